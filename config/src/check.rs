//! The check of a positioned tree against a JSON Schema generated from the types.
//!
//! Owns the shape of a document: which keys there are, which must be there, what a value looks
//! like. All problems are found, each at its own place. It reads the part of JSON Schema that the
//! types give rise to, not all of it; a test checks the same schema with a complete validator.

use serde_json::Value as Json;

use crate::format;
use crate::report::{Problem, Severity};
use crate::suggest::closest;
use crate::tree::{Entry, Node, Place, Value};

/// Something that is wrong with the shape.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) code: &'static str,
    pub(crate) place: Place,
    pub(crate) path: String,
    pub(crate) message: String,
    pub(crate) help: Option<String>,
}

impl Fault {
    pub(crate) fn into_problem(self, file: &str) -> Problem {
        let severity = if self.code.starts_with('W') {
            Severity::Warning
        } else {
            Severity::Error
        };
        Problem {
            severity,
            code: self.code,
            file: file.to_owned(),
            line: self.place.line,
            column: self.place.column,
            path: self.path,
            message: self.message,
            help: self.help,
        }
    }
}

/// Checks `node`, which stands at `path`, against `schema`; `root` holds the `$defs`.
///
/// An unknown key is an error where the schema refuses others, else a warning.
pub(crate) fn check(node: &Node, path: &str, schema: &Json, root: &Json) -> Vec<Fault> {
    let mut walk = Walk {
        root,
        path: path.to_owned(),
        faults: Vec::new(),
    };
    walk.node(node, schema);
    walk.faults
}

struct Walk<'a> {
    root: &'a Json,
    path: String,
    faults: Vec<Fault>,
}

impl<'a> Walk<'a> {
    fn node(&mut self, node: &Node, schema: &'a Json) {
        let schema = self.resolve(schema, node);
        if let Some(outcome) = schema["format"]
            .as_str()
            .and_then(|format| format::check(format, node))
        {
            if let Err(message) = outcome {
                self.fault("E106", node.place, message, None);
            }
            return;
        }
        if let Some(words) = words_of(schema) {
            self.word(node, &words);
            return;
        }
        match (type_of(schema), &node.value) {
            (Some("object"), Value::Map(entries)) => self.map(node, entries, schema),
            (Some("array"), Value::List(items)) => self.list(node, items, schema),
            (Some("integer" | "number"), Value::Number(_)) => self.number(node, schema),
            (Some("string"), Value::Text(_)) | (Some("boolean"), Value::Bool(_)) | (None, _) => {}
            (Some(expected), _) => self.wrong_type(node, expected),
        }
    }

    /// Follows references, and unions with null or between a value and a list of them.
    fn resolve(&self, schema: &'a Json, node: &Node) -> &'a Json {
        let mut schema = schema;
        // References do not nest deeper than a few; the bound makes a cycle harmless.
        for _ in 0..16 {
            if let Some(name) = schema["$ref"]
                .as_str()
                .and_then(|r| r.strip_prefix("#/$defs/"))
            {
                schema = &self.root["$defs"][name];
            } else if let Some(branches) = schema["anyOf"].as_array() {
                let is_list = matches!(node.value, Value::List(_));
                let fits = |branch: &&Json| (type_of(branch) == Some("array")) == is_list;
                let mut real = branches.iter().filter(|branch| branch["type"] != "null");
                let first = real.clone().next();
                let Some(branch) = real.find(fits).or(first) else {
                    return schema;
                };
                schema = branch;
            } else {
                break;
            }
        }
        schema
    }

    fn map(&mut self, node: &Node, entries: &[Entry], schema: &'a Json) {
        let properties = schema["properties"].as_object();
        let others = &schema["additionalProperties"];
        for entry in entries {
            let known = properties.and_then(|properties| properties.get(&entry.key));
            let length = self.push_key(&entry.key);
            match known {
                Some(_) if matches!(entry.node.value, Value::Null) => {}
                Some(property) => self.node(&entry.node, property),
                None if others.is_object() => self.node(&entry.node, others),
                None if properties.is_none() && others.is_null() => {}
                None => {
                    let names = properties
                        .into_iter()
                        .flat_map(|properties| properties.keys());
                    let names: Vec<&str> = names.map(String::as_str).collect();
                    self.unknown_key(entry, &names, others == &Json::Bool(false));
                }
            }
            self.path.truncate(length);
        }
        for key in schema["required"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Json::as_str)
        {
            if node.get(key).is_none() {
                self.fault("E107", node.place, format!("\"{key}\" is missing"), None);
            }
        }
        if schema["x-exactly-one"] == true {
            self.exactly_one(node, entries, properties.into_iter().flat_map(|p| p.keys()));
        }
    }

    fn unknown_key(&mut self, entry: &Entry, known: &[&str], refused: bool) {
        let code = if refused { "E103" } else { "W103" };
        let help = match closest(&entry.key, known.iter().copied()) {
            Some(name) => Some(format!("did you mean \"{name}\"?")),
            None if known.is_empty() => Some("nothing can be set here".to_owned()),
            None if known.len() <= 12 => Some(format!("known are {}", known.join(", "))),
            None => None,
        };
        self.fault(code, entry.place, "unknown field".to_owned(), help);
    }

    fn exactly_one<'k>(
        &mut self,
        node: &Node,
        entries: &[Entry],
        members: impl Iterator<Item = &'k String>,
    ) {
        let members: Vec<&str> = members.map(String::as_str).collect();
        let known = entries
            .iter()
            .filter(|entry| members.contains(&entry.key.as_str()));
        let set: Vec<&Entry> = known
            .filter(|entry| !matches!(entry.node.value, Value::Null))
            .collect();
        let all = members.join(", ");
        match set.as_slice() {
            [_] => {}
            [] => self.fault(
                "E105",
                node.place,
                format!("exactly one of {all} must be set"),
                None,
            ),
            [_, second, ..] => {
                let names: Vec<&str> = set.iter().map(|entry| entry.key.as_str()).collect();
                let message = format!(
                    "exactly one of {all} may be set, found {}",
                    names.join(" and ")
                );
                self.fault("E105", second.place, message, None);
            }
        }
    }

    fn list(&mut self, node: &Node, items: &[Node], schema: &'a Json) {
        if schema["minItems"]
            .as_u64()
            .is_some_and(|least| (items.len() as u64) < least)
        {
            self.fault(
                "E108",
                node.place,
                "the list must not be empty".to_owned(),
                None,
            );
        }
        for (index, item) in items.iter().enumerate() {
            let length = self.path.len();
            self.path.push_str(&format!("[{index}]"));
            self.node(item, &schema["items"]);
            self.path.truncate(length);
        }
    }

    fn number(&mut self, node: &Node, schema: &Json) {
        let Value::Number(number) = &node.value else {
            return;
        };
        if type_of(schema) == Some("integer")
            && number.as_i64().is_none()
            && number.as_u64().is_none()
        {
            return self.wrong_type(node, "integer");
        }
        let widest = match schema["format"].as_str() {
            Some("uint8") => 255.0,
            Some("uint16") => 65_535.0,
            Some("uint32") => f64::from(u32::MAX),
            _ => f64::MAX,
        };
        let least = schema["minimum"].as_f64();
        let most = schema["maximum"].as_f64().unwrap_or(widest).min(widest);
        let value = number.as_f64().unwrap_or(f64::MAX);
        if least.is_some_and(|least| value < least) || value > most {
            let bounds = match least {
                Some(least) if most < f64::MAX => format!("from {least} to {most}"),
                Some(least) => format!("of at least {least}"),
                None => format!("of at most {most}"),
            };
            self.fault(
                "E108",
                node.place,
                format!("expected a number {bounds}, found {number}"),
                None,
            );
        }
    }

    fn word(&mut self, node: &Node, words: &[&str]) {
        match node.text() {
            Some(text) if words.contains(&text) => {}
            text => {
                let help = text
                    .and_then(|text| closest(text, words.iter().copied()))
                    .map(|word| format!("did you mean \"{word}\"?"));
                let message = format!("expected {}, found {}", list_words(words), node.describe());
                self.fault("E104", node.place, message, help);
            }
        }
    }

    fn wrong_type(&mut self, node: &Node, expected: &str) {
        let expected_words = match expected {
            "object" => "a map",
            "array" => "a list",
            "integer" => "a whole number",
            "number" => "a number",
            "boolean" => "true or false",
            _ => "text",
        };
        let help = match (expected, &node.value) {
            ("string", Value::Number(number)) => Some(format!("write \"{number}\" in quotes")),
            ("string", Value::Bool(value)) => Some(format!("write \"{value}\" in quotes")),
            ("integer" | "number" | "boolean", Value::Text(_)) => {
                Some("write it without quotes".to_owned()).filter(|_| {
                    node.text().is_some_and(|text| {
                        text.parse::<f64>().is_ok() || matches!(text, "true" | "false")
                    })
                })
            }
            _ => None,
        };
        let message = format!("expected {expected_words}, found {}", node.describe());
        self.fault("E109", node.place, message, help);
    }

    fn push_key(&mut self, key: &str) -> usize {
        let length = self.path.len();
        if !self.path.is_empty() {
            self.path.push('.');
        }
        self.path.push_str(&crate::tree::shorten(key));
        length
    }

    fn fault(&mut self, code: &'static str, place: Place, message: String, help: Option<String>) {
        self.faults.push(Fault {
            code,
            place,
            path: self.path.clone(),
            message,
            help,
        });
    }
}

fn list_words(words: &[&str]) -> String {
    match words {
        [one] => (*one).to_owned(),
        [rest @ .., last] => format!("{} or {last}", rest.join(", ")),
        [] => String::new(),
    }
}

/// The type that is not null.
fn type_of(schema: &Json) -> Option<&str> {
    match &schema["type"] {
        Json::String(name) => Some(name),
        Json::Array(names) => names
            .iter()
            .filter_map(Json::as_str)
            .find(|name| *name != "null"),
        _ => None,
    }
}

/// The words of an enumeration, in either of the two forms that schemars writes.
fn words_of(schema: &Json) -> Option<Vec<&str>> {
    if let Some(words) = schema["enum"].as_array() {
        return Some(words.iter().filter_map(Json::as_str).collect());
    }
    let branches = schema["oneOf"].as_array()?;
    Some(
        branches
            .iter()
            .flat_map(|branch| {
                let several = branch["enum"].as_array().into_iter().flatten();
                branch["const"]
                    .as_str()
                    .into_iter()
                    .chain(several.filter_map(Json::as_str))
            })
            .collect(),
    )
}
