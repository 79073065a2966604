//! `--wait`: until every connected sidecar runs what the files say, or until it is known that some
//! will not.

use std::time::Duration;

use clap::Args;
use http::{Method, StatusCode};
use outrigger_config::units::Dur;
use serde_json::Value;

use crate::client::Client;
use crate::clock;
use crate::output::{Failure, cell};

/// How often the control plane is asked.
const EVERY: Duration = Duration::from_millis(250);

/// Whether to wait, and how long.
#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// Wait until every connected sidecar runs the config of the files; status 1 when one is
    /// refused, taken back, or not everywhere in time
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "2m", requires = "wait")]
    timeout: Dur,
}

/// How far it is.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Done,
    Underway(String),
    Failed(String),
}

impl Wait {
    /// Waits if that is wanted.
    pub(crate) async fn wait(&self, client: &Client) -> Result<(), Failure> {
        if !self.wait {
            return Ok(());
        }
        // What was saved a moment ago counts; the watch may not have seen it yet.
        let reload = client.ask(Method::POST, "/v1/config/reload", None).await?;
        if !reload.status.is_success() && reload.status != StatusCode::FORBIDDEN {
            let detail = cell(&reload.json()["detail"]);
            return Err(Failure::errors(format!(
                "the files were not read: {detail}"
            )));
        }
        let began = clock::now();
        loop {
            let config = client.get("/v1/config").await?;
            let rollouts = client.get("/v1/rollouts").await?;
            match standing(&config, &rollouts) {
                Standing::Done => return Ok(()),
                Standing::Failed(why) => return Err(Failure::errors(why)),
                Standing::Underway(how) if began.elapsed() >= self.timeout.0 => {
                    let waited = clock::short(self.timeout.0);
                    return Err(Failure::errors(format!("not done after {waited}: {how}")));
                }
                Standing::Underway(_) => tokio::time::sleep(EVERY).await,
            }
        }
    }
}

fn standing(config: &Value, rollouts: &Value) -> Standing {
    if let Some(summary) = config["rejected"]["summary"].as_str() {
        return Standing::Failed(format!(
            "the config of the files is not in force: {summary}"
        ));
    }
    let stopped = &rollouts["stopped"];
    if !stopped.is_null() {
        return Standing::Failed(format!(
            "config {} was taken back: {} {}",
            cell(&stopped["version"]),
            cell(&stopped["sidecar"]),
            cell(&stopped["reason"])
        ));
    }
    let proxies = &rollouts["proxies"];
    let version = cell(&rollouts["version"]);
    if rollouts["version"].is_null() {
        return Standing::Underway("there is no config".to_owned());
    }
    if proxies["refused"] != 0 {
        let refused = cell(&proxies["refused"]);
        return Standing::Failed(format!("{refused} sidecar(s) refused config {version}"));
    }
    let trial = &rollouts["onTrial"];
    if !trial.is_null() {
        return Standing::Underway(format!("config {} is on trial", cell(&trial["version"])));
    }
    let (synced, connected) = (cell(&proxies["synced"]), cell(&proxies["connected"]));
    match synced == connected {
        true => Standing::Done,
        false => Standing::Underway(format!("{synced} of {connected} sidecars run {version}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn it_is_done_when_all_run_it_and_failed_when_one_will_not() {
        let rollouts = |synced: u32, refused: u32| {
            json!({
                "version": "b", "onTrial": null, "stopped": null,
                "proxies": {"connected": 3, "synced": synced, "refused": refused},
            })
        };
        let good = json!({"rejected": null});
        assert_eq!(standing(&good, &rollouts(3, 0)), Standing::Done);
        let check_failed = |config: &Value, rollouts: &Value, says: &str| {
            let standing = standing(config, rollouts);
            assert!(
                matches!(&standing, Standing::Failed(why) if why.contains(says)),
                "{standing:?}"
            );
        };
        let check_underway = |rollouts: &Value, says: &str| {
            let standing = standing(&good, rollouts);
            assert!(
                matches!(&standing, Standing::Underway(how) if how.contains(says)),
                "{standing:?}"
            );
        };
        check_underway(&rollouts(2, 0), "2 of 3");
        check_failed(&good, &rollouts(2, 1), "1 sidecar(s) refused config b");
        let rejected = json!({"rejected": {"summary": "2 error(s)"}});
        check_failed(&rejected, &rollouts(3, 0), "2 error(s)");
        let mut trial = rollouts(3, 0);
        trial["onTrial"] = json!({"version": "c"});
        check_underway(&trial, "c is on trial");
        let mut stopped = rollouts(3, 0);
        stopped["stopped"] = json!({"version": "c", "sidecar": "shop/web-1", "reason": "no"});
        check_failed(&good, &stopped, "shop/web-1 no");
        check_underway(&json!({"version": null}), "no config");
    }
}
