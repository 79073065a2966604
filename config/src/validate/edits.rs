//! Checks of what a rule makes of a request's path and host, and of what it answers itself.

use super::{Checks, Subject};
use crate::format::is_path;
use crate::model::{PathEdit, PathEditType, PathMatchType, RespondStep, RouteMatch, Rule};

impl Checks<'_> {
    /// `redirect`, `rewrite` and `respond` of a rule.
    pub(super) fn answers(&mut self, at: Subject<'_>, base: &str, rule: &Rule) {
        let set: Vec<&str> = [
            ("redirect", rule.redirect.is_some()),
            ("respond", rule.respond.is_some()),
            ("rewrite", rule.rewrite.is_some()),
        ]
        .into_iter()
        .filter_map(|(key, set)| set.then_some(key))
        .collect();
        if let [first, second, ..] = set.as_slice() {
            let message = format!("{first} and {second} exclude each other");
            self.error(at, "E323", &format!("{base}.{second}"), message);
        }
        if let Some(redirect) = &rule.redirect {
            if let Some(scheme) = &redirect.scheme
                && !["http", "https"].contains(&scheme.as_str())
            {
                let message = format!("expected http or https, found {scheme:?}");
                self.error(at, "E322", &format!("{base}.redirect.scheme"), message);
            }
            self.path_edit(
                at,
                &format!("{base}.redirect.path"),
                redirect.path.as_ref(),
                &rule.matches,
            );
        }
        if let Some(rewrite) = &rule.rewrite {
            let path = format!("{base}.rewrite.path");
            self.path_edit(at, &path, rewrite.path.as_ref(), &rule.matches);
        }
        self.respond(at, &format!("{base}.respond"), rule.respond.as_ref());
    }

    /// A fixed answer.
    pub(super) fn respond(&mut self, at: Subject<'_>, path: &str, spec: Option<&RespondStep>) {
        let Some(kind) = spec.and_then(|spec| spec.content_type.as_ref()) else {
            return;
        };
        let text = |byte: u8| (b' '..=b'~').contains(&byte);
        if kind.is_empty() || !kind.bytes().all(text) {
            let path = format!("{path}.contentType");
            self.error(at, "E309", &path, "not a content type");
        }
    }

    fn path_edit(
        &mut self,
        at: Subject<'_>,
        path: &str,
        edit: Option<&PathEdit>,
        matches: &[RouteMatch],
    ) {
        let Some(edit) = edit else { return };
        let (key, value, other) = match edit.type_ {
            PathEditType::ReplaceFullPath => (
                "replaceFullPath",
                &edit.replace_full_path,
                &edit.replace_prefix_match,
            ),
            PathEditType::ReplacePrefixMatch => (
                "replacePrefixMatch",
                &edit.replace_prefix_match,
                &edit.replace_full_path,
            ),
        };
        let Some(value) = value.as_deref().filter(|_| other.is_none()) else {
            let message = format!("the type {:?} needs {key} and nothing else", edit.type_);
            return self.error(at, "E322", path, message);
        };
        let prefix = edit.type_ == PathEditType::ReplacePrefixMatch;
        if !(is_path(value) || prefix && value.is_empty()) {
            let message = "expected a path that begins with \"/\", without a query";
            self.error(at, "E322", &format!("{path}.{key}"), message);
        }
        if prefix && matched_prefix(matches).is_none() {
            let message = "all matches of the rule must be of one and the same PathPrefix";
            self.error(at, "E322", &format!("{path}.{key}"), message);
        }
    }
}

/// The one prefix that all of `matches` ask for; `/` where they say nothing of the path.
pub(crate) fn matched_prefix(matches: &[RouteMatch]) -> Option<&str> {
    let mut found = None;
    for condition in matches {
        let prefix = match (&condition.path, &condition.grpc) {
            (Some(path), None) if path.type_ == PathMatchType::PathPrefix => path.value.as_str(),
            (None, None) => "/",
            _ => return None,
        };
        if *found.get_or_insert(prefix) != prefix {
            return None;
        }
    }
    Some(found.unwrap_or("/"))
}
