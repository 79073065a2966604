//! Which endpoints of its service a request asks for: those with labels, or the one of its key.
//!
//! Made once, when the service is known, and only for requests that ask for any. Stands on the life
//! of a request.

use std::sync::Arc;

use http::header::SET_COOKIE;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue};

use super::Call;
use crate::destination::Wish;
use crate::snapshot::affinity::Source;
use crate::snapshot::live::Labels;
use crate::snapshot::{Algorithm, Service};

/// What a request asks of the endpoints of one service.
pub(super) struct Affinity {
    service: Arc<Service>,
    labels: Option<Labels>,
    key: Option<u64>,
    set_cookie: Option<HeaderValue>,
}

impl Affinity {
    /// What `call` asks of `service`. A caller without a session begins one where the service
    /// wants it.
    pub(super) fn of(call: &Call, service: &Arc<Service>, labels: Option<&Labels>) -> Box<Self> {
        let mut affinity = Self {
            service: Arc::clone(service),
            labels: labels.map(Arc::clone),
            key: None,
            set_cookie: None,
        };
        if let Algorithm::ConsistentHash(settings) = &service.algorithm {
            let source = Source {
                peer: call.peer.ip(),
                workload: &call.worker.shared.workload,
            };
            let host = call.authority.as_ref().map_or("", Authority::as_str);
            affinity.key = settings.key(&call.parts.headers, host, source);
            let session = settings.session.as_ref();
            // A message has nobody who would keep a cookie.
            let session = session.filter(|_| affinity.key.is_none() && !call.is_delivery());
            if let Some(begun) = session.and_then(|cookie| cookie.begin(&mut call.worker.rng())) {
                affinity.key = Some(begun.0);
                affinity.set_cookie = Some(begun.1);
            }
        }
        Box::new(affinity)
    }

    /// Narrows the choice among the endpoints of `service`, if that is the one.
    pub(super) fn restrict<'a>(&'a self, service: &Arc<Service>, wish: &mut Wish<'a>) {
        if Arc::ptr_eq(service, &self.service) {
            wish.labels = self.labels.as_ref();
            wish.key = self.key;
        }
    }

    /// Gives the caller the cookie of the session that begins.
    pub(super) fn begin_session(&self, fields: &mut HeaderMap) {
        if let Some(cookie) = &self.set_cookie {
            fields.append(SET_COOKIE, cookie.clone());
        }
    }
}
