//! Our three programs, started as a user starts them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::http::{self, Answer};
use super::{PATIENCE, Process, binary, wait_until};

/// One of our programs, ready for arguments.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(binary(name));
    // What the developer's shell sets must not decide what a test sees.
    for variable in ["RUST_LOG", "OUTRIGGER_LOG"] {
        command.env_remove(variable);
    }
    command
}

/// The files of one sidecar. They stay when it is killed, for the next one.
#[derive(Debug, Clone)]
pub struct SidecarFiles {
    /// Its bootstrap config.
    pub config: PathBuf,
    /// Its mesh config, when it has one of its own.
    pub mesh: PathBuf,
    /// Its state directory.
    pub state: PathBuf,
}

impl SidecarFiles {
    /// Writes a bootstrap config for workload `name` of service `name` with all listeners on free
    /// ports. `source` is `None` for a mesh file of its own, else the discovery address of the
    /// control plane; `more` is further top-level YAML, such as `app: …`.
    ///
    /// # Panics
    /// When the disk refuses.
    pub fn write(dir: &Path, name: &str, source: Option<SocketAddr>, more: &str) -> Self {
        let files = Self {
            config: dir.join(format!("{name}.yaml")),
            mesh: dir.join(format!("{name}-mesh.yaml")),
            state: dir.join(format!("{name}-state")),
        };
        let source = match source {
            None => format!("mesh: {name}-mesh.yaml"),
            Some(discovery) => format!("controlPlane: {{address: \"http://{discovery}\"}}"),
        };
        let config = format!(
            "workload: {{name: {name}-1, service: {name}}}\n\
             listen: {{outbound: \"127.0.0.1:0\", inbound: \"127.0.0.1:0\", admin: \"127.0.0.1:0\"}}\n\
             {source}\nstateDir: {name}-state\n{more}\n"
        );
        std::fs::write(&files.config, config).expect("the scratch directory is writable");
        files
    }

    /// Puts a mesh config in place as an editor does: whole, by rename.
    ///
    /// # Panics
    /// When the disk refuses.
    pub fn set_mesh(&self, mesh: &str) {
        replace(&self.mesh, mesh);
    }

    /// Starts the sidecar and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start(&self) -> Sidecar {
        let sidecar = self.start_unready();
        wait_until("the sidecar is ready", PATIENCE, || {
            sidecar
                .admin("/readyz")
                .is_some_and(|answer| answer.status == 200)
        });
        sidecar
    }

    /// Starts the sidecar and waits only until it listens.
    ///
    /// # Panics
    /// When it does not.
    pub fn start_unready(&self) -> Sidecar {
        let mut command = command("outrigger-proxy");
        let mut process =
            Process::start("outrigger-proxy", command.arg("--config").arg(&self.config));
        let line = process.line("\"listening\"");
        let addr = |listener| {
            listened(&line, listener).unwrap_or_else(|| panic!("no {listener} address in {line}"))
        };
        let (outbound, inbound, admin) = (addr("outbound"), addr("inbound"), addr("admin"));
        Sidecar {
            process,
            outbound,
            inbound,
            admin,
        }
    }
}

/// A running `outrigger-proxy`.
#[derive(Debug)]
pub struct Sidecar {
    /// The process.
    pub process: Process,
    /// Where its application calls.
    pub outbound: SocketAddr,
    /// Where other sidecars call.
    pub inbound: SocketAddr,
    /// Its admin API.
    pub admin: SocketAddr,
}

impl Sidecar {
    /// A GET on its admin API; none when it does not answer.
    pub fn admin(&self, path: &str) -> Option<Answer> {
        http::get(self.admin, path).ok()
    }

    /// The sum of all series of a metric whose labels contain each of `labels`; none when there is
    /// no such series.
    ///
    /// # Panics
    /// When the metrics cannot be read.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let text = self
            .admin("/metrics")
            .expect("the admin API answers")
            .text();
        let series = text.lines().filter(|line| {
            let named = line
                .strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ']));
            named && labels.iter().all(|label| line.contains(label))
        });
        let values = series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.reduce(|sum, value| sum + value)
    }

    /// The version of the config in force.
    pub fn config_version(&self) -> Option<String> {
        let text = self.admin("/metrics")?.text();
        let line = text
            .lines()
            .find(|line| line.starts_with("outrigger_config_info{") && line.ends_with(" 1"))?;
        Some(
            line.split("version=\"")
                .nth(1)?
                .split('"')
                .next()?
                .to_owned(),
        )
    }
}

/// A running `outrigger-control-plane` and its files.
#[derive(Debug)]
pub struct ControlPlane {
    /// The process.
    pub process: Process,
    /// Where sidecars connect.
    pub discovery: SocketAddr,
    /// Its admin API.
    pub admin: SocketAddr,
    /// The mesh config that it watches.
    pub mesh: PathBuf,
    /// Its bootstrap config.
    pub config: PathBuf,
}

impl ControlPlane {
    /// Starts one in `dir` with this mesh config and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start(dir: &Path, mesh: &str) -> Self {
        Self::start_with(dir, mesh, "")
    }

    /// As [`ControlPlane::start`], with further top-level YAML, such as `replicas: …`.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start_with(dir: &Path, mesh: &str, more: &str) -> Self {
        let path = dir.join("mesh.yaml");
        replace(&path, mesh);
        let config = dir.join("control-plane.yaml");
        let text = format!(
            "listen: {{discovery: \"127.0.0.1:0\", admin: \"127.0.0.1:0\"}}\n\
             config: mesh.yaml\nstateDir: control-state\n{more}\n"
        );
        std::fs::write(&config, text).expect("the scratch directory is writable");
        let mut command = command("outrigger-control-plane");
        let mut process = Process::start(
            "outrigger-control-plane",
            command.arg("--config").arg(&config),
        );
        let line = process.line("control plane started");
        let fields: Value = serde_json::from_str(&line).expect("the log is JSON");
        let addr = |name: &str| -> SocketAddr {
            let text = fields[name].as_str().unwrap_or_default();
            text.parse()
                .unwrap_or_else(|_| panic!("no {name} in {line}"))
        };
        let (discovery, admin) = (addr("discovery_addr"), addr("admin_addr"));
        let control_plane = Self {
            process,
            discovery,
            admin,
            mesh: path,
            config,
        };
        wait_until("the control plane is ready", PATIENCE, || {
            http::get(admin, "/readyz").is_ok_and(|answer| answer.status == 200)
        });
        control_plane
    }

    /// Puts a mesh config in place as an editor does: whole, by rename.
    ///
    /// # Panics
    /// When the disk refuses.
    pub fn set_mesh(&self, mesh: &str) {
        replace(&self.mesh, mesh);
    }

    /// A resource of its API as JSON.
    ///
    /// # Panics
    /// When it does not answer with JSON.
    pub fn api(&self, path: &str) -> Value {
        http::get(self.admin, path)
            .expect("the control plane answers")
            .json()
    }

    /// The version of the config it pushes.
    pub fn config_version(&self) -> String {
        self.api("/v1/config")["version"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).expect("the scratch directory is writable");
    std::fs::rename(&new, path).expect("the scratch directory is writable");
}

/// The first address of a listener in the sidecar's log line, whose `addresses` reads
/// `Addresses { outbound: [127.0.0.1:1], … }`.
fn listened(line: &str, listener: &str) -> Option<SocketAddr> {
    let fields: Value = serde_json::from_str(line).ok()?;
    let addresses = fields["addresses"].as_str()?;
    let list = addresses
        .split(&format!("{listener}: ["))
        .nth(1)?
        .split(']')
        .next()?;
    list.split(',').next()?.trim().parse().ok()
}
