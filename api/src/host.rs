//! What requests do to the world: first to files and interfaces, then to the machine.

use crate::model::{
    BalloonHint, Drive, DrivePatch, Logger, Metrics, NetPatch, NetworkInterface, Vsock,
};
use crate::model::{BootSource, PmemPatch, SnapshotCreate, SnapshotLoad};
use serde_json::Value;

/// Why something was not done, as its client reads it.
pub type Refusal = String;

/// What requests name before the machine runs.
pub trait Resources {
    /// Looks whether the files of a boot source can be opened.
    ///
    /// # Errors
    /// What the system says, with the words of the original.
    fn check_boot_source(&mut self, source: &BootSource) -> Result<(), Refusal>;

    /// Looks whether a drive's image can be opened.
    ///
    /// # Errors
    /// As [`Self::check_boot_source`].
    fn check_drive(&mut self, drive: &Drive) -> Result<(), Refusal>;

    /// Opens the TAP of an interface, in place of one that the same interface has.
    ///
    /// # Errors
    /// As [`Self::check_boot_source`].
    fn open_tap(&mut self, interface: &NetworkInterface) -> Result<(), Refusal>;

    /// Listens at a vsock's path, in place of where it listened.
    ///
    /// # Errors
    /// As [`Self::check_boot_source`].
    fn bind_vsock(&mut self, vsock: &Vsock) -> Result<(), Refusal>;

    /// Has what is logged go where it says.
    ///
    /// # Errors
    /// As [`Self::check_boot_source`].
    fn configure_logger(&mut self, logger: &Logger) -> Result<(), Refusal>;

    /// Has metrics go where it says.
    ///
    /// # Errors
    /// As [`Self::check_boot_source`].
    fn configure_metrics(&mut self, metrics: &Metrics) -> Result<(), Refusal>;

    /// Opens a snapshot, from which the machine goes on. Returns how its machine was configured, as in the
    /// file of `--config-file`.
    ///
    /// # Errors
    /// As [`Self::check_boot_source`].
    fn open_snapshot(&mut self, load: &SnapshotLoad) -> Result<String, Refusal>;
}

/// The machine, once it runs.
pub trait Machine {
    /// Whether the machine is paused.
    ///
    /// # Errors
    /// A machine that has ended.
    fn is_paused(&mut self) -> Result<bool, Refusal>;

    /// Pauses the machine, or has it go on.
    ///
    /// # Errors
    /// Why it cannot.
    fn set_paused(&mut self, paused: bool) -> Result<(), Refusal>;

    /// Presses the guest's power key.
    ///
    /// # Errors
    /// A machine that has ended.
    fn press_power_key(&mut self) -> Result<(), Refusal>;

    /// Writes a line of metrics.
    ///
    /// # Errors
    /// A file that takes none.
    fn flush_metrics(&mut self) -> Result<(), Refusal>;

    /// Gives the drive that is number `index` in the machine another image or other limits.
    ///
    /// # Errors
    /// Why it keeps what it has.
    fn change_drive(&mut self, index: usize, patch: &DrivePatch) -> Result<(), Refusal>;

    /// Gives the interface that is number `index` other limits.
    ///
    /// # Errors
    /// Why it keeps what it has.
    fn change_interface(&mut self, index: usize, patch: &NetPatch) -> Result<(), Refusal>;

    /// Gives the persistent memory that is number `index` other limits.
    ///
    /// # Errors
    /// Why it keeps what it has.
    fn change_pmem(&mut self, index: usize, patch: &PmemPatch) -> Result<(), Refusal>;

    /// Sets the balloon's target, in MiB.
    ///
    /// # Errors
    /// Why it keeps what it has.
    fn set_balloon(&mut self, mib: u32) -> Result<(), Refusal>;

    /// Sets how often the balloon asks the guest for statistics, in seconds.
    ///
    /// # Errors
    /// Why it cannot.
    fn set_balloon_interval(&mut self, seconds: u16) -> Result<(), Refusal>;

    /// The balloon's statistics, as an object.
    ///
    /// # Errors
    /// Why there are none.
    fn balloon_statistics(&mut self) -> Result<Value, Refusal>;

    /// Has the guest tell of free pages, or stop that.
    ///
    /// # Errors
    /// Why it cannot.
    fn hint(&mut self, hint: BalloonHint) -> Result<(), Refusal>;

    /// How far that is, as an object.
    ///
    /// # Errors
    /// Why that is not known.
    fn hinting_status(&mut self) -> Result<Value, Refusal>;

    /// Saves the machine, which is paused and was configured like this.
    ///
    /// # Errors
    /// Why there is no snapshot.
    fn snapshot(&mut self, create: &SnapshotCreate, config: Value) -> Result<(), Refusal>;

    /// Tells the guest's side of MMDS what its data are now.
    fn publish_mmds(&mut self, data: &Value);
}
