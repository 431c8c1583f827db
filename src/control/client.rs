//! `armlet ctl`: asks the control socket of a running armlet.

use super::answer::{DONE, REFUSED, TEXT};
use super::request::Request;
use anyhow::{Context, Result, anyhow, bail};
use armlet_system::deadline::Deadline;
use armlet_system::eintr::uninterrupted;
use armlet_system::sockets::connect_at_once;
use armlet_system::status::{Fault, Status};
use rustix::io::Errno;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

/// How long an answer may take: longer than the other side waits for its machine.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long to wait until a listener with too many clients has accepted some.
const QUEUE: Duration = Duration::from_secs(3);
/// How often it is tried.
const PAUSE: Duration = Duration::from_millis(10);
/// The most bytes of an answer.
const MOST: u64 = 1 << 20;

/// Asks at `path`, and returns what is to be printed (lines for people, or a line of JSON), and whether
/// that is a refusal.
///
/// # Errors
/// Words that are no request ([`Status::Usage`]); nobody who listens; a request that is refused.
pub fn ask(path: &Path, words: &[&str], json: bool) -> Result<(String, bool)> {
    let request = Request::parse(words).fault(Status::Usage)?;
    // Guest memory may have to go to a slow disk.
    let patience = match request {
        Request::Snapshot { .. } => None,
        _ => Some(PATIENCE),
    };
    let words = told(&request, words).fault(Status::Usage)?;
    let shown = path.display();
    let cannot = || format!("cannot ask at {shown}");
    let mut stream = connect(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => anyhow!(
            "nobody listens at {shown}; it is the path that a running 'armlet run --control' has"
        ),
        ErrorKind::WouldBlock => anyhow!("{shown} has too many clients; try again"),
        _ => anyhow!(error).context(cannot()),
    })?;
    stream.set_nonblocking(false).with_context(cannot)?;
    stream.set_read_timeout(patience).with_context(cannot)?;
    stream
        .set_write_timeout(Some(PATIENCE))
        .with_context(cannot)?;
    let line = match json {
        true => format!("{words}\n"),
        false => format!("{TEXT} {words}\n"),
    };
    stream.write_all(line.as_bytes()).with_context(cannot)?;
    let end: &[u8] = if json { b"\n" } else { b"\n\n" };
    let mut answer = Vec::new();
    let mut bytes = [0; 4096];
    while !answer.ends_with(end) {
        match uninterrupted(|| rustix::io::read(&stream, &mut bytes)) {
            Ok(0) => bail!("{shown}: the guest ended before it answered"),
            Ok(count) => answer.extend_from_slice(&bytes[..count]),
            Err(Errno::AGAIN) => bail!("{shown}: no answer within {PATIENCE:?}"),
            Err(error) => return Err(error).with_context(cannot),
        }
        if answer.len() as u64 > MOST {
            bail!("{shown}: an answer of more than {MOST} bytes; is this a control socket?");
        }
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    print(&answer, json)
}

/// Connects, and waits a while for a listener that has others to accept before.
fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let deadline = Deadline::after(QUEUE);
    loop {
        match connect_at_once(path) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && !deadline.left().is_zero() => {
                sleep(PAUSE);
            }
            connected => return connected,
        }
    }
}

/// The words of a request as they are told, in which a path means the same in every folder.
fn told(request: &Request, words: &[&str]) -> Result<String> {
    let (before, path) = match request {
        Request::ChangeDisk(name, path) => (format!("disk change {name}"), path),
        Request::Snapshot { folder, is_diff } => {
            let before = if *is_diff {
                "snapshot --diff"
            } else {
                "snapshot"
            };
            (before.to_owned(), folder)
        }
        _ => return Ok(words.join(" ")),
    };
    let whole = std::path::absolute(path).with_context(|| format!("{before} {path}"))?;
    let told = format!("{before} {}", whole.display());
    let again: Vec<&str> = told.split_whitespace().collect();
    if again.join(" ") != told {
        bail!("{before} {path:?}: a path may have single blanks, and no line breaks");
    }
    Ok(told)
}

/// What is to be printed of an answer. A refusal is an error for people, and printed as JSON for
/// programs.
fn print(answer: &str, json: bool) -> Result<(String, bool)> {
    if json {
        return Ok((answer.to_owned(), answer.starts_with("{\"error\"")));
    }
    let text = answer.strip_suffix('\n').unwrap_or(answer);
    if let Some(error) = text.strip_prefix(REFUSED) {
        bail!("{}", error.trim_end());
    }
    let text = text.strip_prefix(DONE);
    let text = text.context("an answer that is none; is this a control socket?")?;
    Ok((text.to_owned(), false))
}
