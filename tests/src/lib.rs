//! The harness of the whole-mesh tests.
//!
//! [`mesh`] runs real sidecars and a real control plane within the test's process, on ports of the
//! system's choice and with their state in a temporary directory. [`upstream`] plays the services
//! behind them by script, [`client`] the applications in front of them, and [`metrics`] reads what
//! an operator would. [`raw`] and [`frames`] are both sides below HTTP, byte by byte; [`relay`] is a link
//! that can go dead. Nothing here sleeps for a fixed time: [`until`] waits for a condition.

pub mod client;
pub mod frames;
pub mod mesh;
pub mod metrics;
pub mod netns;
pub mod pki;
pub mod process;
pub mod raw;
pub mod relay;
pub mod upstream;

use std::time::Duration;

/// Longer than anything takes; a test that waits this long has failed.
pub const SOON: Duration = Duration::from_secs(15);

/// Asks again until `found` has something to say.
///
/// # Panics
/// When it has not within [`SOON`]; `what` says what was awaited.
pub async fn until<T, F>(what: &str, mut found: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let asking = async {
        loop {
            if let Some(value) = found().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    match tokio::time::timeout(SOON, asking).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain: {what}"),
    }
}

/// Waits until `holds`.
///
/// # Panics
/// When it does not within [`SOON`].
pub async fn until_true(what: &str, mut holds: impl FnMut() -> bool) {
    until(what, || {
        let held = holds().then_some(());
        async move { held }
    })
    .await;
}
