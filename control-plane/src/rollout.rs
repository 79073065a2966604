//! Whether a new config is tried by some sidecars first, by which, and what comes of it.
//!
//! Owns the choice of the canaries and the verdict. Pure: it receives `now` and what the sidecars
//! have said; `app/decide.rs` acts on the verdict. Endpoints are not tried: they reach everybody at
//! once. Stands on the life of a config update, between the files and the push.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use outrigger_config::bootstrap::CanarySpec;
use sha2::{Digest as _, Sha256};

/// How long canaries run a config where the bootstrap does not say; Argo Rollouts' examples.
const BAKE: Duration = Duration::from_secs(30);

/// The share of the sidecars where the bootstrap does not say.
const PERCENT: usize = 10;

/// Who tries new configs, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    choice: Choice,
    bake: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    /// This share of the connected ones, 1 to 100.
    Percent(usize),
    /// Those with all of these labels.
    Labels(BTreeMap<String, String>),
}

impl From<&CanarySpec> for Policy {
    fn from(spec: &CanarySpec) -> Self {
        let percent = spec.percent.map_or(PERCENT, |p| usize::from(p.0));
        Self {
            choice: match &spec.labels {
                Some(labels) => Choice::Labels(labels.clone()),
                None => Choice::Percent(percent),
            },
            bake: spec.bake.map_or(BAKE, |bake| bake.0),
        }
    }
}

/// What is known of a sidecar.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sidecar {
    /// Its node id.
    pub id: String,
    /// The service beside it.
    pub service: String,
    /// Whether a stream is open.
    pub connected: bool,
    /// Whether it has the labels that the policy names.
    pub labelled: bool,
    /// The config that it runs.
    pub runs: Option<String>,
    /// The config that it refused, and why, when it has accepted none since.
    pub refused: Option<(String, String)>,
}

impl Policy {
    /// Whether these labels are those of a canary; false where labels do not count.
    pub fn names(&self, labels: &BTreeMap<String, String>) -> bool {
        match &self.choice {
            Choice::Percent(_) => false,
            Choice::Labels(wanted) => wanted.iter().all(|(k, v)| labels.get(k) == Some(v)),
        }
    }

    /// How long canaries run a config.
    pub fn bake(&self) -> Duration {
        self.bake
    }

    /// The canaries among the connected sidecars, by id. Of a share the same ones each time, of as
    /// many services as there can be.
    fn choose(&self, sidecars: &[Sidecar]) -> BTreeSet<String> {
        let connected = sidecars.iter().filter(|s| s.connected);
        let Choice::Percent(percent) = self.choice else {
            let labelled = connected.filter(|s| s.labelled);
            return labelled.map(|s| s.id.clone()).collect();
        };
        let mut by_service: BTreeMap<&str, Vec<([u8; 32], &str)>> = BTreeMap::new();
        let mut all = 0;
        for sidecar in connected {
            all += 1;
            let place = (Sha256::digest(&sidecar.id).into(), sidecar.id.as_str());
            by_service.entry(&sidecar.service).or_default().push(place);
        }
        // The first of every service before the second of any.
        let mut ranked = Vec::with_capacity(all);
        for places in by_service.values_mut() {
            places.sort_unstable();
            ranked.extend(
                places
                    .iter()
                    .enumerate()
                    .map(|(rank, place)| (rank, *place)),
            );
        }
        ranked.sort_unstable();
        let count = (all * percent).div_ceil(100);
        let chosen = ranked.into_iter().take(count);
        chosen.map(|(_, (_, id))| id.to_owned()).collect()
    }
}

/// A config on trial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    version: String,
    /// When the canaries were chosen, or, while there was nobody to choose, when it began.
    since: Duration,
    canaries: BTreeSet<String>,
    /// Since when no canary is connected.
    alone: Option<Duration>,
}

/// What comes of a trial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on. True: the canaries are others than before.
    Wait(bool),
    /// Everybody gets the config. False: there was nobody to try it.
    Promote(bool),
    /// Everybody goes on with the one before.
    Stop {
        /// Who refused it; empty when the canaries are gone.
        sidecar: String,
        /// Why, in the sidecar's words.
        reason: String,
    },
}

impl Trial {
    /// The trial of a config begins; the canaries are chosen with the first [`Trial::judge`].
    pub fn begin(version: String, now: Duration) -> Self {
        Self {
            version,
            since: now,
            canaries: BTreeSet::new(),
            alone: None,
        }
    }

    /// The config on trial.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Who tries it, by id.
    pub fn canaries(&self) -> &BTreeSet<String> {
        &self.canaries
    }

    /// How long it has been tried.
    pub fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.since)
    }

    /// Looks at what the sidecars have said.
    ///
    /// Everybody gets the config when every connected canary runs it and the time is over; one
    /// refusal ends the trial; so do canaries that were there and are all gone for as long as it
    /// should have taken.
    pub fn judge(&mut self, policy: &Policy, sidecars: &[Sidecar], now: Duration) -> Verdict {
        let by_label = matches!(policy.choice, Choice::Labels(_));
        let mut news = false;
        if self.canaries.is_empty() || by_label {
            let chosen = policy.choose(sidecars);
            let first = self.canaries.is_empty() && !chosen.is_empty();
            news = chosen.iter().any(|id| !self.canaries.contains(id));
            self.canaries.extend(chosen);
            if first {
                self.since = now;
            }
        }
        let canaries = || sidecars.iter().filter(|s| self.canaries.contains(&s.id));
        let refusal = canaries().find_map(|s| {
            let (version, reason) = s.refused.as_ref()?;
            (*version == self.version).then(|| (s.id.clone(), reason.clone()))
        });
        if let Some((sidecar, reason)) = refusal {
            return Verdict::Stop { sidecar, reason };
        }
        let over = |since: Duration| now.saturating_sub(since) >= policy.bake;
        if self.canaries.is_empty() {
            return match over(self.since) {
                true => Verdict::Promote(false),
                false => Verdict::Wait(news),
            };
        }
        let mut connected = canaries().filter(|s| s.connected).peekable();
        if connected.peek().is_none() {
            let alone = *self.alone.get_or_insert(now);
            let reason = "every sidecar that tried it is gone".to_owned();
            return match over(alone) && over(self.since) {
                true => Verdict::Stop {
                    sidecar: String::new(),
                    reason,
                },
                false => Verdict::Wait(news),
            };
        }
        let all_run_it = connected.all(|s| s.runs.as_deref() == Some(&self.version));
        self.alone = None;
        match all_run_it && over(self.since) {
            true => Verdict::Promote(true),
            false => Verdict::Wait(news),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn policy(text: &str) -> Policy {
        let spec: CanarySpec = serde_json::from_str(text).expect("a canary");
        Policy::from(&spec)
    }

    fn sidecar(id: &str, service: &str) -> Sidecar {
        Sidecar {
            id: id.into(),
            service: service.into(),
            connected: true,
            ..Sidecar::default()
        }
    }

    /// Eight of `web`, two of `orders`.
    fn ten() -> Vec<Sidecar> {
        let web = (0..8).map(|n| sidecar(&format!("web-{n}"), "shop/web"));
        let orders = (0..2).map(|n| sidecar(&format!("orders-{n}"), "shop/orders"));
        web.chain(orders).collect()
    }

    fn run(sidecars: &mut [Sidecar], trial: &Trial) {
        for sidecar in sidecars {
            if trial.canaries().contains(&sidecar.id) {
                sidecar.runs = Some(trial.version().to_owned());
            }
        }
    }

    #[test]
    fn a_share_is_the_same_each_time_and_spread_over_services() {
        let check = |percent: u8, count: usize, services: usize| {
            let policy = policy(&format!("{{\"percent\": {percent}}}"));
            let mut sidecars = ten();
            let chosen = policy.choose(&sidecars);
            assert_eq!(chosen.len(), count, "{percent}");
            sidecars.reverse();
            assert_eq!(policy.choose(&sidecars), chosen);
            let of = |s: &&Sidecar| chosen.contains(&s.id);
            let of: BTreeSet<_> = sidecars.iter().filter(of).map(|s| &s.service).collect();
            assert_eq!(of.len(), services, "{percent}");
        };
        check(1, 1, 1);
        check(10, 1, 1);
        check(11, 2, 2);
        check(50, 5, 2);
        check(100, 10, 2);
    }

    #[test]
    fn labels_choose_who_has_them_all_also_when_it_comes_later() {
        let policy = policy(r#"{"labels": {"track": "canary"}, "bake": "10s"}"#);
        let labels = |track: &str| [("track".to_owned(), track.to_owned())].into();
        assert!(policy.names(&labels("canary")) && !policy.names(&labels("stable")));
        assert!(!policy.names(&BTreeMap::new()));
        let mut sidecars = ten();
        let mut trial = Trial::begin("2".into(), secs(0));
        sidecars[0].labelled = true;
        assert_eq!(
            trial.judge(&policy, &sidecars, secs(1)),
            Verdict::Wait(true)
        );
        sidecars[1].labelled = true;
        assert_eq!(
            trial.judge(&policy, &sidecars, secs(2)),
            Verdict::Wait(true)
        );
        assert_eq!(trial.canaries().len(), 2);
        run(&mut sidecars, &trial);
        assert_eq!(
            trial.judge(&policy, &sidecars, secs(10)),
            Verdict::Wait(false)
        );
        assert_eq!(
            trial.judge(&policy, &sidecars, secs(11)),
            Verdict::Promote(true)
        );
    }

    #[test]
    fn all_canaries_must_run_it_for_the_whole_time() {
        let policy = policy(r#"{"percent": 20, "bake": "10s"}"#);
        let mut sidecars = ten();
        let mut trial = Trial::begin("2".into(), secs(0));
        assert_eq!(
            trial.judge(&policy, &sidecars, secs(0)),
            Verdict::Wait(true)
        );
        assert_eq!(
            trial.judge(&policy, &sidecars, secs(60)),
            Verdict::Wait(false)
        );
        let first = trial.canaries().first().expect("there are two").clone();
        run(&mut sidecars, &trial);
        let slow = sidecars
            .iter_mut()
            .find(|s| s.id == first)
            .expect("it is there");
        slow.runs = Some("1".into());
        assert_eq!(
            trial.judge(&policy, &sidecars, secs(61)),
            Verdict::Wait(false)
        );
        // Gone, it does not count; the other one does.
        let slow = sidecars
            .iter_mut()
            .find(|s| s.id == first)
            .expect("it is there");
        slow.connected = false;
        assert_eq!(
            trial.judge(&policy, &sidecars, secs(62)),
            Verdict::Promote(true)
        );
    }

    #[test]
    fn one_refusal_stops_it_and_a_refusal_of_another_config_does_not() {
        let policy = policy(r#"{"percent": 20, "bake": "0s"}"#);
        let mut sidecars = ten();
        let mut trial = Trial::begin("2".into(), secs(0));
        trial.judge(&policy, &sidecars, secs(0));
        run(&mut sidecars, &trial);
        let canary = trial.canaries().last().expect("there are two").clone();
        let of = |sidecars: &mut Vec<Sidecar>, version: &str, id: &str| {
            let one = sidecars.iter_mut().find(|s| s.id == id);
            one.expect("it is there").refused = Some((version.into(), "no".into()));
        };
        of(&mut sidecars, "1", &canary);
        assert_eq!(
            trial.clone().judge(&policy, &sidecars, secs(1)),
            Verdict::Promote(true)
        );
        of(&mut sidecars, "2", &canary);
        let stop = Verdict::Stop {
            sidecar: canary,
            reason: "no".into(),
        };
        assert_eq!(trial.judge(&policy, &sidecars, secs(1)), stop);
    }

    #[test]
    fn canaries_that_are_all_gone_stop_it_and_nobody_at_all_does_not() {
        let policy = policy(r#"{"bake": "10s"}"#);
        let mut trial = Trial::begin("2".into(), secs(0));
        assert_eq!(trial.judge(&policy, &[], secs(9)), Verdict::Wait(false));
        assert_eq!(
            trial.clone().judge(&policy, &[], secs(10)),
            Verdict::Promote(false)
        );
        let mut one = vec![sidecar("web-1", "shop/web")];
        assert_eq!(trial.judge(&policy, &one, secs(9)), Verdict::Wait(true));
        one[0].connected = false;
        assert_eq!(trial.judge(&policy, &one, secs(18)), Verdict::Wait(false));
        assert_eq!(trial.judge(&policy, &one, secs(27)), Verdict::Wait(false));
        // Back for a moment, it is given the time anew.
        one[0].connected = true;
        assert_eq!(trial.judge(&policy, &one, secs(28)), Verdict::Wait(false));
        one[0].connected = false;
        assert_eq!(trial.judge(&policy, &one, secs(29)), Verdict::Wait(false));
        let verdict = trial.judge(&policy, &one, secs(39));
        assert!(matches!(verdict, Verdict::Stop { reason, .. } if reason.contains("gone")));
    }
}
