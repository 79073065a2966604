//! What the admin API says of the process, its sidecars and its configs, and the way back to an
//! earlier config.

use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde::Deserialize;
use serde_json::{Value, json};

use super::call::{Answer, Call, etag, json_answer, tagged, text_answer, would};
use super::problem::Problem;
use crate::app::App;
use crate::clock;
use crate::history::{By, Change};
use crate::proxies::Proxy;

pub(super) fn alive(_: &Call) -> Answer {
    Ok(text_answer(StatusCode::OK, "ok\n"))
}

pub(super) fn ready(call: &Call) -> Answer {
    match call.app.current() {
        Some(_) => Ok(text_answer(StatusCode::OK, "ok\n")),
        None => Err(Problem::unavailable(
            "config_missing",
            "no usable config yet",
        )),
    }
}

pub(super) fn metrics(call: &Call) -> Answer {
    let mut response = text_answer(StatusCode::OK, call.app.metrics());
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, format);
    Ok(response)
}

pub(super) fn proxies(call: &Call) -> Answer {
    let version = call.app.current().map(|c| c.config.version.clone());
    let page = call.page(call.app.proxies.list().into_iter(), |proxy| {
        proxy.id.clone()
    })?;
    let body = json!({"configVersion": version, "proxies": page.items});
    Ok(call.paged(&page, body))
}

pub(super) fn authority(call: &Call) -> Answer {
    match call.app.guard.authority() {
        Some(authority) => Ok(json_answer(StatusCode::OK, &authority.view())),
        None => Err(Problem::unknown(
            "not_found",
            "this control plane has no authority: set ca",
        )),
    }
}

pub(super) fn replicas(call: &Call) -> Answer {
    let Some(replicas) = &call.app.replicas else {
        let detail = "this control plane is the only one: set replicas";
        return Err(Problem::unknown("not_found", detail));
    };
    let standing = replicas.standing();
    let body = json!({
        "name": replicas.name,
        "leads": standing.leads,
        "leader": standing.leader,
        "connected": standing.connected,
        "problem": standing.problem,
    });
    Ok(json_answer(StatusCode::OK, &body))
}

/// Decisions about configs are the leader's.
fn check_lead(app: &App) -> Result<(), Problem> {
    if app.leads() {
        return Ok(());
    }
    let leader = app.replicas.as_ref().and_then(|r| r.standing().leader);
    let detail = match leader {
        Some(leader) => format!("{} leads: ask {}", leader.name, leader.admin),
        None => "nobody leads at the moment: ask again".to_owned(),
    };
    Err(Problem::conflict("not_leader", detail))
}

pub(super) fn config(call: &Call) -> Answer {
    let current = call.app.current();
    let current = current.as_ref();
    let documents = current.map(|c| c.config.documents.keys().collect::<Vec<_>>());
    let rejected = call.app.rejected();
    let candidate = call.app.candidate();
    let body = json!({
        "version": current.map(|c| &c.config.version),
        "source": current.map(|c| c.source),
        "path": call.app.config_path().display().to_string(),
        "appliedAt": current.map(|c| c.applied),
        "documents": documents.unwrap_or_default(),
        "warnings": current.map(|c| c.warnings.as_slice()).unwrap_or_default(),
        "rejected": rejected,
        "onTrial": candidate.map(|c| c.config.version.clone()),
    });
    let tag = etag([body.to_string().as_str()]);
    Ok(tagged(&body, &tag))
}

pub(super) fn rollouts(call: &Call) -> Answer {
    let app = &call.app;
    let history = app.history();
    let versions: Vec<Value> = history
        .versions()
        .map(|version| {
            json!({
                "version": version.version,
                "at": version.at,
                "by": version.by,
                "who": version.who,
                "reason": version.reason,
                "added": version.added,
                "changed": version.changed,
                "removed": version.removed,
            })
        })
        .collect();
    let version = app.current().map(|c| c.config.version.clone());
    let proxies = app.proxies.list();
    let connected = || proxies.iter().filter(|proxy| proxy.connected);
    let runs = |proxy: &&Proxy| proxy.config.acknowledged == version;
    let refused = |proxy: &&Proxy| {
        let refused = proxy.config.refused.as_ref();
        refused.is_some_and(|refused| Some(&refused.version) == version.as_ref())
    };
    let body = json!({
        "version": version,
        "onTrial": trial_view(app, &proxies),
        "withdrawn": history.withdrawn(),
        "stopped": history.stopped(),
        "proxies": {
            "connected": connected().count(),
            "synced": connected().filter(runs).count(),
            "refused": connected().filter(refused).count(),
        },
        "versions": versions,
    });
    Ok(tagged(&body, &rollouts_tag(app)))
}

/// The config that some sidecars try.
fn trial_view(app: &App, proxies: &[Proxy]) -> Value {
    let (Some(candidate), Some(policy)) = (app.candidate(), &app.canary) else {
        return Value::Null;
    };
    let version = &candidate.config.version;
    let canaries = candidate.trial.canaries();
    let of = |proxy: &&Proxy| canaries.contains(&proxy.id);
    let runs = |proxy: &&Proxy| proxy.config.acknowledged.as_ref() == Some(version);
    let age = candidate.trial.age(clock::monotonic());
    json!({
        "version": version,
        "at": candidate.began,
        "canaries": canaries,
        "synced": proxies.iter().filter(of).filter(runs).count(),
        "secondsLeft": policy.bake().saturating_sub(age).as_secs(),
    })
}

/// Changes with every decision about configs, and not with what sidecars say.
fn rollouts_tag(app: &App) -> String {
    let history = app.history();
    let (current, candidate) = (app.current(), app.candidate());
    let newest = history.versions().next().map(|v| v.at.to_string());
    etag([
        current.as_ref().map_or("", |c| &c.config.version),
        candidate.as_ref().map_or("", |c| &c.config.version),
        history.withdrawn().unwrap_or_default(),
        newest.as_deref().unwrap_or_default(),
    ])
}

pub(super) fn roll_back(call: &Call) -> Answer {
    #[derive(Default, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        to: Option<String>,
        reason: Option<String>,
    }
    let expected = r#"{"to": "VERSION", "reason": "TEXT"}, both of which may be left out"#;
    let Body { to, reason } = call.json_or_default(expected)?;
    let app = &call.app;
    check_lead(app)?;
    call.check_conditions(Some(&rollouts_tag(app)))?;
    let refused = |detail| Problem::conflict("no_such_version", detail);
    if call.is_dry_run()? {
        let (config, _) = app.earlier(to.as_deref()).map_err(refused)?;
        return Ok(would(&json!({"version": config.version})));
    }
    let change = Change {
        by: By::Rollback,
        who: call.who.clone(),
        reason,
    };
    let version = app.roll_back(to.as_deref(), change).map_err(refused)?;
    Ok(json_answer(StatusCode::OK, &json!({ "version": version })))
}

pub(super) fn promote(call: &Call) -> Answer {
    let app = &call.app;
    check_lead(app)?;
    call.check_conditions(Some(&rollouts_tag(app)))?;
    if call.is_dry_run()? {
        let candidate = app
            .candidate()
            .ok_or_else(|| Problem::conflict("nothing_on_trial", "no config is on trial"))?;
        return Ok(would(&json!({"version": candidate.config.version})));
    }
    let refused = |detail| Problem::conflict("nothing_on_trial", detail);
    let version = app.promote().map_err(refused)?;
    tracing::warn!(version, who = call.who, "a trial was cut short");
    Ok(json_answer(StatusCode::OK, &json!({ "version": version })))
}
