//! Two replicas with the same inputs push the same bytes, whatever order they came in.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use outrigger_config::{Source, load};
use outrigger_control_plane::registry::{Lease, Registration, Registry, State};
use outrigger_control_plane::render::{PUSH_ORDER, render};
use outrigger_control_plane::world::{Config, Discovered, build};
use prost::Message as _;

const LEASE: Lease = Lease {
    ttl: Duration::from_secs(15),
    remove_after: Duration::from_secs(60),
};

fn documents(rng: &mut Rng) -> Vec<String> {
    let document = |kind: &str, name: &str, spec: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: {kind}\n\
             metadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
        )
    };
    let mut all = Vec::new();
    for n in 0..rng.usize(1..8) {
        let discovery = match rng.usize(..3) {
            0 => "{heartbeat: {}}".to_owned(),
            1 => "{dns: {name: a.example, port: 80}}".to_owned(),
            _ => {
                let ports = 1..=rng.u16(1..6);
                let list: Vec<String> = ports
                    .map(|port| format!("{{address: 10.0.0.1, port: {port}}}"))
                    .collect();
                format!("{{static: [{}]}}", list.join(", "))
            }
        };
        let name = format!("s{n}");
        all.push(document(
            "MeshService",
            &name,
            &format!("{{discovery: {discovery}}}"),
        ));
        if rng.bool() {
            let spec = format!("{{services: [{name}], rules: [{{timeouts: {{request: {n}s}}}}]}}");
            all.push(document("MeshRoute", &name, &spec));
        }
    }
    all
}

fn registrations(rng: &mut Rng) -> Vec<(String, Registration)> {
    let registration = |rng: &mut Rng| Registration {
        id: rng.bool().then(|| format!("i{}", rng.u8(..))),
        address: format!("10.0.1.{}", rng.u8(..)),
        port: rng.u16(1..),
        zone: ["", "a", "b"][rng.usize(..3)].to_owned(),
        weight: rng.u32(..100),
        priority: rng.u32(..3),
        labels: (0..rng.usize(..4))
            .map(|n| (format!("l{n}"), "v".to_owned()))
            .collect(),
        state: [State::Serving, State::Draining][rng.usize(..2)],
    };
    // One of each id: of two that claim one place, the later counts.
    let mut all = BTreeMap::new();
    for _ in 0..rng.usize(..20) {
        let service = format!("shop/s{}", rng.usize(..8));
        let registration = registration(rng);
        let id = registration.id.clone();
        let place = format!("{}-{}", registration.address, registration.port);
        let key = (service.clone(), id.unwrap_or(place));
        all.insert(key, (service, registration));
    }
    all.into_values().collect()
}

/// Everything that a replica would push, after hearing it all in an order of its own.
fn replica(
    rng: &mut Rng,
    documents: &[String],
    registrations: &[(String, Registration)],
    discovered: &Discovered,
) -> Vec<(String, Vec<u8>)> {
    let mut documents = documents.to_vec();
    rng.shuffle(&mut documents);
    let mut files: Vec<Vec<String>> = vec![Vec::new(); rng.usize(1..4)];
    for document in documents {
        let file = rng.usize(..files.len());
        files[file].push(document);
    }
    let mut sources: Vec<Source> = files
        .iter()
        .filter(|documents| !documents.is_empty())
        .map(|documents| Source::new(format!("{}.yaml", rng.u32(..)), documents.join("---\n")))
        .collect();
    rng.shuffle(&mut sources);
    let loaded = load(&sources);
    let mesh = loaded
        .mesh
        .unwrap_or_else(|| panic!("{}", loaded.report.render_text()));
    let mut registry = Registry::default();
    let mut registrations = registrations.to_vec();
    rng.shuffle(&mut registrations);
    for (service, registration) in registrations {
        let now = Duration::from_millis(rng.u64(..1000));
        registry
            .register(&service, registration, LEASE, now)
            .expect("registered");
    }
    let now = Duration::from_secs(1);
    let world = build(&Config::new(&mesh), &registry, discovered, Vec::new(), now);
    let resources = render(&world);
    PUSH_ORDER
        .iter()
        .flat_map(|type_url| {
            let set = resources.of_type(type_url);
            let all = set.resources.values();
            let mut bytes: Vec<_> = all
                .map(|resource| (resource.name.clone(), resource.encode_to_vec()))
                .collect();
            bytes.push((format!("{type_url} {}", set.version), Vec::new()));
            bytes
        })
        .collect()
}

#[test]
fn the_same_inputs_in_any_order_give_the_same_bytes() {
    for seed in 0..200 {
        let mut rng = Rng::with_seed(seed);
        let (documents, registrations) = (documents(&mut rng), registrations(&mut rng));
        let discovered = Discovered::new();
        let [one, two] = [0, 1].map(|_| replica(&mut rng, &documents, &registrations, &discovered));
        assert_eq!(one, two, "seed {seed}");
        // And another input gives other bytes: the comparison can fail.
        let fewer = &documents[..documents.len() - 1];
        if !fewer.is_empty() && !documents[documents.len() - 1].contains("kind: MeshService") {
            let other = replica(&mut rng, fewer, &registrations, &discovered);
            assert_ne!(one, other, "seed {seed}");
        }
    }
}
