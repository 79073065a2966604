//! Identity from a SPIFFE Workload API, such as SPIRE's agent, over its Unix socket.
//!
//! The stream brings every renewal and every change of the bundle by itself. When it ends or the
//! agent is away, what is in force stays in force until the agent is back. Stands on the life of a
//! config update.
//!
//! The messages are written by hand, after `workload.proto` of the SPIFFE Workload API. Revocation
//! lists and the bundles of other trust domains are left out: peers are of our own.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use http::uri::PathAndQuery;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_config::bootstrap::WorkloadApi;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::metadata::MetadataValue;
use tonic_prost::ProstCodec;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::app::Shared;
use crate::identity::svid::{Material, Unusable};
use crate::identity::verify;
use crate::source::control_plane::{H2, reconnect_after};

const FETCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

/// Tells the agent that no browser was talked into this (SPIFFE Workload Endpoint §4.1).
const SECURITY_HEADER: &str = "workload.spiffe.io";

/// How long connecting may take. The first answer may take as long as the agent wants: it may have
/// to wait for a registration.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

#[derive(Clone, PartialEq, prost::Message)]
struct X509SvidRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct X509SvidResponse {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<X509Svid>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct X509Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    /// The leaf, then the intermediates, as DER one after another.
    #[prost(bytes = "vec", tag = "2")]
    x509_svid: Vec<u8>,
    /// PKCS#8, DER.
    #[prost(bytes = "vec", tag = "3")]
    x509_svid_key: Vec<u8>,
    /// The authorities of its trust domain, as DER one after another.
    #[prost(bytes = "vec", tag = "4")]
    bundle: Vec<u8>,
    /// What the operator means it for.
    #[prost(string, tag = "5")]
    hint: String,
}

/// Takes up what the agent says, now and whenever it says something else.
pub async fn run(shared: Arc<Shared>, api: WorkloadApi) {
    let mut failures = 0u32;
    loop {
        let mut answered = false;
        let Err(problem) = follow(&shared, &api, &mut answered).await;
        failures = if answered {
            0
        } else {
            failures.saturating_add(1)
        };
        shared.identity.failed(&problem);
        sleep(reconnect_after(failures, &mut fastrand::Rng::new())).await;
    }
}

/// One stream, to its end.
async fn follow(
    shared: &Shared,
    api: &WorkloadApi,
    answered: &mut bool,
) -> Result<Infallible, String> {
    let socket = api.socket.display();
    let connected = timeout(CONNECT_WITHIN, UnixStream::connect(&api.socket)).await;
    let stream = connected
        .map_err(|_| format!("the Workload API at {socket} does not answer"))?
        .map_err(|error| format!("cannot connect to the Workload API at {socket}: {error}"))?;
    // No pings: a Unix socket tells of its peer's end, and gRPC servers end connections that ping
    // more often than every five minutes (grpc-go's enforcement policy).
    let handshake = http2::handshake::<_, _, Body>(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = timeout(CONNECT_WITHIN, handshake)
        .await
        .map_err(|_| format!("the Workload API at {socket} does not answer"))?
        .map_err(|error| format!("no HTTP/2 with the Workload API at {socket}: {error}"))?;
    let mut connection = pin!(connection);
    let listening = async {
        let origin = Uri::from_static("http://localhost");
        let mut grpc = Grpc::with_origin(H2(sender), origin);
        let mut request = tonic::Request::new(X509SvidRequest {});
        let yes = MetadataValue::from_static("true");
        request.metadata_mut().insert(SECURITY_HEADER, yes);
        let codec = ProstCodec::<X509SvidRequest, X509SvidResponse>::default();
        let path = PathAndQuery::from_static(FETCH);
        let response = grpc.server_streaming(request, path, codec).await;
        let mut answers = response.map_err(|status| describe(&status))?.into_inner();
        loop {
            let answer = answers
                .message()
                .await
                .map_err(|status| describe(&status))?;
            let Some(answer) = answer else {
                return Err("the Workload API ended the stream".to_owned());
            };
            *answered = true;
            let taken = material(answer, api.hint.as_deref())
                .and_then(|material| shared.identity.take_up(material, &shared.metrics));
            if let Err(unusable) = taken {
                shared.identity.failed(&unusable.to_string());
            }
        }
    };
    tokio::select! {
        ended = listening => ended,
        ended = connection.as_mut() => Err(match ended {
            Ok(()) => "the Workload API closed the connection".to_owned(),
            Err(error) => format!("the connection to the Workload API broke: {error}"),
        }),
    }
}

fn describe(status: &tonic::Status) -> String {
    let (code, message) = (status.code(), status.message());
    match code {
        tonic::Code::PermissionDenied => {
            format!("the Workload API has no identity for this workload: {message}")
        }
        _ => format!("the Workload API answered {code:?}: {message}"),
    }
}

/// The SVID that is meant for us: the one with our hint, else the first, which is the default
/// (SPIFFE Workload API §5.2.1).
fn material(answer: X509SvidResponse, hint: Option<&str>) -> Result<Material, Unusable> {
    let mut svids = answer.svids.into_iter();
    let svid = match hint {
        None => svids.next(),
        Some(hint) => svids.find(|svid| svid.hint == hint),
    };
    let Some(svid) = svid else {
        return Err(Unusable(match hint {
            None => "the Workload API sent no SVID".to_owned(),
            Some(hint) => format!("the Workload API sent no SVID with the hint {hint}"),
        }));
    };
    let chain = certificates(&svid.x509_svid, "certificate")?;
    let id = verify::subject(&chain[0]).map_err(|refused| Unusable(refused.to_string()))?;
    if id.as_str() != svid.spiffe_id {
        let said = svid.spiffe_id;
        return Err(Unusable(format!("the SVID of {said} is that of {id}")));
    }
    Ok(Material {
        chain,
        key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(svid.x509_svid_key)),
        bundle: certificates(&svid.bundle, "bundle")?,
    })
}

/// Certificates that stand one after another; at least one.
fn certificates(mut der: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let mut found = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der)
            .map_err(|error| Unusable(format!("the {what} is not DER: {error}")))?;
        let one = &der[..der.len() - rest.len()];
        found.push(CertificateDer::from(one.to_vec()));
        der = rest;
    }
    match found.is_empty() {
        true => Err(Unusable(format!("the {what} has no certificate"))),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn der(id: &str) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        certificate.der().to_vec()
    }

    fn svid(id: &str, hint: &str) -> X509Svid {
        let chain = der(id);
        X509Svid {
            spiffe_id: id.to_owned(),
            bundle: [chain.clone(), der("spiffe://a/root")].concat(),
            x509_svid: chain,
            x509_svid_key: vec![1],
            hint: hint.to_owned(),
        }
    }

    fn check(svids: &[X509Svid], hint: Option<&str>, expected: Result<&X509Svid, &str>) {
        let answer = X509SvidResponse {
            svids: svids.to_vec(),
        };
        match (material(answer, hint), expected) {
            (Ok(found), Ok(expected)) => {
                assert_eq!(found.chain[0].as_ref(), expected.x509_svid);
                assert_eq!(found.bundle.len(), 2);
            }
            (Err(found), Err(expected)) => assert!(found.0.contains(expected), "{found}"),
            (Ok(_), Err(expected)) => panic!("not refused: {expected}"),
            (Err(found), Ok(_)) => panic!("refused: {found}"),
        }
    }

    #[test]
    fn which_of_several_svids_is_taken_and_what_is_none() {
        let (web, ops) = (svid("spiffe://a/web", ""), svid("spiffe://a/ops", "ops"));
        let both = [web.clone(), ops.clone()];
        check(&both, None, Ok(&web));
        check(&both, Some("ops"), Ok(&ops));
        check(&both, Some("db"), Err("no SVID with the hint db"));
        check(&[], None, Err("no SVID"));
        let other = X509Svid {
            spiffe_id: "spiffe://a/other".to_owned(),
            ..web.clone()
        };
        check(
            &[other],
            None,
            Err("of spiffe://a/other is that of spiffe://a/web"),
        );
        let mut cut = web.clone();
        cut.x509_svid.pop();
        check(&[cut], None, Err("the certificate is not DER"));
        let without = X509Svid {
            bundle: Vec::new(),
            ..web
        };
        check(&[without], None, Err("the bundle has no certificate"));
    }
}
