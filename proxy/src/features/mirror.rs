//! Copies of requests for another service, whose answers nobody waits for.
//!
//! A copy is made of what goes to the service, while it goes: the body is shared and not read
//! twice, and the copy is sent when the request has ended. Nothing that happens to it reaches the
//! call, its retries, its breaker or its metrics; it is never sent again, and how many there may be
//! at a time is bounded. Stands on the life of a request.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::uri::Scheme;
use http::{HeaderValue, Request, Uri, request};
use http_body::Body as _;
use outrigger_core::headers;

use crate::attempt::{self, Answer, Window};
use crate::call::{Call, Payload};
use crate::clock;
use crate::deadline::Deadline;
use crate::snapshot::features::Mirror;
use crate::snapshot::live::RouteState;
use crate::snapshot::{Route, Service};
use crate::worker::Worker;

/// How long a copy may take where the route sets no limit.
const LONGEST: Duration = Duration::from_secs(15);

/// More of an answer is not read, to have its connection back.
const MAX_ANSWER: usize = 1024 * 1024;

/// One copy on its way; not sent unless the request ends.
pub struct Duplicate {
    worker: Rc<Worker>,
    service: Arc<Service>,
    route: Arc<Route>,
    head: request::Parts,
    body: BytesMut,
    place: Place,
    too_large: bool,
}

/// A place among the copies that may be under way.
struct Place(Arc<RouteState>, u32);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.mirrored.leave(self.1);
    }
}

/// Begins a copy of `call`, whose head is ready to go, where the draw says so.
pub fn begin(call: &Call, route: &Arc<Route>, mirror: &Mirror) -> Option<Box<Duplicate>> {
    if call.is_delivery() || call.switch.is_some() {
        return None;
    }
    if !mirror.share.draw(&mut call.worker.rng()) {
        return None;
    }
    let service = call.snapshot.services.get(mirror.service)?;
    if !route.state.mirrored.try_enter(mirror.max_in_flight) {
        mirror.limited.increment(1);
        return None;
    }
    let place = Place(Arc::clone(&route.state), mirror.max_in_flight);
    let mut head = Request::new(()).into_parts().0;
    head.method = call.parts.method.clone();
    head.uri = call.parts.uri.clone();
    if let Some(authority) = call.authority() {
        let mut uri = head.uri.into_parts();
        (uri.scheme, uri.authority) = (Some(Scheme::HTTP), Some(authority.clone()));
        head.uri = Uri::from_parts(uri).ok()?;
    }
    head.headers = call.fields().clone();
    let name = HeaderValue::from_str(&route.name).ok()?;
    head.headers.insert(headers::MIRROR, name);
    Some(Box::new(Duplicate {
        worker: Rc::clone(&call.worker),
        service: Arc::clone(service),
        route: Arc::clone(route),
        head,
        body: BytesMut::new(),
        place,
        too_large: false,
    }))
}

impl Duplicate {
    /// A piece of the request's body passed.
    pub fn data(&mut self, data: &Bytes) {
        let Some(mirror) = of(&self.route) else {
            return;
        };
        if self.body.len() + data.len() > mirror.max_body {
            self.too_large = true;
            self.body = BytesMut::new();
        }
        if !self.too_large {
            self.body.extend_from_slice(data);
        }
    }

    /// The request has ended: the copy goes.
    pub fn send(self) {
        let Some(mirror) = of(&self.route) else {
            return;
        };
        if self.too_large {
            mirror.too_large.increment(1);
            return;
        }
        let limit = self.route.timeouts.request.unwrap_or(LONGEST);
        tokio::task::spawn_local(async move {
            let route = Arc::clone(&self.route);
            let sent = tokio::time::timeout(limit, Box::pin(self.run())).await;
            if let Some(mirror) = of(&route) {
                match sent {
                    Ok(Some(())) => mirror.sent.increment(1),
                    Ok(None) | Err(_) => mirror.failed.increment(1),
                }
            }
        });
    }

    /// Sends the copy and reads its answer; none when there was none.
    async fn run(self) -> Option<()> {
        let Self {
            worker,
            service,
            route,
            head,
            body,
            place: _place,
            ..
        } = self;
        let limit = route.timeouts.request.unwrap_or(LONGEST);
        let mut call = Call::from_message(&worker, head, limit);
        call.observation.discard();
        call.prepare_headers();
        let mut body = call.body(Payload::Stored(body.freeze()), &route);
        let deadline = Deadline::new(&call, &route);
        let now = clock::now();
        let endpoint = call.pick_endpoint(&service, &[], now).ok()?.unobserved();
        call.stamp(&endpoint, 1, &deadline, now);
        let window = Window {
            now,
            deadline: &deadline,
            per_try: None,
            connection: service.connection_for(&route),
            fault: None,
            fields: None,
        };
        let attempt = attempt::attempt(&call, &service, endpoint, body.take(), &window, false);
        read(attempt.await.ok()?).await
    }
}

/// Reads a short answer to its end, so that its connection can be used again.
async fn read(answer: Answer) -> Option<()> {
    let Answer {
        response, lease, ..
    } = answer;
    let mut body = response.into_body();
    let mut left = MAX_ANSWER;
    if !body.is_end_stream() {
        while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
        {
            let length = frame.ok()?.data_ref().map_or(0, Bytes::len);
            match left.checked_sub(length) {
                Some(rest) => left = rest,
                None => {
                    lease.discard();
                    return Some(());
                }
            }
        }
    }
    lease.release();
    Some(())
}

fn of(route: &Route) -> Option<&Mirror> {
    route.features.as_ref()?.mirror.as_ref()
}
