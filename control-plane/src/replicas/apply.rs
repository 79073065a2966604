//! What other replicas tell, taken into our own state; and the form of what they are told.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::{error, warn};

use super::Event;
use crate::app::Announcement;
use crate::app::App;
use crate::ca::ledger;
use crate::clock;
use crate::registry::Saved;

/// Before the key of an instance.
const INSTANCES: &str = "instances/";

/// Before the name of the replica that heard instances.
pub(super) const HEARD: &str = "heard/";

/// Before the name of the replica whose certificates need roots.
pub(super) const LEDGERS: &str = "ledger/";

/// What the leader decided about configs.
pub(super) const ROLLOUT: &str = "rollout";

/// The most instances in one value of [`HEARD`]: well below the 1.5 MiB that etcd takes.
pub(super) const MOST_HEARD: usize = 5000;

#[derive(Serialize, Deserialize)]
struct Instance {
    by: String,
    instance: Saved,
}

/// The key of an instance of a service (`namespace/name`).
pub(super) fn instance_key(service: &str, id: &str) -> String {
    format!("{INSTANCES}{service}/{id}")
}

/// Service and id of the key of an instance.
fn instance_of(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(INSTANCES)?.rsplit_once('/')
}

/// An instance as `by` was told of it.
pub(super) fn instance_value(by: &str, saved: &Saved) -> Vec<u8> {
    to_json(&Instance {
        by: by.to_owned(),
        instance: saved.clone(),
    })
}

/// What is told is made of texts and numbers, which are always JSON.
pub(super) fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// Takes in what the store tells; what cannot be read is passed over.
pub(super) async fn apply(app: &Arc<App>, me: &str, event: Event) {
    match event {
        Event::Whole(values) => {
            let instances = values.iter().filter(|(key, _)| instance_of(key).is_some());
            let instances = instances.filter_map(|(key, value)| read::<Instance>(key, value));
            let instances: Vec<Saved> = instances.map(|i| i.instance).collect();
            let now = clock::monotonic();
            app.change_registry(|registry| ((), registry.reconcile(instances, now)));
            for (key, value) in values {
                if instance_of(&key).is_none() {
                    put(app, me, &key, &value).await;
                }
            }
        }
        Event::Put(key, value) => put(app, me, &key, &value).await,
        Event::Delete(key) => {
            if let Some((service, id)) = instance_of(&key) {
                let key = (service.to_owned(), id.to_owned());
                app.change_registry(|registry| {
                    (
                        (),
                        !registry.is_marked(&key) && registry.forget(service, id),
                    )
                });
            }
        }
        Event::Led { .. } | Event::Vacant => {}
    }
}

async fn put(app: &Arc<App>, me: &str, key: &str, value: &[u8]) {
    let now = clock::monotonic();
    if instance_of(key).is_some() {
        let Some(Instance { by, instance }) = read(key, value) else {
            return;
        };
        app.change_registry(|registry| {
            // What we were told since is newer. Our own word counts where another's came between.
            let stale = registry.is_untold(&instance) || by == me && registry.says(&instance);
            ((), !stale && registry.replicate(instance, now))
        });
    } else if let Some(by) = key.strip_prefix(HEARD) {
        let heard: Vec<(String, String)> = match by == me {
            true => return,
            false => read(key, value).unwrap_or_default(),
        };
        app.change_registry(|registry| ((), registry.heard_elsewhere(&heard, now)));
    } else if let Some(by) = key.strip_prefix(LEDGERS) {
        let ledger: Option<ledger::Saved> = read(key, value).filter(|_| by != me);
        if let (Some(authority), Some(ledger)) = (app.guard.authority(), ledger) {
            authority.learn(&ledger, app.guard.state_dir());
        }
    } else if key == ROLLOUT {
        let Some(decision) = read::<Announcement>(key, value) else {
            return;
        };
        if decision.by == me {
            return;
        }
        let app = Arc::clone(app);
        let work = tokio::task::spawn_blocking(move || app.heed(decision));
        if let Err(e) = work.await {
            error!(error = %e, "what the leader decided was not taken up");
        }
    }
}

fn read<T: for<'a> Deserialize<'a>>(key: &str, value: &[u8]) -> Option<T> {
    match serde_json::from_slice(value) {
        Ok(read) => Some(read),
        Err(e) => {
            warn!(key, error = %e, "another replica says what cannot be read");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_an_instance_tells_service_and_id() {
        let key = instance_key("shop/reports", "10.0.0.1-80");
        assert_eq!(instance_of(&key), Some(("shop/reports", "10.0.0.1-80")));
        assert_eq!(instance_of("heard/a"), None);
    }
}
