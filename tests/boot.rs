//! Guests on real KVM, and what armlet says where there is nothing to run.
//!
//! `cargo xtask test` runs these on an ARM64 machine as they are, and on any other inside an
//! emulated host of each kind that matters. Plain `cargo test` elsewhere runs what needs no KVM;
//! the rest says that it was skipped.
//!
//! Each test says in its name what holds. Those that begin with [`rig::any`] run on every host,
//! those with [`rig::main`] on the main one only, because they would show the same anywhere.

/// Guests that Firecracker's API configures and starts.
#[path = "boot/api.rs"]
mod api;
/// Archives for a guest's initramfs.
#[path = "boot/archive.rs"]
mod archive;
/// Guests that do what no driver does, for as long as they are asked to.
#[path = "boot/attack.rs"]
mod attack;
/// What is no good anywhere, and how it is refused.
#[path = "boot/bad.rs"]
mod bad;
/// Boards: recognised, planned for, refused.
#[path = "boot/boards.rs"]
mod boards;
/// Machines that are held, by commands.
#[path = "boot/commanded.rs"]
mod commanded;
/// The console: every byte, in order, both ways, and no time taken while nothing comes.
#[path = "boot/console.rs"]
mod console;
/// Guests that armlet ctl controls.
#[path = "boot/control.rs"]
mod control;
/// Kills and power cuts while a guest writes: what it flushed is there.
#[path = "boot/cuts.rs"]
mod cuts;
/// Disks: data, identity, and what is left after armlet is killed.
#[path = "boot/disk.rs"]
mod disk;
/// Virtio drivers that are not Linux's, in a guest without an operating system.
#[path = "boot/drivers.rs"]
mod drivers;
/// What container engines and SDKs send, replayed.
#[path = "boot/engines.rs"]
mod engines;
/// What vCPUs have beside the base architecture.
#[path = "boot/features.rs"]
mod features;
/// The machine of Firecracker's guests.
#[path = "boot/firecracker.rs"]
mod firecracker;
/// Guests that are debugged.
#[path = "boot/gdb.rs"]
mod gdb;
/// Guests that are debugged, of ARM64.
#[path = "boot/gdbs.rs"]
mod gdbs;
/// Running armlet: with pipes or on a terminal, with a deadline for everything.
#[path = "boot/guest.rs"]
mod guest;
/// Restored guests whose memory a handler of page faults gives.
#[path = "boot/handler.rs"]
mod handler;
/// What does the steps of a guest without an operating system, in the guest.
#[path = "boot/interpreter.rs"]
mod interpreter;
/// KVM's table of interrupts.
#[path = "boot/interrupts.rs"]
mod interrupts;
/// Guests in the jails that root makes.
#[path = "boot/jailed.rs"]
mod jailed;
/// Kernels in every form that distributions ship.
#[path = "boot/kernels.rs"]
mod kernels;
/// Hosts of two kinds of core, as their files describe them.
#[path = "boot/kinds.rs"]
mod kinds;
/// Reset, power key, signals, terminal: how a guest's life goes on and ends.
#[path = "boot/life.rs"]
mod life;
/// Debian's kernels, from boot to power-off, and what they say about the machine.
#[path = "boot/linux.rs"]
mod linux;
/// What holds of a guest's life and its end on every architecture.
#[path = "boot/lives.rs"]
mod lives;
/// Threads, huge pages, memory banks.
#[path = "boot/machine.rs"]
mod machine;
/// What guest memory is made of: pages of a pool, locked, merged, taken beforehand.
#[path = "boot/memory.rs"]
mod memory;
/// Messages: how many, and what happens where nobody reads them.
#[path = "boot/messages.rs"]
mod messages;
/// Metadata that a guest reads on its network card.
#[path = "boot/metadata.rs"]
mod metadata;
/// Networks over TAP, with the kernel's help and without, and through passt.
#[path = "boot/net.rs"]
mod net;
/// Virtio over PCI.
#[path = "boot/pci.rs"]
mod pci;
/// Reboots in place with every device, as many as are asked for.
#[path = "boot/reboots.rs"]
mod reboots;
/// What armlet says to input that is no good.
#[path = "boot/refusals.rs"]
mod refusals;
/// The host that the tests run on, and what it offers.
#[path = "boot/rig.rs"]
mod rig;
/// Linux guests that are saved while they work, and go on in other processes.
#[path = "boot/saved.rs"]
mod saved;
/// Consoles, sockets between guest and host, folders of the host, balloons, persistent memory.
#[path = "boot/sharing.rs"]
mod sharing;
/// Guests that are saved, and go on elsewhere.
#[allow(dead_code, reason = "guests of x86_64 use the rest")]
#[path = "boot/snapshot.rs"]
mod snapshot;
/// What guests run: archives, kernels of a few instructions.
#[path = "boot/software.rs"]
mod software;
/// Machines that get the state of others.
#[path = "boot/state.rs"]
mod state;
/// Guests without an operating system: what they do, step by step, and their drivers.
#[allow(dead_code, reason = "some operations are of one architecture")]
#[path = "boot/steps.rs"]
mod steps;
/// Queues that are stopped while the host's kernel or another process works on them, and set up again.
#[path = "boot/stops.rs"]
mod stops;
/// A whole Debian system on a disk, from power-on to a login over ssh and a clean end.
#[path = "boot/system.rs"]
mod system;
/// What a host has beside armlet.
#[path = "boot/tools.rs"]
mod tools;
/// Whose turn it is to load the host.
#[path = "boot/turn.rs"]
mod turn;
/// Devices whose other end is gone, full, or was never there.
#[path = "boot/unplugged.rs"]
mod unplugged;
/// The address width that KVM is asked for.
#[path = "boot/width.rs"]
mod width;
