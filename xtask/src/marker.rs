//! Finds what a console says to the rig among what programs print on it.

/// A byte that programs do not print: ASCII's record separator. Every mark begins with it.
const SEPARATOR: u8 = 0x1e;

/// The longest mark, so that a stray separator does not hold output back for ever.
const LONGEST: usize = 64;

/// Splits a console's bytes into a program's output and the marks around it.
///
/// A mark is `\x1eARMLET-<name>-START` or `\x1eARMLET-<name>-EXIT <status>`, ended by a line feed.
/// Carriage returns before line feeds, which terminals add, are taken away when asked.
#[derive(Debug)]
pub(crate) struct Filter {
    start: String,
    exit: String,
    pending: Vec<u8>,
    raw: bool,
    started: bool,
    status: Option<i32>,
    before: Vec<u8>,
}

impl Filter {
    /// Creates a filter for the marks called `name`, for output that is read line by line.
    pub(crate) fn new(name: &str) -> Self {
        Self {
            start: format!("ARMLET-{name}-START"),
            exit: format!("ARMLET-{name}-EXIT "),
            pending: Vec::new(),
            raw: false,
            started: false,
            status: None,
            before: Vec::new(),
        }
    }

    /// Leaves carriage returns as they are, for a terminal in raw mode.
    pub(crate) fn raw(self) -> Self {
        Self { raw: true, ..self }
    }

    /// Returns whether the start mark has come.
    pub(crate) fn started(&self) -> bool {
        self.started
    }

    /// Returns the exit status, once its mark has come.
    pub(crate) fn status(&self) -> Option<i32> {
        self.status
    }

    /// Returns what the console said before the start mark: a kernel's complaints, if anything.
    pub(crate) fn before(&self) -> String {
        String::from_utf8_lossy(&self.before).into_owned()
    }

    /// Takes bytes from the console and gives those that are the program's output.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut output = Vec::new();
        for &byte in bytes {
            self.byte(byte, &mut output);
        }
        output
    }

    fn byte(&mut self, byte: u8, output: &mut Vec<u8>) {
        if self.pending.is_empty() && byte != SEPARATOR && (self.raw || byte != b'\r') {
            return self.pass(&[byte], output);
        }
        match self.pending.first() {
            // A carriage return stays only where no line feed follows.
            Some(b'\r') => {
                let held = std::mem::take(&mut self.pending);
                match byte {
                    b'\n' => self.pass(b"\n", output),
                    b'\r' => self.pending = held,
                    _ => {
                        self.pass(&held, output);
                        self.byte(byte, output);
                    }
                }
            }
            Some(_) if byte == b'\n' => {
                let held = std::mem::take(&mut self.pending);
                if !self.mark(&held) {
                    self.pass(&held, output);
                    self.pass(b"\n", output);
                }
            }
            Some(_) if self.pending.len() >= LONGEST => {
                let held = std::mem::take(&mut self.pending);
                self.pass(&held, output);
                self.byte(byte, output);
            }
            _ => self.pending.push(byte),
        }
    }

    /// Notes the mark that `line` is, if it is one.
    fn mark(&mut self, line: &[u8]) -> bool {
        let text = String::from_utf8_lossy(&line[1..]);
        // The 8250's driver of Linux 6.1 has been seen to send NULs behind a line, at the end of a host.
        let text = text.trim_end_matches(['\r', '\0']);
        if text == self.start {
            self.started = true;
            return true;
        }
        let status = text
            .strip_prefix(&self.exit)
            .and_then(|status| status.parse().ok());
        if status.is_some() {
            self.status = status;
        }
        status.is_some()
    }

    fn pass(&mut self, bytes: &[u8], output: &mut Vec<u8>) {
        if self.status.is_some() {
            return;
        }
        let to = if self.started {
            output
        } else {
            &mut self.before
        };
        to.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(filter: &mut Filter, pieces: &[&str]) -> String {
        let fed = pieces
            .iter()
            .flat_map(|piece| filter.feed(piece.as_bytes()))
            .collect();
        String::from_utf8(fed).unwrap_or_default()
    }

    #[test]
    fn output_between_the_marks_passes_and_the_rest_does_not() {
        let mut filter = Filter::new("RIG");
        let pieces = [
            "noise\r\n\x1eARMLET-RI",
            "G-START\r\nhel",
            "lo\r\n\x1eARMLET-RIG-EXIT 3\r\nmore",
        ];
        assert_eq!(whole(&mut filter, &pieces), "hello\n");
        assert_eq!(filter.status(), Some(3));
        assert_eq!(filter.before(), "noise\n");
    }

    #[test]
    fn an_exit_mark_ends_an_unfinished_line() {
        let mut filter = Filter::new("RIG");
        assert_eq!(
            whole(
                &mut filter,
                &["\x1eARMLET-RIG-START\n", "abc\x1eARMLET-RIG-EXIT 0\n"]
            ),
            "abc"
        );
        assert_eq!(filter.status(), Some(0));
    }

    #[test]
    fn nuls_of_a_serial_port_are_no_part_of_a_mark() {
        let mut filter = Filter::new("RIG");
        let pieces = ["\x1eARMLET-RIG-START\n", "\x1eARMLET-RIG-EXIT 4\0\r\n\0\0"];
        assert_eq!(whole(&mut filter, &pieces), "");
        assert_eq!(filter.status(), Some(4));
        let mut filter = Filter::new("RIG");
        assert_eq!(whole(&mut filter, &["\x1eARMLET-RIG-EXIT \0\n"]), "");
        assert_eq!(filter.status(), None);
    }

    #[test]
    fn a_prompt_without_a_line_feed_passes_at_once() {
        let mut filter = Filter::new("RIG").raw();
        assert_eq!(
            whole(&mut filter, &["\x1eARMLET-RIG-START\n", "guest# "]),
            "guest# "
        );
        assert_eq!(whole(&mut filter, &["a\r"]), "a\r");
    }

    #[test]
    fn marks_of_others_and_stray_separators_pass() {
        let mut filter = Filter::new("RIG");
        filter.feed(b"\x1eARMLET-RIG-START\n");
        assert_eq!(
            whole(&mut filter, &["\x1eARMLET-SCRIPT-EXIT 0\n"]),
            "\x1eARMLET-SCRIPT-EXIT 0\n"
        );
        assert_eq!(filter.status(), None);
        let long = format!("\x1e{}", "x".repeat(100));
        assert_eq!(whole(&mut filter, &[&long]), long);
    }

    #[test]
    fn carriage_returns_stay_where_no_line_ends() {
        let mut filter = Filter::new("RIG");
        assert_eq!(
            whole(
                &mut filter,
                &["\x1eARMLET-RIG-START\n", "1%\r2%\r", "\r\nx"]
            ),
            "1%\r2%\nx"
        );
    }
}
