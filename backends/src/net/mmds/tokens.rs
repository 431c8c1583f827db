//! Tokens of a metadata service's second version: random, valid for a time, and few.

use armlet_system::eintr::uninterrupted;
use rustix::io::Result;
use rustix::rand::{GetRandomFlags, getrandom};
use std::collections::VecDeque;
use std::time::Duration;

/// The most tokens that are valid at a time. The oldest goes when there is one more.
pub(super) const MOST: usize = 64;
/// Random bytes of a token.
const BYTES: usize = 16;

/// The tokens that were given, oldest first.
#[derive(Default)]
pub(super) struct Tokens(VecDeque<Token>);

struct Token {
    text: String,
    /// When it ceases to be valid.
    end: Duration,
}

impl Tokens {
    /// Makes a token that is valid for `ttl` from `now` on.
    ///
    /// # Errors
    /// A host that gives no random numbers.
    pub(super) fn make(&mut self, now: Duration, ttl: Duration) -> Result<String> {
        let mut bytes = [0; BYTES];
        uninterrupted(|| getrandom(&mut bytes[..], GetRandomFlags::empty()))?;
        self.0.retain(|token| now < token.end);
        if self.0.len() >= MOST {
            self.0.pop_front();
        }
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.0.push_back(Token {
            text: text.clone(),
            end: now + ttl,
        });
        Ok(text)
    }

    /// Whether this is a token that is valid.
    pub(super) fn knows(&self, text: &str, now: Duration) -> bool {
        let mut tokens = self.0.iter();
        tokens.any(|token| now < token.end && token.text == text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_end_and_the_oldest_goes() {
        let second = Duration::from_secs;
        let mut tokens = Tokens::default();
        let first = tokens.make(second(0), second(10)).expect("random");
        assert!(tokens.knows(&first, second(9)));
        assert!(!tokens.knows(&first, second(10)));
        assert!(!tokens.knows("", second(0)));
        let others: Vec<String> = (0..MOST)
            .map(|_| tokens.make(second(1), second(10)).expect("random"))
            .collect();
        assert!(
            !tokens.knows(&first, second(1)),
            "one more than there may be"
        );
        assert!(others.iter().all(|token| tokens.knows(token, second(1))));
        assert_eq!(tokens.0.len(), MOST);
        tokens.make(second(20), second(1)).expect("random");
        assert_eq!(tokens.0.len(), 1, "tokens that ended take no room");
    }
}
