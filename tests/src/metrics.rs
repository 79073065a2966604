//! Reads the Prometheus text format, and what changed between two scrapes.

use std::collections::BTreeMap;

/// One scrape: each series with its value.
#[derive(Debug, Clone, Default)]
pub struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    /// Reads the text of `/metrics`.
    ///
    /// # Panics
    /// On a line that is none of the format.
    pub fn parse(text: &str) -> Self {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let series = lines.map(|line| {
            let (series, value) = line.rsplit_once(' ').expect("a series and a value");
            (series.to_owned(), value.parse().expect("a number"))
        });
        Self(series.collect())
    }

    /// The sum of all series of `name` that carry all of `labels`; 0 without any.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let wanted: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{value}\""))
            .collect();
        let belongs = |series: &str| {
            let (family, rest) = series.split_once('{').unwrap_or((series, ""));
            family == name && wanted.iter().all(|label| has(rest, label))
        };
        self.0
            .iter()
            .filter(|(series, _)| belongs(series))
            .map(|(_, value)| value)
            .sum()
    }

    /// Whether there is any series of `name`.
    pub fn has(&self, name: &str) -> bool {
        self.0
            .keys()
            .any(|series| series.split('{').next() == Some(name))
    }

    /// Whether every counter stands as in `other`, but for those of the process (CPU time, bytes).
    pub fn same_counters(&self, other: &Self) -> bool {
        let counters = |scrape: &Self| -> Vec<(String, f64)> {
            let counts = |series: &str| {
                let family = series.split('{').next().unwrap_or_default();
                family.ends_with("_total") && !family.starts_with("process_")
            };
            let counted = scrape.0.iter().filter(|(series, _)| counts(series));
            counted.map(|(series, n)| (series.clone(), *n)).collect()
        };
        counters(self) == counters(other)
    }

    /// How much [`Scrape::sum`] has grown since `before`.
    pub fn since(&self, before: &Self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.sum(name, labels) - before.sum(name, labels)
    }
}

/// `labels` is what follows the opening brace.
fn has(labels: &str, wanted: &str) -> bool {
    labels.match_indices(wanted).any(|(at, _)| {
        let before = labels[..at].chars().next_back();
        let after = labels[at + wanted.len()..].chars().next();
        matches!(before, None | Some(',')) && matches!(after, Some(',' | '}'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_over_whole_labels() {
        let scrape = Scrape::parse(
            "# HELP a b\na{x=\"1\",code=\"5\"} 2\na{x=\"2\",code=\"5\"} 3\na{xx=\"1\"} 7\nab 4\n",
        );
        assert_eq!(scrape.sum("a", &[]), 12.0);
        assert_eq!(scrape.sum("a", &[("code", "5")]), 5.0);
        assert_eq!(scrape.sum("a", &[("x", "1")]), 2.0);
        assert_eq!(scrape.sum("ab", &[]), 4.0);
        assert!(scrape.has("ab") && !scrape.has("b"));
    }

    #[test]
    fn only_counters_are_compared() {
        let scrape = |n, depth| {
            let text =
                format!("n_total{{a=\"b\"}} {n}\ndepth {depth}\nprocess_cpu_total {depth}\n");
            Scrape::parse(&text)
        };
        assert!(scrape(1, 1).same_counters(&scrape(1, 2)));
        assert!(!scrape(1, 1).same_counters(&scrape(2, 1)));
    }
}
