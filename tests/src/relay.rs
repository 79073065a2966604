//! A TCP relay that can stop moving bytes without closing anything: what a dead link looks like.

use std::net::SocketAddr;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Runs until it is dropped.
pub struct Relay {
    /// Where it listens.
    pub addr: SocketAddr,
    /// The generation of the connections that are frozen, and those before it.
    frozen: watch::Sender<u64>,
    _accepting: JoinSet<()>,
}

impl Relay {
    /// Between whoever connects to it and `target`.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("bound");
        let frozen = watch::Sender::new(0);
        let seen = frozen.subscribe();
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut relayed = JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                let mut seen = seen.clone();
                let generation = *seen.borrow() + 1;
                relayed.spawn(async move {
                    let Ok(mut to) = TcpStream::connect(target).await else {
                        return;
                    };
                    let freezing = async {
                        let _ = seen.wait_for(|frozen| *frozen >= generation).await;
                    };
                    tokio::select! {
                        _ = copy_bidirectional(&mut from, &mut to) => return,
                        () = freezing => {}
                    }
                    // Both sockets stay open, and nobody reads them any more.
                    std::future::pending::<()>().await;
                });
            }
        });
        Self {
            addr,
            frozen,
            _accepting: accepting,
        }
    }

    /// Freezes the connections that are open. Later ones are relayed.
    pub fn freeze(&self) {
        self.frozen.send_modify(|generation| *generation += 1);
    }
}
