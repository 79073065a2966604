//! The JSON Schemas of the documents, generated from the types.
//!
//! Owns what an editor is told and what the loader checks against: they are the same. The committed
//! copies in `config/schema/` are for editors; a test fails when they are stale.

use std::sync::OnceLock;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};

use crate::bootstrap::{ControlPlaneBootstrap, ProxyBootstrap};
use crate::document::Kind;
use crate::model::{
    AuthorizationPolicy, GrpcRouteSpec, HttpRouteSpec, MeshRoute, MeshService, MeshSpec, QueueSpec,
    RoutePolicy,
};

/// The schema of mesh config documents: of any kind, told apart by `kind`.
pub fn mesh() -> Value {
    compiled().mesh.clone()
}

/// The schema of a sidecar's bootstrap file.
pub fn proxy() -> Value {
    compiled().proxy.clone()
}

/// The schema of the control plane's bootstrap file.
pub fn control_plane() -> Value {
    compiled().control_plane.clone()
}

/// The schemas, generated once a process.
pub(crate) struct Schemas {
    pub(crate) mesh: Value,
    pub(crate) proxy: Value,
    pub(crate) control_plane: Value,
    /// The `spec` of each kind, in the order of [`Kind::ALL`]; `$defs` are those of `mesh`.
    specs: Vec<Value>,
}

impl Schemas {
    /// The `spec` of a kind.
    pub(crate) fn spec(&self, kind: Kind) -> &Value {
        &self.specs[kind as usize]
    }
}

pub(crate) fn compiled() -> &'static Schemas {
    static SCHEMAS: OnceLock<Schemas> = OnceLock::new();
    SCHEMAS.get_or_init(|| {
        let (mesh, specs) = generate_mesh();
        Schemas {
            mesh,
            specs,
            proxy: generate::<ProxyBootstrap>("Outrigger sidecar bootstrap"),
            control_plane: generate::<ControlPlaneBootstrap>("Outrigger control plane bootstrap"),
        }
    })
}

fn generator() -> SchemaGenerator {
    SchemaSettings::draft2020_12().into_generator()
}

fn generate<T: JsonSchema>(title: &str) -> Value {
    let mut schema = generator().into_root_schema_for::<T>();
    schema.insert("title".to_owned(), title.into());
    finish(schema.to_value())
}

fn generate_mesh() -> (Value, Vec<Value>) {
    let mut generator = generator();
    let specs: Vec<Value> = Kind::ALL
        .into_iter()
        .map(|kind| spec_of(kind, &mut generator).to_value())
        .map(finish)
        .collect();
    let branches: Vec<Value> = Kind::ALL
        .into_iter()
        .zip(&specs)
        .map(|(kind, spec)| {
            json!({
                "if": {"required": ["kind"], "properties": {"kind": {"const": kind.name()}}},
                "then": {
                    "required": ["spec"],
                    "properties": {"apiVersion": {"const": kind.api_version()}, "spec": spec},
                },
            })
        })
        .collect();
    let kinds = Kind::ALL.map(Kind::name);
    let text = json!({"type": "string"});
    let texts = json!({"type": "object", "additionalProperties": text});
    let mesh = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Outrigger mesh config",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata"],
        "properties": {
            "apiVersion": text,
            "kind": {"type": "string", "enum": kinds},
            "metadata": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": text, "namespace": text, "labels": texts, "annotations": texts,
                },
            },
            "spec": {"type": "object"},
            "status": {"type": "object"},
        },
        "allOf": branches,
        "$defs": generator.take_definitions(true),
    });
    (finish(mesh), specs)
}

fn spec_of(kind: Kind, generator: &mut SchemaGenerator) -> schemars::Schema {
    match kind {
        Kind::Mesh => generator.subschema_for::<MeshSpec>(),
        Kind::MeshService => generator.subschema_for::<MeshService>(),
        Kind::MeshRoute => generator.subschema_for::<MeshRoute>(),
        Kind::HTTPRoute => generator.subschema_for::<HttpRouteSpec>(),
        Kind::GRPCRoute => generator.subschema_for::<GrpcRouteSpec>(),
        Kind::RoutePolicy => generator.subschema_for::<RoutePolicy>(),
        Kind::Queue => generator.subschema_for::<QueueSpec>(),
        Kind::AuthorizationPolicy => generator.subschema_for::<AuthorizationPolicy>(),
    }
}

/// Says "exactly one member" in the words of JSON Schema beside our own.
fn finish(mut schema: Value) -> Value {
    visit(&mut schema);
    schema
}

fn visit(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            if members.get("x-exactly-one") == Some(&Value::Bool(true)) {
                members.insert("minProperties".to_owned(), 1.into());
                members.insert("maxProperties".to_owned(), 1.into());
            }
            members.values_mut().for_each(visit);
        }
        Value::Array(items) => items.iter_mut().for_each(visit),
        _ => {}
    }
}
