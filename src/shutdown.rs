//! The shutdown of a guest that was asked to power off: when to press its power key again, and when
//! to stop it.

use std::time::{Duration, Instant};

/// The time between two presses of the power key. A guest whose user space has not started yet
/// misses a press: events of an input device that is not open are dropped (Linux:
/// drivers/input/input.c, input_pass_values). A guest that is shutting down ignores further presses
/// (systemd-logind: an action is in progress).
const BETWEEN_PRESSES: Duration = Duration::from_secs(3);
/// How long a guest may take by default.
const PATIENCE: Duration = Duration::from_secs(90);

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing.
    Nothing,
    /// Press the key.
    Press,
    /// Stop the guest: it took too long.
    GiveUp,
}

/// A request to power off that the guest has not complied with yet.
#[derive(Clone, Copy, Debug)]
pub struct Shutdown {
    press: Instant,
    end: Option<Instant>,
}

impl Shutdown {
    /// Creates a request whose key was pressed at `now`; the guest may take `patience`, without
    /// which there is no limit.
    #[must_use]
    pub fn new(now: Instant, patience: Option<Duration>) -> Shutdown {
        Shutdown {
            press: now + BETWEEN_PRESSES,
            end: patience.and_then(|patience| now.checked_add(patience)),
        }
    }

    /// Returns when to call [`Self::due`] again.
    #[must_use]
    pub fn next(&self) -> Instant {
        self.end.map_or(self.press, |end| end.min(self.press))
    }

    /// Returns what is due at `now`.
    pub fn due(&mut self, now: Instant) -> Due {
        if self.end.is_some_and(|end| end <= now) {
            return Due::GiveUp;
        }
        if self.press > now {
            return Due::Nothing;
        }
        self.press = now + BETWEEN_PRESSES;
        Due::Press
    }
}

/// Returns the value of `--stop-timeout`: seconds, or `None` for no limit.
///
/// # Errors
/// Why the value is invalid, as a sentence.
pub fn parse_patience(text: Option<&str>) -> Result<Option<Duration>, String> {
    match text {
        None => Ok(Some(PATIENCE)),
        Some("none") => Ok(None),
        Some(text) => match text.parse::<u32>() {
            Ok(seconds) => Ok(Some(Duration::from_secs(u64::from(seconds)))),
            Err(_) => Err(format!(
                "--stop-timeout '{text}' is invalid; use a number of seconds, or none"
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_pressed_again_and_again_until_the_guest_is_given_up() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut request = Shutdown::new(start, Some(Duration::from_secs(7)));
        assert_eq!(request.due(start), Due::Nothing);
        let mut presses = 0;
        loop {
            let now = request.next();
            match request.due(now) {
                Due::Nothing => panic!("woken for nothing at {:?}", now - start),
                Due::Press => presses += 1,
                Due::GiveUp => break assert_eq!(now, at(7)),
            }
        }
        assert_eq!(presses, 2);
        let mut patient = Shutdown::new(start, None);
        assert_eq!(patient.due(at(100_000)), Due::Press);
        let mut impatient = Shutdown::new(start, Some(Duration::ZERO));
        assert_eq!(impatient.due(start), Due::GiveUp);
    }

    #[test]
    fn patience_is_a_number_of_seconds_or_none() {
        assert_eq!(parse_patience(None), Ok(Some(PATIENCE)));
        assert_eq!(parse_patience(Some("none")), Ok(None));
        assert_eq!(parse_patience(Some("5")), Ok(Some(Duration::from_secs(5))));
        for text in ["", "5s", "-1", "99999999999"] {
            let error = parse_patience(Some(text)).expect_err(text);
            assert!(error.contains("seconds, or none"), "{error}");
        }
    }
}
