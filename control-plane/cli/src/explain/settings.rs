//! Every effective value of a rule and its services, with where each comes from.
//!
//! The policies are taken apart without a rest pattern: a value that is added to them does not
//! compile until it is shown.

use std::time::Duration;

use outrigger_config::effective::{
    Adaptive, Answered, Async, Breaker, Connection, Delivery, Ejection, FailureOn, Features,
    Idempotency, Limit, Limits, LoadBalancer, Origin, Retry, RuleLimits, RulePolicy, ServicePolicy,
    Setting, Timeouts,
};
use outrigger_config::model::AsyncWhen;
use outrigger_config::units::{ByteSize, Dur};
use serde::Serialize;
use serde_json::{Value, json};

/// What stands for nothing.
const NONE: &str = "none";

/// Rows of owner, name, value and origin.
#[derive(Default)]
pub(super) struct Settings(pub(super) Vec<Value>);

impl Settings {
    /// Everything that applies to the calls of a rule.
    pub(super) fn rule(&mut self, policy: &RulePolicy) {
        let RulePolicy {
            timeouts,
            retry,
            limits,
            async_,
            features,
        } = policy;
        let rows = &mut Rows {
            of: "rule",
            to: self,
        };
        rows.timeouts(timeouts);
        rows.retry(retry);
        rows.rule_limits(limits);
        rows.asynchronous(async_);
        rows.features(features);
    }

    /// Everything that applies to a service; `connect` is what comes of its and the rule's.
    pub(super) fn service(&mut self, of: &str, policy: &ServicePolicy, connect: &Limit) {
        let ServicePolicy {
            load_balancer,
            connection,
            limits,
            breaker,
            ejection,
            health,
        } = policy;
        let rows = &mut Rows { of, to: self };
        rows.limit("timeouts.connect", connect);
        rows.load_balancer(load_balancer);
        rows.connection(connection);
        rows.limits(limits);
        rows.breaker(breaker);
        rows.ejection(ejection);
        rows.part("health", health.as_ref());
    }
}

/// The rows of one owner.
struct Rows<'a> {
    of: &'a str,
    to: &'a mut Settings,
}

impl Rows<'_> {
    fn timeouts(&mut self, timeouts: &Timeouts) {
        let Timeouts {
            // Shown with the service, for it may be the service's.
            connect: _,
            request,
            per_try,
            idle,
            stream,
        } = timeouts;
        self.limit("timeouts.request", request);
        self.limit("timeouts.perTry", per_try);
        self.limit("timeouts.idle", idle);
        self.limit("timeouts.stream", stream);
    }

    fn retry(&mut self, retry: &Retry) {
        let Retry {
            attempts,
            codes,
            grpc,
            conditions,
            unsafe_,
            backoff,
            max_backoff,
            max_body,
            budget_percent,
            budget_min_per_second,
            hedge_after,
            hedge_percentile,
            hedge_max,
        } = retry;
        self.plain("retry.attempts", attempts);
        self.list("retry.codes", codes);
        self.list("retry.grpc", grpc);
        self.words("retry.conditions", conditions);
        self.plain("retry.unsafe", unsafe_);
        self.time("retry.backoff", backoff);
        self.time("retry.maxBackoff", max_backoff);
        self.size("retry.maxBody", max_body);
        self.plain("retry.budget.percent", budget_percent);
        self.plain("retry.budget.minPerSecond", budget_min_per_second);
        self.limit("retry.hedge.after", hedge_after);
        self.option("retry.hedge.percentile", hedge_percentile);
        if hedge_after.is_some() || hedge_percentile.is_some() {
            self.plain("retry.hedge.max", hedge_max);
        }
    }

    fn rule_limits(&mut self, limits: &RuleLimits) {
        let RuleLimits {
            max_in_flight,
            max_pending,
            max_pending_wait,
            max_request_body,
        } = limits;
        self.option("limits.maxInFlight", max_in_flight);
        if max_in_flight.is_some() {
            self.plain("limits.maxPending", max_pending);
            self.time("limits.maxPendingWait", max_pending_wait);
        }
        self.optional_size("limits.maxRequestBody", max_request_body);
    }

    fn asynchronous(&mut self, asynchronous: &Async) {
        let Async {
            when,
            queue,
            max_body,
            ordering_key,
            on_dead,
            delivery,
            permanent_codes,
            permanent_except,
            permanent_grpc,
            result_ttl,
            result_max_body,
            subscribers,
            secrets,
            callback,
            grpc_ack,
            grpc_response_type,
            idempotency,
        } = asynchronous;
        self.word("async.when", when);
        if **when == AsyncWhen::Never {
            return;
        }
        self.option("async.queue", queue);
        self.size("async.maxBody", max_body);
        self.option("async.orderingKey", ordering_key);
        self.word("async.onDead", on_dead);
        self.delivery(delivery);
        self.list("async.permanent.codes", permanent_codes);
        self.list("async.permanent.except", permanent_except);
        self.list("async.permanent.grpc", permanent_grpc);
        self.time("async.resultTtl", result_ttl);
        self.size("async.resultMaxBody", result_max_body);
        self.list("async.subscribers", subscribers);
        self.word("async.secrets", secrets);
        self.part("async.callback", callback.as_ref());
        self.optional_word("async.grpcAck", grpc_ack);
        self.option("async.grpcResponseType", grpc_response_type);
        self.idempotency("async.idempotency", idempotency);
    }

    fn idempotency(&mut self, name: &str, idempotency: &Idempotency) {
        let Idempotency {
            header,
            ttl,
            on_unknown,
        } = idempotency;
        self.plain(&format!("{name}.header"), header);
        self.time(&format!("{name}.ttl"), ttl);
        self.word(&format!("{name}.onUnknown"), on_unknown);
    }

    fn delivery(&mut self, delivery: &Delivery) {
        let Delivery {
            attempts,
            backoff,
            max_backoff,
            max_age,
            timeout,
            max_in_flight,
            requests_per_second,
        } = delivery;
        self.plain("async.delivery.attempts", attempts);
        self.time("async.delivery.backoff", backoff);
        self.time("async.delivery.maxBackoff", max_backoff);
        self.limit("async.delivery.maxAge", max_age);
        self.limit("async.delivery.timeout", timeout);
        self.plain("async.delivery.maxInFlight", max_in_flight);
        self.option("async.delivery.requestsPerSecond", requests_per_second);
    }

    fn features(&mut self, features: &Features) {
        let Features {
            rate_limit,
            request_headers,
            response_headers,
            split_key,
            mirror,
            contract,
            cache,
            on_unavailable,
            fault,
            idempotency,
            respond,
            redirect,
            rewrite,
            // What `rewrite` needs to know; in the rule's match already.
            matched_prefix: _,
        } = features;
        self.part("rateLimit", rate_limit.as_ref());
        self.part("requestHeaders", request_headers.as_ref());
        self.part("responseHeaders", response_headers.as_ref());
        self.part("splitKey", split_key.as_ref());
        self.part("mirror", mirror.as_ref());
        self.part("contract", contract.as_ref());
        self.part("cache", cache.as_ref());
        self.part("onUnavailable", on_unavailable.as_ref());
        self.part("fault", fault.as_ref());
        if let Some(Answered { keys, max_body }) = idempotency {
            self.idempotency("idempotency", keys);
            self.size("idempotency.maxBody", max_body);
        }
        self.part("respond", respond.as_ref());
        self.own("redirect", redirect.as_ref());
        self.own("rewrite", rewrite.as_ref());
    }

    fn load_balancer(&mut self, balancer: &LoadBalancer) {
        let LoadBalancer {
            algorithm,
            locality,
            warmup,
            panic_threshold,
            hash_key,
            session_cookie,
            max_load_percent,
        } = balancer;
        self.word("loadBalancer.algorithm", algorithm);
        self.word("loadBalancer.locality", locality);
        self.limit("loadBalancer.warmup", warmup);
        self.plain("loadBalancer.panicThreshold", panic_threshold);
        self.plain("loadBalancer.hashKey", hash_key);
        self.optional_part("loadBalancer.sessionCookie", session_cookie);
        self.option("loadBalancer.maxLoadPercent", max_load_percent);
    }

    fn connection(&mut self, connection: &Connection) {
        let Connection {
            // With the rule's: `timeouts.connect`.
            connect_timeout: _,
            max_per_endpoint,
            idle_timeout,
            max_age,
        } = connection;
        self.option("connection.maxPerEndpoint", max_per_endpoint);
        self.limit("connection.idleTimeout", idle_timeout);
        self.limit("connection.maxAge", max_age);
    }

    fn limits(&mut self, limits: &Limits) {
        let Limits {
            max_in_flight,
            max_pending,
            max_pending_wait,
            max_request_body,
            adaptive,
        } = limits;
        self.plain("limits.maxInFlight", max_in_flight);
        if let Some(Adaptive {
            min_in_flight,
            max_latency_percent,
        }) = adaptive
        {
            self.plain("limits.adaptive.minInFlight", min_in_flight);
            self.plain("limits.adaptive.maxLatencyPercent", max_latency_percent);
        }
        self.plain("limits.maxPending", max_pending);
        self.time("limits.maxPendingWait", max_pending_wait);
        self.optional_size("limits.maxRequestBody", max_request_body);
    }

    fn breaker(&mut self, breaker: &Breaker) {
        let Breaker {
            consecutive_failures,
            failure_percent,
            min_requests,
            window,
            open_for,
            max_open_for,
            half_open_requests,
            failure_on,
        } = breaker;
        self.plain("breaker.consecutiveFailures", consecutive_failures);
        self.plain("breaker.failureRate.percent", failure_percent);
        self.plain("breaker.failureRate.minRequests", min_requests);
        self.time("breaker.failureRate.window", window);
        self.time("breaker.openFor", open_for);
        self.time("breaker.maxOpenFor", max_open_for);
        self.plain("breaker.halfOpenRequests", half_open_requests);
        let FailureOn {
            codes,
            grpc,
            connect,
            timeout,
        } = failure_on;
        self.list("breaker.failureOn.codes", codes);
        self.list("breaker.failureOn.grpc", grpc);
        self.plain("breaker.failureOn.connect", connect);
        self.plain("breaker.failureOn.timeout", timeout);
    }

    fn ejection(&mut self, ejection: &Ejection) {
        let Ejection {
            consecutive_failures,
            base_time,
            max_time,
            max_percent,
        } = ejection;
        self.plain("ejection.consecutiveFailures", consecutive_failures);
        self.time("ejection.baseTime", base_time);
        self.time("ejection.maxTime", max_time);
        self.plain("ejection.maxPercent", max_percent);
    }
}

/// One row for each way of writing a value.
impl Rows<'_> {
    fn add(&mut self, name: &str, value: &str, origin: &Origin) {
        let (of, origin) = (self.of, origin.to_string());
        let row = json!({"of": of, "name": name, "value": value, "origin": origin});
        self.to.0.push(row);
    }

    fn plain<T: ToString>(&mut self, name: &str, setting: &Setting<T>) {
        self.add(name, &setting.value.to_string(), &setting.origin);
    }

    fn word<T: std::fmt::Debug>(&mut self, name: &str, setting: &Setting<T>) {
        self.add(name, &format!("{:?}", setting.value), &setting.origin);
    }

    fn optional_word<T: std::fmt::Debug>(&mut self, name: &str, setting: &Setting<Option<T>>) {
        let word = setting.value.as_ref().map(|word| format!("{word:?}"));
        self.add(name, word.as_deref().unwrap_or(NONE), &setting.origin);
    }

    fn words<T: std::fmt::Debug>(&mut self, name: &str, setting: &Setting<Vec<T>>) {
        let words = setting.value.iter().map(|word| format!("{word:?}"));
        self.joined(name, &words.collect::<Vec<_>>(), &setting.origin);
    }

    fn list<T: ToString>(&mut self, name: &str, setting: &Setting<Vec<T>>) {
        let words = setting.value.iter().map(T::to_string);
        self.joined(name, &words.collect::<Vec<_>>(), &setting.origin);
    }

    fn joined(&mut self, name: &str, words: &[String], origin: &Origin) {
        let text = if words.is_empty() {
            NONE.to_owned()
        } else {
            words.join(" ")
        };
        self.add(name, &text, origin);
    }

    fn option<T: ToString>(&mut self, name: &str, setting: &Setting<Option<T>>) {
        let text = setting.value.as_ref().map(T::to_string);
        self.add(name, text.as_deref().unwrap_or(NONE), &setting.origin);
    }

    fn limit(&mut self, name: &str, limit: &Limit) {
        let text = limit.value.map(|time| Dur(time).to_string());
        self.add(name, text.as_deref().unwrap_or(NONE), &limit.origin);
    }

    fn time(&mut self, name: &str, setting: &Setting<Duration>) {
        self.add(name, &Dur(setting.value).to_string(), &setting.origin);
    }

    fn size(&mut self, name: &str, setting: &Setting<u64>) {
        self.add(name, &ByteSize(setting.value).to_string(), &setting.origin);
    }

    fn optional_size(&mut self, name: &str, setting: &Setting<Option<u64>>) {
        let text = setting.value.map(|size| ByteSize(size).to_string());
        self.add(name, text.as_deref().unwrap_or(NONE), &setting.origin);
    }

    /// A part of a document as a whole, when it is there.
    fn part<T: Serialize>(&mut self, name: &str, part: Option<&Setting<T>>) {
        if let Some(part) = part {
            self.add(name, &flow(&part.value), &part.origin);
        }
    }

    fn optional_part<T: Serialize>(&mut self, name: &str, part: &Setting<Option<T>>) {
        let text = part.value.as_ref().map(flow);
        self.add(name, text.as_deref().unwrap_or(NONE), &part.origin);
    }

    /// A part that only the rule itself can have.
    fn own<T: Serialize>(&mut self, name: &str, part: Option<&T>) {
        if let Some(part) = part {
            self.add(name, &flow(part), &Origin::Rule);
        }
    }
}

/// A part of a document on one line, without what it leaves open.
fn flow(part: &impl Serialize) -> String {
    fn prune(value: Value) -> Value {
        match value {
            Value::Object(members) => {
                let set = members.into_iter().filter(|(_, value)| match value {
                    Value::Null => false,
                    Value::Object(members) => !members.is_empty(),
                    Value::Array(items) => !items.is_empty(),
                    _ => true,
                });
                Value::Object(set.map(|(name, value)| (name, prune(value))).collect())
            }
            Value::Array(items) => Value::Array(items.into_iter().map(prune).collect()),
            other => other,
        }
    }
    // What was read can be written.
    serde_json::to_value(part).map_or_else(|_| NONE.to_owned(), |value| prune(value).to_string())
}
