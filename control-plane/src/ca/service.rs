//! `istio.v1.auth.IstioCertificateService/CreateCertificate` on the discovery listener.

use std::pin::Pin;
use std::time::Duration;

use outrigger_config::signing::{
    CertificateRequest, CertificateResponse, IMPERSONATED_IDENTITY, MAX_SIGNING_BYTES,
    SERVICE_ACCOUNT,
};
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::Refused;
use super::credentials::Caller;
use crate::security::Guard;

/// Answers one call of `caller`, whoever that is.
pub async fn create(
    guard: Guard,
    peer: String,
    caller: Result<Caller, Refused>,
    request: hyper::Request<hyper::body::Incoming>,
) -> hyper::Response<tonic::body::Body> {
    let codec = ProstCodec::<CertificateResponse, CertificateRequest>::default();
    let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_SIGNING_BYTES);
    let sign = Sign {
        guard,
        peer,
        caller,
    };
    grpc.unary(sign, request).await
}

struct Sign {
    guard: Guard,
    peer: String,
    caller: Result<Caller, Refused>,
}

impl UnaryService<CertificateRequest> for Sign {
    type Response = CertificateResponse;
    type Future =
        Pin<Box<dyn Future<Output = Result<Response<CertificateResponse>, Status>> + Send>>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        let (guard, peer, caller) = (self.guard.clone(), self.peer.clone(), self.caller.clone());
        let request = request.into_inner();
        Box::pin(async move {
            // A signature, a line of the audit and, now and then, a write.
            let work = move || match caller {
                Ok(caller) => sign(&guard, &caller, &request),
                Err(refused) => {
                    if let Some(authority) = guard.authority() {
                        authority.refuse(&Caller::anybody(peer), &refused);
                    }
                    Err(refused)
                }
            };
            let signing = tokio::task::spawn_blocking(work);
            match signing.await {
                Ok(Ok(answer)) => Ok(Response::new(answer)),
                Ok(Err(refused)) => Err(status(&refused)),
                Err(_) => Err(Status::internal("signing broke off")),
            }
        })
    }
}

fn sign(
    guard: &Guard,
    caller: &Caller,
    request: &CertificateRequest,
) -> Result<CertificateResponse, Refused> {
    let Some(authority) = guard.authority() else {
        return Err(Refused::Unable(
            "this control plane has no authority: set ca".to_owned(),
        ));
    };
    let metadata = request.metadata.as_ref();
    let wanted = metadata.and_then(|metadata| {
        metadata
            .text(IMPERSONATED_IDENTITY)
            .or(metadata.text(SERVICE_ACCOUNT))
    });
    // What is negative is nonsense, and gets what everybody gets.
    let ttl = Duration::from_secs(u64::try_from(request.validity_duration).unwrap_or(0));
    let signed = authority.issue(caller, wanted, &request.csr, ttl, guard.state_dir())?;
    Ok(CertificateResponse {
        cert_chain: signed.chain,
    })
}

/// As gRPC says it. An authority that is not able to may be able to later.
pub fn status(refused: &Refused) -> Status {
    let text = refused.to_string();
    match refused {
        Refused::Unauthenticated(_) => Status::unauthenticated(text),
        Refused::Denied(_) => Status::permission_denied(text),
        Refused::Request(_) => Status::invalid_argument(text),
        Refused::Limited(_) => Status::resource_exhausted(text),
        Refused::Unable(_) => Status::unavailable(text),
    }
}
