//! Where the demo plays: a directory, free ports, and the config files of its processes.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use outrigger_control_plane::ca::make;
use rustix::fs::statfs;
use tempfile::TempDir;

use crate::clock;

/// The trust domain of the demo's mesh.
pub(super) const TRUST_DOMAIN: &str = "shop.demo";

/// `statfs` types of volumes that do not outlive a reboot or a container (statfs(2)).
const EPHEMERAL: [u64; 2] = [0x0102_1994, 0x794c_7630];

/// The addresses of one sidecar and its application.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) outbound: SocketAddr,
    pub(super) inbound: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) app: SocketAddr,
}

/// The directory and every address.
#[derive(Debug)]
pub(super) struct Stage {
    dir: TempDir,
    ephemeral: bool,
    pub(super) discovery: SocketAddr,
    pub(super) control: SocketAddr,
    pub(super) web: Place,
    pub(super) orders: Place,
    pub(super) mailer: Place,
}

impl Stage {
    /// Makes the directory, chooses ports and writes every file.
    pub(super) fn set() -> io::Result<Self> {
        let dir = directory()?;
        let kind = statfs(dir.path())
            .map(|stat| stat.f_type as u64)
            .unwrap_or_default();
        // All at once, so that no port is given out twice.
        let listeners: Vec<TcpListener> = (0..14)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<_, _>>()?;
        let ports: Vec<SocketAddr> = listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()?;
        let place = |at: usize| Place {
            outbound: ports[at],
            inbound: ports[at + 1],
            admin: ports[at + 2],
            app: ports[at + 3],
        };
        let stage = Self {
            ephemeral: EPHEMERAL.contains(&kind),
            discovery: ports[0],
            control: ports[1],
            web: place(2),
            orders: place(6),
            mailer: place(10),
            dir,
        };
        stage.write_files()?;
        Ok(stage)
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Leaves the directory where it is.
    pub(super) fn keep(&mut self) -> PathBuf {
        self.dir.disable_cleanup(true);
        self.dir.path().to_owned()
    }

    /// The mesh config, as edited by a person.
    pub(super) fn mesh_file(&self) -> PathBuf {
        self.dir().join("mesh").join("shop.yaml")
    }

    /// Replaces the mesh config as editors do: never half a file.
    pub(super) fn edit(&self, text: &str) -> Result<(), String> {
        let new = self.dir().join("edited.tmp");
        let done =
            std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, self.mesh_file()));
        done.map_err(|error| format!("{}: {error}", self.mesh_file().display()))
    }

    /// The path of a bootstrap file.
    pub(super) fn bootstrap(&self, name: &str) -> String {
        self.dir()
            .join(format!("{name}.yaml"))
            .display()
            .to_string()
    }

    fn write_files(&self) -> io::Result<()> {
        std::fs::create_dir(self.dir().join("mesh"))?;
        std::fs::write(self.mesh_file(), self.mesh())?;
        let control = format!(
            "listen: {{discovery: \"{}\", admin: \"{}\"}}\nconfig: ./mesh\nstateDir: ./control-state\n\
             tls: {{certificate: ./control-state/server.pem, key: ./control-state/server.key}}\n\
             ca: {{}}\n\
             join: {{tokens: [{{file: ./join-tokens, serviceAccounts: [\"shop/*\"]}}]}}\n",
            self.discovery, self.control
        );
        std::fs::write(self.bootstrap("control-plane"), control)?;
        self.write_authority().map_err(io::Error::other)?;
        for (name, place) in [
            ("web", self.web),
            ("orders", self.orders),
            ("mailer", self.mailer),
        ] {
            std::fs::write(self.bootstrap(name), self.sidecar(name, place))?;
        }
        Ok(())
    }

    /// As `outrigger ca init` and `outrigger ca token` do.
    fn write_authority(&self) -> Result<(), make::MakeError> {
        let (dir, now) = (self.dir(), clock::wall_millis() / 1000);
        let server = [self.discovery.ip().to_string()];
        make::init(&dir.join("control-state"), TRUST_DOMAIN, &server, now)?;
        for name in ["web", "orders", "mailer"] {
            let (file, account) = (dir.join("join-tokens"), format!("shop/{name}"));
            let day = std::time::Duration::from_secs(86_400);
            let token = make::token(&file, Some(&account), day, now)?;
            make::write_key(&dir.join(format!("{name}.token")), &token)?;
        }
        Ok(())
    }

    fn sidecar(&self, name: &str, place: Place) -> String {
        let Place {
            outbound,
            inbound,
            admin,
            app,
        } = place;
        let discovery = self.discovery;
        format!(
            "workload: {{name: {name}-1, namespace: shop, service: {name}, serviceAccount: {name}}}\n\
             listen: {{outbound: \"{outbound}\", inbound: \"{inbound}\", admin: \"{admin}\"}}\n\
             app: {app}\n\
             controlPlane: {{address: \"https://{discovery}\", \
             bundle: ./control-state/roots.pem, tokenFile: ./{name}.token}}\n\
             identity: {{controlPlane: {{}}}}\n\
             stateDir: ./state-{name}\n\
             drain: 2s\n"
        )
    }

    /// The mesh config that the demo begins with.
    pub(super) fn mesh(&self) -> String {
        let (web, orders) = (self.web.inbound.port(), self.orders.inbound.port());
        MESH.replace("WEB", &web.to_string())
            .replace("ORDERS", &orders.to_string())
            .replace("EPHEMERAL", &self.ephemeral.to_string())
    }
}

/// `$TMPDIR`, or beside this program (a build directory is on a disk, `/tmp` often is not), or the
/// system's directory for temporary files.
fn directory() -> io::Result<TempDir> {
    let chosen = std::env::var_os("TMPDIR").map(PathBuf::from);
    let beside = || std::env::current_exe().ok()?.parent().map(Path::to_owned);
    let make = |base: PathBuf| {
        tempfile::Builder::new()
            .prefix("outrigger-demo-")
            .tempdir_in(base)
    };
    let tried = chosen.or_else(beside).map(make);
    match tried {
        Some(Ok(dir)) => Ok(dir),
        _ => make(std::env::temp_dir()),
    }
}

const MESH: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: Mesh
metadata: {name: default}
spec:
  trustDomain: shop.demo
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: web, namespace: shop}
spec:
  discovery: {static: [{address: 127.0.0.1, port: WEB}]}
  identity: {serviceAccounts: [web]}                      # plaintext too: curl comes in here
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: orders, namespace: shop}
spec:
  discovery: {static: [{address: 127.0.0.1, port: ORDERS}]}
  identity: {serviceAccounts: [orders]}
  mtls: {mode: Strict}
  breaker: {consecutiveFailures: 5, openFor: 1s}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: mailer, namespace: shop}
spec:
  discovery: {heartbeat: {ttl: 6s, removeAfter: 60s}}     # its sidecar registers it, and renews
  identity: {serviceAccounts: [mailer]}
  mtls: {mode: Strict}
  breaker: {consecutiveFailures: 2, openFor: 1s, maxOpenFor: 2s}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshRoute
metadata: {name: orders, namespace: shop}
spec:
  services: [orders]
  rules:
  - name: orders
    matches: [{path: {type: PathPrefix, value: /orders}}]
    timeouts: {request: 10s, perTry: 3s}
    retry: {attempts: 2}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshRoute
metadata: {name: mailer, namespace: shop}
spec:
  services: [mailer]
  rules:
  - name: send
    matches: [{method: POST, path: {type: PathPrefix, value: /mails}}]
    async:
      when: Preferred                 # a caller that sends Prefer: respond-async gets a receipt
      queue: mail
      delivery: {attempts: 8, backoff: 200ms, maxBackoff: 1s}
---
apiVersion: outrigger.dev/v1alpha1
kind: Queue
metadata: {name: mail, namespace: shop}
spec:
  backend: {embedded: {allowEphemeral: EPHEMERAL}}
";

#[cfg(test)]
mod tests {
    use outrigger_config::{Source, bootstrap, load};

    use super::*;

    #[test]
    fn every_file_of_the_demo_is_clean() {
        let stage = Stage::set().unwrap();
        let loaded = load(&[Source::new("shop.yaml", stage.mesh())]);
        assert_eq!(
            loaded.report.problems,
            [],
            "{}",
            loaded.report.render_text()
        );
        for name in ["web", "orders", "mailer"] {
            let text = std::fs::read_to_string(stage.bootstrap(name)).unwrap();
            let (_, report) = bootstrap::load_proxy(&Source::new(name, text));
            assert_eq!(report.problems, [], "{}", report.render_text());
        }
        let text = std::fs::read_to_string(stage.bootstrap("control-plane")).unwrap();
        let (_, report) = bootstrap::load_control_plane(&Source::new("control-plane", text));
        assert_eq!(report.problems, [], "{}", report.render_text());
    }
}
