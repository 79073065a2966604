//! The wish of the process to end, as every task sees it.

use tokio::sync::watch;

/// Hears of the end.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

/// Says that it is the end.
#[derive(Debug)]
pub struct Stopper(watch::Sender<bool>);

impl Stopper {
    /// Nobody has been told yet.
    pub fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Another one who wants to hear.
    pub fn listener(&self) -> Stop {
        Stop(self.0.subscribe())
    }

    /// Tells everybody.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Default for Stopper {
    fn default() -> Self {
        Self::new()
    }
}

impl Stop {
    /// Waits for the end; at once when it has been told, or when nobody is left to tell.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn requested(&mut self) {
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}
