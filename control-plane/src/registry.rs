//! The registry of instances that announce themselves and keep a lease by heartbeats.
//!
//! Owns the leases and what they mean: a missed `ttl` makes an instance [`Unhealthy`], a missed
//! `removeAfter` removes it, a heartbeat brings it back. Pure: it reads no clock (it receives
//! `now`) and does no I/O (`state.rs` keeps a copy on disk). Static endpoints are not here; the
//! two meet in `world.rs`. Stands on the life of a config update, at its source.
//!
//! Two guards keep a fault of ours from emptying a good set: time in which this process did not
//! run is not counted against anyone, and leases read back after a restart start afresh.
//!
//! [`Unhealthy`]: EndpointState::Unhealthy

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use outrigger_config::wire::{Endpoint, EndpointState};
use serde::{Deserialize, Serialize};

/// The most instances one service may have; the next one is refused.
pub const MAX_PER_SERVICE: usize = 10_000;

/// The most instances altogether; bounds memory against a runaway registrant.
pub const MAX_TOTAL: usize = 100_000;

/// How often [`Registry::sweep`] should run: a lost instance is noticed within this time.
pub const SWEEP_EVERY: Duration = Duration::from_millis(250);

/// A gap between two sweeps above which this process was stopped or starved, so that heartbeats
/// may be waiting unread: the gap is credited to every lease.
const STALLED_AFTER: Duration = Duration::from_secs(2);

/// More silent instances than this share are a fault of the network or of ours rather than theirs:
/// they stay listed. Eureka's self-preservation, whose threshold this is.
const PRESERVE_ABOVE_PERCENT: usize = 15;

/// Fewer silent instances than this are no sign of anything.
const PRESERVE_FROM: usize = 3;

/// An instance that was silent for longer than this is removed all the same.
const PRESERVE_AT_MOST: Duration = Duration::from_secs(3600);

/// What an instance says about itself. Unknown members are refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Registration {
    /// Unique within the service: letters, digits and `._:-`, at most 128. Default:
    /// `address-port`, so that an instance that comes back takes its own place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// An IP address that sidecars can reach.
    pub address: String,
    /// 1 to 65535.
    pub port: u16,
    /// The zone it runs in.
    #[serde(default)]
    pub zone: String,
    /// Its share relative to the others, 0 to 10000; default 100; 0 takes no new traffic.
    #[serde(default = "default_weight")]
    pub weight: u32,
    /// Its failover tier, 0 to 100; default 0. The lowest takes the traffic.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: u32,
    /// Free facts, at most 32.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The state to start in; default Serving.
    #[serde(default)]
    pub state: State,
}

fn is_zero(priority: &u32) -> bool {
    *priority == 0
}

fn default_weight() -> u32 {
    100
}

/// What an instance may set itself to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Takes requests.
    #[default]
    Serving,
    /// Finishes what it has.
    Draining,
    /// Takes nothing.
    Disabled,
}

impl From<State> for EndpointState {
    fn from(state: State) -> Self {
        match state {
            State::Serving => Self::Serving,
            State::Draining => Self::Draining,
            State::Disabled => Self::Disabled,
        }
    }
}

/// How long an instance lives without a heartbeat (`discovery.heartbeat` of its service).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Without a heartbeat for this long: excluded.
    pub ttl: Duration,
    /// Without a heartbeat for this long: removed. Not below `ttl`.
    pub remove_after: Duration,
}

/// One registered instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// What it said.
    pub registration: Registration,
    /// Its lease.
    pub lease: Lease,
    /// When it was last heard.
    pub seen: Duration,
    /// Its lease's `ttl` has passed.
    pub missed: bool,
    /// It was another replica that heard it.
    pub elsewhere: bool,
}

/// What a control plane may conclude from silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It is the only one, or leads several: whoever is silent for long is removed.
    Leads,
    /// It follows: whoever is silent takes no traffic; another one removes.
    Follows,
    /// It does not hear the others: of those that they heard it knows nothing.
    Apart,
}

impl Instance {
    /// What sidecars are told.
    pub fn state(&self) -> EndpointState {
        if self.missed {
            EndpointState::Unhealthy
        } else {
            self.registration.state.into()
        }
    }
}

/// An instance as it is kept on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    /// `namespace/name`.
    pub service: String,
    /// With its id filled in.
    pub registration: Registration,
    /// Milliseconds.
    pub ttl: u64,
    /// Milliseconds.
    pub remove_after: u64,
}

impl Saved {
    /// Service and id.
    fn key(&self) -> (String, String) {
        let id = self.registration.id.clone().unwrap_or_default();
        (self.service.clone(), id)
    }

    /// Service, registration and lease.
    fn parts(self) -> (String, Registration, Lease) {
        let lease = Lease {
            ttl: Duration::from_millis(self.ttl),
            remove_after: Duration::from_millis(self.remove_after.max(self.ttl)),
        };
        (self.service, self.registration, lease)
    }
}

/// What a registration led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    /// The id in use.
    pub id: String,
    /// False when an instance of that id was there and has been replaced.
    pub created: bool,
}

/// Why the registry refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// A member of the registration cannot be used.
    #[error("{member}: {problem}")]
    Invalid {
        /// The member's name as in JSON.
        member: &'static str,
        /// What is wrong and what to write instead.
        problem: String,
    },
    /// No such instance: the caller should register again.
    #[error("instance {id} of {service} is not registered; register it again")]
    Unknown {
        /// `namespace/name`.
        service: String,
        /// The id asked for.
        id: String,
    },
    /// One of [`MAX_PER_SERVICE`] and [`MAX_TOTAL`] is reached.
    #[error(
        "the registry is full: at most {MAX_PER_SERVICE} instances a service, {MAX_TOTAL} in all"
    )]
    Full,
}

/// What one sweep changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Instances (service, id) that missed their `ttl`.
    pub missed: Vec<(String, String)>,
    /// Instances (service, id) that missed their `removeAfter`.
    pub removed: Vec<(String, String)>,
    /// So many are silent at once that none is removed; told when that begins.
    pub preserving: bool,
    /// The time credited because this process did not run.
    pub credited: Duration,
}

impl Swept {
    /// Whether sidecars have to hear of it.
    pub fn changed(&self) -> bool {
        !self.missed.is_empty() || !self.removed.is_empty()
    }
}

/// All registered instances, by service (`namespace/name`) and id.
#[derive(Debug, Default)]
pub struct Registry {
    services: BTreeMap<String, BTreeMap<String, Instance>>,
    total: usize,
    swept: Option<Duration>,
    /// When it began without any memory.
    forgetful_since: Option<Duration>,
    preserving: bool,
    /// What other replicas do not know yet; none when there are no others.
    untold: Option<Untold>,
}

/// What other replicas do not know yet, as service and id.
#[derive(Debug, Default)]
struct Untold {
    changed: BTreeSet<(String, String)>,
    heard: BTreeSet<(String, String)>,
}

impl Registry {
    /// Adds an instance, or replaces the one of the same id, with a fresh lease.
    ///
    /// # Errors
    /// [`RegistryError::Invalid`] and [`RegistryError::Full`]; nothing has changed then.
    pub fn register(
        &mut self,
        service: &str,
        mut registration: Registration,
        lease: Lease,
        now: Duration,
    ) -> Result<Registered, RegistryError> {
        let registered = self.put(service, &mut registration, lease, now)?;
        self.mark([(service.to_owned(), registered.id.clone())]);
        Ok(registered)
    }

    fn put(
        &mut self,
        service: &str,
        registration: &mut Registration,
        lease: Lease,
        now: Duration,
    ) -> Result<Registered, RegistryError> {
        let Registered { id, created } = self.would_register(service, registration)?;
        registration.id = Some(id.clone());
        let instance = Instance {
            registration: registration.clone(),
            lease,
            seen: now,
            missed: false,
            elsewhere: false,
        };
        self.services
            .entry(service.to_owned())
            .or_default()
            .insert(id.clone(), instance);
        self.total += usize::from(created);
        Ok(Registered { id, created })
    }

    /// What [`Registry::register`] would do.
    ///
    /// # Errors
    /// Its errors.
    pub fn would_register(
        &self,
        service: &str,
        registration: &Registration,
    ) -> Result<Registered, RegistryError> {
        check(registration)?;
        let id = match &registration.id {
            Some(id) => id.clone(),
            None => format!("{}-{}", registration.address, registration.port),
        };
        let of_service = self.services.get(service);
        let created = !of_service.is_some_and(|instances| instances.contains_key(&id));
        let full = of_service.is_some_and(|instances| instances.len() >= MAX_PER_SERVICE);
        if created && (full || self.total >= MAX_TOTAL) {
            return Err(RegistryError::Full);
        }
        Ok(Registered { id, created })
    }

    /// Renews a lease; true when that brought the instance back, so that sidecars have to hear.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`].
    pub fn heartbeat(
        &mut self,
        service: &str,
        id: &str,
        now: Duration,
    ) -> Result<bool, RegistryError> {
        let instance = self.instance_mut(service, id)?;
        instance.seen = now;
        instance.elsewhere = false;
        let back = std::mem::take(&mut instance.missed);
        if let Some(untold) = &mut self.untold {
            untold.heard.insert((service.to_owned(), id.to_owned()));
        }
        Ok(back)
    }

    /// Sets an instance's state; true when it was another one. Does not renew the lease.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`].
    pub fn set_state(
        &mut self,
        service: &str,
        id: &str,
        state: State,
    ) -> Result<bool, RegistryError> {
        let instance = self.instance_mut(service, id)?;
        let news = std::mem::replace(&mut instance.registration.state, state) != state;
        if news {
            self.mark([(service.to_owned(), id.to_owned())]);
        }
        Ok(news)
    }

    /// Removes an instance at its own wish.
    ///
    /// # Errors
    /// [`RegistryError::Unknown`].
    pub fn remove(&mut self, service: &str, id: &str) -> Result<(), RegistryError> {
        self.instance_mut(service, id)?;
        self.forget(service, id);
        self.mark([(service.to_owned(), id.to_owned())]);
        Ok(())
    }

    /// Applies the passing of time. Serving → Unhealthy after `ttl`, gone after `removeAfter`,
    /// as far as `role` may say so.
    pub fn sweep(&mut self, now: Duration, role: Role) -> Swept {
        let mut swept = Swept::default();
        let gap = now.saturating_sub(self.swept.replace(now).unwrap_or(now));
        if gap > STALLED_AFTER {
            swept.credited = gap;
        }
        for instance in self.services.values_mut().flat_map(BTreeMap::values_mut) {
            instance.seen = match role == Role::Apart && instance.elsewhere {
                true => now,
                false => (instance.seen + swept.credited).min(now),
            };
        }
        let many = self.many_are_silent(now);
        swept.preserving = many && !self.preserving;
        self.preserving = many;
        for (service, instances) in &mut self.services {
            instances.retain(|id, instance| {
                let silent = now.saturating_sub(instance.seen);
                let kept = role != Role::Leads || self.preserving && silent < PRESERVE_AT_MOST;
                if silent >= instance.lease.remove_after && !kept {
                    swept.removed.push((service.clone(), id.clone()));
                    return false;
                }
                if silent >= instance.lease.ttl && !instance.missed {
                    instance.missed = true;
                    swept.missed.push((service.clone(), id.clone()));
                }
                true
            });
        }
        self.total -= swept.removed.len();
        self.services.retain(|_, instances| !instances.is_empty());
        self.mark(swept.removed.iter().cloned());
        swept
    }

    /// Whether silent instances stay listed because there are so many of them.
    pub fn is_preserving(&self) -> bool {
        self.preserving
    }

    fn many_are_silent(&self, now: Duration) -> bool {
        let all = self.services.values().flat_map(BTreeMap::values);
        let is_silent = |i: &&Instance| now.saturating_sub(i.seen) >= i.lease.ttl;
        let silent = all.filter(is_silent).count();
        silent >= PRESERVE_FROM && silent * 100 > self.total * PRESERVE_ABOVE_PERCENT
    }

    /// There are other replicas from now on, which are to be told.
    pub fn share(&mut self) {
        self.untold = Some(Untold::default());
    }

    /// Other replicas are to be told of these instances (service, id), or that they are gone.
    pub fn mark(&mut self, instances: impl IntoIterator<Item = (String, String)>) {
        if let Some(untold) = &mut self.untold {
            untold.changed.extend(instances);
        }
    }

    /// Whether other replicas are to be told of this instance (service, id) still.
    pub fn is_marked(&self, instance: &(String, String)) -> bool {
        let untold = self.untold.as_ref();
        untold.is_some_and(|untold| untold.changed.contains(instance))
    }

    /// [`Registry::is_marked`], of what another replica says.
    pub fn is_untold(&self, saved: &Saved) -> bool {
        self.is_marked(&saved.key())
    }

    /// Whether we say the same of an instance.
    pub fn says(&self, said: &Saved) -> bool {
        let (service, id) = said.key();
        let ours = self.instance(&service, &id);
        ours.is_some_and(|ours| ours.registration == said.registration)
    }

    /// What other replicas do not know yet, each instance as it is now; none: it is gone.
    pub fn take_changes(&mut self) -> Vec<((String, String), Option<Saved>)> {
        let untold = self.untold.as_mut();
        let changed = untold.map(|untold| std::mem::take(&mut untold.changed));
        let changed = changed.unwrap_or_default().into_iter();
        let now = |(service, id): (String, String)| {
            let saved = self.instance(&service, &id).map(|i| saved(&service, i));
            ((service, id), saved)
        };
        changed.map(now).collect()
    }

    /// Whose lease was renewed here since the last time.
    pub fn take_heard(&mut self) -> Vec<(String, String)> {
        let untold = self.untold.as_mut();
        let heard = untold.map(|untold| std::mem::take(&mut untold.heard));
        heard.unwrap_or_default().into_iter().collect()
    }

    /// Another replica was told of an instance. True when that is news for sidecars.
    pub fn replicate(&mut self, saved: Saved, now: Duration) -> bool {
        let (service, mut registration, lease) = saved.parts();
        let id = registration.id.clone().unwrap_or_default();
        let before = self.instance(&service, &id);
        let news = before.is_none_or(|i| i.missed || i.registration != registration);
        let done = self.put(&service, &mut registration, lease, now).is_ok();
        self.heard_elsewhere(&[(service, id)], now);
        done && news
    }

    /// Other replicas renewed the leases of these. True when that is news for sidecars.
    pub fn heard_elsewhere(&mut self, heard: &[(String, String)], now: Duration) -> bool {
        let mut news = false;
        for (service, id) in heard {
            if let Ok(instance) = self.instance_mut(service, id) {
                instance.seen = now;
                instance.elsewhere = true;
                news |= std::mem::take(&mut instance.missed);
            }
        }
        news
    }

    /// Another replica was told that an instance is gone. True when that is news for sidecars.
    pub fn forget(&mut self, service: &str, id: &str) -> bool {
        let Some(instances) = self.services.get_mut(service) else {
            return false;
        };
        let gone = instances.remove(id).is_some();
        self.total -= usize::from(gone);
        if instances.is_empty() {
            self.services.remove(service);
        }
        gone
    }

    /// What all replicas know, after a time in which we heard nothing from them. What we were told
    /// meanwhile counts; of the rest, theirs. Replicas that know nothing at all have lost it: they
    /// are told. True when there is news for sidecars.
    pub fn reconcile(&mut self, theirs: Vec<Saved>, now: Duration) -> bool {
        let all = self.services.iter();
        let ours: Vec<(String, String)> = all
            .flat_map(|(s, instances)| instances.keys().map(|id| (s.clone(), id.clone())))
            .collect();
        if theirs.is_empty() {
            self.mark(ours);
            return false;
        }
        let known: BTreeSet<(String, String)> = theirs.iter().map(Saved::key).collect();
        let mut news = false;
        for instance in ours {
            if !known.contains(&instance) && !self.is_marked(&instance) {
                news |= self.forget(&instance.0, &instance.1);
            }
        }
        for saved in theirs {
            if !self.is_untold(&saved) {
                news |= self.replicate(saved, now);
            }
        }
        news
    }

    /// Gives every instance its whole lease: whoever led before may have heard what we have not.
    pub fn renew_all(&mut self, now: Duration) {
        for instance in self.services.values_mut().flat_map(BTreeMap::values_mut) {
            instance.seen = now;
        }
    }

    /// It begins at `now` with nothing from an earlier process. Instances that live announce
    /// themselves again within a `ttl`, and until then their absence says nothing.
    pub fn begin_without_memory(&mut self, now: Duration) {
        self.forgetful_since = Some(now);
    }

    /// Whether instances with this lease may live and not have announced themselves again yet.
    pub fn may_lack_instances(&self, lease: &Lease, now: Duration) -> bool {
        self.forgetful_since
            .is_some_and(|since| now < since + lease.ttl)
    }

    /// Gives every instance of a service its service's current lease times.
    pub fn set_lease(&mut self, service: &str, lease: Lease) {
        for instance in self
            .services
            .get_mut(service)
            .into_iter()
            .flat_map(BTreeMap::values_mut)
        {
            instance.lease = lease;
        }
    }

    /// One instance.
    pub fn instance(&self, service: &str, id: &str) -> Option<&Instance> {
        self.services.get(service)?.get(id)
    }

    /// One instance as sidecars are told.
    pub fn endpoint(&self, service: &str, id: &str) -> Option<Endpoint> {
        self.instance(service, id).map(|i| endpoint(id, i))
    }

    /// The instances of a service, ordered by id.
    pub fn instances(&self, service: &str) -> impl Iterator<Item = (&String, &Instance)> {
        self.services.get(service).into_iter().flatten()
    }

    /// The services that have instances.
    pub fn services(&self) -> impl Iterator<Item = &String> {
        self.services.keys()
    }

    /// The endpoints of a service as sidecars are told, ordered by id.
    pub fn endpoints(&self, service: &str) -> Vec<Endpoint> {
        self.instances(service)
            .map(|(id, instance)| endpoint(id, instance))
            .collect()
    }

    /// How many instances each service has in each state.
    pub fn counts(&self) -> BTreeMap<(String, EndpointState), u64> {
        let mut counts = BTreeMap::new();
        for (service, instances) in &self.services {
            for instance in instances.values() {
                *counts
                    .entry((service.clone(), instance.state()))
                    .or_default() += 1;
            }
        }
        counts
    }

    /// What to keep on disk.
    pub fn save(&self) -> Vec<Saved> {
        let all = self.services.iter();
        all.flat_map(|(service, instances)| {
            instances
                .values()
                .map(move |instance| saved(service, instance))
        })
        .collect()
    }

    /// Takes up what was kept, every lease starting afresh at `now`: what happened to an instance
    /// while nobody listened is unknown, so it is not held against it. Returns how many.
    pub fn restore(&mut self, saved: Vec<Saved>, now: Duration) -> usize {
        let mut restored = BTreeSet::new();
        for saved in saved {
            let (service, registration, lease) = saved.parts();
            if let Ok(registered) = self.register(&service, registration, lease, now) {
                restored.insert((service, registered.id));
            }
        }
        restored.len()
    }

    fn instance_mut(&mut self, service: &str, id: &str) -> Result<&mut Instance, RegistryError> {
        let found = self
            .services
            .get_mut(service)
            .and_then(|instances| instances.get_mut(id));
        found.ok_or_else(|| RegistryError::Unknown {
            service: service.into(),
            id: id.into(),
        })
    }
}

fn saved(service: &str, instance: &Instance) -> Saved {
    Saved {
        service: service.to_owned(),
        registration: instance.registration.clone(),
        ttl: millis(instance.lease.ttl),
        remove_after: millis(instance.lease.remove_after),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn endpoint(id: &str, instance: &Instance) -> Endpoint {
    let registration = &instance.registration;
    Endpoint {
        id: id.to_owned(),
        address: registration.address.clone(),
        port: u32::from(registration.port),
        zone: registration.zone.clone(),
        weight: registration.weight,
        state: instance.state().into(),
        labels: registration.labels.clone(),
        identity: String::new(),
        priority: registration.priority,
    }
}

/// Refuses what sidecars could not use, and what would make names ambiguous.
fn check(registration: &Registration) -> Result<(), RegistryError> {
    let invalid = |member, problem: &str| {
        Err(RegistryError::Invalid {
            member,
            problem: problem.to_owned(),
        })
    };
    if let Some(id) = &registration.id
        && !(1..=128).contains(&id.len())
    {
        return invalid("id", "write 1 to 128 characters, or leave it out");
    }
    if let Some(id) = &registration.id
        && !id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b))
    {
        return invalid("id", "use letters, digits and . _ : - only");
    }
    if let Err(problem) = check_address(&registration.address) {
        return invalid("address", problem);
    }
    if registration.port == 0 {
        return invalid("port", "write a port from 1 to 65535");
    }
    if registration.weight > 10_000 {
        return invalid("weight", "write 0 to 10000");
    }
    if registration.priority > 100 {
        return invalid("priority", "write 0 to 100");
    }
    if !is_label(&registration.zone) {
        return invalid("zone", "write at most 253 printable characters");
    }
    if registration.labels.len() > 32 {
        return invalid("labels", "write at most 32");
    }
    if !registration
        .labels
        .iter()
        .all(|(k, v)| !k.is_empty() && is_label(k) && is_label(v))
    {
        return invalid(
            "labels",
            "write names and values of at most 253 printable characters",
        );
    }
    Ok(())
}

fn is_label(text: &str) -> bool {
    text.len() <= 253 && !text.chars().any(char::is_control)
}

fn check_address(address: &str) -> Result<(), &'static str> {
    match address.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() || ip.is_multicast() => {
            Err("this address stands for no single peer; write the one that sidecars can reach")
        }
        Ok(_) => Ok(()),
        Err(_) => Err("write an IP address, without scheme, port or brackets"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Lease = Lease {
        ttl: Duration::from_secs(15),
        remove_after: Duration::from_secs(60),
    };
    const S: &str = "shop/reports";

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn registration(port: u16) -> Registration {
        serde_json::from_value(serde_json::json!({"address": "127.0.0.1", "port": port}))
            .expect("a valid registration")
    }

    fn with_one() -> (Registry, String) {
        let mut registry = Registry::default();
        registry.sweep(secs(0), Role::Leads);
        let registered = registry
            .register(S, registration(9001), LEASE, secs(0))
            .expect("room");
        assert!(registered.created);
        (registry, registered.id)
    }

    /// Sweeps as often as the program does, so that no time is credited.
    fn sweep_until(registry: &mut Registry, from: u64, to: u64) -> Swept {
        let mut all = Swept::default();
        for second in from..=to {
            let swept = registry.sweep(secs(second), Role::Leads);
            all.missed.extend(swept.missed);
            all.removed.extend(swept.removed);
            all.credited += swept.credited;
        }
        all
    }

    #[test]
    fn a_missed_ttl_excludes_and_a_missed_remove_after_removes() {
        let (mut registry, id) = with_one();
        assert!(!sweep_until(&mut registry, 1, 14).changed());
        assert_eq!(registry.endpoints(S)[0].state(), EndpointState::Serving);
        assert_eq!(
            registry.sweep(secs(15), Role::Leads).missed,
            [(S.to_owned(), id.clone())]
        );
        assert_eq!(registry.endpoints(S)[0].state(), EndpointState::Unhealthy);
        assert!(!sweep_until(&mut registry, 16, 59).changed());
        assert_eq!(
            registry.sweep(secs(60), Role::Leads).removed,
            [(S.to_owned(), id)]
        );
        assert!(registry.endpoints(S).is_empty());
        assert_eq!(registry.services().count(), 0);
    }

    #[test]
    fn a_heartbeat_renews_and_brings_back() {
        let (mut registry, id) = with_one();
        sweep_until(&mut registry, 1, 10);
        assert_eq!(registry.heartbeat(S, &id, secs(10)), Ok(false));
        assert!(!sweep_until(&mut registry, 11, 24).changed());
        assert!(registry.sweep(secs(25), Role::Leads).changed());
        assert_eq!(registry.heartbeat(S, &id, secs(26)), Ok(true));
        assert_eq!(registry.endpoints(S)[0].state(), EndpointState::Serving);
    }

    #[test]
    fn a_heartbeat_of_an_unknown_instance_says_register_again() {
        let (mut registry, id) = with_one();
        registry.remove(S, &id).expect("it is there");
        let error = registry.heartbeat(S, &id, secs(1)).expect_err("it is gone");
        assert!(error.to_string().contains("register it again"));
        assert!(registry.remove(S, &id).is_err());
        assert!(
            registry
                .set_state("shop/other", &id, State::Draining)
                .is_err()
        );
    }

    #[test]
    fn state_is_set_and_survives_a_missed_heartbeat() {
        let (mut registry, id) = with_one();
        assert_eq!(registry.set_state(S, &id, State::Draining), Ok(true));
        assert_eq!(registry.set_state(S, &id, State::Draining), Ok(false));
        sweep_until(&mut registry, 1, 16);
        assert_eq!(registry.endpoints(S)[0].state(), EndpointState::Unhealthy);
        assert_eq!(registry.heartbeat(S, &id, secs(17)), Ok(true));
        assert_eq!(registry.endpoints(S)[0].state(), EndpointState::Draining);
    }

    #[test]
    fn registering_again_replaces_and_renews() {
        let (mut registry, id) = with_one();
        sweep_until(&mut registry, 1, 16);
        let again = Registration {
            priority: 0,
            weight: 7,
            ..registration(9001)
        };
        let registered = registry.register(S, again, LEASE, secs(16)).expect("room");
        assert_eq!(registered, Registered { id, created: false });
        assert_eq!(registry.endpoints(S)[0].weight, 7);
        assert_eq!(registry.endpoints(S)[0].state(), EndpointState::Serving);
    }

    #[test]
    fn time_in_which_this_process_was_stopped_is_not_counted() {
        let (mut registry, _) = with_one();
        sweep_until(&mut registry, 1, 5);
        let swept = registry.sweep(secs(600), Role::Leads);
        assert!(!swept.changed());
        assert_eq!(swept.credited, secs(595));
        assert!(sweep_until(&mut registry, 601, 611).changed());
    }

    #[test]
    fn restored_leases_start_afresh() {
        let (mut registry, id) = with_one();
        registry
            .set_state(S, &id, State::Draining)
            .expect("it is there");
        let saved = registry.save();
        let mut later = Registry::default();
        assert_eq!(later.restore(saved, secs(1000)), 1);
        assert!(!later.sweep(secs(1001), Role::Leads).changed());
        assert_eq!(later.endpoints(S)[0].state(), EndpointState::Draining);
    }

    #[test]
    fn unusable_registrations_are_refused() {
        let check = |member: &str, edit: &dyn Fn(&mut Registration)| {
            let mut bad = registration(9001);
            edit(&mut bad);
            let mut registry = Registry::default();
            let error = registry.register(S, bad, LEASE, secs(0)).expect_err(member);
            assert!(matches!(error, RegistryError::Invalid { member: m, .. } if m == member));
            assert!(registry.endpoints(S).is_empty());
        };
        check("id", &|r| r.id = Some(String::new()));
        check("id", &|r| r.id = Some("a/b".into()));
        check("id", &|r| r.id = Some("a".repeat(129)));
        check("address", &|r| r.address = "http://a".into());
        check("address", &|r| r.address = "0.0.0.0".into());
        check("address", &|r| r.address = "a b".into());
        check("address", &|r| r.address = String::new());
        check("port", &|r| r.port = 0);
        check("weight", &|r| r.weight = 10_001);
        check("zone", &|r| r.zone = "a\nb".into());
        check("labels", &|r| {
            r.labels = [(String::new(), String::new())].into();
        });
        check("labels", &|r| {
            r.labels = (0..33).map(|n| (n.to_string(), String::new())).collect();
        });
    }

    #[test]
    fn a_full_service_refuses_the_next_but_renews_the_present() {
        let mut registry = Registry::default();
        for n in 0..MAX_PER_SERVICE {
            let one = Registration {
                id: Some(n.to_string()),
                ..registration(9001)
            };
            registry.register(S, one, LEASE, secs(0)).expect("room");
        }
        let next = Registration {
            id: Some("next".into()),
            ..registration(9001)
        };
        assert_eq!(
            registry.register(S, next, LEASE, secs(0)),
            Err(RegistryError::Full)
        );
        let present = Registration {
            id: Some("0".into()),
            ..registration(9001)
        };
        assert!(registry.register(S, present, LEASE, secs(0)).is_ok());
    }

    #[test]
    fn many_that_fall_silent_at_once_stay_listed() {
        let lease = Lease {
            ttl: Duration::from_secs(10),
            remove_after: Duration::from_secs(20),
        };
        let mut registry = Registry::default();
        let register = |registry: &mut Registry, port: u16, now| {
            let registration = Registration {
                id: None,
                address: "10.0.0.1".into(),
                port,
                zone: String::new(),
                weight: 100,
                priority: 0,
                labels: BTreeMap::new(),
                state: State::Serving,
            };
            let registered = registry.register("shop/a", registration, lease, now);
            registered.expect("registered").id
        };
        let ids: Vec<String> = (1..=20)
            .map(|port| register(&mut registry, port, Duration::ZERO))
            .collect();
        // Time passes in steps that are no stall of ours; the first `alive` are heard.
        let pass = |registry: &mut Registry, from: u64, to: u64, alive: usize| {
            let mut all = Swept::default();
            for second in from..to {
                let now = Duration::from_secs(second);
                for id in &ids[..alive] {
                    registry.heartbeat("shop/a", id, now).expect("it is known");
                }
                let swept = registry.sweep(now, Role::Leads);
                all.missed.extend(swept.missed);
                all.removed.extend(swept.removed);
                all.preserving |= swept.preserving;
            }
            all
        };
        // Four of twenty are more than 15 %: they take no traffic, and they are not removed.
        let swept = pass(&mut registry, 1, 100, 16);
        assert!(swept.preserving && registry.is_preserving());
        assert_eq!((swept.missed.len(), swept.removed.len()), (4, 0));
        assert_eq!(registry.endpoints("shop/a").len(), 20);
        // One of them is back: the three that are left are no more than 15 %, and go.
        let swept = pass(&mut registry, 100, 101, 17);
        assert!(!registry.is_preserving());
        assert_eq!(swept.removed.len(), 3);
        // Nor is any kept for ever.
        let swept = pass(&mut registry, 101, 3800, 0);
        assert_eq!(swept.removed.len(), 17);
        assert_eq!(registry.endpoints("shop/a").len(), 0);
    }

    /// Two replicas that tell each other everything at once.
    fn tell(from: &mut Registry, to: &mut Registry, now: Duration) {
        for ((service, id), saved) in from.take_changes() {
            match saved {
                Some(saved) => to.replicate(saved, now),
                None => to.forget(&service, &id),
            };
        }
        to.heard_elsewhere(&from.take_heard(), now);
    }

    fn sharing() -> Registry {
        let mut registry = Registry::default();
        registry.share();
        registry.sweep(secs(0), Role::Leads);
        registry
    }

    #[test]
    fn what_one_replica_is_told_the_others_know() {
        let (mut one, mut two) = (sharing(), sharing());
        let id = one
            .register(S, registration(9001), LEASE, secs(0))
            .expect("room")
            .id;
        tell(&mut one, &mut two, secs(0));
        assert_eq!(two.endpoints(S), one.endpoints(S));
        // It renews its lease at the other one; neither finds it silent.
        for second in 1..100 {
            two.heartbeat(S, &id, secs(second)).expect("it is known");
            tell(&mut two, &mut one, secs(second));
            assert!(!one.sweep(secs(second), Role::Leads).changed());
            assert!(!two.sweep(secs(second), Role::Follows).changed());
        }
        two.set_state(S, &id, State::Draining).expect("it is known");
        tell(&mut two, &mut one, secs(100));
        assert_eq!(one.endpoints(S)[0].state(), EndpointState::Draining);
        // What is told comes back to nobody as news.
        assert!(one.take_changes().is_empty());
        one.remove(S, &id).expect("it is known");
        tell(&mut one, &mut two, secs(101));
        assert!(two.endpoints(S).is_empty());
    }

    #[test]
    fn only_the_leader_removes_and_a_new_one_gives_everybody_the_whole_time() {
        let (mut one, mut two) = (sharing(), sharing());
        one.register(S, registration(9001), LEASE, secs(0))
            .expect("room");
        tell(&mut one, &mut two, secs(0));
        let follow = |two: &mut Registry, from: u64, to: u64| {
            let mut swept = Swept::default();
            for second in from..to {
                let now = two.sweep(secs(second), Role::Follows);
                swept.missed.extend(now.missed);
                swept.removed.extend(now.removed);
            }
            swept
        };
        let swept = follow(&mut two, 1, 200);
        assert_eq!((swept.missed.len(), swept.removed.len()), (1, 0));
        two.renew_all(secs(200));
        let removed = |two: &mut Registry, from: u64, to: u64| {
            (from..to).any(|second| !two.sweep(secs(second), Role::Leads).removed.is_empty())
        };
        assert!(!removed(&mut two, 200, 260));
        assert!(removed(&mut two, 260, 261));
        assert_eq!(two.take_changes().len(), 1);
    }

    #[test]
    fn what_others_heard_is_not_silent_while_they_are_away() {
        let (mut one, mut two) = (sharing(), sharing());
        for (registry, port) in [(&mut one, 1), (&mut two, 2)] {
            let registered = registry.register(S, registration(port), LEASE, secs(0));
            registered.expect("room");
        }
        tell(&mut two, &mut one, secs(0));
        let mut missed = Vec::new();
        for second in 1..100 {
            let swept = one.sweep(secs(second), Role::Apart);
            assert!(swept.removed.is_empty());
            missed.extend(swept.missed);
        }
        assert_eq!(missed, [(S.to_owned(), "127.0.0.1-1".to_owned())]);
        // Together again, it has its time, and no more.
        assert!(!one.sweep(secs(100), Role::Follows).changed());
        let later = (101..130).any(|second| one.sweep(secs(second), Role::Follows).changed());
        assert!(later);
    }

    #[test]
    fn after_a_time_apart_what_all_know_counts_and_what_only_we_were_told() {
        let mut ours = sharing();
        let register = |registry: &mut Registry, port: u16| {
            registry
                .register(S, registration(port), LEASE, secs(0))
                .expect("room")
        };
        register(&mut ours, 1);
        register(&mut ours, 2);
        ours.take_changes();
        register(&mut ours, 3);
        let mut theirs = sharing();
        register(&mut theirs, 2);
        register(&mut theirs, 4);
        // 1 was removed meanwhile, 4 came, and of 3 only we know.
        assert!(ours.reconcile(theirs.save(), secs(1)));
        let ports = |registry: &Registry| {
            let endpoints = registry.endpoints(S).into_iter();
            endpoints.map(|e| e.port).collect::<Vec<_>>()
        };
        assert_eq!(ports(&ours), [2, 3, 4]);
        let untold = ours.take_changes();
        assert_eq!(untold.len(), 1);
        // A store that knows nothing has lost it.
        assert!(!ours.reconcile(Vec::new(), secs(2)));
        assert_eq!(ports(&ours), [2, 3, 4]);
        assert_eq!(ours.take_changes().len(), 3);
    }
}
