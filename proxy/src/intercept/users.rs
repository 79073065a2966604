//! The number of a user or a group, by name.
//!
//! Reads the files and no other source of names: the image of a sidecar has no other, and a number
//! always works.

use std::path::Path;

/// The number of a user.
///
/// # Errors
/// What to write instead.
pub(super) fn uid(text: &str) -> Result<u32, String> {
    number(text, "user", Path::new("/etc/passwd"))
}

/// The number of a group.
///
/// # Errors
/// What to write instead.
pub(super) fn gid(text: &str) -> Result<u32, String> {
    number(text, "group", Path::new("/etc/group"))
}

fn number(text: &str, what: &str, file: &Path) -> Result<u32, String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // The kernel's "no one" is the highest number.
        let number = text.parse().ok().filter(|number| *number != u32::MAX);
        return number.ok_or_else(|| format!("{text} is too large for a {what}"));
    }
    let listed = std::fs::read_to_string(file).map_err(|error| {
        format!(
            "{} cannot be read ({error}): write a number",
            file.display()
        )
    })?;
    // Both files: name, password, number.
    let found = listed.lines().find_map(|line| {
        let mut fields = line.split(':');
        let named = fields.next() == Some(text);
        fields.nth(1).filter(|_| named)?.parse().ok()
    });
    found.ok_or_else(|| format!("no {what} `{text}` in {}: write a number", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_or_a_number_is_understood() {
        assert_eq!(uid("2102"), Ok(2102));
        assert_eq!(uid("root"), Ok(0));
        assert_eq!(gid("root"), Ok(0));
    }

    #[test]
    fn a_name_that_is_not_listed_asks_for_a_number() {
        let unknown = "no user `nobody-here` in /etc/passwd: write a number";
        assert_eq!(uid("nobody-here"), Err(unknown.to_owned()));
        let unknown = "no group `` in /etc/group: write a number";
        assert_eq!(gid(""), Err(unknown.to_owned()));
        for text in ["4294967295", "4294967296"] {
            let large = format!("{text} is too large for a user");
            assert_eq!(uid(text), Err(large));
        }
    }
}
