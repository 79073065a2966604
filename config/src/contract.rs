//! The files that a rule's `contract` names, put in their place.
//!
//! Who is given a config need not have the files: a pushed document, a saved one, and the version
//! that is made of both hold their content. A `jsonSchema` that begins with a brace is the schema
//! itself, a `descriptorSet` that begins with `base64,` the set. Reads no file: what lies beside a
//! source came with it. Stands on the life of a config update.

use std::path::{Component, Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::document::Kind;
use crate::source::Source;
use crate::tree::{Node, Value};

/// How the content of a descriptor set begins.
const BASE64: &str = "base64,";

/// What is wrong with a contract.
pub(crate) struct Flaw {
    /// The key.
    pub(crate) path: String,
    /// For a person.
    pub(crate) message: String,
    /// The file is not there, so the rule takes no calls; the rest of the config is sound.
    pub(crate) missing: bool,
}

/// Replaces the names by the contents.
pub(crate) fn inline(root: &mut Node, kind: Kind, source: &Source) -> Vec<Flaw> {
    let Some(spec) = root.get_mut("spec") else {
        return Vec::new();
    };
    let mut flaws = Vec::new();
    match kind {
        Kind::RoutePolicy => one(spec, "spec", source, &mut flaws),
        Kind::MeshRoute => {
            if let Some(Value::List(rules)) = spec.get_mut("rules").map(|rules| &mut rules.value) {
                for (n, rule) in rules.iter_mut().enumerate() {
                    one(rule, &format!("spec.rules[{n}]"), source, &mut flaws);
                }
            }
        }
        _ => {}
    }
    flaws
}

fn one(rule: &mut Node, base: &str, source: &Source, flaws: &mut Vec<Flaw>) {
    let Some(contract) = rule.get_mut("contract") else {
        return;
    };
    for key in ["jsonSchema", "descriptorSet"] {
        let Some(Value::Text(text)) = contract.get_mut(key).map(|node| &mut node.value) else {
            continue; // absent, or no text, which is told elsewhere
        };
        let path = format!("{base}.contract.{key}");
        let content = match beside(source, text) {
            Some(bytes) if key == "jsonSchema" => String::from_utf8_lossy(bytes).trim().to_owned(),
            Some(bytes) => format!("{BASE64}{}", STANDARD.encode(bytes)),
            None if is_content(text) => text.clone(),
            None => {
                let message = format!(
                    "there is no file {text} beside the document (.json, .pb or .binpb, up to 1 MiB): with mode Enforce every call is refused"
                );
                let missing = true;
                flaws.push(Flaw {
                    path,
                    message,
                    missing,
                });
                continue;
            }
        };
        match Contract::read(key, &content) {
            Ok(_) => *text = content,
            Err(message) => flaws.push(Flaw {
                path,
                message,
                missing: false,
            }),
        }
    }
}

/// Whether a value is the content itself and no file's name.
fn is_content(text: &str) -> bool {
    text.starts_with(BASE64) || text.trim_start().starts_with('{')
}

/// The file that a source's document names.
fn beside<'a>(source: &'a Source, name: &str) -> Option<&'a [u8]> {
    let directory = Path::new(&source.name).parent().unwrap_or(Path::new(""));
    let wanted = plain(&directory.join(name));
    let mut files = source.beside.iter();
    let found = files.find(|(path, _)| plain(path) == wanted);
    found.map(|(_, bytes)| &**bytes)
}

/// A path without its `.` steps.
fn plain(path: &Path) -> PathBuf {
    let steps = path.components();
    steps.filter(|step| *step != Component::CurDir).collect()
}

/// What a body must be, ready to be asked.
#[derive(Debug, Clone)]
pub enum Contract {
    /// JSON of this schema.
    Json(Box<jsonschema::Validator>),
    /// The request message of the gRPC method that is called.
    Protobuf(prost_reflect::DescriptorPool),
}

impl Contract {
    /// Reads the content of `jsonSchema` or `descriptorSet`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(key: &str, content: &str) -> Result<Self, String> {
        if key == "jsonSchema" {
            let schema =
                serde_json::from_str(content).map_err(|error| format!("no JSON: {error}"))?;
            let validator = jsonschema::validator_for(&schema);
            let validator = validator.map_err(|error| format!("no JSON Schema: {error}"))?;
            return Ok(Self::Json(Box::new(validator)));
        }
        let text = content.strip_prefix(BASE64).unwrap_or(content);
        let bytes = STANDARD
            .decode(text)
            .map_err(|error| format!("no base64: {error}"))?;
        let pool = prost_reflect::DescriptorPool::decode(bytes.as_slice());
        pool.map(Self::Protobuf)
            .map_err(|error| format!("no protobuf descriptor set: {error}"))
    }

    /// What is wrong with a JSON body: at most `most` sentences, each with the place in the body.
    ///
    /// Takes about 10 ms for a megabyte; see to it that nobody waits.
    ///
    /// # Errors
    /// The sentences.
    pub fn check_json(&self, body: &[u8], most: usize) -> Result<(), Vec<String>> {
        let Self::Json(validator) = self else {
            return Ok(());
        };
        let body =
            serde_json::from_slice(body).map_err(|error| vec![format!("no JSON: {error}")])?;
        let tell = |error: jsonschema::ValidationError<'_>| {
            // Without the values: what is refused may be logged.
            let place = error.instance_path().to_string();
            let place = if place.is_empty() {
                "/".to_owned()
            } else {
                place
            };
            format!("{place}: {}", error.masked())
        };
        let wrong: Vec<String> = validator.iter_errors(&body).take(most).map(tell).collect();
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    /// What is wrong with the request message of a gRPC call to `path` (`/package.Service/Method`).
    ///
    /// # Errors
    /// A sentence.
    pub fn check_grpc(&self, path: &str, message: &[u8]) -> Result<(), String> {
        let Self::Protobuf(pool) = self else {
            return Ok(());
        };
        let (service, method) = path
            .strip_prefix('/')
            .and_then(|path| path.split_once('/'))
            .unwrap_or_default();
        let found = pool.get_service_by_name(service);
        let found =
            found.and_then(|service| service.methods().find(|known| known.name() == method));
        let Some(found) = found else {
            return Err(format!("the contract has no method {path}"));
        };
        let kind = found.input();
        prost_reflect::DynamicMessage::decode(kind.clone(), message)
            .map(drop)
            .map_err(|error| format!("no {}: {error}", kind.full_name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_told_every_place_where_it_is_wrong_and_no_value() {
        let schema = r#"{"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}, "to": {"type": "array", "items": {"type": "string"}}}}"#;
        let contract = Contract::read("jsonSchema", schema).unwrap();
        let check = |body: &str| contract.check_json(body.as_bytes(), 8);
        assert_eq!(check(r#"{"id": 7, "to": ["a"]}"#), Ok(()));
        let wrong = check(r#"{"id": "secret", "to": ["a", 1]}"#).unwrap_err();
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        let all = wrong.join("\n");
        assert!(all.contains("/id: ") && all.contains("/to/1: "), "{all}");
        assert!(!all.contains("secret"), "{all}");
        assert!(check("{}").unwrap_err()[0].starts_with("/: "));
        assert!(check("not JSON").unwrap_err()[0].starts_with("no JSON"));
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        for (key, content) in [
            ("jsonSchema", "{"),
            ("jsonSchema", r#"{"type": 7}"#),
            (
                "jsonSchema",
                r#"{"$ref": "https://elsewhere.example/schema.json"}"#,
            ),
            ("descriptorSet", "base64,!"),
            ("descriptorSet", "base64,/////w=="),
        ] {
            assert!(Contract::read(key, content).is_err(), "{content}");
        }
    }
}
