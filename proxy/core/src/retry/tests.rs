use super::*;
use http::StatusCode;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A GET without a body that nobody retried.
const GET: RequestFacts = RequestFacts {
    idempotent: true,
    keyed: false,
    grpc: false,
    replay: Replay::Yes,
    retried_by_peer: false,
};
const POST: RequestFacts = RequestFacts {
    idempotent: false,
    ..GET
};
const KEYED_POST: RequestFacts = RequestFacts {
    keyed: true,
    ..POST
};
/// A caller that wrongly says idempotent changes nothing for gRPC.
const GRPC: RequestFacts = RequestFacts { grpc: true, ..GET };
const KEYED_GRPC: RequestFacts = RequestFacts {
    keyed: true,
    ..GRPC
};

fn http(status: u16) -> Observed {
    Observed::Head {
        status: StatusCode::from_u16(status).unwrap(),
        grpc: None,
    }
}

fn grpc(code: GrpcCode) -> Observed {
    Observed::Head {
        status: StatusCode::OK,
        grpc: Some(code),
    }
}

fn decided(params: &Params, facts: RequestFacts, tried: u32, observed: Observed) -> Decision {
    decide(
        params,
        &facts,
        tried,
        &observed,
        Asked::Nothing,
        None,
        &mut fastrand::Rng::with_seed(5),
    )
}

fn check(facts: RequestFacts, observed: Observed, expected: &str) {
    check_with(&Params::default(), facts, 1, observed, expected);
}

fn check_with(params: &Params, facts: RequestFacts, tried: u32, seen: Observed, expected: &str) {
    let decision = match decided(params, facts, tried, seen) {
        Decision::Retry { .. } => "retry",
        Decision::Stop(reason) => reason.as_str(),
    };
    assert_eq!(decision, expected, "{facts:?} {seen:?} after {tried}");
}

#[test]
fn what_nobody_worked_on_is_always_safe() {
    for facts in [GET, POST, KEYED_POST, GRPC, KEYED_GRPC] {
        for observed in [
            Observed::ConnectFailed,
            Observed::Unsent,
            Observed::RefusedStream,
        ] {
            check(facts, observed, "retry");
        }
    }
}

#[test]
fn listed_statuses_are_retried_where_repeating_is_harmless() {
    for status in [502, 503, 504] {
        check(GET, http(status), "retry");
        check(KEYED_POST, http(status), "retry");
        check(POST, http(status), "unsafe_method");
    }
    for status in [200, 404, 429, 500] {
        check(GET, http(status), "not_retryable");
    }
    check(GRPC, grpc(GrpcCode::Unavailable), "unsafe_method");
    check(KEYED_GRPC, grpc(GrpcCode::Unavailable), "retry");
    check(KEYED_GRPC, grpc(GrpcCode::Ok), "not_retryable");
    check(KEYED_GRPC, grpc(GrpcCode::Internal), "not_retryable");
}

#[test]
fn unsafe_opts_the_others_in() {
    let params = Params {
        unsafe_methods: true,
        ..Params::default()
    };
    check_with(&params, POST, 1, http(503), "retry");
    check_with(&params, GRPC, 1, grpc(GrpcCode::Unavailable), "retry");
    check_with(&params, POST, 1, http(500), "not_retryable");
}

#[test]
fn what_broke_or_took_too_long() {
    check(GET, Observed::ResetBeforeResponse, "not_retryable");
    let params = Params {
        reset_before_response: true,
        ..Params::default()
    };
    check_with(&params, GET, 1, Observed::ResetBeforeResponse, "retry");
    check_with(
        &params,
        POST,
        1,
        Observed::ResetBeforeResponse,
        "unsafe_method",
    );
    check(GET, Observed::PerTryTimeout, "retry");
    check(POST, Observed::PerTryTimeout, "unsafe_method");
    check(GET, Observed::Protocol, "retry");
    for observed in [
        Observed::ResetInBody,
        Observed::RequestTimeout,
        Observed::CallerDeadline,
        Observed::CallerGone,
    ] {
        check(GET, observed, "not_retryable");
    }
}

#[test]
fn attempts_count_additional_tries() {
    let params = Params {
        attempts: 2,
        ..Params::default()
    };
    check_with(&params, GET, 1, http(503), "retry");
    check_with(&params, GET, 2, http(503), "retry");
    check_with(&params, GET, 3, http(503), "attempts_exhausted");
    let none = Params {
        attempts: 0,
        ..Params::default()
    };
    check_with(&none, GET, 1, Observed::ConnectFailed, "attempts_exhausted");
}

#[test]
fn what_cannot_be_sent_again_is_not() {
    let too_large = RequestFacts {
        replay: Replay::TooLarge,
        ..GET
    };
    check(too_large, http(503), "body_too_large");
    check(
        RequestFacts {
            replay: Replay::Consumed,
            ..GET
        },
        http(503),
        "body_consumed",
    );
    check(
        RequestFacts {
            retried_by_peer: true,
            ..GET
        },
        Observed::ConnectFailed,
        "retried_by_peer",
    );
}

#[test]
fn a_success_is_called_nothing_worse_than_not_retryable() {
    let hopeless = RequestFacts {
        replay: Replay::TooLarge,
        retried_by_peer: true,
        ..POST
    };
    check_with(&Params::default(), hopeless, 9, http(200), "not_retryable");
}

#[test]
fn the_first_retry_of_an_unsent_request_goes_at_once() {
    let params = Params {
        attempts: 5,
        ..Params::default()
    };
    let first = decided(&params, GET, 1, Observed::ConnectFailed);
    assert_eq!(
        first,
        Decision::Retry {
            after: Duration::ZERO
        }
    );
    for tried in 2..5 {
        let Decision::Retry { after } = decided(&params, GET, tried, Observed::ConnectFailed)
        else {
            panic!()
        };
        assert!(
            after > Duration::ZERO && after <= MS(25 << (tried - 1)),
            "{after:?}"
        );
    }
}

#[test]
fn retry_after_is_honoured_while_the_deadline_allows() {
    let check = |retry_after: Option<u64>, remaining: Option<u64>, expected: Option<u64>| {
        let params = Params {
            backoff: Duration::ZERO,
            ..Params::default()
        };
        let mut rng = fastrand::Rng::with_seed(5);
        let remaining = remaining.map(MS);
        let asked = retry_after.map_or(Asked::Nothing, |millis| Asked::After(MS(millis)));
        let decision = decide(&params, &GET, 1, &http(503), asked, remaining, &mut rng);
        let expected = match expected {
            Some(after) => Decision::Retry { after: MS(after) },
            None => Decision::Stop(StopReason::Deadline),
        };
        assert_eq!(decision, expected);
    };
    check(None, None, Some(0));
    check(Some(1_000), None, Some(1_000));
    check(Some(1_000), Some(1_001), Some(1_000));
    check(Some(1_000), Some(1_000), None);
    check(None, Some(0), None);
    check(Some(60_000), None, None);
    check(Some(60_000), Some(600_000), None);
}

#[test]
fn an_upstream_that_forbids_it_is_not_tried_again() {
    let decided = |observed| {
        let mut rng = fastrand::Rng::with_seed(5);
        let params = Params::default();
        decide(&params, &GET, 1, &observed, Asked::Never, None, &mut rng)
    };
    assert_eq!(decided(http(503)), Decision::Stop(StopReason::PushedBack));
    // Nothing was called for that could be forbidden.
    assert_eq!(decided(http(200)), Decision::Stop(StopReason::NotRetryable));
}

#[test]
fn a_head_is_held_only_while_a_retry_is_possible() {
    let params = Params::default();
    assert!(is_possible(&params, &GET, 1));
    assert!(!is_possible(&params, &GET, 2));
    assert!(!is_possible(&params, &GRPC, 1));
    assert!(is_possible(&params, &KEYED_GRPC, 1));
    assert!(!is_possible(
        &params,
        &RequestFacts {
            replay: Replay::TooLarge,
            ..GET
        },
        1
    ));
}

#[test]
fn idempotent_methods() {
    for method in [
        Method::GET,
        Method::HEAD,
        Method::OPTIONS,
        Method::PUT,
        Method::DELETE,
    ] {
        assert!(is_idempotent(&method), "{method}");
    }
    for method in [Method::POST, Method::PATCH, Method::CONNECT, Method::TRACE] {
        assert!(!is_idempotent(&method), "{method}");
    }
}
