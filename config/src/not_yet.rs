//! Keys that are read and checked, but whose behaviour comes later.
//!
//! Owns one table a subject. Whoever brings a key into effect removes its line.

use crate::document::Kind;
use crate::tree::{Node, Value};

/// Paths under a rule, for MeshRoute's rules, RoutePolicy and, where they exist, the Mesh's defaults.
/// `=Word` ends a path whose value matters.
const OF_A_RULE: &[&str] = &[];

/// Paths under a service, and under the Mesh's defaults.
const OF_A_SERVICE: &[&str] = &["discovery.kubernetes"];

const OF_A_QUEUE: &[&str] = &[
    "backend.kafka",
    "backend.rabbitmq",
    "backend.nats",
    "backend.amqp1",
    "backend.mqtt",
    "backend.redis",
];

/// Paths under a Gateway API rule.
const OF_A_GATEWAY_RULE: &[&str] = &[];

/// Keys of a sidecar's bootstrap file.
pub(crate) const OF_A_PROXY: &[&str] = &["tracing"];

/// Keys of the control plane's bootstrap file.
pub(crate) const OF_A_CONTROL_PLANE: &[&str] = &["kubernetes"];

/// The paths of a document that are set and not yet in effect.
pub(crate) fn paths(kind: Kind, root: &Node) -> Vec<String> {
    let tables: &[(&str, &[&str])] = match kind {
        Kind::Mesh => &[
            ("spec.defaults", OF_A_RULE),
            ("spec.defaults", OF_A_SERVICE),
        ],
        Kind::MeshService => &[("spec", OF_A_SERVICE)],
        Kind::MeshRoute => &[("spec.rules[*]", OF_A_RULE)],
        Kind::RoutePolicy => &[("spec", OF_A_RULE)],
        Kind::HTTPRoute | Kind::GRPCRoute => &[("spec.rules[*]", OF_A_GATEWAY_RULE)],
        Kind::Queue => &[("spec", OF_A_QUEUE)],
        Kind::AuthorizationPolicy => &[],
    };
    tables
        .iter()
        .flat_map(|(base, table)| under(base, table, root))
        .collect()
}

/// The paths of a table that are set in `root`.
pub(crate) fn among(table: &[&str], root: &Node) -> Vec<String> {
    under("", table, root)
}

fn under(base: &str, table: &[&str], root: &Node) -> Vec<String> {
    let mut found = Vec::new();
    for pattern in table {
        let (pattern, word) = match pattern.split_once('=') {
            Some((pattern, word)) => (pattern, Some(word)),
            None => (*pattern, None),
        };
        let steps = base
            .split('.')
            .chain(pattern.split('.'))
            .filter(|step| !step.is_empty());
        let steps: Vec<&str> = steps.collect();
        search(root, &steps, word, &mut String::new(), &mut found);
    }
    found
}

fn search(
    node: &Node,
    steps: &[&str],
    word: Option<&str>,
    path: &mut String,
    found: &mut Vec<String>,
) {
    let Some((step, rest)) = steps.split_first() else {
        let empty = matches!(&node.value, Value::List(items) if items.is_empty());
        if !empty && word.is_none_or(|word| node.text() == Some(word)) {
            found.push(path.clone());
        }
        return;
    };
    let length = path.len();
    let (key, each) = match step.strip_suffix("[*]") {
        Some(key) => (key, true),
        None => (*step, false),
    };
    if let Some(member) = node.get(key) {
        if length > 0 {
            path.push('.');
        }
        path.push_str(key);
        match &member.value {
            Value::List(items) if each => {
                for (n, item) in items.iter().enumerate() {
                    let length = path.len();
                    path.push_str(&format!("[{n}]"));
                    search(item, rest, word, path, found);
                    path.truncate(length);
                }
            }
            _ => search(member, rest, word, path, found),
        }
        path.truncate(length);
    }
}
