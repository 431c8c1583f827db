//! The command line: argh structs, and what argh lacks (`--option=value`, one-line errors).

mod api;
mod devices;
mod habits;
mod parse;
mod snapshot;
mod unknown;

pub use api::ApiArgs;
pub use devices::DeviceArgs;
pub use parse::{Parsed, parse};
pub use snapshot::SnapshotArgs;

use argh::FromArgs;

/// A small virtual machine monitor for ARM64 Linux hosts with KVM.
#[derive(FromArgs, Debug)]
#[argh(
    example = "Boot a distribution kernel to a shell on the serial console:
  {command_name} run --kernel vmlinuz --initrd initrd.img --memory 1G

See the machine before it exists, on any computer:
  {command_name} plan --cpus 4 --memory 14G",
    note = "Run '{command_name} COMMAND --help' for a command's options.",
    error_code(0, "The guest powered off, or the command did its work."),
    error_code(1, "Armlet failed, for instance at writing a file."),
    error_code(2, "The command line, a board file or an input file is wrong."),
    error_code(3, "This host cannot run the machine."),
    error_code(4, "The guest crashed, or did what KVM cannot go on from."),
    error_code(5, "The guest asked for a reset, with --on-reset exit."),
    error_code(
        6,
        "The guest was stopped before it powered off (Ctrl-A x, SIGINT, second SIGTERM, --stop-timeout)."
    )
)]
pub struct Cli {
    /// print the version and leave
    #[argh(switch)]
    pub version: bool,
    #[argh(subcommand)]
    /// what to do
    pub command: Option<Command>,
}

/// What to do.
#[derive(FromArgs, Debug)]
#[argh(subcommand)]
pub enum Command {
    /// Run a guest.
    Run(RunArgs),
    /// Show a machine without running it.
    Plan(PlanArgs),
    /// Say what this host offers.
    Probe(ProbeArgs),
    /// List the boards.
    Boards(BoardsArgs),
    /// Confine a program before it starts.
    Jail(JailArgs),
    /// Control a running guest.
    Ctl(CtlArgs),
    /// Serve Firecracker's API.
    Api(ApiArgs),
    /// Look into snapshots, and merge them.
    Snapshot(SnapshotArgs),
}

/// The options that describe a machine, shared by `run` and `plan`.
#[derive(Clone, Default)]
pub struct MachineArgs {
    /// `--kernel`.
    pub kernel: Option<String>,
    /// `--initrd`.
    pub initrd: Option<String>,
    /// `--cmdline`.
    pub cmdline: Option<String>,
    /// `--cpus`.
    pub cpus: Option<String>,
    /// `--memory`.
    pub memory: Option<String>,
    /// `--board`.
    pub board: Option<String>,
    /// `--ipa-bits`.
    pub ipa_bits: Option<String>,
    /// `--gic`.
    pub gic: Option<String>,
    /// `--pv`.
    pub pv: Option<String>,
    /// `--exits`.
    pub exits: Option<String>,
    /// `--pmu`.
    pub pmu: Option<String>,
    /// `--sve`.
    pub sve: Option<String>,
    /// `--pauth`.
    pub pauth: Option<String>,
    /// `--vmgenid`.
    pub vmgenid: Option<String>,
    /// `--transport`.
    pub transport: Option<String>,
    /// `--pin`.
    pub pin: Option<String>,
    /// `--pin-io`.
    pub pin_io: Option<String>,
    /// `--hugepages`.
    pub hugepages: Option<String>,
    /// `--prefault`.
    pub prefault: bool,
    /// `--mergeable`.
    pub mergeable: bool,
    /// `--mlock`.
    pub mlock: bool,
    /// Those of devices, each with its kind.
    pub devices: DeviceArgs,
    /// `--deterministic`.
    pub deterministic: bool,
    /// `--verbose`.
    pub verbose: bool,
}

/// The options of `run` and `plan` that take no value.
const SWITCHES: &[&str] = &[
    "--prefault",
    "--mergeable",
    "--mlock",
    "--deterministic",
    "-v",
    "--verbose",
    "--stats",
    "--paused",
    "--json",
    "--dts",
];

/// Whether an option of a command takes no value. `run --sandbox` takes one, `plan --sandbox` does not.
fn is_switch(command: &str, option: &str) -> bool {
    SWITCHES.contains(&option) || (command == "plan" && option == "--sandbox")
}

/// Declares a command's struct with the machine's options in front of its own, so that `run` and
/// `plan` cannot differ in them.
macro_rules! machine_command {
    ($(#[$outer:meta])* $name:ident { $($own:tt)* }) => {
        $(#[$outer])*
        // The brackets of the help's syntax are no links.
        #[allow(rustdoc::broken_intra_doc_links)]
        pub struct $name {
            /// kernel to boot: Image, raw or compressed (gzip, zstd, lz4, xz), or EFI zboot; for
            /// x86_64 bzImage or ELF vmlinux
            #[argh(option, short = 'k', arg_name = "PATH")]
            pub kernel: Option<String>,
            /// initial RAM disk
            #[argh(option, short = 'i', arg_name = "PATH")]
            pub initrd: Option<String>,
            /// kernel command line (default: the board's)
            #[argh(option, short = 'p', arg_name = "STR")]
            pub cmdline: Option<String>,
            /// number of vCPUs (default: the board's)
            #[argh(option, short = 'c', arg_name = "N")]
            pub cpus: Option<String>,
            /// guest memory, like 512M or 4G (default: the board's)
            #[argh(option, short = 'm', arg_name = "SIZE")]
            pub memory: Option<String>,
            /// board: auto (the one that this host is, else
            /// virt, or pc to run on an x86_64 host; the default), a built-in name ('armlet
            /// boards') or the path of a TOML file
            #[argh(option, short = 'b', arg_name = "auto|NAME|PATH")]
            pub board: Option<String>,
            /// guest-physical address bits: fit (as few as the machine needs, the default), max
            /// (as many as the host has) or a number from 32 to 52
            #[argh(option, arg_name = "fit|max|N")]
            pub ipa_bits: Option<String>,
            /// interrupt controller version (default: auto, GICv3 where the host has it)
            #[argh(option, arg_name = "auto|2|3")]
            pub gic: Option<String>,
            /// what KVM offers beside a CPU, each on, off or auto (as the host has it, the
            /// default): steal-time; x86_64 also: clock, async-pf, eoi, unhalt (spinlocks),
            /// tlb-flush, send-ipi, poll-control, sched-yield, tsc-deadline; realtime (vCPUs that
            /// are never descheduled) is off by default
            #[argh(option, arg_name = "NAME=on|off|auto,..")]
            pub pv: Option<String>,
            /// x86_64: the instructions at which a vCPU leaves the guest, each on (the default) or
            /// off, for vCPUs with a CPU of their own: mwait, hlt, pause, cstate
            #[argh(option, arg_name = "NAME=on|off,..")]
            pub exits: Option<String>,
            /// aarch64: performance counters for the guest: on, off or auto (as the host has them,
            /// the default)
            #[argh(option, arg_name = "auto|on|off")]
            pub pmu: Option<String>,
            /// aarch64: scalable vectors (SVE) for the guest: on, off or auto (as the host has
            /// them, the default)
            #[argh(option, arg_name = "auto|on|off")]
            pub sve: Option<String>,
            /// aarch64: pointer authentication for the guest: on, off or auto (as the host has it,
            /// the default)
            #[argh(option, arg_name = "auto|on|off")]
            pub pauth: Option<String>,
            /// VMGenID and VMClock, by which a guest learns that it goes on from a snapshot: on, off
            /// or auto (for guests that clients control, the default)
            #[argh(option, arg_name = "auto|on|off")]
            pub vmgenid: Option<String>,
            /// what virtio devices are connected by: mmio, pci or auto (mmio, the default); one device's own
            /// is the part transport=mmio|pci of its option
            #[argh(option, arg_name = "auto|mmio|pci")]
            pub transport: Option<String>,
            /// the host's CPUs for the vCPUs: auto (those of one kind, where there are several; the
            /// default), none, or a list with a CPU or range for each vCPU (4,5,6-7), or one for all
            #[argh(option, arg_name = "auto|none|LIST")]
            pub pin: Option<String>,
            /// the host's CPUs for all other threads: 0,2-3 (default: any)
            #[argh(option, arg_name = "LIST")]
            pub pin_io: Option<String>,
            /// the host's pages for guest memory: thp (transparent huge pages, the default), none
            /// (small ones), or a size (only pages of the pool in hugetlbfs: 2M, 32M, 1G)
            #[argh(option, arg_name = "thp|none|SIZE")]
            pub hugepages: Option<String>,
            /// take all guest memory from the host before the guest starts
            #[argh(switch)]
            pub prefault: bool,
            /// let the host keep one copy of pages that are the same in several guests (KSM)
            #[argh(switch)]
            pub mergeable: bool,
            /// never swap guest memory out
            #[argh(switch)]
            pub mlock: bool,
            /// leave the random seeds out of the device tree, so that it is the same each time
            #[argh(switch)]
            pub deterministic: bool,
            /// say more about what is done
            #[argh(switch, short = 'v')]
            pub verbose: bool,
            $($own)*
        }

        impl $name {
            /// Returns the options that describe the machine, with those of `devices`.
            #[must_use]
            pub fn machine(&self, devices: &DeviceArgs) -> MachineArgs {
                MachineArgs {
                    kernel: self.kernel.clone(),
                    initrd: self.initrd.clone(),
                    cmdline: self.cmdline.clone(),
                    cpus: self.cpus.clone(),
                    memory: self.memory.clone(),
                    board: self.board.clone(),
                    ipa_bits: self.ipa_bits.clone(),
                    gic: self.gic.clone(),
                    pv: self.pv.clone(),
                    exits: self.exits.clone(),
                    pmu: self.pmu.clone(),
                    sve: self.sve.clone(),
                    pauth: self.pauth.clone(),
                    vmgenid: self.vmgenid.clone(),
                    transport: self.transport.clone(),
                    pin: self.pin.clone(),
                    pin_io: self.pin_io.clone(),
                    hugepages: self.hugepages.clone(),
                    prefault: self.prefault,
                    mergeable: self.mergeable,
                    mlock: self.mlock,
                    devices: devices.clone(),
                    deterministic: self.deterministic,
                    verbose: self.verbose,
                }
            }
        }
    };
}

machine_command! {
    /// Run a guest until it powers off. Its serial console is this terminal: Ctrl-A x leaves,
    /// Ctrl-A h helps. SIGTERM presses the guest's power key until it powers off; a second one stops at
    /// once.
    #[derive(FromArgs, Debug)]
    #[argh(
        subcommand,
        name = "run",
        example = "A shell from a distribution's kernel and initrd:
  {command_name} --kernel vmlinuz --initrd initrd.img --memory 1G

Four vCPUs, options as in other tools:
  {command_name} -k Image -i initrd -c 4 -m 2G -p 'console=ttyAMA0 quiet'

A system on a disk, with network; ssh -p 2222 localhost reaches it:
  {command_name} -k vmlinuz -i initrd.img -d root.img -n user,hostfwd=tcp:2222-:22

Go on with a guest where 'armlet ctl SOCKET snapshot DIR' saved it:
  {command_name} --restore DIR

In a script: stop at the guest's reboot, keep the device tree:
  {command_name} --kernel Image --on-reset exit --dump-dtb guest.dtb < /dev/null"
    )]
    RunArgs {
        /// what to do when the guest asks for a reset: restart (default) or exit, with status 5
        #[argh(option, arg_name = "restart|exit")]
        pub on_reset: Option<String>,
        /// what to do when the guest's kernel panics, as its console says, or turns its last CPU
        /// off (PSCI CPU_OFF): report (default) and let it go on, or exit, with status 4
        #[argh(option, arg_name = "report|exit")]
        pub on_panic: Option<String>,
        /// seconds that the guest may take to power off after SIGTERM, before it is stopped with
        /// status 6 (default: 90), or none
        #[argh(option, arg_name = "SECONDS|none")]
        pub stop_timeout: Option<String>,
        /// how far armlet confines itself before the guest runs: on (default), strict to refuse a
        /// host that lacks a part of it, log to have the kernel's log tell of system calls that are
        /// not allowed, or off
        #[argh(option, arg_name = "on|strict|log|off")]
        pub sandbox: Option<String>,
        /// count exits by reason, and tell them with KVM's own counters at the end and on SIGUSR1
        #[argh(switch)]
        pub stats: bool,
        /// let 'armlet ctl' control the guest by a Unix socket at this path, for this user alone
        #[argh(option, arg_name = "PATH")]
        pub control: Option<String>,
        /// go on with the guest of this snapshot, on the machine that it had; files and devices that
        /// are named here take the place of those of their kind
        #[argh(option, arg_name = "DIR")]
        pub restore: Option<String>,
        /// where a restored guest's memory comes from: private (the snapshot's file is mapped, and
        /// read as the guest needs it; the default; shared is the same), copy (read as a whole before it goes on) or
        /// uffd (a handler of page faults that listens at a socket, as those made for Firecracker)
        #[argh(option, arg_name = "private|shared|copy|uffd=SOCKET")]
        pub memory_from: Option<String>,
        /// whether the pages that a restored guest needs first are brought before it asks: on (the
        /// default; the first restore records them beside the snapshot) or off
        #[argh(option, arg_name = "on|off")]
        pub prefetch: Option<String>,
        /// leave a restored guest paused, until 'armlet ctl' resumes it
        #[argh(switch)]
        pub paused: bool,
        /// write what vCPUs and devices do as OpenMetrics text: to this file every 10 seconds, or
        /// for whoever connects to the socket
        #[argh(option, arg_name = "PATH|unix:PATH")]
        pub metrics: Option<String>,
        /// let gdb debug the guest at this socket, for this user or this host alone; the guest waits for it
        /// before its first instruction, unless ,nowait
        #[argh(option, arg_name = "unix:PATH|tcp:LOOPBACK:PORT")]
        pub gdb: Option<String>,
        /// write the device tree that the guest gets to this file, which only its owner may read:
        /// it holds the seeds of the guest's random numbers
        #[argh(option, arg_name = "PATH")]
        pub dump_dtb: Option<String>,
    }
}

machine_command! {
    /// Show the machine that 'run' would make: address map, address bits and why, interrupts, and
    /// where kernel, initrd and device tree go. Works on any computer, without KVM.
    #[derive(FromArgs, Debug)]
    #[argh(
        subcommand,
        name = "plan",
        example = "What would this machine look like?
  {command_name} --cpus 4 --memory 14G

What does KVM on this host make of it?
  {command_name} --kernel vmlinuz --memory 4G --host this

What would a Raspberry Pi 5 make of it, with its kernel of 4K pages?
  {command_name} --host rpi5 --page-size 4K --memory 6G

The device tree as source:
  {command_name} --dts

Would the guest of a snapshot go on on a Raspberry Pi 5?
  {command_name} --restore DIR --host rpi5

What may armlet still do with these devices once the guest runs?
  {command_name} --disk disk.img --net user --sandbox"
    )]
    PlanArgs {
        /// say whether and how the guest of this snapshot goes on there, in place of a new machine
        #[argh(option, arg_name = "DIR")]
        pub restore: Option<String>,
        /// the host to plan for: a board's assumptions (default: those of --board), or 'this'
        #[argh(option, arg_name = "BOARD|this")]
        pub host: Option<String>,
        /// page size of that host's kernel: 4K, 16K or 64K (default: the board's)
        #[argh(option, arg_name = "SIZE")]
        pub page_size: Option<String>,
        /// print JSON
        #[argh(switch)]
        pub json: bool,
        /// write the device tree to this file
        #[argh(option, arg_name = "PATH")]
        pub dtb: Option<String>,
        /// print the device tree as source instead of the table
        #[argh(switch)]
        pub dts: bool,
        /// print what 'run' would still be allowed to do once the guest runs, instead of the table
        #[argh(switch)]
        pub sandbox: bool,
    }
}

/// Say what this host offers to guests, and what would stop or slow them, with the fix.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "probe",
    example = "Before the first guest:
  {command_name}

For a program:
  {command_name} --json",
    note = "The exit status is 3 if this host cannot run guests."
)]
pub struct ProbeArgs {
    /// print JSON
    #[argh(switch)]
    pub json: bool,
}

/// List the boards that are built in.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "boards",
    example = "The names that --board takes:
  {command_name}

A board with the file and line that each value comes from, to start one's own from:
  {command_name} --show virt > my.toml"
)]
pub struct BoardsArgs {
    /// print JSON
    #[argh(switch)]
    pub json: bool,
    /// print what guests each board's host holds: address bits, stage-2 levels, vCPUs
    #[argh(switch)]
    pub table: bool,
    /// print a board as one file, with the place that each value comes from
    #[argh(option, arg_name = "NAME|PATH")]
    pub show: Option<String>,
}

/// Start a program, armlet or another VMM, in a jail: a folder as its root, devices in it, a user,
/// and what else was asked for. For root, with the command line of Firecracker's jailer; it is the same
/// when this program is started under the name 'jailer'.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "jail",
    example = "A guest as user 123 and group 100, whose files are in the jail already:
  {command_name} --id web --uid 123 --gid 100 -- run -k /Image -i /initrd -d /root.img

In the background, in a network namespace, with at most 2 GiB of memory:
  {command_name} --id web --uid 123 --gid 100 --daemonize --netns /run/netns/web \\
    --cgroup-version 2 --cgroup memory.max=2G -- run -k /Image -n tap=tap0",
    note = "The jail is the folder DIR/PROGRAM/ID/root, where DIR is that of --chroot-base-dir and PROGRAM the name of the program; remove it when the program has ended. The file PROGRAM.pid in it has the program's process ID. Files that the program needs are put there first."
)]
pub struct JailArgs {
    /// the jail's name: 1 to 64 letters, digits and '-'; needed
    #[argh(option, arg_name = "ID")]
    pub id: Option<String>,
    /// the user that the program runs as, a number; needed
    #[argh(option, arg_name = "N")]
    pub uid: Option<String>,
    /// the group that the program runs as, a number; needed
    #[argh(option, arg_name = "N")]
    pub gid: Option<String>,
    /// the program, linked statically, of which the jail gets a copy (default: armlet)
    #[argh(option, arg_name = "PATH")]
    pub exec_file: Option<String>,
    /// the folder of jails (default: /srv/jailer)
    #[argh(option, arg_name = "DIR", default = "String::from(\"/srv/jailer\")")]
    pub chroot_base_dir: String,
    /// a value of a control group, such as pids.max=64; may be repeated
    #[argh(option, arg_name = "FILE=VALUE")]
    pub cgroup: Vec<String>,
    /// version of cgroups (default: 1)
    #[argh(option, arg_name = "1|2", default = "String::from(\"1\")")]
    pub cgroup_version: String,
    /// the control group in which the jail's one, ID, is made (default: the name of the program)
    #[argh(option, arg_name = "PATH")]
    pub parent_cgroup: Option<String>,
    /// the file of a network namespace for the program, such as /run/netns/NAME
    #[argh(option, arg_name = "PATH")]
    pub netns: Option<String>,
    /// run in the background, without a terminal, with /dev/null as standard input and output
    #[argh(switch)]
    pub daemonize: bool,
    /// make the program the first process of a PID namespace
    #[argh(switch)]
    pub new_pid_ns: bool,
    /// a limit: fsize=BYTES for the files that the program writes, no-file=N for its
    /// descriptors (default: no-file=2048); may be repeated
    #[argh(option, arg_name = "NAME=N")]
    pub resource_limit: Vec<String>,
    /// print the version and leave
    #[argh(switch)]
    pub version: bool,
    /// the program's arguments, after --
    #[argh(positional, greedy)]
    pub arguments: Vec<String>,
}

/// Control a running guest: status, pause, resume, power-key, reset, stop, stats, balloon SIZE,
/// disk resize NAME (to tell the guest the size that the image of a disk has now), disk change NAME
/// IMG (to give a disk another image), or snapshot DIR (to save the guest in a folder, from which
/// 'armlet run --restore' goes on).
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "ctl",
    example = "A guest that can be controlled:
  armlet run --kernel Image --control guest.sock

From another terminal:
  {command_name} guest.sock status
  {command_name} guest.sock balloon 256M

A disk that has grown:
  truncate -s 8G disk.img && {command_name} guest.sock disk resize disk0

Save the guest, then what changed since, and put both together:
  {command_name} guest.sock snapshot whole
  {command_name} guest.sock snapshot changes --diff
  armlet snapshot merge whole changes",
    note = "The exit status is 1 if the guest refused, or nobody listens at the path."
)]
pub struct CtlArgs {
    /// print JSON
    #[argh(switch)]
    pub json: bool,
    /// with snapshot: save only what changed since the last one
    #[argh(switch)]
    pub diff: bool,
    /// the path that the guest has as --control
    #[argh(positional, arg_name = "PATH")]
    pub path: String,
    /// what is asked for
    #[argh(positional, arg_name = "REQUEST")]
    pub request: Vec<String>,
}
