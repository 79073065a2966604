//! The positioned tree: every key and value of a document with its line and column.
//!
//! Owns parsing, the budgets against hostile input, and the way from a path back to a place. The
//! YAML parser is behind [`parse`] and nowhere else. Knows nothing of kinds or schemas.

use std::collections::{HashMap, HashSet};

use crate::report::{Problem, Severity};
use granit_parser::{Event, Marker, Parser, ScalarStyle, Span, Tag};
use serde_json::{Map, Number, Value as Json};

/// The largest source: far above any real one, far below what would hold a process up.
pub(crate) const MAX_SOURCE_BYTES: usize = 8 << 20;
/// The deepest nesting; the contract needs nine levels.
const MAX_DEPTH: usize = 64;
/// The most nodes of one source, aliases expanded.
const MAX_NODES: usize = 1_000_000;
/// The most nodes that aliases may add to one document.
const MAX_ALIASED: usize = 50_000;

/// A place in a source; both from 1, the column in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) line: usize,
    pub(crate) column: usize,
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

/// What a node holds.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key and its value.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) place: Place,
    pub(crate) node: Node,
}

/// Text that could not be read.
#[derive(Debug)]
pub(crate) struct Flaw {
    pub(crate) code: &'static str,
    pub(crate) place: Place,
    pub(crate) message: String,
    pub(crate) help: Option<String>,
}

impl Flaw {
    pub(crate) fn into_problem(self, file: &str) -> Problem {
        Problem {
            severity: Severity::Error,
            code: self.code,
            file: file.to_owned(),
            line: self.place.line,
            column: self.place.column,
            path: String::new(),
            message: self.message,
            help: self.help,
        }
    }
}

/// One document, or what of it could be read.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    /// None for an empty document, and where the text is broken.
    pub(crate) root: Option<Node>,
    pub(crate) flaws: Vec<Flaw>,
}

impl Node {
    /// The value of a key, unless it is null.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        let Value::Map(entries) = &self.value else {
            return None;
        };
        let entry = entries.iter().find(|entry| entry.key == key)?;
        (!matches!(entry.node.value, Value::Null)).then_some(&entry.node)
    }

    /// The value of a key, to be replaced.
    pub(crate) fn get_mut(&mut self, key: &str) -> Option<&mut Node> {
        let Value::Map(entries) = &mut self.value else {
            return None;
        };
        let entry = entries.iter_mut().find(|entry| entry.key == key)?;
        Some(&mut entry.node)
    }

    /// The text of a string.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Where the deepest part of `path` stands that is there: the value if it is a scalar, which is
    /// itself the culprit, else its key.
    pub(crate) fn place_of(&self, path: &str) -> Place {
        let mut place = self.place;
        let mut node = self;
        for step in path.split(['.', '[']).filter(|step| !step.is_empty()) {
            let next = match (&node.value, step.strip_suffix(']')) {
                (Value::List(items), Some(index)) => index
                    .parse::<usize>()
                    .ok()
                    .and_then(|index| items.get(index))
                    .map(|item| (item.place, item)),
                (Value::Map(entries), None) => entries
                    .iter()
                    .find(|entry| entry.key == step)
                    .map(|entry| (entry.place, &entry.node)),
                _ => None,
            };
            let Some((next_place, next_node)) = next else {
                return place;
            };
            (place, node) = (next_place, next_node);
        }
        match node.value {
            Value::Map(_) | Value::List(_) | Value::Null => place,
            _ => node.place,
        }
    }

    /// The content without places; keys that are null are as good as absent.
    pub(crate) fn to_json(&self) -> Json {
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(value) => Json::Bool(*value),
            Value::Number(number) => Json::Number(number.clone()),
            Value::Text(text) => Json::String(text.clone()),
            Value::List(items) => items.iter().map(Node::to_json).collect(),
            Value::Map(entries) => Json::Object(
                entries
                    .iter()
                    .filter(|entry| !matches!(entry.node.value, Value::Null))
                    .map(|entry| (entry.key.clone(), entry.node.to_json()))
                    .collect::<Map<_, _>>(),
            ),
        }
    }

    /// What the value is, for a person.
    pub(crate) fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("{value}"),
            Value::Number(number) => format!("the number {number}"),
            Value::Text(text) => format!("{:?}", shorten(text)),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        }
    }
}

/// The beginning of a text that may be long.
pub(crate) fn shorten(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Parses every document of a text. A broken document does not hide the others.
pub(crate) fn parse(text: &str) -> Vec<Parsed> {
    let start = Place { line: 1, column: 1 };
    if text.len() > MAX_SOURCE_BYTES {
        return vec![limit(
            start,
            format!(
                "the file is {} bytes long, more than the {MAX_SOURCE_BYTES} that are read",
                text.len()
            ),
        )];
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some(place) = place_of_char(text, |c| c == char::REPLACEMENT_CHARACTER) {
        return vec![Parsed {
            root: None,
            flaws: vec![flaw("E004", place, "the text is not UTF-8".to_owned())],
        }];
    }
    let mut budget = MAX_NODES;
    let mut documents = Vec::new();
    for (chunk, line) in split(text) {
        parse_chunk(chunk, line, &mut budget, &mut documents);
    }
    documents
}

fn flaw(code: &'static str, place: Place, message: String) -> Flaw {
    Flaw {
        code,
        place,
        message,
        help: None,
    }
}

fn limit(place: Place, message: String) -> Parsed {
    Parsed {
        root: None,
        flaws: vec![flaw("E002", place, message)],
    }
}

fn place_of_char(text: &str, is: impl Fn(char) -> bool) -> Option<Place> {
    let (line, found) = text
        .split('\n')
        .enumerate()
        .find(|(_, line)| line.contains(&is))?;
    let column = found.chars().position(is)? + 1;
    Some(Place {
        line: line + 1,
        column,
    })
}

/// Splits a stream at its `---` lines, which mark a document wherever they stand (YAML 1.2 §9.1.2).
/// Gives each part with the number of lines before it.
fn split(text: &str) -> Vec<(&str, usize)> {
    let mut parts = Vec::new();
    let (mut start, mut start_line) = (0, 0);
    let mut offset = 0;
    for (line, content) in text.split_inclusive('\n').enumerate() {
        let marker = content
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && offset > start {
            parts.push((&text[start..offset], start_line));
            (start, start_line) = (offset, line);
        }
        offset += content.len();
    }
    parts.push((&text[start..], start_line));
    // Directives before the first `---` belong to nothing that we read.
    parts.retain(|(part, _)| {
        !part.lines().all(|line| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#') || line.starts_with('%')
        })
    });
    parts
}

fn parse_chunk(text: &str, lines_before: usize, budget: &mut usize, documents: &mut Vec<Parsed>) {
    let options = granit_parser::options! { emit_comments: false, emit_unresolved_aliases: true };
    let mut parser = Parser::new_from_str_with_options(text, options);
    let mut builder = Builder::new(lines_before, budget);
    loop {
        match parser.next_event() {
            None => break,
            Some(Ok((Event::DocumentEnd, _))) => {
                documents.push(builder.finish());
            }
            Some(Ok((event, span))) => {
                if let Err(stop) = builder.take(event, span) {
                    documents.push(builder.abandon(stop));
                    break;
                }
            }
            Some(Err(error)) => {
                let place = builder.place(*error.marker());
                let message = format!("broken YAML: {}", error.info());
                documents.push(builder.abandon(flaw("E001", place, message)));
                break;
            }
        }
    }
}

/// A collection that is being filled.
enum Open {
    List {
        place: Place,
        anchor: usize,
        items: Vec<Node>,
    },
    Map {
        place: Place,
        anchor: usize,
        entries: Vec<Entry>,
        seen: HashSet<String>,
        key: Key,
    },
}

/// What a map waits for.
enum Key {
    Awaited,
    Taken {
        key: String,
        place: Place,
    },
    /// The value that follows is dropped: its key was refused.
    Refused,
}

struct Builder<'a> {
    lines_before: usize,
    budget: &'a mut usize,
    aliased: usize,
    open: Vec<Open>,
    root: Option<Node>,
    anchors: HashMap<usize, (Node, Extent)>,
    flaws: Vec<Flaw>,
}

/// How large a subtree is.
#[derive(Clone, Copy)]
struct Extent {
    nodes: usize,
    depth: usize,
}

impl<'a> Builder<'a> {
    fn new(lines_before: usize, budget: &'a mut usize) -> Self {
        Self {
            lines_before,
            budget,
            aliased: 0,
            open: Vec::new(),
            root: None,
            anchors: HashMap::new(),
            flaws: Vec::new(),
        }
    }

    fn place(&self, marker: Marker) -> Place {
        Place {
            line: marker.line().max(1) + self.lines_before,
            column: marker.col() + 1,
        }
    }

    fn finish(&mut self) -> Parsed {
        self.open.clear();
        self.anchors.clear();
        self.aliased = 0;
        Parsed {
            root: self.root.take(),
            flaws: std::mem::take(&mut self.flaws),
        }
    }

    fn abandon(&mut self, stop: Flaw) -> Parsed {
        self.root = None;
        self.flaws.push(stop);
        self.finish()
    }

    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Flaw> {
        let place = self.place(span.start);
        if event.is_node() {
            *self.budget = self.budget.checked_sub(1).ok_or_else(|| {
                flaw(
                    "E002",
                    place,
                    format!("the file has more than {MAX_NODES} values"),
                )
            })?;
        }
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref());
                self.add(Node { place, value }, anchor, Some(&text));
                Ok(())
            }
            Event::SequenceStart(_, anchor, _) => self.push(
                Open::List {
                    place,
                    anchor,
                    items: Vec::new(),
                },
                place,
            ),
            Event::MappingStart(_, anchor, _) => {
                let (entries, seen, key) = (Vec::new(), HashSet::new(), Key::Awaited);
                self.push(
                    Open::Map {
                        place,
                        anchor,
                        entries,
                        seen,
                        key,
                    },
                    place,
                )
            }
            Event::SequenceEnd | Event::MappingEnd => {
                self.close();
                Ok(())
            }
            Event::Alias(id) => self.alias(id, place),
            Event::UnresolvedAlias(name) => {
                let message = format!("broken YAML: no anchor &{} before this", shorten(&name));
                self.flaws.push(flaw("E001", place, message));
                self.add(
                    Node {
                        place,
                        value: Value::Null,
                    },
                    0,
                    None,
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn push(&mut self, open: Open, place: Place) -> Result<(), Flaw> {
        if self.open.len() >= MAX_DEPTH {
            return Err(flaw(
                "E002",
                place,
                format!("nested more than {MAX_DEPTH} levels deep"),
            ));
        }
        self.open.push(open);
        Ok(())
    }

    fn close(&mut self) {
        let (node, anchor) = match self.open.pop() {
            Some(Open::List {
                place,
                anchor,
                items,
            }) => (
                Node {
                    place,
                    value: Value::List(items),
                },
                anchor,
            ),
            Some(Open::Map {
                place,
                anchor,
                entries,
                ..
            }) => (
                Node {
                    place,
                    value: Value::Map(entries),
                },
                anchor,
            ),
            None => return,
        };
        self.add(node, anchor, None);
    }

    fn alias(&mut self, id: usize, place: Place) -> Result<(), Flaw> {
        let Some((node, extent)) = self.anchors.get(&id) else {
            return Err(flaw(
                "E001",
                place,
                "broken YAML: an alias within its own anchor".to_owned(),
            ));
        };
        self.aliased += extent.nodes;
        if self.aliased > MAX_ALIASED || self.open.len() + extent.depth > MAX_DEPTH {
            return Err(flaw(
                "E002",
                place,
                "aliases repeat too much of the document".to_owned(),
            ));
        }
        let node = Node {
            place,
            value: node.value.clone(),
        };
        let text = node.text().map(str::to_owned);
        self.add(node, 0, text.as_deref());
        Ok(())
    }

    /// Puts a finished node where it belongs; `text` is that of a scalar, which may be a key.
    fn add(&mut self, node: Node, anchor: usize, text: Option<&str>) {
        if anchor != 0 {
            let extent = extent(&node);
            self.anchors.insert(anchor, (node.clone(), extent));
        }
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(Open::List { items, .. }) => items.push(node),
            Some(Open::Map {
                entries, seen, key, ..
            }) => match std::mem::replace(key, Key::Awaited) {
                Key::Taken { key, place } => entries.push(Entry { key, place, node }),
                Key::Refused => {}
                Key::Awaited => {
                    let refusal = match text {
                        None => {
                            Some(("E001", "broken YAML: a key must be a plain word".to_owned()))
                        }
                        Some(text) if !seen.insert(text.to_owned()) => Some((
                            "E003",
                            format!("the key \"{}\" is there twice", shorten(text)),
                        )),
                        Some(_) => None,
                    };
                    *key = match (refusal, text) {
                        (None, Some(text)) => Key::Taken {
                            key: text.to_owned(),
                            place: node.place,
                        },
                        (refusal, _) => {
                            let flaws =
                                refusal.map(|(code, message)| flaw(code, node.place, message));
                            self.flaws.extend(flaws);
                            Key::Refused
                        }
                    };
                }
            },
        }
    }
}

fn extent(node: &Node) -> Extent {
    let children: Box<dyn Iterator<Item = &Node>> = match &node.value {
        Value::List(items) => Box::new(items.iter()),
        Value::Map(entries) => Box::new(entries.iter().map(|entry| &entry.node)),
        _ => return Extent { nodes: 1, depth: 0 },
    };
    children
        .map(extent)
        .fold(Extent { nodes: 1, depth: 1 }, |sum, child| Extent {
            nodes: sum.nodes + child.nodes,
            depth: sum.depth.max(child.depth + 1),
        })
}

/// The value of a scalar: YAML 1.2's core schema, but that `0123`, `0x1F`, `.inf` and `1_000` are
/// text, as they are in JSON.
fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Value {
    let is_text = tag.is_some_and(|tag| tag.is_yaml_core_schema_tag("str"));
    if style != ScalarStyle::Plain || is_text {
        return Value::Text(text.to_owned());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let numeric = text.starts_with(|c: char| c == '-' || c.is_ascii_digit());
    match serde_json::from_str::<Number>(text) {
        Ok(number) if numeric => Value::Number(number),
        _ => Value::Text(text.to_owned()),
    }
}
