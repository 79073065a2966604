//! How many durable enqueues a second the embedded store takes with 1, 64 and 1,024 producers:
//! measured on this disk, not gated.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a measurement reads the clock and ends at the first error"
)]

use bytes::Bytes;
use outrigger_core::time::UnixMillis;
use outrigger_queue::*;
use std::sync::Arc;
use std::time::Instant;
#[tokio::main(flavor = "current_thread")]
async fn main() {
    for p in [1u64, 64, 1024] {
        let dir = tempfile::TempDir::new_in("/tmp").unwrap();
        let s = Arc::new(
            EmbeddedStore::open(
                dir.path(),
                Options {
                    allow_ephemeral: true,
                    ..Options::default()
                },
            )
            .unwrap(),
        );
        s.ready().await.unwrap();
        let t = Instant::now();
        let per = if p == 1 {
            1500
        } else if p == 64 {
            400
        } else {
            40
        };
        let hs: Vec<_> = (0..p)
            .map(|i| {
                let s = s.clone();
                tokio::spawn(async move {
                    for n in 0..per {
                        let id = MessageId::from_bytes(
                            ((u128::from(n as u64) << 64) | u128::from(i)).to_be_bytes(),
                        );
                        s.enqueue(
                            Message::new(id, "q", "t", Bytes::from(vec![7u8; 1024]), UnixMillis(1)),
                            QueueLimits::NONE,
                            UnixMillis(1),
                        )
                        .await
                        .unwrap();
                    }
                })
            })
            .collect();
        for h in hs {
            h.await.unwrap();
        }
        let e = t.elapsed();
        let st = s.stats();
        println!(
            "{p} producers: {:.0}/s, {} commits mean {}us",
            (p * per as u64) as f64 / e.as_secs_f64(),
            st.commits,
            st.commit_us / st.commits
        );
        let t = Instant::now();
        let mut n = 0;
        loop {
            let l = s
                .lease(LeaseRequest {
                    queue: "q".into(),
                    max: 64,
                    lease_for_ms: 1000,
                    now: UnixMillis(1),
                    limits: TargetLimits::default(),
                })
                .await
                .unwrap()
                .leases;
            if l.is_empty() {
                break;
            }
            for l in l {
                n += 1;
                s.settle(
                    l.id,
                    Settle::Done {
                        result: None,
                        attempt: Default::default(),
                    },
                    UnixMillis(2),
                )
                .await
                .unwrap();
            }
        }
        println!(
            "   drained {n}: {:.0}/s",
            n as f64 / t.elapsed().as_secs_f64()
        );
        s.close().await;
    }
}
