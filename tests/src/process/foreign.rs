//! Programs that are not ours: the clients and servers that users have.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Process, free_port, run, target_dir, tools_dir};

/// A program of the system.
///
/// # Panics
/// When it is not installed.
pub fn tool(name: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path
        .split(':')
        .chain(["/usr/sbin", "/usr/local/sbin", "/sbin"]);
    let found = dirs
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file());
    Command::new(found.unwrap_or_else(|| panic!("{name} is not installed: tests/run installs it")))
}

/// A script of `tests/tools` under the Python that has grpcio and hyperframe: `OUTRIGGER_TEST_PYTHON`, or the
/// environment that `tests/run` makes.
///
/// # Panics
/// When there is no such Python.
pub fn python(script: &str) -> Command {
    let set = std::env::var_os("OUTRIGGER_TEST_PYTHON").map(PathBuf::from);
    let python = set.unwrap_or_else(|| target_dir().join("test-venv/bin/python"));
    assert!(
        python.is_file(),
        "{} does not exist: run `tests/run --install`, or set OUTRIGGER_TEST_PYTHON to a Python \
         with grpcio",
        python.display()
    );
    let mut command = Command::new(python);
    command.arg("-u").arg(tools_dir().join(script));
    command
}

/// nginx with one site: `/small`, `/10k`, files below `/files/` which can be PUT.
#[derive(Debug)]
pub struct Nginx {
    /// Where it listens.
    pub addr: SocketAddr,
    /// The directory behind `/files/`.
    pub files: PathBuf,
    /// The process.
    pub process: Process,
}

impl Nginx {
    /// Starts one with its files in `dir`.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(dir: &Path) -> Self {
        let root = dir.join("nginx");
        let files = root.join("site/files");
        std::fs::create_dir_all(&files).expect("the scratch directory is writable");
        let port = free_port();
        let ten = "0123456789".repeat(1024);
        std::fs::write(root.join("site/10k"), ten).expect("the scratch directory is writable");
        let config = format!(
            "daemon off; master_process off; worker_processes 1; pid {root}/pid;\n\
             error_log stderr warn;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\n\
               access_log off; default_type application/octet-stream; sendfile on;\n\
               client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;\n\
               fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi;\n\
               scgi_temp_path {root}/scgi;\n\
               keepalive_requests 100000000; keepalive_timeout 300s; client_max_body_size 0;\n\
               server {{\n\
                 listen 127.0.0.1:{port}; root {root}/site;\n\
                 location = /small {{ return 200 \"hello\\n\"; }}\n\
                 location = /gone {{ return 410 \"gone\\n\"; }}\n\
                 location /files/ {{ dav_methods PUT DELETE; create_full_put_path on; }}\n\
               }}\n\
             }}\n",
            root = root.display(),
        );
        let path = root.join("nginx.conf");
        std::fs::write(&path, config).expect("the scratch directory is writable");
        let mut command = tool("nginx");
        let mut process =
            Process::start("nginx", command.arg("-p").arg(&root).arg("-c").arg(&path));
        process.accepts(port);
        Self {
            addr: SocketAddr::from(([127, 0, 0, 1], port)),
            files,
            process,
        }
    }
}

/// Starts the grpcio server of `tests/tools`.
///
/// # Panics
/// When it does not start.
pub fn grpc_server() -> (Process, SocketAddr) {
    let mut process = Process::start("grpc_server.py", &mut python("grpc_server.py"));
    let line = process.line("listening on port ");
    let port: u16 = line
        .rsplit(' ')
        .next()
        .and_then(|port| port.parse().ok())
        .expect("a port");
    (process, SocketAddr::from(([127, 0, 0, 1], port)))
}

/// Runs h2load against `http://HOST/PATH` at `addr`; `--h1` among `options` makes it HTTP/1.1.
/// Gives the number of requests.
///
/// # Panics
/// With its report, when any request did not succeed with 2xx.
pub fn h2load(addr: SocketAddr, url: &str, options: &[&str]) -> u64 {
    let mut command = tool("h2load");
    command
        .args(options)
        .arg(format!("--connect-to={addr}"))
        .arg(url);
    let report = run(&mut command);
    succeeded(&report)
        .unwrap_or_else(|| panic!("not every request of {command:?} succeeded:\n{report}"))
}

/// How many requests h2load reports, when each of them ended with 2xx.
fn succeeded(report: &str) -> Option<u64> {
    let requests = counts(report, "requests: ")?;
    let codes = counts(report, "status codes: ")?;
    // total, started, done, succeeded, failed, errored, timeout; and 2xx, 3xx, 4xx, 5xx.
    let total = *requests.first()?;
    let all = requests.get(3) == Some(&total) && codes.first() == Some(&total);
    (all && total > 0).then_some(total)
}

/// Runs h2load again and again until `stop`; gives the number of requests.
///
/// # Panics
/// As [`h2load`].
pub fn h2load_until(stop: &AtomicBool, addr: SocketAddr, url: &str, options: &[&str]) -> u64 {
    let mut total = 0;
    loop {
        total += h2load(addr, url, options);
        if stop.load(Ordering::Relaxed) {
            return total;
        }
    }
}

/// The numbers of a line such as `requests: 10 total, 10 started, …`.
fn counts(report: &str, label: &str) -> Option<Vec<u64>> {
    let line = report.lines().find_map(|line| line.strip_prefix(label))?;
    let numbers = line
        .split(", ")
        .map(|part| part.split(' ').next()?.parse().ok());
    numbers.collect()
}

#[cfg(test)]
mod tests {
    use super::succeeded;

    #[test]
    fn one_request_that_did_not_succeed_counts_for_all() {
        let report = |good: u64, ok: u64| {
            format!(
                "requests: 9 total, 9 started, 9 done, {good} succeeded, 0 failed, 0 errored, \
                 0 timeout\nstatus codes: {ok} 2xx, 0 3xx, 0 4xx, 0 5xx\n"
            )
        };
        assert_eq!(succeeded(&report(9, 9)), Some(9));
        assert_eq!(succeeded(&report(8, 8)), None);
        assert_eq!(succeeded(&report(9, 8)), None);
        assert_eq!(succeeded("finished in 1s\n"), None);
    }
}
