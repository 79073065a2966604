//! `async.callback`, compiled: who may be called back, as whom and how often.
//!
//! Secrets and authorities are files at the sidecar, read when a callback is sent. Stands on the
//! life of a config update.

use std::path::PathBuf;
use std::time::Duration;

use outrigger_config::model::CallbackSpec;
use outrigger_core::authz::Block;
use outrigger_core::callback::{self, Pattern, Url};

/// The deadline of one try: the least that Standard Webhooks recommends.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Who may be called back, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Callback {
    allow: Vec<Pattern>,
    /// The only addresses; none: those of the public internet.
    pub addresses: Vec<Block>,
    /// Files with the secrets that sign.
    pub secret_files: Vec<PathBuf>,
    /// The authorities to trust; none: the system's.
    pub ca_file: Option<PathBuf>,
    /// The pauses between tries.
    pub schedule: Vec<Duration>,
    /// The deadline of one try.
    pub timeout: Duration,
}

impl Callback {
    /// Patterns and ranges were checked; one that is wrong all the same allows nothing.
    pub fn compile(spec: &CallbackSpec) -> Self {
        let ranges = spec.allow_addresses.iter();
        let listed = spec.schedule.as_ref();
        Self {
            allow: spec
                .allow
                .iter()
                .filter_map(|pattern| Pattern::parse(pattern).ok())
                .collect(),
            addresses: ranges.filter_map(|range| Block::parse(range)).collect(),
            secret_files: spec
                .signing_secret_files
                .iter()
                .map(PathBuf::from)
                .collect(),
            ca_file: spec.ca_file.as_ref().map(PathBuf::from),
            schedule: listed.map_or_else(
                || callback::SCHEDULE.to_vec(),
                |pauses| pauses.iter().map(|pause| pause.0).collect(),
            ),
            timeout: spec.timeout.map_or(TIMEOUT, |timeout| timeout.0),
        }
    }

    /// Whether it may be called back, as far as its text tells.
    ///
    /// # Errors
    /// Why not.
    pub fn screen(&self, url: &Url) -> Result<(), String> {
        if !self.allow.iter().any(|pattern| pattern.allows(url)) {
            return Err(format!(
                "the route's callback.allow has no {}",
                url.origin()
            ));
        }
        match url.address() {
            Some(address) => callback::screen(address, &self.addresses)
                .map_err(|kind| format!("{} is {kind}", url.host)),
            None => Ok(()),
        }
    }

    /// How long the tries of one callback take in all: the news must last so long.
    pub fn lasts(&self) -> Duration {
        let pauses = self.schedule.iter();
        let tries = u32::try_from(self.schedule.len() + 1).unwrap_or(u32::MAX);
        pauses.fold(self.timeout.saturating_mul(tries), |all, pause| {
            // A tenth for the jitter.
            all.saturating_add(*pause).saturating_add(*pause / 10)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_address_are_both_screened() {
        let spec = CallbackSpec {
            allow: vec![
                "https://*.shop".into(),
                "http://10.0.0.7".into(),
                "http://127.0.0.1".into(),
            ],
            allow_addresses: vec!["10.0.0.0/8".into(), "127.0.0.0/8".into()],
            ..CallbackSpec::default()
        };
        let callback = Callback::compile(&spec);
        let check = |text: &str, expected: &str| {
            let found = callback.screen(&Url::parse(text).unwrap());
            assert_eq!(found.err().unwrap_or_default(), expected, "{text}");
        };
        check("https://hooks.shop/x", "");
        check("http://10.0.0.7/x", "");
        check("http://127.0.0.1/x", "127.0.0.1 is a loopback address");
        check(
            "https://evil.example/token",
            "the route's callback.allow has no https://evil.example",
        );
        assert!(
            Callback::compile(&CallbackSpec::default())
                .screen(&Url::parse("https://a").unwrap())
                .is_err()
        );
    }

    #[test]
    fn news_last_as_long_as_the_schedule() {
        let callback = Callback::compile(&CallbackSpec::default());
        assert_eq!(callback.schedule.len(), 9);
        let longest: Duration = callback::SCHEDULE.iter().sum();
        assert!(callback.lasts() > longest + longest / 10);
    }
}
