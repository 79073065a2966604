//! `outrigger identity`: who a sidecar is, and for how long.

use std::time::Duration;

use serde_json::Value;

use crate::client::Admin;
use crate::clock;
use crate::output::{Failure, Format, cell, print_as, table};

pub(crate) async fn run(admin: Admin, format: Format) -> Result<(), Failure> {
    let value = admin.client()?.get("/identity").await?;
    let now = clock::wall_millis();
    print_as(format, &value, |value| identity_table(value, now));
    Ok(())
}

fn identity_table(value: &Value, now_millis: u64) -> String {
    if value["configured"] == false {
        return "no source of identity: this sidecar speaks plaintext\n".to_owned();
    }
    let left = |key: &str| match value[key].as_i64() {
        Some(at) => match u64::try_from(at.saturating_mul(1000))
            .unwrap_or(0)
            .checked_sub(now_millis)
        {
            Some(left) if left > 0 => clock::short(Duration::from_millis(left)),
            _ => "EXPIRED".to_owned(),
        },
        None => "-".to_owned(),
    };
    let row = vec![
        cell(&value["id"]),
        left("notAfter"),
        left("bundleNotAfter"),
        cell(&value["generation"]),
    ];
    let mut text = table(
        &["ID", "EXPIRES IN", "BUNDLE EXPIRES IN", "GENERATION"],
        &[row],
    );
    if let Some(problem) = value["problem"].as_str() {
        text.push_str(&format!("not taken up: {problem}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_has_expired_and_what_was_refused_is_seen() {
        let value = json!({
            "configured": true, "id": "spiffe://a/b", "generation": 3,
            "notAfter": 90, "bundleNotAfter": 30, "problem": "the key is another's",
        });
        let text = identity_table(&value, 60_000);
        assert!(text.contains("spiffe://a/b"), "{text}");
        assert!(text.contains("30.0s"), "{text}");
        assert!(text.contains("EXPIRED"), "{text}");
        assert!(
            text.contains("not taken up: the key is another's"),
            "{text}"
        );
        let none = identity_table(&json!({"configured": false}), 0);
        assert!(none.contains("plaintext"), "{none}");
    }
}
