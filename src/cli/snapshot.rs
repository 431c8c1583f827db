//! `armlet snapshot`: what is done with a snapshot without restoring it.

use argh::FromArgs;

/// Look into a snapshot (show DIR), or apply a diff to the snapshot that it changes (merge BASE DIFF).
/// A snapshot is a folder, or its two files with a comma between them: STATE,MEMORY.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "snapshot",
    example = "What is in a snapshot, and on what was it made?
  {command_name} show web

A whole snapshot of a diff and its base, in the base's place:
  armlet ctl guest.sock snapshot base
  armlet ctl guest.sock snapshot later --diff
  {command_name} merge base later",
    note = "A merge that is cut off leaves the base as it was or has replaced it, and can be done again. The diff stays. The exit status is 2 if a snapshot is damaged, or two do not belong together."
)]
pub struct SnapshotArgs {
    /// print JSON
    #[argh(switch)]
    pub json: bool,
    /// what to do
    #[argh(positional, arg_name = "show|merge")]
    pub action: String,
    /// the snapshots
    #[argh(positional, arg_name = "DIR")]
    pub snapshots: Vec<String>,
}
