//! Answers that need no service: redirects and fixed ones.

use http::header::LOCATION;
use http::uri::Scheme;
use http::{HeaderValue, Response, StatusCode};
use outrigger_core::edit::{Redirect, Redirected};
use outrigger_core::host::parse_authority;

use crate::call::Call;
use crate::http::body::ResponseBody;
use crate::http::respond;
use crate::snapshot::features::Direct;

/// Answers `call` and ends its observation.
pub(super) fn answer(call: &mut Call, direct: &Direct) -> Response<ResponseBody> {
    let response = match direct {
        Direct::Respond(fixed) => respond::fixed(fixed, call.grpc),
        Direct::Redirect(status, to) => redirect(call, *status, to),
    };
    call.answer(response)
}

fn redirect(call: &Call, status: StatusCode, to: &Redirect) -> Response<ResponseBody> {
    let uri = &call.parts.uri;
    let authority = call.authority().map_or("", |authority| authority.as_str());
    let (host, port) = match parse_authority(authority) {
        Some((host, port)) => (host.into_owned(), port),
        None => (authority.to_owned(), None),
    };
    let location = to.location(&Redirected {
        scheme: uri.scheme().map_or("http", Scheme::as_str),
        host: &host,
        port,
        path: uri.path(),
        query: uri.query(),
    });
    let mut response = Response::new(ResponseBody::full(""));
    *response.status_mut() = status;
    // Made of parts that were checked: a head or a config cannot carry what a value may not.
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}
