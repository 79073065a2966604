//! From texts to a checked [`MeshConfig`]: the one way in, for files, pushes and the command line.
//!
//! Owns the order of the steps: positioned trees, envelope, shape, types, then what documents say
//! about each other. A document that fails one step does not hide the problems of the others.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json, json};

use crate::check;
use crate::config::MeshConfig;
use crate::contract;
use crate::document::{Document, Kind};
use crate::model::{GrpcRouteSpec, HttpRouteSpec, MeshRoute, RoutePolicy, Rule};
use crate::normalise::{self, Remarks};
use crate::not_yet;
use crate::report::{Problem, Report, Severity};
use crate::schema;
use crate::source::Source;
use crate::suggest::closest;
use crate::tree::{self, Node, Place, Value};
use crate::units::{DEFAULT_NAMESPACE, NamespacedName, Reference, is_object_name};
use crate::validate;

/// The outcome of a load.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The config; none when there is any error.
    pub mesh: Option<MeshConfig>,
    /// All problems.
    pub report: Report,
}

/// Parses and checks all documents of all sources, in any order, and reports all problems.
///
/// JSON is YAML: the [`Document::to_json`] texts of a config load to the same config.
pub fn load(sources: &[Source]) -> Loaded {
    let mut loading = Loading::default();
    for source in sources {
        loading.read(source);
    }
    if loading.report.documents == 0 {
        let file = sources.first().map_or("", |source| source.name.as_str());
        let message = "nothing is defined: no source holds a document".to_owned();
        loading.report.problems.push(Problem {
            severity: Severity::Warning,
            code: "W304",
            file: file.to_owned(),
            line: 1,
            column: 1,
            path: String::new(),
            message,
            help: None,
        });
    }
    let mut report = loading.report;
    validate::validate(&loading.config, &loading.docs, &mut report.problems);
    report.sort();
    let mut mesh = loading.config;
    mesh.documents
        .sort_by(|a, b| (a.kind, &a.namespace, &a.name).cmp(&(b.kind, &b.namespace, &b.name)));
    Loaded {
        mesh: (!report.has_errors()).then_some(mesh),
        report,
    }
}

/// A document whose envelope could be read.
pub(crate) struct Doc {
    pub(crate) file: String,
    pub(crate) root: Node,
}

/// Every document by what it is called, also those that are refused: a reference to one of them is
/// not a second problem.
pub(crate) type Docs = BTreeMap<(Kind, NamespacedName), Doc>;

impl Doc {
    /// A problem at a path, or at the deepest part of it that is there.
    pub(crate) fn problem(
        &self,
        severity: Severity,
        code: &'static str,
        path: &str,
        message: impl Into<String>,
    ) -> Problem {
        let Place { line, column } = self.root.place_of(path);
        Problem {
            severity,
            code,
            file: self.file.clone(),
            line,
            column,
            path: path.to_owned(),
            message: message.into(),
            help: None,
        }
    }
}

#[derive(Default)]
struct Loading {
    report: Report,
    docs: Docs,
    config: MeshConfig,
}

/// What the envelope says.
struct Envelope {
    kind: Kind,
    name: NamespacedName,
}

impl Loading {
    fn read(&mut self, source: &Source) {
        for parsed in tree::parse(&source.text) {
            let broken = !parsed.flaws.is_empty();
            self.report.problems.extend(
                parsed
                    .flaws
                    .into_iter()
                    .map(|flaw| flaw.into_problem(&source.name)),
            );
            match parsed.root {
                Some(Node {
                    value: Value::Null, ..
                }) => {}
                Some(root) => self.document_or_list(source, root, broken),
                None if broken => self.report.documents += 1,
                None => {}
            }
        }
    }

    /// `kubectl get -o yaml` wraps several documents into one `List`.
    fn document_or_list(&mut self, source: &Source, root: Node, broken: bool) {
        let is_list = root.get("kind").and_then(Node::text) == Some("List");
        let items = root.get("items").map(|items| &items.value);
        match items {
            Some(Value::List(items)) if is_list => {
                for item in items.clone() {
                    self.document(source, item, broken);
                }
            }
            _ => self.document(source, root, broken),
        }
    }

    fn document(&mut self, source: &Source, root: Node, broken: bool) {
        let file = source.name.as_str();
        self.report.documents += 1;
        let errors_before = self.report.errors();
        let mut doc = Doc {
            file: file.to_owned(),
            root,
        };
        let Some(Envelope { kind, name }) = self.envelope(&doc) else {
            return;
        };
        if let Some(spec) = doc.root.get("spec") {
            let schemas = schema::compiled();
            let faults = check::check(spec, "spec", schemas.spec(kind), &schemas.mesh);
            self.report
                .problems
                .extend(faults.into_iter().map(|fault| fault.into_problem(file)));
        }
        for flaw in contract::inline(&mut doc.root, kind, source) {
            let (severity, code) = match flaw.missing {
                true => (Severity::Warning, "W309"),
                false => (Severity::Error, "E208"),
            };
            let problem = doc.problem(severity, code, &flaw.path, flaw.message);
            self.report.problems.push(problem);
        }
        let is_sound = !broken && self.report.errors() == errors_before;
        for path in not_yet::paths(kind, &doc.root) {
            self.report.problems.push(doc.problem(
                Severity::Warning,
                "W401",
                &path,
                "not yet in effect",
            ));
        }
        match self.docs.entry((kind, name.clone())) {
            Slot::Occupied(first) => {
                let first = first.get();
                let message = format!(
                    "there is already a {kind} {name}, in {}:{}",
                    first.file, first.root.place.line
                );
                let problem = doc.problem(Severity::Error, "E204", "metadata.name", message);
                self.report.problems.push(problem);
            }
            Slot::Vacant(slot) => {
                let doc = slot.insert(doc);
                if is_sound {
                    let outcome = accept(&mut self.config, kind, &name, doc);
                    self.report.problems.extend(outcome);
                }
            }
        }
    }

    /// Reads `apiVersion`, `kind` and `metadata`; none when the document cannot be told.
    fn envelope(&mut self, doc: &Doc) -> Option<Envelope> {
        let Value::Map(entries) = &doc.root.value else {
            let message = format!("expected a document, found {}", doc.root.describe());
            self.error(doc, "E109", "", message, None);
            return None;
        };
        let kind = self.kind(doc)?;
        let known = ["apiVersion", "kind", "metadata", "spec", "status"];
        for entry in entries
            .iter()
            .filter(|entry| !known.contains(&entry.key.as_str()))
        {
            let help = closest(&entry.key, known).map(|name| format!("did you mean \"{name}\"?"));
            let (severity, code) = match kind.is_gateway() {
                true => (Severity::Warning, "W103"),
                false => (Severity::Error, "E103"),
            };
            let mut problem = doc.problem(severity, code, &entry.key, "unknown field");
            (problem.line, problem.column) = (entry.place.line, entry.place.column);
            problem.help = help;
            self.report.problems.push(problem);
        }
        if doc.root.get("spec").is_none() {
            self.error(doc, "E107", "", "\"spec\" is missing".to_owned(), None);
        }
        let name = self.metadata(doc, kind)?;
        Some(Envelope { kind, name })
    }

    fn kind(&mut self, doc: &Doc) -> Option<Kind> {
        let version = doc.root.get("apiVersion").map(|node| (node, node.text()));
        let known_kinds = Kind::ALL.map(Kind::name);
        let Some(node) = doc.root.get("kind") else {
            self.error(doc, "E107", "", "\"kind\" is missing".to_owned(), None);
            return None;
        };
        let Some(kind) = node.text().and_then(Kind::from_name) else {
            let help = node.text().and_then(|text| closest(text, known_kinds));
            let help = match help {
                Some(name) => format!("did you mean \"{name}\"?"),
                None => format!("known are {}", known_kinds.join(", ")),
            };
            let message = format!("unknown kind {}", node.describe());
            self.error(doc, "E102", "kind", message, Some(help));
            return None;
        };
        match version {
            None => {
                let help = format!("write apiVersion: {}", kind.api_version());
                self.error(
                    doc,
                    "E107",
                    "",
                    "\"apiVersion\" is missing".to_owned(),
                    Some(help),
                );
            }
            Some((_, Some(version))) if version == kind.api_version() => {}
            Some((node, _)) => {
                let message = format!("unknown apiVersion {} for {kind}", node.describe());
                let help = format!("understood is {}", kind.api_version());
                self.error(doc, "E101", "apiVersion", message, Some(help));
            }
        }
        Some(kind)
    }

    fn metadata(&mut self, doc: &Doc, kind: Kind) -> Option<NamespacedName> {
        let Some(metadata) = doc.root.get("metadata") else {
            self.error(doc, "E107", "", "\"metadata\" is missing".to_owned(), None);
            return None;
        };
        let name = self.object_name(doc, metadata, "name");
        if metadata.get("name").is_none() {
            self.error(
                doc,
                "E107",
                "metadata",
                "\"name\" is missing".to_owned(),
                None,
            );
        }
        if let Value::Map(entries) = &metadata.value {
            for entry in entries
                .iter()
                .filter(|e| !METADATA.contains(&e.key.as_str()))
            {
                let path = format!("metadata.{}", entry.key);
                let mut problem = doc.problem(Severity::Warning, "W103", &path, "unknown field");
                (problem.line, problem.column) = (entry.place.line, entry.place.column);
                problem.help = closest(&entry.key, METADATA.iter().copied())
                    .map(|name| format!("did you mean \"{name}\"?"));
                self.report.problems.push(problem);
            }
        }
        for key in ["labels", "annotations"] {
            self.texts(doc, metadata, key);
        }
        let namespace = match metadata.get("namespace") {
            Some(_) if !kind.is_namespaced() => {
                let message = format!("a {kind} belongs to no namespace; this is not read");
                let problem = doc.problem(Severity::Warning, "W104", "metadata.namespace", message);
                self.report.problems.push(problem);
                String::new()
            }
            Some(_) => self.object_name(doc, metadata, "namespace")?,
            None if kind.is_namespaced() => DEFAULT_NAMESPACE.to_owned(),
            None => String::new(),
        };
        Some(NamespacedName::new(namespace, name?))
    }

    fn object_name(&mut self, doc: &Doc, metadata: &Node, key: &str) -> Option<String> {
        let node = metadata.get(key)?;
        match node.text() {
            Some(text) if is_object_name(text) => Some(text.to_owned()),
            _ => {
                let message = format!(
                    "expected a name in lower-case letters, digits, '-' and '.', found {}",
                    node.describe()
                );
                self.error(doc, "E106", &format!("metadata.{key}"), message, None);
                None
            }
        }
    }

    fn texts(&mut self, doc: &Doc, metadata: &Node, key: &str) {
        let schema = json!({"type": "object", "additionalProperties": {"type": "string"}});
        if let Some(node) = metadata.get(key) {
            let path = format!("metadata.{key}");
            let faults = check::check(node, &path, &schema, &schema);
            self.report.problems.extend(
                faults
                    .into_iter()
                    .map(|fault| fault.into_problem(&doc.file)),
            );
        }
    }

    fn error(
        &mut self,
        doc: &Doc,
        code: &'static str,
        path: &str,
        message: String,
        help: Option<String>,
    ) {
        let mut problem = doc.problem(Severity::Error, code, path, message);
        problem.help = help;
        self.report.problems.push(problem);
    }
}

/// The keys that clusters know in `metadata`.
const METADATA: &[&str] = &[
    "name",
    "namespace",
    "labels",
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

/// Takes a document of sound shape into the config.
fn accept(config: &mut MeshConfig, kind: Kind, name: &NamespacedName, doc: &Doc) -> Vec<Problem> {
    let spec = doc.root.get("spec").map_or(Json::Null, Node::to_json);
    let mut remarks = Remarks::default();
    let namespace = name.namespace.as_str();
    let outcome = (|| {
        match kind {
            Kind::Mesh => config.mesh = typed(spec)?,
            Kind::MeshService => {
                config.services.insert(name.clone(), typed(spec)?);
            }
            Kind::MeshRoute => {
                config
                    .routes
                    .insert(name.clone(), qualified(typed(spec)?, namespace));
            }
            Kind::HTTPRoute => {
                let route = normalise::http_route(&typed::<HttpRouteSpec>(spec)?, &mut remarks);
                config
                    .http_routes
                    .insert(name.clone(), qualified(route, namespace));
            }
            Kind::GRPCRoute => {
                let route = normalise::grpc_route(&typed::<GrpcRouteSpec>(spec)?, &mut remarks);
                config
                    .grpc_routes
                    .insert(name.clone(), qualified(route, namespace));
            }
            Kind::RoutePolicy => {
                let mut policy: RoutePolicy = typed(spec)?;
                policy_references(&mut policy).for_each(|r| r.qualify(namespace));
                config.route_policies.insert(name.clone(), policy);
            }
            Kind::Queue => {
                config.queues.insert(name.clone(), typed(spec)?);
            }
            Kind::AuthorizationPolicy => {
                let mut policy: crate::model::AuthorizationPolicy = typed(spec)?;
                policy
                    .services
                    .iter_mut()
                    .for_each(|r| r.qualify(namespace));
                config.authorization.insert(name.clone(), policy);
            }
        }
        Ok::<(), serde_json::Error>(())
    })();
    if let Err(error) = outcome {
        // The schema is generated from the types, so this is a gap between the two.
        return vec![doc.problem(Severity::Error, "E109", "spec", error.to_string())];
    }
    config.documents.push(document(kind, name, doc));
    let problem = |remark: normalise::Remark| {
        doc.problem(remark.severity, remark.code, &remark.path, remark.message)
    };
    remarks.0.into_iter().map(problem).collect()
}

fn typed<T: DeserializeOwned>(spec: Json) -> Result<T, serde_json::Error> {
    serde_json::from_value(spec)
}

fn qualified(mut route: MeshRoute, namespace: &str) -> MeshRoute {
    let rules = route.rules.iter_mut().flat_map(rule_references);
    route
        .services
        .iter_mut()
        .chain(rules)
        .for_each(|reference| reference.qualify(namespace));
    route
}

fn rule_references(rule: &mut Rule) -> impl Iterator<Item = &mut Reference> {
    let async_ = rule.async_.iter_mut().flat_map(|spec| {
        spec.queue
            .iter_mut()
            .chain(spec.subscribers.iter_mut().flatten())
    });
    let steps = rule.on_unavailable.iter_mut().flatten();
    rule.backends
        .iter_mut()
        .map(|backend| &mut backend.service)
        .chain(async_)
        .chain(steps.filter_map(|step| step.service.as_mut()))
        .chain(rule.mirror.iter_mut().map(|mirror| &mut mirror.service))
}

fn policy_references(policy: &mut RoutePolicy) -> impl Iterator<Item = &mut Reference> {
    let async_ = policy.async_.iter_mut().flat_map(|spec| {
        spec.queue
            .iter_mut()
            .chain(spec.subscribers.iter_mut().flatten())
    });
    let steps = policy.on_unavailable.iter_mut().flatten();
    async_
        .chain(steps.filter_map(|step| step.service.as_mut()))
        .chain(policy.mirror.iter_mut().map(|mirror| &mut mirror.service))
}

fn document(kind: Kind, name: &NamespacedName, doc: &Doc) -> Document {
    let mut metadata = Map::new();
    metadata.insert("name".to_owned(), json!(name.name));
    if kind.is_namespaced() {
        metadata.insert("namespace".to_owned(), json!(name.namespace));
    }
    for key in ["labels", "annotations"] {
        let texts = doc
            .root
            .get("metadata")
            .and_then(|metadata| metadata.get(key));
        if let Some(Json::Object(mut texts)) = texts.map(Node::to_json) {
            // kubectl keeps a copy of the document in here.
            texts.remove("kubectl.kubernetes.io/last-applied-configuration");
            if !texts.is_empty() {
                metadata.insert(key.to_owned(), Json::Object(texts));
            }
        }
    }
    let spec = doc.root.get("spec").map_or(Json::Null, Node::to_json);
    Document {
        kind,
        name: name.name.clone(),
        namespace: name.namespace.clone(),
        source: doc.file.clone(),
        line: doc.root.place.line,
        canonical: json!({
            "apiVersion": kind.api_version(),
            "kind": kind.name(),
            "metadata": metadata,
            "spec": spec,
        }),
    }
}
