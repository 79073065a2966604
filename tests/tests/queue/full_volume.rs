//! A volume that is full: a file system of its own, as root makes one.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use outrigger_tests::mesh::Sidecar;
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::json;
use tempfile::TempDir;

use crate::{accepted, assert_no_drift, mesh, post, progress, store_ready};

const BALLAST: u64 = 8 << 20;

/// An ext4 of 256 MiB on a loop device, mounted until it is dropped.
struct Volume {
    dir: TempDir,
}

fn run(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output();
    let done = done.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        done.status.success(),
        "{program} {args:?}, which needs root: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

impl Volume {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let image = dir.path().join("image");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(256 << 20).expect("its size");
        let image = image.to_str().expect("UTF-8");
        run("mkfs.ext4", &["-q", "-F", image]);
        let volume = Self { dir };
        std::fs::create_dir(volume.path()).expect("a mount point");
        let mount = volume.path();
        run(
            "mount",
            &["-o", "loop", image, mount.to_str().expect("UTF-8")],
        );
        volume
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("volume")
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// Writes a file until there is no room for a byte more.
fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).expect("a file");
    for size in [1 << 20, 4096, 1] {
        while file
            .write_all(&vec![7; size])
            .and_then(|()| file.sync_data())
            .is_ok()
        {}
    }
}

async fn gauge(sidecar: &Sidecar, name: &str) -> f64 {
    sidecar.metrics().await.sum(name, &[])
}

#[tokio::test]
async fn a_full_volume_refuses_drains_and_takes_again() {
    let volume = Volume::new();
    let mut upstream = Upstream::h1(|_| Reply::ok("")).await;
    let rule = "when: Always, \
                delivery: {backoff: 20ms, maxBackoff: 50ms, attempts: 100000, maxInFlight: 4}";
    let calm = "breaker: {consecutiveFailures: 0}";
    let sidecar = Sidecar::named("web-1")
        .mesh(mesh(&upstream, rule, calm))
        .set("stateDir", json!(volume.path().join("state")))
        .set(
            "queueStore",
            json!({"headroom": "150MiB", "ballast": "8MiB"}),
        )
        .start()
        .await;
    store_ready(&sidecar).await;
    let ballast = "outrigger_queue_store_ballast_bytes";
    assert_eq!(gauge(&sidecar, ballast).await, BALLAST as f64);

    upstream.stop().await;
    let large = "x".repeat(500_000);
    let mut taken = 0;
    let refused = loop {
        let answer = sidecar.call(post(&large)).await;
        if answer.status != 202 {
            break answer;
        }
        taken += 1;
        assert!(taken < 500, "the volume is not that large");
    };
    refused.assert_error(503, "queue_unavailable");
    let detail = refused.text();
    assert!(detail.contains("queueStore.headroom"), "{detail}");
    assert!(taken > 20, "{taken} taken");

    // Others fill what was left, to the last byte; deliveries go on all the same.
    let filler = volume.path().join("filler");
    fill(&filler);
    upstream.start_again().await;
    progress("delivered", taken, || upstream.hits()).await;
    until("all are settled on disk", || async {
        let metrics = sidecar.metrics().await;
        let depth = metrics.sum("outrigger_queue_depth", &[]);
        (depth == 0.0).then_some(())
    })
    .await;
    assert_no_drift(&sidecar.metrics().await);
    let refused = sidecar.call(post("x")).await;
    refused.assert_error(503, "queue_unavailable");

    std::fs::remove_file(&filler).expect("removed");
    until("it takes messages again", || async {
        (sidecar.call(post("x")).await.status == 202).then_some(())
    })
    .await;
    until("the ballast is back", || async {
        accepted(&sidecar, post("x")).await;
        (gauge(&sidecar, ballast).await == BALLAST as f64).then_some(())
    })
    .await;
}
