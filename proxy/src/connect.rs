//! CONNECT (RFC 9110 §9.3.6): a tunnel to a service of the mesh or to a host outside it, for
//! applications that use the sidecar as their proxy.
//!
//! A host of the mesh gets one of its service's endpoints, as opaque connections do; for any other
//! `outbound.unknown` decides. What goes through is not looked at. Inbound there is no CONNECT.
//!
//! Stands on the life of a request.

use http::Response;
use outrigger_core::error_code::ErrorCode;

use crate::call::Call;
use crate::destination;
use crate::error::ProxyError;
use crate::http::body::ResponseBody;
use crate::http::tunnel::{Limits, Tunnel};
use crate::http1::wire::Wire;
use crate::listener::Direction;
use crate::tcp;

/// Opens the tunnel that `call` asks for.
///
/// # Errors
/// `bad_request` inbound and without a port; those of [`destination::tunnel`]; `no_endpoints`,
/// `limit_reached`, `connect_failed`.
///
/// # Cancel safety
/// Dropping the future abandons the connect.
pub async fn serve(call: &mut Call) -> Result<Response<ResponseBody>, ProxyError> {
    if call.direction == Direction::Inbound {
        let detail = "CONNECT is served on the outbound listener only";
        return Err(ProxyError::downstream(ErrorCode::BadRequest, detail));
    }
    let onward = destination::tunnel(call).await?;
    call.observation.passed(&onward.service);
    let observation = &mut call.observation;
    let attempted = &mut |_| observation.attempt();
    let dialled = tcp::dial(&call.worker, &onward, call.peer, attempted).await;
    let (stream, held) = match dialled {
        Ok(upstream) => upstream.into_parts(),
        Err(refused) => return Err(ProxyError::upstream(refused.code, refused.detail)),
    };
    call.observation.opened();
    let limits = Limits {
        idle: call.worker.shared.wire.tcp_idle_timeout,
        ends: None,
    };
    let observation = call.observation.take();
    let tunnel = Tunnel::new(Wire::new(stream), Box::new(held), observation, limits);
    Ok(Response::new(ResponseBody::tunnel(tunnel)))
}
