//! What documents say about each other, and what values must be beyond their shape.
//!
//! Owns every check from E201 on. Each reads the typed config and names a path; the place comes from
//! the document's tree. A document that failed before is not in the config, but its name is known.

mod edits;
mod policies;
mod routes;
mod rules;
mod services;

use crate::config::MeshConfig;
use crate::document::Kind;
use crate::load::{Doc, Docs};
use crate::report::{Problem, Severity};
use crate::suggest::closest;
use crate::units::NamespacedName;

pub(crate) use edits::matched_prefix;

/// Adds every problem of `config` to `problems`.
pub(crate) fn validate(config: &MeshConfig, docs: &Docs, problems: &mut Vec<Problem>) {
    let mut checks = Checks {
        config,
        docs,
        problems,
    };
    checks.mesh();
    checks.services();
    checks.routes();
    checks.route_policies();
    checks.queues();
    checks.authorization();
}

struct Checks<'a> {
    config: &'a MeshConfig,
    docs: &'a Docs,
    problems: &'a mut Vec<Problem>,
}

/// A document under check, and the way its kind spells a path.
#[derive(Clone, Copy)]
struct Subject<'a> {
    kind: Kind,
    name: &'a NamespacedName,
    doc: &'a Doc,
}

impl<'a> Checks<'a> {
    fn subject(&self, kind: Kind, name: &'a NamespacedName) -> Option<Subject<'a>> {
        let doc = self.docs.get(&(kind, name.clone()))?;
        Some(Subject { kind, name, doc })
    }

    fn error(
        &mut self,
        at: Subject<'_>,
        code: &'static str,
        path: &str,
        message: impl Into<String>,
    ) {
        self.add(at, Severity::Error, code, path, message.into(), None);
    }

    fn warn(
        &mut self,
        at: Subject<'_>,
        code: &'static str,
        path: &str,
        message: impl Into<String>,
    ) {
        self.add(at, Severity::Warning, code, path, message.into(), None);
    }

    fn add(
        &mut self,
        at: Subject<'_>,
        severity: Severity,
        code: &'static str,
        path: &str,
        message: String,
        help: Option<String>,
    ) {
        let path = as_written(at.kind, path);
        let mut problem = at.doc.problem(severity, code, &path, message);
        problem.help = help;
        self.problems.push(problem);
    }

    /// An error unless a document of `kind` has that name.
    fn exists(
        &mut self,
        at: Subject<'_>,
        code: &'static str,
        path: &str,
        kind: Kind,
        name: &NamespacedName,
    ) -> bool {
        if self.docs.contains_key(&(kind, name.clone())) {
            return true;
        }
        let names: Vec<String> = self
            .docs
            .keys()
            .filter(|(other, _)| *other == kind)
            .map(|(_, name)| name.to_string())
            .collect();
        let elsewhere = names
            .iter()
            .find(|other| other.ends_with(&format!("/{}", name.name)));
        let wanted = name.to_string();
        let near = elsewhere
            .map(String::as_str)
            .or_else(|| closest(&wanted, names.iter().map(String::as_str)));
        let help = near.map(|near| {
            let local = near
                .strip_prefix(&format!("{}/", at.name.namespace))
                .unwrap_or(near);
            format!("did you mean \"{local}\"?")
        });
        let message = format!(
            "no {kind} \"{}\" in namespace \"{}\"",
            name.name, name.namespace
        );
        self.add(at, Severity::Error, code, path, message, help);
        false
    }
}

/// The path as the document spells it: Gateway API has other names for some keys.
fn as_written(kind: Kind, path: &str) -> String {
    if !kind.is_gateway() {
        return path.to_owned();
    }
    let path = path
        .replace(".backends", ".backendRefs")
        .replace("timeouts.perTry", "timeouts.backendRequest")
        .replace("].grpc", "].method");
    match path.strip_suffix(".service") {
        Some(backend) if backend.contains(".backendRefs[") => format!("{backend}.name"),
        _ if path.starts_with("spec.services") => "spec.parentRefs".to_owned(),
        _ => path,
    }
}
