//! What the control plane has sent, and what of it is in effect.
//!
//! Owns the two states and their difference. They differ while a push is refused: the control plane
//! counts a refused resource as sent and later sends only what changed, so what was sent has to be
//! kept although it is not in effect. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use outrigger_config::wire::{
    self, Any, DOCUMENT_TYPE, DeltaDiscoveryResponse, Document, ENDPOINTS_TYPE, Endpoints,
};
use sha2::{Digest as _, Sha256};

use super::{ConfigSink, DocumentSet, LastGood, NamedDocument, Update};

/// How many broken resources a refusal names.
const MAX_NAMED: usize = 20;

/// Both states.
#[derive(Debug, Default)]
pub(super) struct Received {
    sent: LastGood,
    /// Resources of either type that could not be read, with the reason.
    broken: BTreeMap<(String, String), String>,
    in_effect: Option<LastGood>,
    endpoints_answered: bool,
}

impl Received {
    /// Starts from what is in effect already.
    pub(super) fn resumed(last_good: LastGood) -> Self {
        Self {
            sent: last_good.clone(),
            in_effect: Some(last_good),
            ..Self::default()
        }
    }

    /// What is in effect.
    pub(super) fn in_effect(&self) -> Option<&LastGood> {
        self.in_effect.as_ref()
    }

    /// Name to version of what is in effect, for a new stream.
    pub(super) fn versions(&self, type_url: &str) -> BTreeMap<String, String> {
        let Some(state) = &self.in_effect else {
            return BTreeMap::new();
        };
        if type_url == ENDPOINTS_TYPE {
            let endpoints = state.endpoints.iter();
            endpoints
                .map(|(name, e)| (name.clone(), e.version.clone()))
                .collect()
        } else {
            let documents = state.documents.iter();
            documents
                .map(|(name, d)| (name.clone(), d.version.to_string()))
                .collect()
        }
    }

    /// A stream ended: the next one starts from what is in effect, as [`Received::versions`] says.
    pub(super) fn disconnected(&mut self) {
        self.sent = self.in_effect.clone().unwrap_or_default();
        self.broken.clear();
        self.endpoints_answered = false;
    }

    /// Whether the first documents should wait: without endpoints, every call would fail.
    pub(super) fn must_wait_for_endpoints(&self) -> bool {
        self.in_effect.is_none() && !self.endpoints_answered
    }

    /// Takes in a response; nothing comes into effect yet.
    pub(super) fn take(&mut self, response: &DeltaDiscoveryResponse) {
        let type_url = &response.type_url;
        self.endpoints_answered |= type_url == ENDPOINTS_TYPE;
        for resource in &response.resources {
            let key = (type_url.clone(), resource.name.clone());
            let any = resource.resource.as_ref();
            let read = match type_url.as_str() {
                DOCUMENT_TYPE => read_document(&resource.name, &resource.version, any).map(|d| {
                    self.sent.documents.insert(resource.name.clone(), d);
                }),
                ENDPOINTS_TYPE => read_endpoints(&resource.name, &resource.version, any).map(|e| {
                    self.sent.endpoints.insert(resource.name.clone(), e);
                }),
                _ => Err("nobody asked for this type".to_owned()),
            };
            match read {
                Ok(()) => self.broken.remove(&key),
                Err(problem) => self.broken.insert(key, problem),
            };
        }
        for name in &response.removed_resources {
            self.broken.remove(&(type_url.clone(), name.clone()));
            match type_url.as_str() {
                DOCUMENT_TYPE => drop(self.sent.documents.remove(name)),
                ENDPOINTS_TYPE => drop(self.sent.endpoints.remove(name)),
                _ => {}
            }
        }
        if type_url == DOCUMENT_TYPE {
            self.sent.version.clone_from(&response.system_version_info);
        }
    }

    /// Brings what was sent of one type into effect; true when anything changed. Documents take
    /// endpoints that wait along; endpoints before the first documents wait for them.
    pub(super) fn apply(
        &mut self,
        type_url: &str,
        sink: &mut impl ConfigSink,
    ) -> Result<bool, String> {
        self.check_readable(type_url)?;
        let documents = type_url == DOCUMENT_TYPE;
        if self.in_effect.is_none() && !documents {
            return Ok(false);
        }
        let nothing = LastGood::default();
        let old = self.in_effect.as_ref().unwrap_or(&nothing);
        let is_news = |(name, endpoints): &(&String, &Arc<Endpoints>)| {
            old.endpoints
                .get(*name)
                .is_none_or(|old| old.version != endpoints.version)
        };
        let changed = self
            .sent
            .endpoints
            .iter()
            .filter(is_news)
            .map(|(_, e)| e.clone());
        let is_gone = |name: &&String| !self.sent.endpoints.contains_key(*name);
        let mut update = Update {
            documents: None,
            endpoints: changed.collect(),
            removed_endpoints: old.endpoints.keys().filter(is_gone).cloned().collect(),
        };
        if documents && (self.in_effect.is_none() || self.sent.documents != old.documents) {
            if self.sent.documents.is_empty() {
                return Err("an empty set of documents is not taken".to_owned());
            }
            let (version, documents) = (self.sent.version.clone(), self.sent.documents.clone());
            update.documents = Some(DocumentSet { version, documents });
        }
        if update == Update::default() {
            return Ok(false);
        }
        let with_documents = update.documents.is_some();
        sink.apply(update)?;
        let in_effect = self.in_effect.get_or_insert_default();
        in_effect.endpoints = self.sent.endpoints.clone();
        if with_documents {
            in_effect.documents = self.sent.documents.clone();
            in_effect.version = self.sent.version.clone();
        }
        Ok(true)
    }

    fn check_readable(&self, type_url: &str) -> Result<(), String> {
        let broken = self
            .broken
            .iter()
            .filter(|((of_type, _), _)| of_type == type_url);
        let lines: Vec<_> = broken
            .map(|((_, name), problem)| format!("{name:.200}: {problem}"))
            .take(MAX_NAMED)
            .collect();
        if lines.is_empty() {
            Ok(())
        } else {
            Err(lines.join("\n"))
        }
    }
}

fn read_document(name: &str, version: &str, any: Option<&Any>) -> Result<NamedDocument, String> {
    let document: Document = wire::unpack(any.ok_or("it has no content")?)?;
    if document.name != name {
        return Err(format!("it calls itself {:.200}", document.name));
    }
    if document.sha256 != Sha256::digest(&document.yaml)[..] {
        return Err("its checksum does not match".to_owned());
    }
    Ok(NamedDocument {
        version: version.into(),
        json: document.yaml.into(),
    })
}

fn read_endpoints(name: &str, version: &str, any: Option<&Any>) -> Result<Arc<Endpoints>, String> {
    let mut endpoints: Endpoints = wire::unpack(any.ok_or("it has no content")?)?;
    if endpoints.service != name {
        return Err(format!("it calls itself {:.200}", endpoints.service));
    }
    // The version that counts on a reconnect is the resource's.
    version.clone_into(&mut endpoints.version);
    Ok(Arc::new(endpoints))
}

#[cfg(test)]
mod tests {
    use outrigger_config::wire::{Endpoint, Resource, pack};

    use super::*;

    /// Refuses documents whose text is `bad`; notes what it took.
    #[derive(Default)]
    struct Sink(Vec<Update>);

    impl ConfigSink for Sink {
        fn apply(&mut self, update: Update) -> Result<(), String> {
            let documents = update.documents.iter().flat_map(|set| &set.documents);
            for (name, document) in documents {
                if &*document.json == "bad" {
                    return Err(format!("{name}: bad"));
                }
            }
            self.0.push(update);
            Ok(())
        }
    }

    fn documents(version: &str, set: &[(&str, &str)], removed: &[&str]) -> DeltaDiscoveryResponse {
        let resource = |(name, text): &(&str, &str)| {
            let document = Document {
                name: (*name).into(),
                yaml: (*text).into(),
                sha256: Sha256::digest(text).to_vec().into(),
                generation: 0,
            };
            Resource {
                version: format!("v-{text}"),
                resource: Some(pack(&document)),
                name: (*name).into(),
            }
        };
        DeltaDiscoveryResponse {
            system_version_info: version.into(),
            resources: set.iter().map(resource).collect(),
            type_url: DOCUMENT_TYPE.into(),
            removed_resources: removed.iter().map(|n| (*n).to_owned()).collect(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    fn endpoints(set: &[(&str, u32)]) -> DeltaDiscoveryResponse {
        let resource = |(service, port): &(&str, u32)| {
            let endpoint = Endpoint {
                id: "1".into(),
                port: *port,
                ..Endpoint::default()
            };
            let message = Endpoints {
                service: (*service).into(),
                endpoints: vec![endpoint],
                version: port.to_string(),
            };
            Resource {
                version: port.to_string(),
                resource: Some(pack(&message)),
                name: (*service).into(),
            }
        };
        DeltaDiscoveryResponse {
            resources: set.iter().map(resource).collect(),
            type_url: ENDPOINTS_TYPE.into(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    fn step(
        received: &mut Received,
        sink: &mut Sink,
        response: &DeltaDiscoveryResponse,
    ) -> Result<bool, String> {
        received.take(response);
        received.apply(&response.type_url, sink)
    }

    fn texts(update: &Update) -> Vec<&str> {
        let set = update.documents.as_ref().expect("documents");
        set.documents.values().map(|d| &*d.json).collect()
    }

    #[test]
    fn endpoints_wait_for_the_first_documents_and_come_with_them() {
        let (mut received, mut sink) = (Received::default(), Sink::default());
        assert!(received.must_wait_for_endpoints());
        assert_eq!(
            step(&mut received, &mut sink, &endpoints(&[("s/a", 1)])),
            Ok(false)
        );
        assert!(!received.must_wait_for_endpoints());
        assert!(sink.0.is_empty());
        assert_eq!(
            step(
                &mut received,
                &mut sink,
                &documents("1", &[("a", "x")], &[])
            ),
            Ok(true)
        );
        assert_eq!(texts(&sink.0[0]), ["x"]);
        assert_eq!(sink.0[0].endpoints[0].service, "s/a");
    }

    #[test]
    fn each_change_brings_the_whole_set_of_documents_but_only_changed_endpoints() {
        let (mut received, mut sink) = (Received::default(), Sink::default());
        step(
            &mut received,
            &mut sink,
            &endpoints(&[("s/a", 1), ("s/b", 1)]),
        )
        .expect("taken");
        step(
            &mut received,
            &mut sink,
            &documents("1", &[("a", "x"), ("b", "y")], &[]),
        )
        .expect("taken");
        step(
            &mut received,
            &mut sink,
            &documents("2", &[("c", "z")], &["a"]),
        )
        .expect("taken");
        assert_eq!(texts(&sink.0[1]), ["y", "z"]);
        assert!(sink.0[1].endpoints.is_empty());
        step(&mut received, &mut sink, &endpoints(&[("s/b", 2)])).expect("taken");
        assert_eq!(sink.0[2].documents, None);
        assert_eq!(sink.0[2].endpoints.len(), 1);
        let mut gone = endpoints(&[]);
        gone.removed_resources = vec!["s/a".into()];
        step(&mut received, &mut sink, &gone).expect("taken");
        assert_eq!(sink.0[3].removed_endpoints, ["s/a"]);
        assert_eq!(step(&mut received, &mut sink, &endpoints(&[])), Ok(false));
    }

    #[test]
    fn a_refused_push_is_kept_apart_and_the_repair_completes_it() {
        let (mut received, mut sink) = (Received::default(), Sink::default());
        received.take(&endpoints(&[]));
        step(
            &mut received,
            &mut sink,
            &documents("1", &[("a", "x"), ("b", "y")], &[]),
        )
        .expect("taken");
        let refused = step(
            &mut received,
            &mut sink,
            &documents("2", &[("a", "new"), ("b", "bad")], &[]),
        );
        assert_eq!(refused, Err("b: bad".to_owned()));
        assert_eq!(received.versions(DOCUMENT_TYPE)["a"], "v-x");
        step(&mut received, &mut sink, &endpoints(&[("s/a", 1)])).expect("endpoints still flow");
        assert_eq!(sink.0.last().expect("one").documents, None);
        step(
            &mut received,
            &mut sink,
            &documents("3", &[("b", "good")], &[]),
        )
        .expect("taken");
        assert_eq!(texts(sink.0.last().expect("one")), ["new", "good"]);
    }

    #[test]
    fn after_a_broken_stream_the_base_is_what_is_in_effect() {
        let (mut received, mut sink) = (Received::default(), Sink::default());
        received.take(&endpoints(&[]));
        step(
            &mut received,
            &mut sink,
            &documents("1", &[("a", "x")], &[]),
        )
        .expect("taken");
        step(
            &mut received,
            &mut sink,
            &documents("2", &[("a", "bad")], &[]),
        )
        .expect_err("refused");
        received.disconnected();
        let versions = received.versions(DOCUMENT_TYPE);
        assert_eq!(
            versions,
            BTreeMap::from([("a".to_owned(), "v-x".to_owned())])
        );
        step(
            &mut received,
            &mut sink,
            &documents("3", &[("b", "y")], &[]),
        )
        .expect("taken");
        assert_eq!(texts(sink.0.last().expect("one")), ["x", "y"]);
    }

    #[test]
    fn unreadable_resources_are_refused_until_they_are_repaired() {
        let (mut received, mut sink) = (Received::default(), Sink::default());
        received.take(&endpoints(&[]));
        let mut response = documents("1", &[("a", "x"), ("b", "y"), ("c", "z")], &[]);
        response.resources[0].resource = None;
        response.resources[1].name = "other".into();
        let mut tampered = Document {
            name: "c".into(),
            yaml: "z".into(),
            ..Document::default()
        };
        tampered.sha256 = vec![0; 32].into();
        response.resources[2].resource = Some(pack(&tampered));
        let problem = step(&mut received, &mut sink, &response).expect_err("refused");
        for part in [
            "a: it has no content",
            "other: it calls itself b",
            "c: its checksum",
        ] {
            assert!(problem.contains(part), "{problem}");
        }
        let repair = documents("2", &[("a", "x"), ("b", "y"), ("c", "z")], &["other"]);
        assert_eq!(step(&mut received, &mut sink, &repair), Ok(true));
    }

    #[test]
    fn an_empty_set_never_wipes_a_good_one() {
        let (mut received, mut sink) = (Received::default(), Sink::default());
        received.take(&endpoints(&[]));
        assert!(step(&mut received, &mut sink, &documents("0", &[], &[])).is_err());
        step(
            &mut received,
            &mut sink,
            &documents("1", &[("a", "x")], &[]),
        )
        .expect("taken");
        assert!(step(&mut received, &mut sink, &documents("2", &[], &["a"])).is_err());
        assert_eq!(received.versions(DOCUMENT_TYPE).len(), 1);
    }
}
