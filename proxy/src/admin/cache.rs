//! What the caches keep, and how to make them forget it.

use http::StatusCode;
use serde_json::{Value, json};

use crate::app::Shared;
use crate::snapshot::Service;

/// Services with a cache, and how much is kept of each.
pub(super) fn view(shared: &Shared) -> Value {
    let snapshot = shared.store.load();
    let kept = snapshot
        .services
        .iter()
        .filter(|service| has_cache(service));
    kept.map(|service| {
        let (entries, bytes) = service.state.cache.size();
        json!({"service": &*service.name, "entries": entries, "bytes": bytes})
    })
    .collect()
}

/// Forgets what is kept of one service, or of all; `path` names the beginning of its targets.
///
/// # Errors
/// 400 for what is no such request, 404 for a service that is not there.
pub(super) fn purge(shared: &Shared, body: &Value) -> Result<Value, (StatusCode, String)> {
    let text = |key: &str| match &body[key] {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        _ => Err((StatusCode::BAD_REQUEST, format!("{key} is not a string"))),
    };
    let (wanted, path) = (text("service")?, text("path")?);
    let snapshot = shared.store.load();
    let is_wanted = |service: &Service| wanted.as_ref().is_none_or(|name| **name == *service.name);
    let mut services = snapshot.services.iter().filter(|s| is_wanted(s)).peekable();
    if wanted.is_some() && services.peek().is_none() {
        return Err((StatusCode::NOT_FOUND, "no such service".to_owned()));
    }
    let holds = |key: &str| {
        let target = key.split_once(' ').map_or(key, |(_, target)| target);
        path.as_ref()
            .is_none_or(|path| target.starts_with(path.as_str()))
    };
    let purged: usize = services
        .map(|service| service.state.cache.purge(holds))
        .sum();
    Ok(json!({"purged": purged}))
}

/// Sets the gauges just before they are read.
pub(super) fn refresh_metrics(shared: &Shared) {
    for service in &shared.store.load().services {
        if !has_cache(service) {
            continue;
        }
        let (entries, bytes) = service.state.cache.size();
        let labels = [("service", &*service.name)];
        let gauge = |name| shared.metrics.gauge(name, &labels);
        gauge("outrigger_cache_entries").set(entries as f64);
        gauge("outrigger_cache_bytes").set(bytes as f64);
    }
}

fn has_cache(service: &Service) -> bool {
    let features = |features: &crate::snapshot::features::Features| features.cache.is_some();
    let mut routes = service.routes.iter();
    routes.any(|route| route.features.as_deref().is_some_and(features))
}
