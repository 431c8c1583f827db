//! Requests to a machine that runs: what they ask for goes to the event loop as commands.

use super::files::Files;
use super::limits::limits;
use super::metrics::MetricsFile;
use crate::run::{Command, Commands, Reply, State};
use crate::snapshot::Wanted;
use armlet_api::http::Request;
use armlet_api::model::{
    BalloonHint, DrivePatch, Limits, NetPatch, PmemPatch, SnapshotCreate, SnapshotType,
};
use armlet_api::server::Handler;
use armlet_api::{Machine, Microvm, Refusal, Step};
use armlet_backends::backend::Flow;
use armlet_backends::drafts::Place;
use armlet_devices::sync::lock;
use serde_json::{Value, json};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether a request has no answer yet: the guest may end by what it asks for, and its client is to hear
/// that it was done.
#[derive(Clone, Default)]
pub(super) struct UnderWay(Arc<(Mutex<bool>, Condvar)>);

impl UnderWay {
    fn set(&self, is: bool) {
        let (state, changed) = &*self.0;
        *lock(state) = is;
        changed.notify_all();
    }

    /// Waits until there is none, and not longer than this.
    pub(super) fn wait(&self, longest: Duration) {
        let (state, changed) = &*self.0;
        let state = lock(state);
        // The end waits for nothing else.
        let _ = changed.wait_timeout_while(state, longest, |is| *is);
    }
}

/// What answers while a machine runs.
pub(super) struct Running {
    microvm: Microvm,
    guest: Guest,
    under_way: UnderWay,
}

/// The machine, as far as requests reach it.
struct Guest {
    commands: Commands,
    metrics: MetricsFile,
    /// IDs, in the order of the machine's devices.
    drives: Vec<String>,
    interfaces: Vec<String>,
    /// It keeps what the machine has taken over; the sandbox lets nobody open it again.
    files: Files,
}

impl Running {
    pub(super) fn new(
        microvm: Microvm,
        mut files: Files,
        commands: Commands,
        under_way: UnderWay,
    ) -> Running {
        files.hand_over();
        let drives = microvm.drives.iter().map(|drive| drive.drive_id.clone());
        let interfaces = microvm.interfaces.iter().map(|net| net.iface_id.clone());
        let (drives, interfaces) = (drives.collect(), interfaces.collect());
        Running {
            microvm,
            under_way,
            guest: Guest {
                commands,
                metrics: files.metrics.clone(),
                drives,
                interfaces,
                files,
            },
        }
    }

    /// Waits until the guest runs.
    ///
    /// # Errors
    /// A machine that cannot run.
    pub(super) fn wait_for_start(&mut self) -> Result<(), Refusal> {
        self.guest.ask(Command::Status).map(drop)?;
        self.guest.write_metrics();
        Ok(())
    }
}

impl Handler for Running {
    fn handle(&mut self, request: &Request) -> Step {
        self.under_way.set(true);
        self.guest.metrics.count(request);
        Step::Answer(self.microvm.handle_running(request, &mut self.guest))
    }

    fn answered(&mut self) {
        self.under_way.set(false);
    }

    fn deadline(&self) -> Option<Instant> {
        self.guest.metrics.deadline()
    }

    fn pass(&mut self) {
        self.guest.write_metrics();
    }
}

impl Guest {
    fn send(&self, command: Command) -> Result<(), Refusal> {
        let busy = "the guest has ended, or has too much to do; try again";
        self.commands.send(command).map_err(|_| busy.to_owned())
    }

    /// Sends a command and waits for its answer.
    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refusal> {
        let (reply, answer) = Reply::channel();
        self.send(command(reply))?;
        answer.recv_timeout(PATIENCE).map_err(|error| match error {
            std::sync::mpsc::RecvTimeoutError::Disconnected => "the guest has ended".to_owned(),
            std::sync::mpsc::RecvTimeoutError::Timeout => {
                format!("no answer within {PATIENCE:?}: it may still be done")
            }
        })
    }

    /// Writes a line of metrics, if they are wanted.
    fn write_metrics(&self) {
        if self.metrics.is_wanted() {
            let done = self.ask(Command::Tally).ok();
            self.metrics.flush(done, &self.drives, &self.interfaces);
        }
    }

    /// Changes limits of a device, where there is something to change.
    fn limit(&self, name: String, flow: Flow, given: Option<Limits>) -> Result<(), Refusal> {
        let Some(given) = given else {
            return Ok(());
        };
        let limits = limits(Some(given));
        self.ask(|reply| Command::SetLimits(name, flow, limits, reply))?
    }

    fn state(&self) -> Result<State, Refusal> {
        self.ask(Command::Status)
    }
}

/// What is said of a balloon whose driver is not there.
const INACTIVE: &str = "Balloon: Device not activated yet.";

impl Machine for Guest {
    fn is_paused(&mut self) -> Result<bool, Refusal> {
        Ok(self.state()?.is_paused)
    }

    fn set_paused(&mut self, paused: bool) -> Result<(), Refusal> {
        if self.state()?.is_paused == paused {
            return Ok(());
        }
        match paused {
            true => self.ask(Command::Pause)?,
            false => self.ask(Command::Resume)?,
        }
    }

    fn press_power_key(&mut self) -> Result<(), Refusal> {
        self.ask(Command::PressPowerKey)?
    }

    fn flush_metrics(&mut self) -> Result<(), Refusal> {
        self.write_metrics();
        Ok(())
    }

    fn change_drive(&mut self, index: usize, patch: &DrivePatch) -> Result<(), Refusal> {
        let name = || format!("disk{index}");
        if let Some(path) = &patch.path_on_host {
            let what = "Block: Virtio backend error: Error manipulating the backing file";
            let change = |reply| Command::ChangeDisk(name(), path.into(), reply);
            self.ask(change)?
                .map_err(|why| format!("{what}: {why} {path}"))?;
        }
        self.limit(name(), Flow::All, patch.rate_limiter)
    }

    fn change_interface(&mut self, index: usize, patch: &NetPatch) -> Result<(), Refusal> {
        let name = || format!("net{index}");
        self.limit(name(), Flow::Receive, patch.rx_rate_limiter)?;
        self.limit(name(), Flow::Transmit, patch.tx_rate_limiter)
    }

    fn change_pmem(&mut self, index: usize, patch: &PmemPatch) -> Result<(), Refusal> {
        self.limit(format!("pmem{index}"), Flow::All, patch.rate_limiter)
    }

    fn set_balloon(&mut self, mib: u32) -> Result<(), Refusal> {
        if !self.ask(Command::LookAtBalloon)??.is_active {
            return Err(INACTIVE.to_owned());
        }
        self.ask(|reply| Command::SetBalloon(u64::from(mib) << 20, reply))?
    }

    fn set_balloon_interval(&mut self, _seconds: u16) -> Result<(), Refusal> {
        // The guest is asked whenever a client looks.
        Ok(())
    }

    fn balloon_statistics(&mut self) -> Result<Value, Refusal> {
        const PAGE: u64 = 4096;
        const MIB: u64 = 1 << 20;
        let report = self.ask(Command::LookAtBalloon)??;
        let mut value = json!({
            "target_pages": report.target / PAGE,
            "actual_pages": report.actual / PAGE,
            "target_mib": report.target / MIB,
            "actual_mib": report.actual / MIB,
        });
        for (name, number) in report.statistics.iter() {
            value[statistic(name)] = number.into();
        }
        Ok(value)
    }

    fn hint(&mut self, _: BalloonHint) -> Result<(), Refusal> {
        if !self.ask(Command::LookAtBalloon)??.is_active {
            return Err(INACTIVE.to_owned());
        }
        Err("free page hinting is not offered; use free_page_reporting".to_owned())
    }

    fn hinting_status(&mut self) -> Result<Value, Refusal> {
        Ok(json!({ "host_cmd": 0, "guest_cmd": null }))
    }

    fn snapshot(&mut self, create: &SnapshotCreate, config: Value) -> Result<(), Refusal> {
        let wanted = Wanted {
            place: Place::Pair(create.snapshot_path.clone(), create.mem_file_path.clone()),
            is_diff: create.snapshot_type == SnapshotType::Diff,
            only_paused: true,
            microvm: Some(config),
        };
        let (reply, answer) = Reply::channel();
        self.send(Command::Snapshot(wanted, reply))?;
        // Guest memory may have to go to a slow disk.
        let written = answer
            .recv()
            .map_err(|_| "the guest has ended".to_owned())?;
        written.map(drop)
    }

    fn publish_mmds(&mut self, data: &Value) {
        self.files.metadata.set(data.clone());
    }
}

/// What the interface calls a statistic of the balloon.
fn statistic(name: &str) -> String {
    match name {
        "swapped-in" => "swap_in",
        "swapped-out" => "swap_out",
        "free" => "free_memory",
        "total" => "total_memory",
        "available" => "available_memory",
        "oom-kills" => "oom_kill",
        "allocation-stalls" => "alloc_stall",
        "async-scanned" => "async_scan",
        "direct-scanned" => "direct_scan",
        "async-reclaimed" => "async_reclaim",
        "direct-reclaimed" => "direct_reclaim",
        name => return name.replace('-', "_"),
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_waits_for_the_answer_to_a_request_and_not_for_ever() {
        let under_way = UnderWay::default();
        under_way.wait(Duration::MAX);
        under_way.set(true);
        under_way.wait(Duration::from_millis(1));
        let other = under_way.clone();
        let answers = std::thread::spawn(move || other.set(false));
        under_way.wait(Duration::MAX);
        answers.join().expect("a thread");
    }
}
