//! The user's side of the serial console: escape keys and output.

use anyhow::Result;
use armlet_devices::action::Action;
use armlet_devices::console::Output;
use armlet_devices::rate::{Bucket, TokenBucket};
use armlet_devices::sync::lock;
use armlet_system::deadline::wait_once;
use armlet_system::eintr::CallError;
use armlet_system::visible::visible;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The action of an escape key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// Ctrl-A x: stop the guest.
    Leave,
    /// Ctrl-A h: help.
    Help,
    /// Ctrl-A b: send a break.
    Break,
}

/// The help that Ctrl-A h prints.
pub const ESCAPE_HELP: &str = "Ctrl-A x: stop the guest and leave; Ctrl-A b: send a break; Ctrl-A Ctrl-A: send Ctrl-A; Ctrl-A h: this help";

/// Finds QEMU's escape keys in what is typed.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    pending: bool,
}

const CTRL_A: u8 = 1;

impl EscapeFilter {
    /// Appends input for the guest to `guest`, up to the first escape key, which is returned with
    /// the number of bytes consumed.
    pub fn take(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> (usize, Option<Escape>) {
        for (index, &byte) in typed.iter().enumerate() {
            if !self.pending {
                match byte {
                    CTRL_A => self.pending = true,
                    byte => guest.push(byte),
                }
                continue;
            }
            self.pending = false;
            let escape = match byte {
                b'x' => Escape::Leave,
                b'h' | b'?' => Escape::Help,
                b'b' => Escape::Break,
                CTRL_A => {
                    guest.push(CTRL_A);
                    continue;
                }
                _ => continue,
            };
            return (index + 1, Some(escape));
        }
        (typed.len(), None)
    }
}

/// Standard output as the sink of the serial console: every byte, in order, waiting for a slow
/// reader, until it is closed or armlet stops. Bytes that cannot be written for another reason,
/// such as a full disk, are lost and counted, and each further write tries again.
pub struct StandardOutput<W = fn(&[u8]) -> Result<usize, Errno>> {
    stopping: Arc<AtomicBool>,
    write: W,
    closed: bool,
    /// Bytes lost since the last successful write.
    lost: u64,
    limit: Option<Arc<Limit>>,
    /// Bytes beyond the limit, which were thrown away.
    beyond: u64,
}

/// How much may be printed in how much time: whoever prints waits for nothing, so the rest is thrown away.
pub struct Limit {
    bucket: Mutex<TokenBucket>,
    begun: Instant,
}

impl Limit {
    /// The limit of a bucket; `None` where it is none.
    #[must_use]
    pub fn new(bucket: &Bucket) -> Option<Limit> {
        let bucket = TokenBucket::new(bucket, Duration::ZERO)?;
        Some(Limit {
            bucket: Mutex::new(bucket),
            begun: Instant::now(),
        })
    }

    /// How many of so many bytes may be printed.
    fn admit(&self, bytes: usize) -> usize {
        let mut bucket = lock(&self.bucket);
        let now = self.begun.elapsed();
        let mut admits = |_: &usize| {
            let passes = bucket.wait(1, now).is_zero();
            if passes {
                bucket.take(1);
            }
            passes
        };
        (0..bytes).take_while(|byte| admits(byte)).count()
    }
}

impl StandardOutput {
    /// Creates the sink; setting `stopping` ends a wait for a reader that does not read.
    #[must_use]
    pub fn new(stopping: Arc<AtomicBool>) -> StandardOutput {
        StandardOutput::by(stopping, |bytes| rustix::io::write(stdio::stdout(), bytes))
    }
}

impl<W: FnMut(&[u8]) -> Result<usize, Errno>> StandardOutput<W> {
    /// The sink, held to a limit, if there is one.
    #[must_use]
    pub fn held_to(mut self, limit: Option<Arc<Limit>>) -> StandardOutput<W> {
        self.limit = limit;
        self
    }

    fn by(stopping: Arc<AtomicBool>, write: W) -> StandardOutput<W> {
        StandardOutput {
            stopping,
            write,
            closed: false,
            lost: 0,
            limit: None,
            beyond: 0,
        }
    }

    fn lose(&mut self, count: usize, error: Errno) {
        if self.lost == 0 {
            log::warn!(
                "cannot write to standard output ({error}); the guest keeps running, and its console output is lost until writing works again"
            );
        }
        self.lost += count as u64;
    }

    fn tell_lost(&mut self) {
        let lost = std::mem::take(&mut self.lost);
        if lost > 0 {
            log::warn!("{lost} bytes of the console's output are lost");
        }
    }
}

/// Reports lost output at the latest when the guest ends.
impl<W> Drop for StandardOutput<W> {
    fn drop(&mut self) {
        if self.lost > 0 {
            let lost = self.lost;
            log::warn!("the last {lost} bytes of the console's output are lost");
        }
        if self.beyond > 0 {
            let beyond = self.beyond;
            log::warn!(
                "{beyond} bytes of the console's output were beyond its limit, and are lost"
            );
        }
    }
}

impl<W: FnMut(&[u8]) -> Result<usize, Errno> + Send> Output for StandardOutput<W> {
    fn write(&mut self, mut bytes: &[u8]) -> Action {
        if let Some(limit) = &self.limit {
            let admitted = limit.admit(bytes.len());
            self.beyond += (bytes.len() - admitted) as u64;
            bytes = &bytes[..admitted];
        }
        while !bytes.is_empty() && !self.closed {
            // Once armlet stops, output no longer waits for a reader.
            if self.stopping.load(Ordering::Relaxed) && !is_output_ready() {
                break;
            }
            match (self.write)(bytes) {
                Ok(written) => {
                    self.tell_lost();
                    bytes = &bytes[written..];
                }
                // The signal may mean that armlet stops.
                Err(error) if error.is_interrupted() => {}
                // Others may have set O_NONBLOCK, and share the description, so it is not cleared.
                Err(Errno::AGAIN) => {
                    let _ = wait_once(stdio::stdout(), PollFlags::OUT, None);
                }
                // There is no reader any more.
                Err(error @ (Errno::PIPE | Errno::BADF | Errno::CONNRESET)) => {
                    self.closed = true;
                    self.tell_lost();
                    log::warn!(
                        "standard output is closed ({error}); the guest keeps running, its console output is lost"
                    );
                }
                Err(error) => {
                    self.lose(bytes.len(), error);
                    break;
                }
            }
        }
        Action::None
    }
}

/// Returns whether a write to standard output would not block, or would fail.
#[must_use]
pub fn is_output_ready() -> bool {
    wait_once(stdio::stdout(), PollFlags::OUT, Some(Duration::ZERO)) == Ok(true)
}

/// The message of a Linux kernel panic (kernel/panic.c: vpanic).
const PANIC: &[u8] = b"Kernel panic - not syncing: ";
/// The most bytes of a panic's reason that are kept.
const REASON_BYTES: usize = 160;

/// Passes output on, and searches it for the message of a kernel panic, which KVM/arm64 does not
/// report otherwise.
pub struct PanicWatch {
    output: StandardOutput,
    /// Bytes of [`PANIC`] seen in a row.
    matched: usize,
    /// The reason, as far as it has been printed.
    reason: Option<Vec<u8>>,
}

impl PanicWatch {
    /// Creates a watch that passes its output to `output`.
    #[must_use]
    pub fn new(output: StandardOutput) -> PanicWatch {
        PanicWatch {
            output,
            matched: 0,
            reason: None,
        }
    }

    fn watch(&mut self, byte: u8) -> Action {
        if let Some(reason) = &mut self.reason {
            if matches!(byte, b'\r' | b'\n') || reason.len() == REASON_BYTES {
                let reason = visible(reason, REASON_BYTES);
                self.reason = None;
                return Action::panicked(reason);
            }
            reason.push(byte);
            return Action::None;
        }
        // The first byte of the message occurs nowhere else in it, so a mismatch starts over.
        self.matched = match byte == PANIC[self.matched] {
            true => self.matched + 1,
            false => usize::from(byte == PANIC[0]),
        };
        if self.matched == PANIC.len() {
            self.matched = 0;
            self.reason = Some(Vec::new());
        }
        Action::None
    }
}

impl Output for PanicWatch {
    fn write(&mut self, bytes: &[u8]) -> Action {
        let mut action = self.output.write(bytes);
        let mut rest = bytes;
        while let Some((&byte, behind)) = rest.split_first() {
            if self.matched > 0 || self.reason.is_some() {
                action.add(self.watch(byte));
                rest = behind;
                continue;
            }
            // Most output contains no part of the message.
            let Some(begin) = rest.iter().position(|byte| *byte == PANIC[0]) else {
                break;
            };
            self.matched = 1;
            rest = &rest[begin + 1..];
        }
        action
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;

    fn filter(typed: &[u8]) -> (Vec<u8>, Vec<Escape>) {
        let mut filter = EscapeFilter::default();
        let (mut guest, mut escapes) = (Vec::new(), Vec::new());
        // Byte by byte, as from a keyboard.
        for byte in typed {
            let (_, escape) = filter.take(&[*byte], &mut guest);
            escapes.extend(escape);
        }
        (guest, escapes)
    }

    #[test]
    fn escape_keys_are_those_of_qemu() {
        assert_eq!(filter(b"ab\x01x"), (b"ab".to_vec(), vec![Escape::Leave]));
        assert_eq!(
            filter(b"\x01h\x01b"),
            (vec![], vec![Escape::Help, Escape::Break])
        );
        assert_eq!(filter(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(filter(b"\x01zq"), (b"q".to_vec(), vec![]));
    }

    #[test]
    fn a_chunk_stops_at_its_first_escape() {
        let mut guest = Vec::new();
        let result = EscapeFilter::default().take(b"a\x01xb", &mut guest);
        assert_eq!(result, (3, Some(Escape::Leave)));
        assert_eq!(guest, b"a");
    }

    fn reasons(printed: &[u8]) -> Vec<String> {
        let mut output = StandardOutput::new(Arc::default());
        output.closed = true;
        let mut watch = PanicWatch::new(output);
        let actions = printed.iter().map(|byte| watch.write(&[*byte]));
        let reasons = actions.filter_map(|action| match action {
            Action::Panicked(panic) => Some(panic.reason),
            _ => None,
        });
        reasons.collect()
    }

    #[test]
    fn a_panic_is_noticed_with_its_reason() {
        let printed = b"[ 1.0] KKernel panic - not syncing: sysrq triggered\x1b crash\r\n[ 1.1]";
        assert_eq!(reasons(printed), ["sysrq triggered\\x1b crash"]);
        assert!(reasons(b"Kernel panic - not sinking: x\n").is_empty());
        assert!(reasons(b"Kernel panic - not syncing: unfinished").is_empty());
        let endless = [PANIC, &[b'x'; 1000]].concat();
        assert_eq!(reasons(&endless)[0].len(), REASON_BYTES);
    }

    #[test]
    fn a_panic_is_noticed_however_its_words_are_cut() {
        let printed = b"[ 1.0] Kern KKernel panic - not syncing: at last\nand on";
        for size in 1..=printed.len() {
            let mut output = StandardOutput::new(Arc::default());
            output.closed = true;
            let mut watch = PanicWatch::new(output);
            let mut action = Action::None;
            for part in printed.chunks(size) {
                action.add(watch.write(part));
            }
            assert_eq!(action, Action::panicked("at last".to_owned()), "{size}");
        }
    }

    #[test]
    fn a_full_disk_silences_the_console_only_while_it_is_full() {
        let taken = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&taken);
        let mut answers = vec![
            Ok(2),
            Err(Errno::NOSPC),
            Err(Errno::IO),
            Err(Errno::INTR),
            Ok(3),
            Err(Errno::DQUOT),
        ];
        answers.reverse();
        let write = move |bytes: &[u8]| {
            let answer = answers.pop().expect("an answer")?;
            let mut taken = kept.lock().expect("one thread");
            taken.extend_from_slice(&bytes[..answer]);
            Ok(answer)
        };
        let mut output = StandardOutput::by(Arc::default(), write);
        // Two go out, and two are lost on a full disk, as is the next one.
        assert_eq!(output.write(b"abcd"), Action::None);
        assert_eq!(output.write(b"e"), Action::None);
        assert_eq!(output.lost, 3);
        // There is room again.
        assert_eq!(output.write(b"fgh"), Action::None);
        assert_eq!(output.lost, 0);
        assert_eq!(output.write(b"i"), Action::None);
        assert_eq!((output.lost, output.closed), (1, false));
        assert_eq!(*taken.lock().expect("one thread"), b"abfgh");
    }

    #[test]
    fn what_is_beyond_a_limit_is_thrown_away_and_counted() {
        let bucket = Bucket {
            size: 5,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 3,
        };
        let limit = Limit::new(&bucket).map(Arc::new);
        assert!(limit.is_some() && Limit::new(&Bucket::per_second(0)).is_none());
        let taken = Arc::new(Mutex::new(Vec::new()));
        let output = || {
            let kept = Arc::clone(&taken);
            let write = move |bytes: &[u8]| {
                lock(&kept).extend_from_slice(bytes);
                Ok(bytes.len())
            };
            StandardOutput::by(Arc::default(), write).held_to(limit.clone())
        };
        let mut first = output();
        assert_eq!(first.write(b"abcdef"), Action::None);
        assert_eq!(first.write(b"ghijk"), Action::None);
        assert_eq!(first.beyond, 3);
        // The guest's next life has no more than that.
        assert_eq!(output().write(b"l"), Action::None);
        assert_eq!(*lock(&taken), b"abcdefgh");
    }

    #[test]
    fn a_closed_output_is_asked_once() {
        let mut calls = 0;
        let write = |_: &[u8]| {
            calls += 1;
            Err(Errno::PIPE)
        };
        let mut output = StandardOutput::by(Arc::default(), write);
        assert_eq!(output.write(b"abc"), Action::None);
        assert_eq!(output.write(b"def"), Action::None);
        assert!(output.closed);
        drop(output);
        assert_eq!(calls, 1);
    }

    proptest! {
        #[test]
        fn what_holds_no_ctrl_a_passes_unchanged(typed: Vec<u8>) {
            prop_assume!(!typed.contains(&CTRL_A));
            prop_assert_eq!(filter(&typed), (typed, vec![]));
        }
    }
}
