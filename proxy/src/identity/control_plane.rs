//! Identity from the control plane's authority.
//!
//! The key is made here, for each certificate a new one, and never leaves this process. The first
//! certificate is asked for with the join token, the next ones with the certificate before. While
//! the authority is away the certificate in force stays, until it expires. Stands on the life of a
//! config update.
//!
//! The protocol is Istio's, so that its authority may sign as well (`outrigger_config::signing`).

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::uri::PathAndQuery;
use outrigger_config::signing::{
    CREATE_CERTIFICATE_PATH, CertificateRequest, CertificateResponse, MAX_SIGNING_BYTES,
    SERVICE_ACCOUNT,
};
use outrigger_config::wire::{Struct, Value};
use outrigger_core::renewal;
use outrigger_core::spiffe::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use tokio::time::{sleep, timeout};
use tonic::client::Grpc;
use tonic_prost::ProstCodec;
use tracing::error;

use crate::app::Shared;
use crate::identity::svid::{Material, Svid};
use crate::identity::{now, verify};
use crate::source::control_plane::H2;
use crate::source::dial::Dialer;

/// How long one request may take, all in all.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Keeps a certificate in force for as long as it is polled.
pub async fn run(shared: Arc<Shared>) {
    let Some(client) = &shared.bootstrap.control_plane else {
        return error!("identity.controlPlane needs controlPlane");
    };
    let dialer = match Dialer::new(client) {
        Ok(dialer) => dialer,
        Err(problem) => return error!(problem, "controlPlane.address"),
    };
    let renewals = shared
        .metrics
        .counter("outrigger_certificate_renewals_total", &[]);
    let failed = shared
        .metrics
        .counter("outrigger_certificate_renewal_failures_total", &[]);
    let mut rng = fastrand::Rng::new();
    let mut failures = 0u32;
    loop {
        let svid = shared.identity.current();
        let asked = timeout(ANSWER_WITHIN, ask(&shared, &dialer, svid.as_deref())).await;
        let taken = match asked {
            Ok(Ok(material)) => shared
                .identity
                .take_up_signed(material, &shared.metrics)
                .map_err(|unusable| format!("the control plane's certificate: {unusable}")),
            Ok(Err(problem)) => Err(problem),
            Err(_) => Err("the control plane does not answer".to_owned()),
        };
        let left = shared.identity.current().map(|svid| left(&svid));
        let wait = match taken {
            Ok(()) => {
                failures = 0;
                renewals.increment(1);
                renewal::renew_after(left.unwrap_or_default(), &mut rng)
            }
            Err(problem) => {
                failures = failures.saturating_add(1);
                failed.increment(1);
                shared.identity.failed(&problem);
                renewal::retry_after(left, failures, &mut rng)
            }
        };
        sleep(wait).await;
    }
}

/// How long it still counts.
fn left(svid: &Svid) -> Duration {
    let end = Duration::from_secs(u64::try_from(svid.not_after).unwrap_or(0));
    end.saturating_sub(Duration::from_millis(crate::clock::unix_now().0))
}

/// One certificate, with its key and the roots.
async fn ask(shared: &Shared, dialer: &Dialer, svid: Option<&Svid>) -> Result<Material, String> {
    let key = KeyPair::generate().map_err(|e| format!("no key was made: {e}"))?;
    let workload = &shared.bootstrap.workload;
    let (namespace, account) = (workload.namespace(), workload.service_account());
    let csr = signing_request(&key, our_id(shared, svid, namespace, account).as_ref())?;
    let fields = BTreeMap::from([(
        SERVICE_ACCOUNT.to_owned(),
        Value::text(format!("{namespace}/{account}")),
    )]);
    let mut request = tonic::Request::new(CertificateRequest {
        csr,
        validity_duration: 0,
        metadata: Some(Struct { fields }),
    });
    if let Some(token) = dialer.token(svid)? {
        request.metadata_mut().insert("authorization", token);
    }
    let (sender, connection) = dialer.connect(svid).await?;
    let mut connection = pin!(connection);
    let asking = async {
        let mut grpc = Grpc::with_origin(H2(sender), dialer.address().clone())
            .max_decoding_message_size(MAX_SIGNING_BYTES);
        let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
        let path = PathAndQuery::from_static(CREATE_CERTIFICATE_PATH);
        grpc.unary(request, path, codec)
            .await
            .map(tonic::Response::into_inner)
            .map_err(|status| {
                let (code, message) = (status.code(), status.message());
                format!("the control plane signed nothing: {code:?}: {message}")
            })
    };
    let answer = tokio::select! {
        answer = asking => answer?,
        ended = connection.as_mut() => {
            let why = ended.err().map_or_else(|| "it was closed".to_owned(), |e| e.to_string());
            return Err(format!("the connection to the control plane broke: {why}"));
        }
    };
    let material = material(&answer, &key)?;
    let id = verify::subject(&material.chain[0])
        .map_err(|refused| format!("the control plane's certificate: {refused}"))?;
    if id.account() != Some((namespace, account)) {
        return Err(format!(
            "the control plane signed for {id}, this workload is {namespace}/{account}"
        ));
    }
    Ok(material)
}

/// Who we are, where that is known: as before, or as the mesh config names its trust domain. Ours
/// does not read it, other authorities compare it with the credential.
fn our_id(
    shared: &Shared,
    svid: Option<&Svid>,
    namespace: &str,
    account: &str,
) -> Option<SpiffeId> {
    if let Some(svid) = svid {
        return Some(svid.id.clone());
    }
    let snapshot = shared.store.load();
    let domain = snapshot.config.as_ref()?.mesh.trust_domain.as_deref()?;
    SpiffeId::of_account(domain, namespace, account)
}

fn signing_request(key: &KeyPair, id: Option<&SpiffeId>) -> Result<String, String> {
    let unmade = |e: rcgen::Error| format!("no signing request was made: {e}");
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(id) = id {
        let name = id.as_str().try_into().map_err(unmade)?;
        params.subject_alt_names = vec![SanType::URI(name)];
    }
    let request = params.serialize_request(key).map_err(unmade)?;
    request.pem().map_err(unmade)
}

/// The last text of the chain is the bundle of roots.
fn material(answer: &CertificateResponse, key: &KeyPair) -> Result<Material, String> {
    let [chain @ .., bundle] = &answer.cert_chain[..] else {
        return Err("the control plane answered without certificates".to_owned());
    };
    let chain: String = chain.iter().map(|pem| format!("{pem}\n")).collect();
    Material::from_pem(
        chain.as_bytes(),
        key.serialize_pem().as_bytes(),
        bundle.as_bytes(),
    )
    .map_err(|unusable| format!("the control plane's certificate: {unusable}"))
}

/// Puts certificates out of force that have expired, whatever source should have renewed them, for
/// as long as it is polled.
pub(super) async fn end_in_time(shared: Arc<Shared>) {
    let mut changes = shared.identity.changes();
    loop {
        let svid = shared.identity.current();
        let end = async {
            match &svid {
                // Not later: the wall clock may be set meanwhile.
                Some(svid) => sleep(left(svid).min(Duration::from_secs(60))).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return;
            },
            () = end => if let Some(svid) = &svid {
                shared.identity.lapse(svid, now());
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_chain_and_bundle_is_refused() {
        let key = KeyPair::generate().unwrap();
        let check = |chain: &[&str], expected: &str| {
            let cert_chain = chain.iter().map(ToString::to_string).collect();
            let Err(refused) = material(&CertificateResponse { cert_chain }, &key) else {
                panic!("taken: {chain:?}");
            };
            assert!(refused.contains(expected), "{refused}");
        };
        let pem = CertificateParams::default()
            .self_signed(&key)
            .unwrap()
            .pem();
        check(&[], "without certificates");
        check(&[&pem], "no PEM certificate");
        check(&[&pem, ""], "the bundle has no PEM certificate");
        check(&["", &pem], "the certificate has no PEM certificate");
        let cert_chain = vec![pem.clone(), pem.clone(), pem.clone() + &pem];
        let taken = material(&CertificateResponse { cert_chain }, &key).unwrap();
        assert_eq!((taken.chain.len(), taken.bundle.len()), (2, 2));
    }
}
