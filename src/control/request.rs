//! What a client can ask for, as words.

use anyhow::{Context, Result, anyhow, bail};
use armlet_arch::size::parse_size;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The state of the machine.
    Status,
    /// Pause the machine.
    Pause,
    /// Resume it.
    Resume,
    /// Press the guest's power key.
    PowerKey,
    /// Reset the guest, as if it had asked for it.
    Reset,
    /// Stop the guest at once.
    Stop,
    /// The counters.
    Stats,
    /// Set the balloon's target in bytes.
    Balloon(u64),
    /// Have the guest told of the size that a disk's image has now.
    ResizeDisk(String),
    /// Give a disk another image.
    ChangeDisk(String, String),
    /// Save the machine in a folder: all of it, or what changed since the last time.
    Snapshot {
        /// The folder.
        folder: String,
        /// Whether it is what changed.
        is_diff: bool,
    },
}

/// The requests, for errors.
const USAGE: [&str; 12] = [
    "status",
    "pause",
    "resume",
    "power-key",
    "reset",
    "stop",
    "stats",
    "balloon SIZE",
    "disk resize NAME",
    "disk change NAME IMG",
    "snapshot DIR",
    "snapshot --diff DIR",
];

impl Request {
    /// Reads a request from its words.
    ///
    /// # Errors
    /// Words that are no request, with those that are; a size that is none.
    pub(super) fn parse(words: &[&str]) -> Result<Request> {
        Ok(match words {
            ["status"] => Request::Status,
            ["pause"] => Request::Pause,
            ["resume"] => Request::Resume,
            ["power-key"] => Request::PowerKey,
            ["reset"] => Request::Reset,
            ["stop"] => Request::Stop,
            ["stats"] => Request::Stats,
            ["balloon", size] => {
                let bytes = parse_size(size).map_err(|why| anyhow!(why));
                Request::Balloon(bytes.with_context(|| format!("balloon {size}"))?)
            }
            ["balloon"] => bail!("balloon needs a size: balloon 512M"),
            ["disk", "resize", name] => Request::ResizeDisk((*name).to_owned()),
            ["disk", "change", name, path @ ..] if !path.is_empty() => {
                Request::ChangeDisk((*name).to_owned(), path.join(" "))
            }
            ["disk", ..] => {
                bail!("disk needs a verb and a name: disk resize disk0, or disk change disk0 IMG")
            }
            ["snapshot", "--diff", folder @ ..] if !folder.is_empty() => Request::Snapshot {
                folder: folder.join(" "),
                is_diff: true,
            },
            ["snapshot"] | ["snapshot", "--diff"] => {
                bail!("snapshot needs a folder: snapshot DIR")
            }
            ["snapshot", folder @ ..] => Request::Snapshot {
                folder: folder.join(" "),
                is_diff: false,
            },
            [] => bail!("no request; use {}", known()),
            [first, ..] => {
                let name = |words: &&'static str| words.split(' ').next();
                match USAGE.iter().filter_map(name).any(|name| name == *first) {
                    true => bail!("{first} takes no more words"),
                    false => bail!("'{first}' is no request; use {}", known()),
                }
            }
        })
    }
}

/// The requests in a row.
fn known() -> String {
    USAGE.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Request, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        Request::parse(&words).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn each_request_that_help_shows_is_one() {
        for words in USAGE {
            let words = words
                .replace("SIZE", "1G")
                .replace("NAME", "disk0")
                .replace("IMG", "a.img")
                .replace("DIR", "/tmp/s");
            assert!(parse(&words).is_ok(), "{words}");
        }
        assert_eq!(parse("balloon 512M"), Ok(Request::Balloon(512 << 20)));
        let disk = Request::ResizeDisk("disk1".to_owned());
        assert_eq!(parse(" disk  resize disk1 "), Ok(disk));
        let other = Request::ChangeDisk("disk1".to_owned(), "/a b.img".to_owned());
        assert_eq!(parse("disk change disk1 /a b.img"), Ok(other));
        let snapshot = |is_diff| {
            let folder = "/a b".to_owned();
            Ok(Request::Snapshot { folder, is_diff })
        };
        assert_eq!(parse("snapshot /a b"), snapshot(false));
        assert_eq!(parse("snapshot --diff /a b"), snapshot(true));
    }

    #[test]
    fn what_is_none_is_refused_with_those_that_are() {
        let wrong = |line| parse(line).expect_err(line);
        assert!(wrong("").starts_with("no request; use status, pause,"));
        assert!(wrong("quit").contains("'quit' is no request; use status"));
        assert_eq!(wrong("pause now"), "pause takes no more words");
        assert!(wrong("balloon").contains("balloon 512M"));
        assert!(wrong("balloon much").starts_with("balloon much: "));
        assert!(wrong("snapshot").contains("snapshot DIR"));
        assert!(wrong("disk grow").contains("disk resize disk0"));
    }
}
