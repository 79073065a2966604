//! The rules of one discovery stream: what a sidecar has, what it asked for, what to send next.
//!
//! Owns, per stream and type, the subscription, the versions the sidecar is known to have and the
//! one response that waits for its answer. Pure: `server.rs` moves the bytes, `proxies.rs` keeps
//! what is shown to people. Stands on the life of a config update.
//!
//! Follows the xDS protocol's incremental variant
//! (<https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol>). One response of a type is
//! outstanding at a time; what changes meanwhile is not queued but compared anew when the answer is
//! here, so the latest state wins and a slow sidecar costs nothing. Ours differs in one point: the
//! first request of a type is always answered, if need be with nothing, so that a sidecar knows
//! when it has everything.
//!
//! A sidecar that has everything has one of the tables of `render.rs`, and its session holds no more
//! than a pointer to it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use outrigger_config::wire::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, UNREACHABLE_TYPE, WILDCARD,
};
use prost::Message as _;

use crate::render::{Content, PUSH_ORDER, Resources, TypeSet};

/// The most types one stream may ask for. Ours are two; an Envoy asks for about ten.
const MAX_TYPES: usize = 16;

/// The most names one stream may subscribe to in one type.
const MAX_NAMES: usize = 50_000;

/// The most endpoints that a sidecar may say it cannot connect to.
const MAX_UNREACHABLE: usize = 1024;

/// The longest resource or type name, in bytes.
const MAX_NAME_BYTES: usize = 1024;

/// What a request was.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A subscription, first or changed.
    Subscribed,
    /// The outstanding response of this type was accepted.
    Acked {
        /// The type.
        type_url: String,
        /// The version of the set that was sent.
        version: String,
    },
    /// The outstanding response of this type was refused; the sidecar keeps what it had.
    Refused {
        /// The type.
        type_url: String,
        /// The version of the set that was sent.
        version: String,
        /// The sidecar's diagnostics.
        reason: String,
    },
    /// An answer to a response that is no longer outstanding.
    Stale,
    /// What the sidecar cannot connect to is another set than before.
    Unreachable,
}

/// Why a stream is closed. The peer broke the protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The first request names no node.
    #[error("the first request of a stream must carry node.id (at most {MAX_NAME_BYTES} bytes)")]
    NoNode,
    /// No type in the request, or one too long.
    #[error("type_url is empty or too long")]
    BadType,
    /// Too many types, names, or a name too long.
    #[error(
        "too many subscriptions: at most {MAX_TYPES} types, {MAX_NAMES} names of {MAX_NAME_BYTES} bytes"
    )]
    TooMany,
}

/// One stream's state.
#[derive(Debug, Default)]
pub struct Session {
    node: Option<Node>,
    types: BTreeMap<String, TypeState>,
    unreachable: BTreeSet<String>,
    nonces: u64,
}

#[derive(Debug, Default)]
struct TypeState {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Names asked for just now: answered even if unchanged or absent.
    asked: BTreeSet<String>,
    /// The first request has not been answered.
    unanswered: bool,
    known: Known,
    /// What it said that it has, and was sent nothing newer of.
    inherited: BTreeSet<String>,
    outstanding: Option<Outstanding>,
}

/// What the sidecar was sent, or said that it has.
#[derive(Debug)]
enum Known {
    /// Name to version.
    Each(BTreeMap<String, String>),
    /// The whole of a table.
    Table(Arc<TypeSet>),
}

impl Default for Known {
    fn default() -> Self {
        Self::Each(BTreeMap::new())
    }
}

impl Known {
    fn version(&self, name: &str) -> Option<&String> {
        match self {
            Self::Each(versions) => versions.get(name),
            Self::Table(set) => set.resources.get(name).map(|resource| &resource.version),
        }
    }

    /// As a list of its own, to be changed name by name.
    fn each(&mut self) -> &mut BTreeMap<String, String> {
        if let Self::Table(set) = self {
            let versions = set.resources.values();
            let versions = versions.map(|r| (r.name.clone(), r.version.clone()));
            *self = Self::Each(versions.collect());
        }
        match self {
            Self::Each(versions) => versions,
            Self::Table(_) => unreachable!("it was just made a list"),
        }
    }
}

/// A response to be sent, with its nonce.
#[derive(Debug, Clone)]
pub struct Push {
    /// To be repeated by the answer.
    pub nonce: String,
    content: Arc<Content>,
}

/// Everything but the nonce.
impl Deref for Push {
    type Target = DeltaDiscoveryResponse;

    fn deref(&self) -> &DeltaDiscoveryResponse {
        &self.content.response
    }
}

impl Push {
    /// The message as gRPC frames it: a head of this stream's own, and bytes that streams share.
    pub fn frames(&self) -> [Bytes; 2] {
        let nonce = DeltaDiscoveryResponse {
            nonce: self.nonce.clone(),
            ..DeltaDiscoveryResponse::default()
        };
        let length = nonce.encoded_len() + self.content.encoded.len();
        // Not compressed, then the length in four bytes: messages are bounded far below 4 GiB.
        let mut head = vec![0];
        head.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        head.extend(nonce.encode_to_vec());
        [head.into(), self.content.encoded.clone()]
    }
}

#[derive(Debug)]
struct Outstanding {
    nonce: String,
    version: String,
}

impl Session {
    /// Who is at the other end; known after the first request.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// What it cannot connect to, `namespace/name address:port`.
    pub fn unreachable(&self) -> &BTreeSet<String> {
        &self.unreachable
    }

    /// Takes in a request.
    ///
    /// # Errors
    /// The peer broke the protocol; the stream should be closed with the text.
    pub fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<Event, SessionError> {
        if self.node.is_none() {
            let node = request
                .node
                .filter(|n| (1..=MAX_NAME_BYTES).contains(&n.id.len()));
            self.node = Some(node.ok_or(SessionError::NoNode)?);
        }
        if !(1..=MAX_NAME_BYTES).contains(&request.type_url.len()) {
            return Err(SessionError::BadType);
        }
        if request.type_url == UNREACHABLE_TYPE {
            for name in &request.resource_names_unsubscribe {
                self.unreachable.remove(name);
            }
            let names = request.resource_names_subscribe.into_iter();
            self.unreachable
                .extend(names.filter(|name| name.len() <= MAX_NAME_BYTES));
            if self.unreachable.len() > MAX_UNREACHABLE {
                return Err(SessionError::TooMany);
            }
            return Ok(Event::Unreachable);
        }
        let first = !self.types.contains_key(&request.type_url);
        if first && self.types.len() >= MAX_TYPES {
            return Err(SessionError::TooMany);
        }
        let state = self.types.entry(request.type_url.clone()).or_default();
        if first {
            state.unanswered = true;
            state.wildcard = request.resource_names_subscribe.is_empty();
            state.inherited = request.initial_resource_versions.keys().cloned().collect();
            state.known = Known::Each(request.initial_resource_versions);
        }
        // Subscriptions count whatever the nonce: they are not part of the answer.
        let subscribed = state.subscribe(
            request.resource_names_subscribe,
            request.resource_names_unsubscribe,
        )?;
        if request.response_nonce.is_empty() {
            return Ok(Event::Subscribed);
        }
        let matches = |o: &mut Outstanding| o.nonce == request.response_nonce;
        let Some(outstanding) = state.outstanding.take_if(matches) else {
            return Ok(if subscribed {
                Event::Subscribed
            } else {
                Event::Stale
            });
        };
        let (type_url, version) = (request.type_url, outstanding.version);
        Ok(match request.error_detail {
            None => Event::Acked { type_url, version },
            Some(status) => Event::Refused {
                type_url,
                version,
                reason: status.message,
            },
        })
    }

    /// Whether a response waits for its answer.
    pub fn is_waiting(&self) -> bool {
        self.types.values().any(|state| state.outstanding.is_some())
    }

    /// The next response to send, or `None` when nothing has changed for this sidecar or everything
    /// that has waits for an answer. Call again until `None`.
    pub fn next(&mut self, resources: &Resources) -> Option<Push> {
        let place = |type_url: &str| PUSH_ORDER.iter().position(|ours| *ours == type_url);
        let mut types: Vec<_> = self.types.iter_mut().collect();
        types.sort_by_key(|(type_url, _)| place(type_url).unwrap_or(PUSH_ORDER.len()));
        for (type_url, state) in types {
            let set = resources.of_type(type_url);
            let Some(content) = state.changes(set, type_url) else {
                continue;
            };
            self.nonces += 1;
            let nonce = self.nonces.to_string();
            state.outstanding = Some(Outstanding {
                nonce: nonce.clone(),
                version: set.version.clone(),
            });
            return Some(Push { nonce, content });
        }
        None
    }
}

impl TypeState {
    /// Applies a change of subscription; true when there was one.
    fn subscribe(&mut self, add: Vec<String>, remove: Vec<String>) -> Result<bool, SessionError> {
        let changed = !add.is_empty() || !remove.is_empty();
        for name in add {
            if name == WILDCARD {
                self.wildcard = true;
                self.unanswered = true;
                continue;
            }
            if self.names.len() >= MAX_NAMES || name.len() > MAX_NAME_BYTES {
                return Err(SessionError::TooMany);
            }
            self.asked.insert(name.clone());
            self.names.insert(name);
        }
        for name in remove {
            if name == WILDCARD {
                self.wildcard = false;
                self.known
                    .each()
                    .retain(|known, _| self.names.contains(known));
                continue;
            }
            self.names.remove(&name);
            self.asked.remove(&name);
            if !self.wildcard {
                self.known.each().remove(&name);
            }
        }
        Ok(changed)
    }

    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    /// What to send now: changed resources and removed names. Notes it as sent.
    fn changes(&mut self, set: &Arc<TypeSet>, type_url: &str) -> Option<Arc<Content>> {
        if self.outstanding.is_some() {
            return None;
        }
        let content = match self.table() {
            Some(from) => self.step(from.as_ref(), set, type_url)?,
            None => self.difference(set, type_url)?,
        };
        self.unanswered = false;
        self.asked.clear();
        // What it keeps of before is not in the table as long as anything is tentative.
        if self.wildcard && set.tentative.is_empty() {
            self.inherited.clear();
            self.known = Known::Table(Arc::clone(set));
        }
        Some(content)
    }

    /// The table that it has the whole of, inside none where it has nothing; none where what it has
    /// is a matter of names.
    fn table(&self) -> Option<Option<Arc<TypeSet>>> {
        if !self.wildcard || !self.asked.is_empty() || !self.inherited.is_empty() {
            return None;
        }
        match &self.known {
            Known::Table(set) => Some(Some(Arc::clone(set))),
            Known::Each(versions) => versions.is_empty().then_some(None),
        }
    }

    /// From table to table.
    fn step(
        &mut self,
        from: Option<&Arc<TypeSet>>,
        set: &Arc<TypeSet>,
        type_url: &str,
    ) -> Option<Arc<Content>> {
        let same = from.is_some_and(|from| Arc::ptr_eq(from, set));
        if same && !self.unanswered {
            return None;
        }
        let content = set.step(from, type_url);
        let response = &content.response;
        let nothing = response.resources.is_empty() && response.removed_resources.is_empty();
        // A config whose change it does not see is accepted by it all the same.
        let renamed = from.is_some_and(|from| from.version != set.version);
        let news = !nothing || renamed || self.unanswered;
        // It has all of it, also where part of it is tentative: it came with nothing of its own.
        self.known = Known::Table(Arc::clone(set));
        news.then_some(content)
    }

    /// Name by name.
    fn difference(&mut self, set: &TypeSet, type_url: &str) -> Option<Arc<Content>> {
        // What a sidecar brought from before is better than what we cannot know enough about yet.
        let keeps = |name: &String| set.tentative.contains(name) && self.inherited.contains(name);
        let is_news = |resource: &&Resource| {
            self.wants(&resource.name)
                && !keeps(&resource.name)
                && (self.known.version(&resource.name) != Some(&resource.version)
                    || self.asked.contains(&resource.name))
        };
        let changed: Vec<Resource> = set.resources.values().filter(is_news).cloned().collect();
        let known: Vec<&String> = match &self.known {
            Known::Each(versions) => versions.keys().collect(),
            Known::Table(table) => table.resources.keys().collect(),
        };
        let removed: BTreeSet<String> = known
            .into_iter()
            .chain(&self.asked)
            .filter(|name| !set.resources.contains_key(*name) && !keeps(name))
            .cloned()
            .collect();
        if changed.is_empty() && removed.is_empty() && !self.unanswered {
            return None;
        }
        self.inherited.retain(|name| !removed.contains(name));
        let versions = self.known.each();
        versions.retain(|name, _| !removed.contains(name));
        for resource in &changed {
            self.inherited.remove(&resource.name);
            versions.insert(resource.name.clone(), resource.version.clone());
        }
        let removed = removed.into_iter().collect();
        Some(Arc::new(Content::new(set, type_url, changed, removed)))
    }
}

#[cfg(test)]
mod tests {
    use outrigger_config::wire::{DOCUMENT_TYPE, ENDPOINTS_TYPE, Status};

    use super::*;
    use crate::world::{DocumentEntry, World};

    fn world(documents: &[(&str, &str)]) -> Resources {
        let entry = |(name, json): &(&str, &str)| {
            let entry = DocumentEntry {
                name: (*name).into(),
                json: (*json).into(),
                generation: 0,
            };
            ((*name).to_owned(), entry)
        };
        let documents = documents.iter().map(entry).collect();
        crate::render::render(&World {
            documents,
            ..World::default()
        })
    }

    fn request(type_url: &str) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            node: Some(Node {
                id: "web-1".into(),
                ..Node::default()
            }),
            type_url: type_url.into(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    fn answer(response: &Push, refused: Option<&str>) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: refused.map(|m| Status {
                code: 3,
                message: m.into(),
                details: vec![],
            }),
            ..DeltaDiscoveryRequest::default()
        }
    }

    fn subscribed() -> Session {
        let mut session = Session::default();
        assert_eq!(
            session.on_request(request(DOCUMENT_TYPE)),
            Ok(Event::Subscribed)
        );
        session
    }

    fn names(response: &Push) -> Vec<&str> {
        response.resources.iter().map(|r| r.name.as_str()).collect()
    }

    #[test]
    fn the_first_request_is_answered_even_with_nothing() {
        let mut session = subscribed();
        let response = session.next(&world(&[])).expect("a first answer");
        assert!(response.resources.is_empty());
        assert!(session.next(&world(&[])).is_none());
    }

    #[test]
    fn only_what_changed_is_sent_and_what_is_gone_is_named() {
        let mut session = subscribed();
        let response = session
            .next(&world(&[("a", "1"), ("b", "1")]))
            .expect("all");
        assert_eq!(names(&response), ["a", "b"]);
        let event = session
            .on_request(answer(&response, None))
            .expect("in order");
        let version = response.system_version_info.clone();
        assert_eq!(
            event,
            Event::Acked {
                type_url: DOCUMENT_TYPE.into(),
                version
            }
        );
        assert!(session.next(&world(&[("a", "1"), ("b", "1")])).is_none());
        let response = session
            .next(&world(&[("b", "2"), ("c", "1")]))
            .expect("a change");
        assert_eq!(names(&response), ["b", "c"]);
        assert_eq!(response.removed_resources, ["a"]);
    }

    #[test]
    fn nothing_is_pushed_before_the_answer_and_then_the_latest_wins() {
        let mut session = subscribed();
        let first = session.next(&world(&[("a", "1")])).expect("the first");
        for version in ["2", "3", "4"] {
            assert!(session.next(&world(&[("a", version)])).is_none());
        }
        session.on_request(answer(&first, None)).expect("in order");
        let latest = world(&[("a", "5")]);
        let second = session.next(&latest).expect("the latest");
        assert_eq!(
            second.resources[0],
            latest.of_type(DOCUMENT_TYPE).resources["a"]
        );
        assert_ne!(first.nonce, second.nonce);
    }

    #[test]
    fn a_refusal_is_reported_and_not_sent_again_until_something_changes() {
        let mut session = subscribed();
        let bad = session.next(&world(&[("a", "bad")])).expect("the first");
        let event = session
            .on_request(answer(&bad, Some("a: no")))
            .expect("in order");
        assert!(matches!(event, Event::Refused { reason, .. } if reason == "a: no"));
        assert!(session.next(&world(&[("a", "bad")])).is_none());
        assert_eq!(
            names(&session.next(&world(&[("a", "good")])).expect("the repair")),
            ["a"]
        );
    }

    #[test]
    fn a_stale_nonce_answers_nothing_but_its_subscription_counts() {
        let mut session = subscribed();
        let first = session.next(&world(&[("a", "1")])).expect("the first");
        let mut stale = answer(&first, None);
        stale.response_nonce = "77".into();
        assert_eq!(session.on_request(stale.clone()), Ok(Event::Stale));
        assert!(session.next(&world(&[("a", "2")])).is_none());
        stale.resource_names_subscribe = vec!["absent".into()];
        assert_eq!(session.on_request(stale), Ok(Event::Subscribed));
        session.on_request(answer(&first, None)).expect("in order");
        let next = session
            .next(&world(&[("a", "1")]))
            .expect("the absent name");
        assert_eq!(next.removed_resources, ["absent"]);
    }

    #[test]
    fn a_resumed_stream_gets_the_difference_only() {
        let resources = world(&[("a", "1"), ("b", "2")]);
        let have = resources.of_type(DOCUMENT_TYPE).resources["a"]
            .version
            .clone();
        let mut resume = request(DOCUMENT_TYPE);
        resume.initial_resource_versions =
            [("a".to_owned(), have), ("gone".to_owned(), "1".to_owned())].into();
        let mut session = Session::default();
        session.on_request(resume).expect("a first request");
        let response = session.next(&resources).expect("the difference");
        assert_eq!(names(&response), ["b"]);
        assert_eq!(response.removed_resources, ["gone"]);
    }

    #[test]
    fn what_is_not_known_yet_takes_nothing_away_from_a_sidecar_that_resumes() {
        let endpoint = |port| outrigger_config::wire::Endpoint {
            port,
            ..Default::default()
        };
        let world = |endpoints: &[(&str, u32)], tentative: &[&str]| {
            let set =
                |(service, port): &(&str, u32)| ((*service).to_owned(), vec![endpoint(*port)]);
            crate::render::render(&World {
                endpoints: endpoints.iter().map(set).collect(),
                tentative: tentative.iter().map(|t| (*t).to_owned()).collect(),
                ..World::default()
            })
        };
        let mut resume = request(ENDPOINTS_TYPE);
        let old = [("beats", "v"), ("looked-up", "v"), ("gone", "v")];
        resume.initial_resource_versions =
            old.map(|(name, v)| (name.to_owned(), v.to_owned())).into();
        let mut session = Session::default();
        session.on_request(resume).expect("a first request");
        // Of `beats` one instance of several is back, of `looked-up` nothing is known.
        let early = world(&[("beats", 1), ("new", 2)], &["beats", "looked-up", "new"]);
        let response = session.next(&early).expect("the difference");
        assert_eq!(names(&response), ["new"]);
        assert_eq!(response.removed_resources, ["gone"]);
        session
            .on_request(answer(&response, None))
            .expect("in order");
        assert!(session.next(&early).is_none());
        // What this stream was sent by us is ours to change, tentative or not.
        let more = world(&[("beats", 1), ("new", 3)], &["beats", "looked-up", "new"]);
        let response = session.next(&more).expect("a change");
        assert_eq!(names(&response), ["new"]);
        session
            .on_request(answer(&response, None))
            .expect("in order");
        let settled = world(&[("beats", 1), ("new", 3)], &[]);
        let response = session.next(&settled).expect("what is known for sure");
        assert_eq!(names(&response), ["beats"]);
        assert_eq!(response.removed_resources, ["looked-up"]);
    }

    #[test]
    fn named_subscriptions_get_their_names_and_forget_the_unsubscribed() {
        let mut named = request(DOCUMENT_TYPE);
        named.resource_names_subscribe = vec!["a".into(), "later".into()];
        let mut session = Session::default();
        session.on_request(named).expect("a first request");
        let response = session
            .next(&world(&[("a", "1"), ("b", "1")]))
            .expect("the names");
        assert_eq!(
            (names(&response), &response.removed_resources),
            (vec!["a"], &vec!["later".to_owned()])
        );
        session
            .on_request(answer(&response, None))
            .expect("in order");
        let response = session
            .next(&world(&[("a", "1"), ("later", "1")]))
            .expect("it appeared");
        assert_eq!(names(&response), ["later"]);
        let mut fewer = answer(&response, None);
        fewer.resource_names_unsubscribe = vec!["a".into()];
        session.on_request(fewer).expect("in order");
        assert!(
            session
                .next(&world(&[("a", "2"), ("later", "1")]))
                .is_none()
        );
        let mut again = request(DOCUMENT_TYPE);
        again.resource_names_subscribe = vec!["later".into()];
        session.on_request(again).expect("a subscription");
        let response = session
            .next(&world(&[("later", "1")]))
            .expect("asked for again");
        assert_eq!(names(&response), ["later"]);
    }

    #[test]
    fn types_do_not_wait_for_each_other_and_endpoints_come_first() {
        let mut session = subscribed();
        session
            .on_request(request(ENDPOINTS_TYPE))
            .expect("a second type");
        let resources = world(&[("a", "1")]);
        let order: Vec<_> = std::iter::from_fn(|| session.next(&resources)).collect();
        let types: Vec<_> = order.iter().map(|r| r.type_url.as_str()).collect();
        assert_eq!(types, [ENDPOINTS_TYPE, DOCUMENT_TYPE]);
    }

    #[test]
    fn streams_that_have_the_same_are_sent_the_same_bytes() {
        let (first, second) = (world(&[("a", "1")]), world(&[("a", "2"), ("b", "1")]));
        let mut streams = [subscribed(), subscribed()];
        for resources in [&first, &second] {
            let sent = streams.each_mut().map(|session| {
                let push = session.next(resources).expect("news");
                session.on_request(answer(&push, None)).expect("in order");
                push
            });
            let [one, two] = sent.each_ref().map(|push| push.frames()[1].as_ptr());
            assert_eq!(one, two);
        }
        // A table that is the same is no news, and a resumed stream joins the others.
        let same = world(&[("a", "2"), ("b", "1")]).keeping(&second);
        assert!(streams[0].next(&same).is_none());
        let mut resume = request(DOCUMENT_TYPE);
        let version = |name: &str| {
            let resource = &second.of_type(DOCUMENT_TYPE).resources[name];
            (name.to_owned(), resource.version.clone())
        };
        resume.initial_resource_versions = [version("a"), version("b")].into();
        let mut resumed = Session::default();
        resumed.on_request(resume).expect("a first request");
        let push = resumed.next(&second).expect("a first answer");
        assert!(push.resources.is_empty() && push.removed_resources.is_empty());
        resumed.on_request(answer(&push, None)).expect("in order");
        let third = world(&[("a", "3"), ("b", "1")]);
        let [one, two] = [&mut resumed, &mut streams[0]]
            .map(|session| session.next(&third).expect("news").frames()[1].as_ptr());
        assert_eq!(one, two);
    }

    #[test]
    fn the_frames_of_a_push_are_one_message_with_its_nonce() {
        let mut session = subscribed();
        let push = session.next(&world(&[("a", "1")])).expect("the first");
        let [head, rest] = push.frames();
        let message = [&head[5..], &rest[..]].concat();
        assert_eq!(head[0], 0);
        let length = u32::try_from(message.len()).expect("small").to_be_bytes();
        assert_eq!(head[1..5], length);
        let read = DeltaDiscoveryResponse::decode(&message[..]).expect("a message");
        let expected = DeltaDiscoveryResponse {
            nonce: push.nonce.clone(),
            ..(*push).clone()
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn a_type_that_is_not_ours_is_answered_with_nothing() {
        let mut session = Session::default();
        session
            .on_request(request("type.googleapis.com/other"))
            .expect("a first request");
        let response = session.next(&world(&[("a", "1")])).expect("a first answer");
        assert!(response.resources.is_empty());
    }

    #[test]
    fn broken_peers_are_told_what_they_broke() {
        let check = |edit: &dyn Fn(&mut DeltaDiscoveryRequest), expected: SessionError| {
            let mut bad = request(DOCUMENT_TYPE);
            edit(&mut bad);
            assert_eq!(Session::default().on_request(bad), Err(expected));
        };
        check(&|r| r.node = None, SessionError::NoNode);
        check(&|r| r.node = Some(Node::default()), SessionError::NoNode);
        check(&|r| r.type_url.clear(), SessionError::BadType);
        check(
            &|r| r.resource_names_subscribe = vec!["n".repeat(2000)],
            SessionError::TooMany,
        );
        let mut session = subscribed();
        let types = (0..MAX_TYPES).map(|n| session.on_request(request(&format!("t{n}"))));
        assert_eq!(types.last(), Some(Err(SessionError::TooMany)));
    }
}
