//! Every broken config is refused whole, with file, line, column and code, and what was pushed
//! before goes on.

mod common;

use common::*;
use outrigger_config::wire::DOCUMENT_TYPE;
use serde_json::Value;

fn document(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: {kind}\n\
         metadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

fn rule(rules: &str) -> String {
    let spec = format!("\n  services: [orders]\n  rules: {rules}");
    document("MeshRoute", "orders", &spec).replace("spec: \n", "spec:\n")
}

fn orders(version: &str, name: &str) -> String {
    let spec = "{discovery: {static: [{address: 127.0.0.1, port: 9001}]}}";
    document("MeshService", name, spec).replace("v1alpha1", version)
}

/// What is wrong, where and how it is told, and the file.
fn broken() -> Vec<(&'static str, &'static str, String)> {
    vec![
        ("an unknown key", "6:23 E103", rule(r#"[{timeouts: {perTri: 1s}}]"#)),
        ("a wrong type", "6:30 E109", rule(r#"[{retry: {attempts: many}}]"#)),
        ("a number for a duration", "4:27 E106", document("MeshService", "a", "{breaker: {openFor: 10}}")),
        ("an unknown word", "6:26 E104", rule(r#"[{async: {when: always}}]"#)),
        ("half a file", "3:11 E001", "apiVersion: outrigger.dev/v1alpha1\nkind: MeshRoute\nmetadata: {name: orders, namesp".to_owned()),
        ("no YAML", "1:1 E001", "{]\n".to_owned()),
        ("a tab", "4:2 E001", "apiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata:\n\tname: a\n".to_owned()),
        ("a duplicate key", "4:33 E003", document("MeshService", "a", "{limits: {maxInFlight: 1, maxInFlight: 2}}")),
        ("a duplicate document", "3:18 E204", orders("v1alpha1", "orders")),
        ("an unknown kind", "2:7 E102", document("MeshRouter", "a", "{}")),
        ("an unknown version", "1:13 E101", orders("v9", "b")),
        ("no kind", "1:1 E107", "apiVersion: outrigger.dev/v1alpha1\nmetadata: {name: a}\nspec: {}\n".to_owned()),
        ("no name", "3:1 E107", "apiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {namespace: shop}\nspec: {}\n".to_owned()),
        ("a bad name", "3:18 E106", document("MeshService", "Ord_ers", "{}")),
        ("an unknown service", "6:33 E201", rule(r#"[{backends: [{service: nowhere}]}]"#)),
        ("a route for nobody", "4:19 E201", document("MeshRoute", "r", "{services: [nowhere], rules: [{}]}")),
        ("a bad regex", "6:62 E303", rule(r#"[{matches: [{path: {type: RegularExpression, value: '/(a'}}]}]"#)),
        ("weights that are all zero", "6:12 E301", rule(r#"[{backends: [{service: orders, weight: 0}]}]"#)),
        ("a cycle of fallbacks", "6:38 E304", rule(r#"[{onUnavailable: [{service: orders}]}]"#)),
        ("a port out of range", "4:23 E106", document("MeshService", "a", "{ports: [{port: 70000}]}")),
        ("a percentage out of range", "4:31 E106", document("MeshService", "a", "{ejection: {maxPercent: 101}}")),
        ("two discoveries", "4:32 E105", document("MeshService", "a", "{discovery: {static: [], heartbeat: {}}}")),
        ("an endpoint twice", "4:59 E320", document("MeshService", "a", "{discovery: {static: [{address: 10.0.0.1, port: 1}, {address: 10.0.0.1, port: 1}]}}")),
        ("an address that is none", "4:39 E106", document("MeshService", "a", "{discovery: {static: [{address: somewhere, port: 1}]}}")),
        ("a DNS name without a port", "4:20 E107", document("MeshService", "a", "{discovery: {dns: {name: a.example}}}")),
        ("times the wrong way round", "4:27 E308", document("MeshService", "a", "{breaker: {openFor: 5m, maxOpenFor: 1m}}")),
        ("an unknown queue", "6:41 E202", rule(r#"[{async: {when: Always, queue: nowhere}}]"#)),
        ("a second Mesh", "8:18 E207", "apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {name: one}\nspec: {}\n---\napiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {name: two}\nspec: {}\n".to_owned()),
        ("an alias bomb", "5:23 E002", "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n".to_owned()),
        ("10 MiB", "1:1 E002", format!("# {}\n", "x".repeat(10 << 20))),
        ("a list for a document", "1:1 E109", "- a\n- b\n".to_owned()),
        ("a policy for nobody", "4:79 E203", document("RoutePolicy", "p", "{targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: nowhere}], timeouts: {request: 1s}}")),
        ("a negative weight", "6:49 E108", rule(r#"[{backends: [{service: orders, weight: -1}]}]"#)),
    ]
}

#[tokio::test]
async fn broken_configs_are_refused_whole_and_the_old_one_goes_on() {
    let plane = Plane::start().await;
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    let (_, first) = client.sync().await;
    let version = first.system_version_info;
    let all = broken();
    assert!(all.len() >= 30, "{}", all.len());
    let mut wrong = Vec::new();
    for (what, expected, text) in &all {
        plane.write("new.yaml", text);
        // Told with its place: the repair of the one before has cleared what it was told.
        let config = plane
            .get_until("/v1/config", |view| !view["rejected"].is_null())
            .await;
        let problems = config["rejected"]["problems"].as_array().expect("a list");
        let told = |problem: &Value| {
            let file = problem["file"].as_str().expect("a text");
            let file = file.rsplit('/').next().unwrap_or(file);
            let code = problem["code"].as_str().expect("a text");
            format!("{file}:{}:{} {code}", problem["line"], problem["column"])
        };
        let errors = problems.iter().filter(|p| p["severity"] == "error");
        let told: Vec<String> = errors.map(told).collect();
        if !told.contains(&format!("new.yaml:{expected}")) {
            wrong.push(format!("{what}: not {expected} but {told:?}"));
        }
        assert_eq!(config["version"], version.as_str(), "{what}");
        plane.remove("new.yaml");
        plane
            .get_until("/v1/config", |view| view["rejected"].is_null())
            .await;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Nothing of all that was pushed: the next push is the first good edit.
    plane.write("route.yaml", ROUTE);
    let push = client.next().await;
    assert_eq!(push.type_url, DOCUMENT_TYPE);
    assert_eq!(names(&push), ["MeshRoute/shop/orders"]);
    let (_, metrics) = plane.request("GET", "/metrics", "").await;
    let pushes = |kind: &str, count: u32| {
        let line = format!("outrigger_control_plane_pushes_total{{type=\"{kind}\"}} {count}\n");
        assert!(metrics.contains(&line), "{metrics}");
    };
    pushes("document", 2);
    pushes("endpoints", 1);
}
