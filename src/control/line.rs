//! Lines out of a stream of bytes, with a bound.

/// The most bytes of a request.
pub(super) const MOST: usize = 4096;

/// What a client has sent and nobody has taken.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<u8>);

/// A line has more than [`MOST`] bytes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a request has up to {MOST} bytes")]
pub(super) struct TooLong;

impl Lines {
    /// Adds what came.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Takes the next whole line, without its end.
    ///
    /// # Errors
    /// A line that is too long, whole or not.
    pub(super) fn take(&mut self) -> Result<Option<String>, TooLong> {
        let end = self.0.iter().position(|byte| *byte == b'\n');
        if end.unwrap_or(self.0.len()) > MOST {
            return Err(TooLong);
        }
        Ok(end.map(|end| {
            let line: Vec<u8> = self.0.drain(..=end).collect();
            String::from_utf8_lossy(&line[..end]).into_owned()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_and_in_order() {
        let mut lines = Lines::default();
        for part in [&b"sta"[..], b"tus\r\npa", b"use\n\xff\n"] {
            lines.push(part);
        }
        let mut take = || lines.take().expect("short lines");
        assert_eq!(take().as_deref(), Some("status\r"));
        assert_eq!(take().as_deref(), Some("pause"));
        assert_eq!(take().as_deref(), Some("\u{fffd}"));
        assert_eq!(take(), None);
    }

    #[test]
    fn a_line_has_a_bound() {
        let mut lines = Lines::default();
        lines.push(&[b'x'; MOST]);
        assert_eq!(lines.take(), Ok(None));
        lines.push(b"\n");
        assert_eq!(lines.take(), Ok(Some("x".repeat(MOST))));
        lines.push(&[b'x'; MOST + 1]);
        assert_eq!(lines.take(), Err(TooLong));
        lines.push(b"\nstatus\n");
        assert_eq!(lines.take(), Err(TooLong), "it stays wrong");
    }
}
