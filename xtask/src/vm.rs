//! A VMM that is being measured, with its console.

use std::io::{PipeReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// What the guest's init prints first.
const MARKER: &[u8] = b"GUEST-MARKER";

/// How long a VM may take for anything, in the host's own time.
const LIMIT: Duration = Duration::from_secs(120);

/// A running VMM, whose output is one pipe and whose input stays open.
pub(crate) struct Vm {
    /// The VMM.
    pub(crate) child: Child,
    console: PipeReader,
    started: Instant,
    /// What its console and its standard error said so far.
    pub(crate) output: Vec<u8>,
    /// How much of that was looked at line by line.
    seen: usize,
}

impl Vm {
    /// Starts it.
    pub(crate) fn start(command: &[String]) -> Result<Self> {
        let (program, arguments) = command.split_first().context("no VMM was given")?;
        let (console, output) = std::io::pipe().context("cannot make a pipe")?;
        let errors = output.try_clone().context("cannot share a pipe")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped());
        command.stdout(output).stderr(errors);
        let started = Instant::now();
        let child = command.spawn();
        // The command holds the pipe's other ends, which shall be the VMM's alone.
        drop(command);
        Ok(Self {
            child: child.with_context(|| format!("cannot start {program}"))?,
            console,
            started,
            output: Vec::new(),
            seen: 0,
        })
    }

    /// Waits for the guest's marker and gives the time since the start; every `period`, if there
    /// is one, `look` is called with the process's number.
    pub(crate) fn until_marker(
        &mut self,
        period: Option<Duration>,
        look: &mut dyn FnMut(u32),
    ) -> Result<Duration> {
        let timeout = Timespec::try_from(period.unwrap_or(LIMIT)).context("a long period")?;
        let mut buffer = [0; 1 << 16];
        loop {
            ensure!(self.started.elapsed() < LIMIT, "no marker: {}", self.said());
            let mut console = [PollFd::new(&self.console, PollFlags::IN)];
            let ready = poll(&mut console, Some(&timeout)).context("cannot wait for the VMM")?;
            if ready == 0 {
                look(self.child.id());
                continue;
            }
            let length = self
                .console
                .read(&mut buffer)
                .context("cannot read the console")?;
            let time = self.started.elapsed();
            ensure!(
                length > 0,
                "the VMM ended before the marker: {}",
                self.said()
            );
            let from = self.output.len().saturating_sub(MARKER.len());
            self.output.extend_from_slice(&buffer[..length]);
            if self.output[from..]
                .windows(MARKER.len())
                .any(|window| window == MARKER)
            {
                return Ok(time);
            }
        }
    }

    /// Waits for the next line that begins with `word`, and gives it without line feed.
    pub(crate) fn line(&mut self, word: &str) -> Result<String> {
        let timeout = Timespec::try_from(LIMIT).context("a long period")?;
        let mut buffer = [0; 1 << 16];
        loop {
            while let Some(length) = self.output[self.seen..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let line = String::from_utf8_lossy(&self.output[self.seen..self.seen + length]);
                let line = line.trim_end_matches('\r').to_owned();
                self.seen += length + 1;
                if line.starts_with(word) {
                    return Ok(line);
                }
            }
            let mut console = [PollFd::new(&self.console, PollFlags::IN)];
            let ready = poll(&mut console, Some(&timeout)).context("cannot wait for the VMM")?;
            ensure!(ready > 0, "no line {word}: {}", self.said());
            let length = self
                .console
                .read(&mut buffer)
                .context("cannot read the console")?;
            ensure!(length > 0, "the VMM ended before {word}: {}", self.said());
            self.output.extend_from_slice(&buffer[..length]);
        }
    }

    /// Waits for the VMM to end by itself and gives the time since the start.
    pub(crate) fn until_end(&mut self) -> Result<Duration> {
        let timeout = Timespec::try_from(LIMIT).context("a long period")?;
        let mut buffer = [0; 1 << 16];
        loop {
            let mut console = [PollFd::new(&self.console, PollFlags::IN)];
            let ready = poll(&mut console, Some(&timeout)).context("cannot wait for the VMM")?;
            ensure!(ready > 0, "it does not end: {}", self.said());
            match self
                .console
                .read(&mut buffer)
                .context("cannot read the console")?
            {
                0 => break,
                length => self.output.extend_from_slice(&buffer[..length]),
            }
        }
        let status = self.child.wait().context("cannot wait for the VMM")?;
        let time = self.started.elapsed();
        ensure!(
            status.success(),
            "the VMM ended with {status}: {}",
            self.said()
        );
        Ok(time)
    }

    /// Ends the VMM, which is to be running.
    pub(crate) fn kill(mut self) -> Result<()> {
        let ended = self.child.try_wait().context("cannot look at the VMM")?;
        ensure!(ended.is_none(), "the VMM ended: {}", self.said());
        Ok(())
    }

    /// Returns the end of the console's output.
    pub(crate) fn said(&self) -> String {
        let from = self.output.len().saturating_sub(2000);
        String::from_utf8_lossy(&self.output[from..]).into_owned()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It has mostly ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
