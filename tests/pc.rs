//! x86_64 guests on real KVM.
//!
//! Small guests, of a few instructions, run wherever there is `/dev/kvm`, also where it works
//! without the CPU's help. Debian's kernels run in the rig: `cargo xtask test --arch x86_64`.

/// Guests that Firecracker's API configures and starts.
#[path = "boot/api.rs"]
mod api;
/// Archives for a guest's initramfs.
#[path = "boot/archive.rs"]
mod archive;
/// What is no good anywhere, and how it is refused.
#[path = "boot/bad.rs"]
mod bad;
/// Machines that are held, by commands.
#[path = "boot/commanded.rs"]
mod commanded;
/// Guests that armlet ctl controls.
#[path = "boot/control.rs"]
mod control;
/// Kills and power cuts while a guest writes: what it flushed is there.
#[path = "boot/cuts.rs"]
mod cuts;
/// What container engines and SDKs send, replayed.
#[path = "boot/engines.rs"]
mod engines;
/// Guests that are debugged.
#[path = "boot/gdb.rs"]
mod gdb;
/// Guests that are debugged, of x86_64.
#[path = "pc/gdbs.rs"]
mod gdbs;
/// Running armlet: with pipes or on a terminal, with a deadline for everything.
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "boot/guest.rs"]
mod guest;
/// Restored guests whose memory a handler of page faults gives.
#[path = "boot/handler.rs"]
mod handler;
/// What does the steps of a guest without an operating system, in the guest.
#[path = "pc/interpreter.rs"]
mod interpreter;
/// Debian's kernels, from boot to power-off.
#[path = "pc/linux.rs"]
mod linux;
/// What holds of a guest's life and its end on every architecture.
#[path = "boot/lives.rs"]
mod lives;
/// Networks over TAP, with the kernel's help and without, and through passt.
#[path = "boot/net.rs"]
mod net;
/// Reboots in place with every device, as many as are asked for.
#[path = "boot/reboots.rs"]
mod reboots;
/// Requests whose answers by Firecracker were recorded.
#[path = "pc/recorded.rs"]
mod recorded;
/// What armlet says to input that is no good.
#[path = "pc/refusals.rs"]
mod refusals;
/// The host that the tests run on.
#[path = "pc/rig.rs"]
mod rig;
/// Linux guests that are saved while they work, and go on in other processes.
#[path = "boot/saved.rs"]
mod saved;
/// Consoles, sockets between guest and host, folders of the host, balloons, persistent memory.
#[path = "boot/sharing.rs"]
mod sharing;
/// Guests of a few instructions.
#[path = "pc/small.rs"]
mod small;
/// Guests that are saved, and go on elsewhere.
#[path = "boot/snapshot.rs"]
mod snapshot;
/// What small guests are made of.
#[path = "pc/software.rs"]
mod software;
/// The state of vCPUs and of what KVM emulates beside them, saved and restored.
#[path = "pc/states.rs"]
mod states;
/// Guests without an operating system: what they do, step by step, and their drivers.
#[allow(dead_code, reason = "some operations are of one architecture")]
#[path = "boot/steps.rs"]
mod steps;
/// What a host has beside armlet.
#[path = "boot/tools.rs"]
mod tools;
/// Whose turn it is to load the host.
#[path = "boot/turn.rs"]
mod turn;
