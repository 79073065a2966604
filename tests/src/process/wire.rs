//! Reading HTTP/1.1 heads and bodies from a blocking stream, for the test's client and sink.
//!
//! Not a parser to learn from: it trusts what it reads as far as a test may, and turns everything
//! else into an error.

use std::io::{self, BufRead};

/// The first line and the fields of a message.
#[derive(Debug, Clone, Default)]
pub(super) struct Head {
    pub(super) first: String,
    pub(super) fields: Vec<(String, String)>,
}

impl Head {
    /// Reads one; none when the peer closed before its first byte.
    pub(super) fn read(from: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut head = Self::default();
        if from.read_line(&mut head.first)? == 0 {
            return Ok(None);
        }
        head.first.truncate(head.first.trim_end().len());
        loop {
            let mut line = String::new();
            if from.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let line = line.trim_end();
            if line.is_empty() {
                return Ok(Some(head));
            }
            let (name, value) = line.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
            head.fields
                .push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// The first field of this name, in lower case.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        let found = self.fields.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Hands the body to `each`, piece by piece, by the head's framing.
pub(super) fn read_body(
    from: &mut impl BufRead,
    head: &Head,
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    if head
        .field("transfer-encoding")
        .is_some_and(|value| value.contains("chunked"))
    {
        loop {
            let mut line = String::new();
            from.read_line(&mut line)?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = u64::from_str_radix(size, 16).map_err(|_| io::ErrorKind::InvalidData)?;
            if size == 0 {
                // Trailer fields, if any, and the empty line.
                while line.trim_end() != "" {
                    line.clear();
                    from.read_line(&mut line)?;
                }
                return Ok(());
            }
            read_exactly(from, size, &mut each)?;
            let mut end = [0; 2];
            from.read_exact(&mut end)?;
        }
    }
    let length = head.field("content-length").map_or(Ok(0), str::parse);
    read_exactly(
        from,
        length.map_err(|_| io::ErrorKind::InvalidData)?,
        &mut each,
    )
}

fn read_exactly(
    from: &mut impl BufRead,
    mut left: u64,
    each: &mut impl FnMut(&[u8]),
) -> io::Result<()> {
    while left > 0 {
        let available = from.fill_buf()?;
        if available.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let here = available
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        each(&available[..here]);
        from.consume(here);
        left -= here as u64;
    }
    Ok(())
}
