//! Defaults are those of the product, and each value says where it comes from.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use outrigger_config::effective::{Origin, connect_timeout, queue};
use outrigger_config::model::{AsyncWhen, QueueSpec, Secrets};
use outrigger_config::units::{ByteSize, CodeOrClass, Dur, Percent};
use outrigger_config::{MeshConfig, NamespacedName, Source, load};

const TEXT: &str = "
{apiVersion: outrigger.dev/v1alpha1, kind: Mesh, metadata: {name: default}, spec: {defaults: {timeouts: {idle: 1m, connect: 3s}, retry: {backoff: 7ms}, limits: {maxInFlight: 9}}}}
---
{apiVersion: outrigger.dev/v1alpha1, kind: MeshService, metadata: {name: orders, namespace: shop}, spec: {discovery: {heartbeat: {}}, limits: {maxPending: 1}}}
---
{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: orders, namespace: shop}, spec: {parentRefs: [{group: '', kind: Service, name: orders}], rules: [
  {name: one, timeouts: {request: 2s}, backendRefs: [{name: orders}]}, {matches: [{method: GET}], backendRefs: [{name: orders}]}]}}
---
{apiVersion: outrigger.dev/v1alpha1, kind: RoutePolicy, metadata: {name: all, namespace: shop}, spec: {targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: orders}],
  timeouts: {request: 9s, perTry: 1s}, retry: {attempts: 4}, async: {when: Preferred, delivery: {attempts: 3}}}}
---
{apiVersion: outrigger.dev/v1alpha1, kind: RoutePolicy, metadata: {name: one, namespace: shop}, spec: {targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: orders, sectionName: one}],
  retry: {attempts: 0}}}
";

fn config(text: &str) -> MeshConfig {
    let loaded = load(&[Source::new("it.yaml", text)]);
    loaded
        .mesh
        .unwrap_or_else(|| panic!("{}", loaded.report.render_text()))
}

#[test]
fn the_most_specific_value_wins_field_by_field() {
    let config = config(TEXT);
    let orders = NamespacedName::new("shop", "orders");
    let rules = config.rules_for_service(&orders);
    assert_eq!(rules[0].route_name(), "shop/orders/one");
    assert_eq!(rules[1].route_name(), "shop/orders/rule-1");
    let policy = |name| Origin::RoutePolicy(NamespacedName::new("shop", name));

    let one = config.rule_policy(rules[0]);
    let two = config.rule_policy(rules[1]);
    assert_eq!(one.timeouts.request.value, Some(Duration::from_secs(2)));
    assert_eq!(one.timeouts.request.origin, Origin::Rule);
    assert_eq!(two.timeouts.request.origin, policy("all"));
    assert_eq!(one.timeouts.per_try.origin, policy("all"));
    assert_eq!(
        (*one.retry.attempts, one.retry.attempts.origin.clone()),
        (0, policy("one"))
    );
    assert_eq!(
        (*two.retry.attempts, two.retry.attempts.origin.clone()),
        (4, policy("all"))
    );
    assert_eq!(one.timeouts.idle.value, Some(Duration::from_secs(60)));
    assert_eq!(one.retry.backoff.origin, Origin::MeshDefaults);
    assert_eq!(one.retry.max_backoff.origin, Origin::BuiltIn);
    assert_eq!(*one.async_.when, AsyncWhen::Preferred);
    assert_eq!(*one.async_.delivery.attempts, 3);

    let service = config.service_policy(&config.services[&orders]);
    assert_eq!(
        (
            *service.limits.max_in_flight,
            service.limits.max_in_flight.origin.clone()
        ),
        (9, Origin::MeshDefaults)
    );
    assert_eq!(service.limits.max_pending.origin, Origin::Service);
    assert_eq!(
        connect_timeout(&one, &service).value,
        Some(Duration::from_secs(3))
    );
}

#[test]
fn built_in_defaults_are_those_of_the_product() {
    let config = MeshConfig::default();
    let rule = config.default_rule_policy();
    let secs = |n| Some(Duration::from_secs(n));
    assert_eq!(rule.timeouts.connect.value, secs(1));
    assert_eq!(rule.timeouts.request.value, secs(15));
    assert_eq!(rule.timeouts.idle.value, secs(300));
    assert_eq!(
        (rule.timeouts.per_try.value, rule.timeouts.stream.value),
        (None, None)
    );
    assert_eq!((*rule.retry.attempts, *rule.retry.max_body), (1, 64 << 10));
    assert_eq!(
        (
            *rule.retry.budget_percent,
            *rule.retry.budget_min_per_second
        ),
        (20, 3)
    );
    assert_eq!(
        (*rule.async_.when, *rule.async_.secrets),
        (AsyncWhen::Never, Secrets::Reject)
    );
    assert_eq!(
        (
            *rule.async_.delivery.attempts,
            *rule.async_.delivery.max_in_flight
        ),
        (8, 32)
    );
    assert_eq!(rule.async_.delivery.max_age.value, secs(72 * 3600));
    assert!(rule.async_.is_permanent(404) && rule.async_.is_permanent(302));
    assert!(!rule.async_.is_permanent(429) && !rule.async_.is_permanent(503));
    let service = config.service_policy(&Default::default());
    assert_eq!(
        (*service.limits.max_in_flight, *service.limits.max_pending),
        (20_000, 1024)
    );
    assert_eq!(
        (
            *service.breaker.failure_percent,
            *service.breaker.min_requests
        ),
        (50, 20)
    );
    assert_eq!(service.connection.max_age.value, secs(1800));
    assert_eq!(*service.ejection.max_percent, 50);
    let queue = queue(&QueueSpec::default());
    assert_eq!(
        (queue.max_depth, queue.max_bytes, queue.retain_dead),
        (1_000_000, 1 << 30, secs(336 * 3600))
    );
    assert!(queue.backend.embedded.is_some());
}

#[test]
fn names_by_which_a_service_is_called() {
    let service = |ns: &str, name: &str, spec: &str| {
        format!(
            "---\n{{apiVersion: outrigger.dev/v1alpha1, kind: MeshService, metadata: {{name: {name}, namespace: {ns}}}, spec: {{discovery: {{heartbeat: {{}}}}{spec}}}}}\n"
        )
    };
    let config = config(
        &[
            service("a", "web", ""),
            service("b", "web", ""),
            service("b", "db", ""),
            service("a", "x", ", hostnames: [Y]"),
        ]
        .concat(),
    );
    let index = config.host_index("b");
    let owner = |host: &str| index.get(host).map(ToString::to_string);
    assert_eq!(owner("web").as_deref(), Some("b/web"));
    assert_eq!(owner("web.a").as_deref(), Some("a/web"));
    assert_eq!(owner("web.a.svc.cluster.local").as_deref(), Some("a/web"));
    assert_eq!(owner("y").as_deref(), Some("a/x"));
    assert_eq!(owner("x"), None);
    assert_eq!(config.host_index("c").get("web"), None);
    assert_eq!(config.host_index("c")["db"].to_string(), "b/db");
}

#[test]
fn scalars() {
    for (text, standard) in [
        ("90s", "1m30s"),
        ("0s", "0s"),
        ("0h", "0s"),
        ("1500ms", "1s500ms"),
        ("99999h", "99999h"),
        ("1h1m1s1ms", "1h1m1s1ms"),
    ] {
        assert_eq!(text.parse::<Dur>().unwrap().to_string(), standard);
    }
    for text in [
        "",
        "1",
        "1.5s",
        "s",
        "123456s",
        "1s1s1s1s1s",
        "-1s",
        "1 s",
        "1d",
        "1é",
    ] {
        assert!(text.parse::<Dur>().is_err(), "{text}");
    }
    for (text, bytes, standard) in [
        ("64KiB", 65_536, "64KiB"),
        ("12", 12, "12B"),
        ("1024B", 1024, "1KiB"),
        ("0", 0, "0B"),
    ] {
        let size: ByteSize = text.parse().unwrap();
        assert_eq!((size.0, size.to_string().as_str()), (bytes, standard));
    }
    for text in ["", "1KB", "1234567890", "KiB", "1 KiB", "1é"] {
        assert!(text.parse::<ByteSize>().is_err(), "{text}");
    }
    assert!("5xx".parse::<CodeOrClass>().unwrap().matches(503));
    assert!(!"503".parse::<CodeOrClass>().unwrap().matches(502));
    assert!("6xx".parse::<CodeOrClass>().is_err() && "5XX".parse::<CodeOrClass>().is_err());
    assert_eq!(
        serde_json::from_str::<Percent>("100").unwrap(),
        Percent(100)
    );
    assert!(serde_json::from_str::<Percent>("101").is_err());
}
