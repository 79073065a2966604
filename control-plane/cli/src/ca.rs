//! `outrigger ca`: makes and replaces the authority of the mesh, and shows it.
//!
//! Works on files of this machine; the control plane takes up what it finds within a second or
//! two. Only `status` asks it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use outrigger_config::units::Dur;
use outrigger_control_plane::ca::make;
use serde_json::{Value, json};

use crate::client::{CONTROL_PLANE, Client};
use crate::clock;
use crate::output::{Failure, Format, cell, items, print_as, table};

/// What to do with the authority.
#[derive(Debug, Subcommand)]
pub(crate) enum Ca {
    /// Make root and issuer, and a certificate for the control plane itself
    Init(Init),
    /// Replace the issuer, the root or the control plane's certificate, without a gap
    Rotate(Rotate),
    /// Make a join token: it is printed once, its hash is added to a file
    Token(Token),
    /// Show issuers, roots and what was signed
    Status(Status),
}

/// Where the authority is kept.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// The control plane's stateDir
    #[arg(long, value_name = "DIR", default_value = "./control-state")]
    dir: PathBuf,
}

/// A new authority.
#[derive(Debug, Args)]
pub(crate) struct Init {
    #[command(flatten)]
    place: Place,
    /// The trust domain of the mesh, as in Mesh.spec.trustDomain
    #[arg(long, value_name = "NAME")]
    trust_domain: String,
    /// A name or address that sidecars reach the control plane by; makes server.pem and server.key
    #[arg(long, value_name = "NAME")]
    server: Vec<String>,
}

/// What to replace; without an option the issuer.
#[derive(Debug, Args)]
pub(crate) struct Rotate {
    #[command(flatten)]
    place: Place,
    /// The root, with an issuer of its own: the old one stays listed until --drop-old-roots
    #[arg(long, group = "what")]
    root: bool,
    /// List the present root only; refused while certificates under an old one live
    #[arg(long, group = "what")]
    drop_old_roots: bool,
    /// The control plane's own certificate, for the same names
    #[arg(long, group = "what")]
    server: bool,
}

/// A token.
#[derive(Debug, Args)]
pub(crate) struct Token {
    /// The file that join.tokens names
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// The one service account that it is good for; default: those of the file
    #[arg(long = "for", value_name = "NAMESPACE/NAME")]
    account: Option<String>,
    /// How long it may be used; 0s: for ever
    #[arg(long, value_name = "DURATION", default_value = "24h")]
    ttl: Dur,
}

/// Whom to ask.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// The control plane
    #[arg(long, value_name = "URL", env = "OUTRIGGER_CONTROL_PLANE", default_value = CONTROL_PLANE)]
    control_plane: String,
}

pub(crate) async fn run(command: Ca, format: Format) -> Result<(), Failure> {
    let now = clock::wall_millis() / 1000;
    match command {
        Ca::Init(init) => {
            let dir = &init.place.dir;
            let made = make::init(dir, &init.trust_domain, &init.server, now);
            written(&made.map_err(failed)?, "", format);
        }
        Ca::Rotate(rotate) => {
            let dir = &rotate.place.dir;
            let (made, next) = if rotate.root {
                let next = "The old root stays until every sidecar knows the new one and no \
                            certificate under the old one lives: `outrigger ca status`, then \
                            `outrigger ca rotate --drop-old-roots`.\n";
                (make::rotate_root(dir, now), next)
            } else if rotate.drop_old_roots {
                (make::drop_old_roots(dir, now), "")
            } else if rotate.server {
                (make::rotate_server(dir, now), "")
            } else {
                (make::rotate_issuer(dir, now), "")
            };
            written(&made.map_err(failed)?, next, format);
        }
        Ca::Token(token) => {
            let account = token.account.as_deref();
            let made = make::token(&token.file, account, token.ttl.0, now).map_err(failed)?;
            print_as(format, &json!({"token": made}), |_| format!("{made}\n"));
        }
        Ca::Status(status) => {
            let value = Client::control_plane(&status.control_plane)?
                .get("/v1/ca")
                .await?;
            print_as(format, &value, |value| authority(value, now));
        }
    }
    Ok(())
}

#[allow(clippy::needless_pass_by_value)] // as map_err passes it
fn failed(error: make::MakeError) -> Failure {
    match error {
        make::MakeError::Io { .. } => Failure::unusable(error.to_string()),
        make::MakeError::Refused(_) => Failure::errors(error.to_string()),
    }
}

fn written(files: &[PathBuf], next: &str, format: Format) {
    let names: Vec<String> = files
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    print_as(format, &json!({"written": names}), |_| {
        let lines: String = names.iter().map(|name| format!("wrote {name}\n")).collect();
        lines + next
    });
}

fn authority(value: &Value, now: u64) -> String {
    let until = |at: &Value| match at.as_u64() {
        Some(at) if at > now => clock::short(Duration::from_secs(at - now)),
        Some(_) => "EXPIRED".to_owned(),
        None => "-".to_owned(),
    };
    let mut text = format!(
        "trust domain {}, {} certificates issued\n\n",
        cell(&value["trustDomain"]),
        cell(&value["issued"])
    );
    let rows: Vec<Vec<String>> = items(&value["issuers"])
        .iter()
        .map(|issuer| {
            let signs = match issuer["signing"] == true {
                true => "yes",
                false => "no",
            };
            vec![
                cell(&issuer["subject"]),
                signs.to_owned(),
                until(&issuer["notAfter"]),
                short(&issuer["root"]),
            ]
        })
        .collect();
    text.push_str(&table(&["ISSUER", "SIGNS", "EXPIRES IN", "ROOT"], &rows));
    let rows: Vec<Vec<String>> = items(&value["roots"])
        .iter()
        .map(|root| {
            vec![
                short(&root["sha256"]),
                cell(&root["state"]),
                until(&root["notAfter"]),
                until(&root["liveUntil"]),
                until(&root["signsFrom"]),
            ]
        })
        .collect();
    text.push('\n');
    let headings = [
        "ROOT",
        "STATE",
        "EXPIRES IN",
        "CERTIFICATES LIVE FOR",
        "MAY SIGN IN",
    ];
    text.push_str(&table(&headings, &rows));
    if let Some(problem) = value["problem"].as_str() {
        text.push_str(&format!("\nnot taken up: {problem}\n"));
    }
    text
}

/// The beginning of a fingerprint.
fn short(fingerprint: &Value) -> String {
    fingerprint
        .as_str()
        .unwrap_or_default()
        .chars()
        .take(12)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_signs_what_leaves_and_what_is_wrong_is_seen() {
        let value = json!({
            "trustDomain": "shop.local", "issued": 7,
            "issuers": [
                {"subject": "CN=new", "signing": false, "notAfter": 400, "root": "bb00bb00bb00bb"},
                {"subject": "CN=old", "signing": true, "notAfter": 90, "root": "aa"},
            ],
            "roots": [
                {"sha256": "aa", "state": "leaving", "notAfter": 900, "liveUntil": 130},
                {"sha256": "bb00bb00bb00bb", "state": "announced", "notAfter": 900, "signsFrom": 120},
            ],
            "problem": "the issuer's key is no PEM",
        });
        let text = authority(&value, 100);
        for part in [
            "shop.local, 7 certificates",
            "CN=old",
            "EXPIRED",
            "5m0s",
            "bb00bb00bb00 ",
            "leaving",
            "30.0s",
            "20.0s",
            "not taken up: the issuer's key",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }
}
