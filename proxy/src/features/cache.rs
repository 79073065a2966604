//! Answers to GET and HEAD that are kept and said again (RFC 9111).
//!
//! What may be kept and for how long is core's [`outrigger_core::cache`]; this file asks, fetches,
//! validates and fills. Calls that miss the same answer at once fetch it once. The answer to the
//! caller says what was done in `Cache-Status` (RFC 9211). Stands on the life of a request; a
//! delivery is never answered from here.

pub mod store;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{AGE, IF_MODIFIED_SINCE, IF_NONE_MATCH, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use outrigger_core::cache::{self, Asked, Kept};
use outrigger_core::error_code::ErrorCode;

use self::store::{Bounds, Cache, Flight, Lead, Stored};
use crate::call::{Call, Payload};
use crate::clock;
use crate::error::ProxyError;
use crate::forward;
use crate::http::body::{BodyError, Layer, ResponseBody};
use crate::snapshot::features::CacheParams;
use crate::snapshot::{Route, Service};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// The longest wait for an answer that another call is fetching.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// A failed answer that is not passed on is read so far, and so long, to have its connection back.
const DISCARD_BYTES: usize = 64 * 1024;
const DISCARD_FOR: Duration = Duration::from_secs(1);

/// Fields that describe an answer without its body (RFC 9110 §15.4.5 leaves out the rest).
const OF_THE_BODY: [HeaderName; 4] = [
    http::header::CONTENT_LENGTH,
    http::header::CONTENT_TYPE,
    http::header::CONTENT_ENCODING,
    http::header::CONTENT_LANGUAGE,
];

/// Whether a call can be answered from a cache at all.
pub fn concerns(call: &Call) -> bool {
    let method = &call.parts.method;
    (*method == Method::GET || *method == Method::HEAD)
        && !call.grpc
        && call.switch.is_none()
        && !call.parts.headers.contains_key(RANGE)
}

/// Answers a call from the cache, or fetches the answer and keeps it.
///
/// # Errors
/// What to answer when there is no answer.
pub async fn serve(
    call: &mut Call,
    service: &Arc<Service>,
    route: &Arc<Route>,
    params: &CacheParams,
    payload: Payload,
) -> Result<Response<ResponseBody>, ProxyError> {
    let known = Arc::clone(&params.cache);
    let key = key(call);
    let wanted = Asked::of(&call.parts.headers);
    if wanted.only_if_cached {
        payload.discard();
        return only_if_cached(call, params, &wanted, &key);
    }
    let (found, lead) = match look_up(call, route, &known, &key, &wanted).await {
        Found::Fresh(stored) => {
            payload.discard();
            params.hit.increment(1);
            return Ok(say(call, &stored, "hit"));
        }
        Found::Stale(stored, lead) => (Some(stored), lead),
        Found::Nothing(lead) => (None, lead),
    };
    let asked = call.parts.headers.clone();
    let validated = found
        .as_deref()
        .is_some_and(|stored| ask_whether_good(call, stored));
    let answered = forward::queue_or_exchange(call, service, route, payload).await;
    let now = clock::unix_now();
    let failed = match &answered {
        Ok(response) => response.status().is_server_error(),
        Err(_) => true,
    };
    if failed {
        let stands = |stored: &&Arc<Stored>| stored.kept.may_stand_in(params.stale_if_error, now);
        if let Some(stored) = found.as_ref().filter(stands)
            && call.fallback.is_none()
        {
            if let Ok(response) = answered {
                let reading = response.into_body().collect(DISCARD_BYTES);
                // How it ended is of no interest: its observation has it.
                let _ = tokio::time::timeout(DISCARD_FOR, reading).await;
            }
            params.stale.increment(1);
            return Ok(say(call, stored, "hit; detail=stale-if-error"));
        }
    }
    let response = answered?;
    if call.fallback.is_some() {
        return Ok(response);
    }
    if let Some(stored) = found.filter(|_| validated)
        && response.status() == StatusCode::NOT_MODIFIED
    {
        params.revalidated.increment(1);
        let stored = confirm(&asked, &stored, response.headers());
        call.parts.headers = asked;
        let answer = say(call, &stored, "hit; fwd=stale; fwd-status=304");
        if !wanted.no_store {
            known.insert(&key, stored, params.bounds);
        }
        drop(lead);
        return Ok(answer);
    }
    params.miss.increment(1);
    Ok(fill(call, &asked, response, params, key, lead))
}

/// What is there, or nothing: the caller does not want its service to be asked (RFC 9111 §5.2.1.7).
fn only_if_cached(
    call: &mut Call,
    params: &CacheParams,
    wanted: &Asked,
    key: &str,
) -> Result<Response<ResponseBody>, ProxyError> {
    let stored = params.cache.find(key, &call.parts.headers);
    let now = clock::unix_now();
    match stored.filter(|stored| stored.kept.satisfies(wanted, now)) {
        Some(stored) => {
            params.hit.increment(1);
            Ok(say(call, &stored, "hit"))
        }
        None => {
            params.miss.increment(1);
            let detail = "nothing kept satisfies the request, and it says only-if-cached";
            Err(ProxyError::local(ErrorCode::NotCached, detail))
        }
    }
}

/// What the ladder's `staleCache` finds, however old it is; none for what must be validated.
pub fn stale(call: &mut Call, params: &CacheParams) -> Option<Response<ResponseBody>> {
    if !concerns(call) {
        return None;
    }
    let stored = params.cache.find(&key(call), &call.parts.headers)?;
    let fresh = stored.kept.fresh_until_now(clock::unix_now()).is_some();
    if stored.kept.must_revalidate && !fresh {
        return None;
    }
    params.stale.increment(1);
    // Whatever the caller's own condition was, it was replaced by ours.
    call.parts.headers.remove(IF_NONE_MATCH);
    call.parts.headers.remove(IF_MODIFIED_SINCE);
    Some(say(call, &stored, "hit; detail=stale-cache"))
}

/// Whether a request may change what its target answers (RFC 9111 §4.4).
pub fn is_unsafe(method: &Method) -> bool {
    !matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE
    )
}

/// Host and target; until the request is rewritten.
pub fn key(call: &Call) -> Arc<str> {
    let host = call.authority().map_or("", |authority| authority.host());
    let target = call.parts.uri.path_and_query();
    let target = target.map_or("/", |target| target.as_str());
    Arc::from(format!("{} {target}", host.to_ascii_lowercase()))
}

enum Found {
    Fresh(Arc<Stored>),
    Stale(Arc<Stored>, Option<Lead>),
    Nothing(Option<Lead>),
}

/// Looks again when somebody else had gone to fetch the answer.
async fn look_up(
    call: &Call,
    route: &Route,
    known: &Arc<Cache>,
    key: &Arc<str>,
    wanted: &Asked,
) -> Found {
    let fields = &call.parts.headers;
    let limit = route.timeouts.request.unwrap_or(LONGEST_WAIT);
    let caller = call.caller_timeout().unwrap_or(LONGEST_WAIT);
    let until = call.start + limit.min(caller).min(LONGEST_WAIT);
    // Whoever asks under a condition, or for the head only, may get what helps nobody else; and
    // nobody else's answer helps whoever wants one of its own.
    let alone = call.parts.method == Method::HEAD
        || wanted.no_cache
        || wanted.no_store
        || fields.contains_key(IF_NONE_MATCH)
        || fields.contains_key(IF_MODIFIED_SINCE);
    let mut waited = false;
    loop {
        let found = known.find(key, fields);
        if let Some(stored) = &found
            && stored.kept.satisfies(wanted, clock::unix_now())
        {
            return Found::Fresh(Arc::clone(stored));
        }
        let lead = match known.flight(key, clock::now()) {
            _ if alone => None,
            Flight::Lead(lead) => Some(lead),
            Flight::Wait(mut ended) if !waited => {
                waited = true;
                // How it ended shows in what is kept now; who finds nothing new goes alone.
                let _ = tokio::time::timeout_at(clock::instant(until), ended.changed()).await;
                continue;
            }
            Flight::Wait(_) | Flight::Alone => None,
        };
        return match found {
            Some(stored) => Found::Stale(stored, lead),
            None => Found::Nothing(lead),
        };
    }
}

/// Makes the request ask whether `stored` is still good; false when there is nothing to ask by.
fn ask_whether_good(call: &mut Call, stored: &Stored) -> bool {
    let Some(validators) = cache::validators(&stored.fields) else {
        return false;
    };
    let fields = &mut call.parts.headers;
    fields.remove(IF_NONE_MATCH);
    fields.remove(IF_MODIFIED_SINCE);
    fields.extend(validators);
    true
}

/// The answer that the service called good.
fn confirm(asked: &HeaderMap, stored: &Stored, confirmed: &HeaderMap) -> Stored {
    let mut fields = cache::updated(&stored.fields, confirmed);
    fields.remove(CACHE_STATUS);
    let now = clock::unix_now();
    let kept = Kept::judge(asked, stored.status, &fields, now);
    let kept = kept.unwrap_or_else(|| Kept {
        // It may not be kept any more: good for this once.
        fresh_for: Duration::ZERO,
        must_revalidate: true,
        ..stored.kept.clone()
    });
    Stored::new(stored.status, fields, stored.body.clone(), kept)
}

/// Says a kept answer again, and ends the observation.
fn say(call: &mut Call, stored: &Stored, how: &str) -> Response<ResponseBody> {
    let now = clock::unix_now();
    let mut fields = stored.fields.clone();
    fields.insert(AGE, HeaderValue::from(stored.kept.age(now).as_secs()));
    let lifetime = stored.kept.fresh_for.as_secs().cast_signed();
    let ttl = lifetime - stored.kept.age(now).as_secs().cast_signed();
    status(&mut fields, &format!("outrigger; {how}; ttl={ttl}"));
    let unchanged = stored.status == StatusCode::OK
        && cache::not_modified(&call.parts.headers, &stored.fields, now);
    let mut response = if unchanged {
        for name in OF_THE_BODY {
            fields.remove(name);
        }
        let mut response = Response::new(ResponseBody::full(Bytes::new()));
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
    } else {
        let mut response = Response::new(ResponseBody::full(stored.body.clone()));
        *response.status_mut() = stored.status;
        response
    };
    *response.headers_mut() = fields;
    call.answer(response)
}

fn status(fields: &mut HeaderMap, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        // Caches nearer to the service have spoken before (RFC 9211 §2).
        fields.append(CACHE_STATUS, value);
    }
}

/// Passes an answer on and keeps it, if it may be kept, once it is whole.
fn fill(
    call: &Call,
    asked: &HeaderMap,
    mut response: Response<ResponseBody>,
    params: &CacheParams,
    key: Arc<str>,
    lead: Option<Lead>,
) -> Response<ResponseBody> {
    let now = clock::unix_now();
    let kept = Kept::judge(asked, response.status(), response.headers(), now);
    let kept = kept.filter(|kept| {
        let useful = kept.fresh_until_now(now).is_some()
            || cache::validators(response.headers()).is_some()
            || (params.stands_in && !kept.must_revalidate);
        let fits = response.body().size_hint().lower() <= params.max_body as u64;
        call.parts.method == Method::GET && useful && fits
    });
    let Some(kept) = kept else {
        if let Some(lead) = &lead
            && response.status().is_success()
        {
            lead.pass(clock::now());
        }
        status(response.headers_mut(), "outrigger; fwd=uri-miss");
        return response;
    };
    let status_code = response.status();
    let mut fields = response.headers().clone();
    fields.remove(outrigger_core::headers::RETRY);
    status(response.headers_mut(), "outrigger; fwd=uri-miss; stored");
    let (cache, bounds, max_body) = (Arc::clone(&params.cache), params.bounds, params.max_body);
    if response.body().is_end_stream() {
        cache.insert(
            &key,
            Stored::new(status_code, fields, Bytes::new(), kept),
            bounds,
        );
        return response;
    }
    response.map(|inner| {
        ResponseBody::layered(Box::new(Fill {
            inner,
            pending: Some(Box::new(Pending {
                cache,
                key,
                bounds,
                max_body,
                status: status_code,
                fields,
                kept,
                body: BytesMut::new(),
                _lead: lead,
            })),
        }))
    })
}

/// A body of which a copy is kept.
struct Fill {
    inner: ResponseBody,
    pending: Option<Box<Pending>>,
}

struct Pending {
    cache: Arc<Cache>,
    key: Arc<str>,
    bounds: Bounds,
    max_body: usize,
    status: StatusCode,
    fields: HeaderMap,
    kept: Kept,
    body: BytesMut,
    /// Those who wait for the answer wait until it is kept, or given up.
    _lead: Option<Lead>,
}

impl Fill {
    fn data(&mut self, data: &Bytes) {
        let Some(pending) = &mut self.pending else {
            return;
        };
        if pending.body.len() + data.len() > pending.max_body {
            self.pending = None;
        } else {
            pending.body.extend_from_slice(data);
        }
    }

    fn whole(&mut self) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        let body = pending.body.freeze();
        let stored = Stored::new(pending.status, pending.fields, body, pending.kept);
        pending.cache.insert(&pending.key, stored, pending.bounds);
    }
}

impl Layer for Fill {
    fn inner(&self) -> &ResponseBody {
        &self.inner
    }

    fn inner_mut(&mut self) -> &mut ResponseBody {
        &mut self.inner
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match &polled {
            Some(Ok(frame)) => match frame.data_ref() {
                Some(data) => {
                    self.data(data);
                    if self.inner.is_end_stream() {
                        self.whole();
                    }
                }
                // Trailers would be lost.
                None => self.pending = None,
            },
            // Half an answer is none.
            Some(Err(_)) => self.pending = None,
            None => self.whole(),
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
