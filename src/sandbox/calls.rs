//! The system calls that threads may make, by their role.

use super::requests::{self, Request};
use crate::kvm::{HostArch, KvmArch, OtherCalls};
use armlet_backends::kind::Need;
use armlet_system::seccomp::{LAST_CALL, Outcome, Place, Program, Spans};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The event loop, which also makes machines and starts the other threads: they are bound to what it
    /// may do, too.
    Machine,
    /// Running a vCPU, and answering its accesses.
    Vcpu,
    /// A busy device.
    Device,
    /// Writing the console's output.
    Console,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 4] = [Role::Machine, Role::Vcpu, Role::Device, Role::Console];

    /// What it is called in documents.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Machine => "event loop",
            Role::Vcpu => "vCPU",
            Role::Device => "device",
            Role::Console => "console",
        }
    }
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is forbidden, and ends armlet.
    Forbidden,
    /// It is allowed.
    Allowed,
    /// It is allowed with some arguments.
    Checked,
    /// It fails, as if the kernel did not know it, and whoever makes it does without.
    Missing,
}

/// Above the numbers of all calls.
pub const NUMBERS: usize = 512;
/// The most lists of requests of a role, and the most requests.
const MOST_LISTS: usize = 20;
const MOST_REQUESTS: usize = 96;

/// What every thread does: memory, locks, time, its descriptors, what is written to the console and as
/// messages, its end, and what handlers of signals do.
const EVERY: Calls = Calls::of(&[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpgid,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendto,
    libc::SYS_setitimer,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
]);

/// What every thread does with some arguments only.
const CHECKED: Calls = Calls::of(&[
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_prctl,
    libc::SYS_tgkill,
]);

/// What vCPUs' threads do besides, for devices that are light enough for them, and for a driver that starts
/// or stops another.
const VCPU: Calls = Calls::of(&[
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_getrandom,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
]);

/// What the threads of devices do besides.
const DEVICE: Calls = Calls::of(&[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_readv,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setscheduler,
    libc::SYS_timerfd_settime,
]);

/// What is done to images.
const STORAGE: Calls = Calls::of(&[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
]);

/// What is done where a page of a file that is guest memory is missing.
const PAGES: Calls = Calls::of(&[libc::SYS_lseek, libc::SYS_pread64]);

/// What the event loop does: it makes machines and threads, reads kernels, waits, and sees the processes end
/// that were forked before.
const MACHINE: Calls = Calls::of(&[
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_pwait,
    libc::SYS_fstatfs,
    libc::SYS_lseek,
    libc::SYS_pidfd_open,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_seccomp,
    libc::SYS_statx,
    libc::SYS_timerfd_create,
    libc::SYS_wait4,
]);

/// What glibc and the standard library on it do besides.
pub(super) const GLIBC: Calls = Calls::of(&[
    libc::SYS_membarrier,
    libc::SYS_prlimit64,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
]);

/// What is done to connected sockets.
const CONNECTED: Calls = Calls::of(&[
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
]);

/// What is done to others besides.
const SOCKETS: Calls = Calls::of(&[
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
]);

/// How the broker is asked: each request has a socket of its own, and a program another to speak on.
const BROKER: Calls = Calls::of(&[
    libc::SYS_pipe2,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
]);

/// The ring is made before; another cannot be.
const RING: Calls = Calls::of(&[libc::SYS_io_uring_enter]);

/// What is done to the files of a snapshot, when it is made and when it is restored first.
const SNAPSHOTS: Calls = DEVICE
    .and(STORAGE)
    .and(BROKER)
    .and(Calls::of(&[libc::SYS_copy_file_range]));

/// What is asked of another image before it is a disk's.
const IMAGES: Calls = Calls::of(&[libc::SYS_fstatfs, libc::SYS_statx]);

/// The flags of a thread that is started, as musl and glibc have them: CLONE_VM, FS, FILES, SIGHAND,
/// THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID; and CLONE_DETACHED, which the kernel ignores.
const THREAD: u32 = 0x3d_0f00;
const DETACHED: u32 = 0x40_0000;

/// Commands of fcntl: F_DUPFD, and those of flags after it, up to F_SETFL. F_SETOWN and F_SETSIG, which
/// signal others, are above them, and so are locks: images are locked before, but for those that come later.
const LAST_OF_FLAGS: u32 = libc::F_SETFL as u32;

/// A set of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Calls([u64; NUMBERS / 64]);

impl Calls {
    /// No call.
    const NONE: Calls = Calls([0; NUMBERS / 64]);

    /// These calls.
    const fn of(calls: &[i64]) -> Calls {
        let mut bits = [0; NUMBERS / 64];
        let mut at = 0;
        while at < calls.len() {
            let call = calls[at] as usize;
            bits[call / 64] |= 1 << (call % 64);
            at += 1;
        }
        Calls(bits)
    }

    /// Both sets.
    const fn and(mut self, other: Calls) -> Calls {
        let mut at = 0;
        while at < self.0.len() {
            self.0[at] |= other.0[at];
            at += 1;
        }
        self
    }

    /// Whether a call is among them.
    pub(super) const fn has(&self, call: i64) -> bool {
        0 <= call && call < NUMBERS as i64 && self.0[call as usize / 64] >> (call % 64) & 1 == 1
    }
}

/// What a role may call, and the requests that it may make.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    allowed: Calls,
    checked: Calls,
    missing: Calls,
    requests: [&'static [Request]; MOST_LISTS],
    lists: usize,
    /// Whether files are locked.
    locks: bool,
}

impl Rules {
    /// The rules of a role in a machine with these needs, on an architecture.
    #[must_use]
    pub const fn of(role: Role, needs: &[Need], other: &OtherCalls) -> Rules {
        const MACHINES: Calls = VCPU.and(MACHINE);
        const STARTS: Calls = CHECKED.and(Calls::of(&[libc::SYS_clone]));
        // Its flags are in memory; the C library does without.
        const MISSING: Calls = Calls::of(&[libc::SYS_clone3]);
        const LIBRARY: Calls = match cfg!(target_env = "gnu") {
            true => GLIBC,
            false => Calls::NONE,
        };
        let (own, checked, missing) = match role {
            Role::Machine => (MACHINES.and(LIBRARY), STARTS, MISSING),
            Role::Vcpu => (VCPU, CHECKED, Calls::NONE),
            Role::Device | Role::Console => (Calls::NONE, CHECKED, Calls::NONE),
        };
        let mut rules = Rules {
            allowed: EVERY.and(Calls::of(other.native.calls)).and(own),
            checked,
            missing,
            requests: [&[]; MOST_LISTS],
            lists: 0,
            locks: false,
        };
        rules.add_requests(requests::TERMINAL);
        if matches!(role, Role::Machine | Role::Vcpu) {
            rules.add_requests(requests::VCPU);
            rules.add_requests(other.vcpu);
        }
        if matches!(role, Role::Machine) {
            rules.add_requests(requests::MACHINE);
            rules.add_requests(other.machine);
        }
        let mut at = 0;
        while at < needs.len() && !matches!(role, Role::Console) {
            rules.meet(needs[at], role, other);
            at += 1;
        }
        rules
    }

    const fn add_requests(&mut self, requests: &'static [Request]) {
        if requests.is_empty() {
            return;
        }
        self.requests[self.lists] = requests;
        self.lists += 1;
    }

    const fn meet(&mut self, need: Need, role: Role, other: &OtherCalls) {
        let is_vcpu = matches!(role, Role::Vcpu);
        const UNCONNECTED: Calls = CONNECTED.and(SOCKETS);
        let (calls, requests) = match need {
            Need::Thread | Need::Storage | Need::Discards | Need::Ring | Need::Images
                if is_vcpu =>
            {
                return;
            }
            Need::Thread => (DEVICE, &[] as &[_]),
            Need::Storage => (STORAGE, &[] as &[_]),
            Need::Pages => (PAGES, &[] as &[_]),
            Need::Sockets if is_vcpu => (CONNECTED, requests::SOCKETS),
            Need::Sockets => (UNCONNECTED, requests::SOCKETS),
            Need::Broker => (BROKER, &[] as &[_]),
            Need::Tap => (Calls::NONE, requests::TAP),
            Need::Vhost => (Calls::NONE, requests::VHOST),
            Need::Discards => (Calls::NONE, requests::BLOCK),
            // The event loop may have them anyway, and others change nothing.
            Need::Pci if !is_vcpu => return,
            Need::Pci => (Calls::NONE, requests::PCI),
            Need::Ring => (RING, &[] as &[_]),
            Need::Images => (IMAGES, &[] as &[_]),
            // Those who ask for it have vCPUs' threads do it.
            Need::Debugger if matches!(role, Role::Device) => return,
            Need::Debugger => (Calls::NONE, other.debug),
            // vCPUs' threads read their registers, and one of its own writes the files.
            Need::Snapshots if is_vcpu => (Calls::NONE, other.save),
            Need::Snapshots if matches!(role, Role::Device) => (SNAPSHOTS, &[] as &[_]),
            Need::Snapshots => {
                self.add_requests(other.restore);
                (SNAPSHOTS, other.save)
            }
            Need::Restoring if !matches!(role, Role::Machine) => return,
            Need::Restoring => {
                self.add_requests(other.restore);
                (Calls::NONE, other.save)
            }
            Need::Recording if is_vcpu => return,
            Need::Recording => (SNAPSHOTS, &[] as &[_]),
        };
        self.locks |= matches!(need, Need::Images);
        self.allowed = self.allowed.and(calls);
        self.add_requests(requests);
    }

    /// What becomes of a call.
    #[must_use]
    pub const fn answer(&self, call: i64) -> Answer {
        match call {
            _ if self.checked.has(call) => Answer::Checked,
            _ if self.allowed.has(call) => Answer::Allowed,
            _ if self.missing.has(call) => Answer::Missing,
            _ => Answer::Forbidden,
        }
    }

    /// The requests of ioctl that may be made.
    pub fn requests(&self) -> impl Iterator<Item = &'static Request> {
        self.requests.into_iter().flatten()
    }

    /// The numbers of the calls that may be made.
    pub fn calls(&self) -> impl Iterator<Item = i64> {
        let all = self.allowed.and(self.checked);
        (0..NUMBERS as i64).filter(move |call| all.has(*call))
    }

    /// Writes the filter of the thread that is bound to these rules first. This process is `process`.
    pub(super) const fn write(
        &self,
        forbidden: Outcome,
        other: &OtherCalls,
        process: u32,
    ) -> Program {
        let mut program = Program::new(forbidden);
        let mut spans = Spans::new(program.forbidden);
        let mut call = 0;
        while call < NUMBERS as i64 {
            let to = match self.answer(call) {
                Answer::Checked if call == libc::SYS_ioctl => {
                    Some(self.check_request(&mut program, other))
                }
                Answer::Checked => Some(check(&mut program, call, process, self.locks)),
                Answer::Allowed => Some(program.allowed),
                Answer::Missing => Some(program.end(Outcome::Fail(libc::ENOSYS))),
                Answer::Forbidden => None,
            };
            if let Some(to) = to {
                spans.add(call as u32, to);
            }
            call += 1;
        }
        spans.finish();
        let tree = program.search(&spans, LAST_CALL);
        let tree = program.number(tree);
        program.only(other.native.architecture, tree);
        program
    }

    /// Writes the filter of a thread that is bound to `outer` already, and so to this process and
    /// architecture: it decides only what those leave open.
    pub(super) const fn write_within(&self, outer: &Rules, forbidden: Outcome) -> Program {
        let mut program = Program::new(forbidden);
        let mut spans = Spans::new(program.forbidden);
        let mut call = 0;
        while call < NUMBERS as i64 {
            if !matches!(outer.answer(call), Answer::Forbidden) {
                let to = match self.answer(call) {
                    Answer::Checked if call == libc::SYS_ioctl => {
                        self.check_request_within(&mut program, outer)
                    }
                    Answer::Allowed | Answer::Checked => program.allowed,
                    Answer::Forbidden | Answer::Missing => program.forbidden,
                };
                spans.add_next(call as u32, to);
            }
            call += 1;
        }
        let tree = program.search(&spans, LAST_CALL);
        program.number(tree);
        program
    }

    /// Writes the check of a request. The kernel refuses those that it does not know.
    const fn check_request(&self, program: &mut Program, other: &OtherCalls) -> Place {
        let (all, count) = self.sorted_requests(!self.may_request(requests::RUN));
        let mut spans = Spans::new(program.forbidden);
        let mut at = 0;
        while at < count {
            match other.are_unknown(spans.next(), all[at] as u32) {
                true => spans.add_next(all[at] as u32, program.allowed),
                false => spans.add(all[at] as u32, program.allowed),
            }
            at += 1;
        }
        spans.finish();
        self.search_request(program, &spans)
    }

    /// The same of one that `outer` leaves open.
    const fn check_request_within(&self, program: &mut Program, outer: &Rules) -> Place {
        let (all, count) = outer.sorted_requests(!self.may_request(requests::RUN));
        let mut spans = Spans::new(program.forbidden);
        let mut at = 0;
        while at < count {
            let to = match self.may_request(all[at]) {
                true => program.allowed,
                false => program.forbidden,
            };
            spans.add_next(all[at] as u32, to);
            at += 1;
        }
        self.search_request(program, &spans)
    }

    const fn search_request(&self, program: &mut Program, spans: &Spans) -> Place {
        let mut place = program.search(spans, 1 << 16);
        if self.may_request(requests::RUN) {
            place = program.if_equal(requests::RUN as u32, program.allowed, place);
        }
        let place = program.mask(0xffff, place);
        program.argument(1, place)
    }

    /// All requests in order, each once, and how many they are; with or without that which runs a vCPU.
    const fn sorted_requests(&self, with_run: bool) -> ([u16; MOST_REQUESTS], usize) {
        let (mut all, mut count, mut list) = ([0; MOST_REQUESTS], 0, 0);
        while list < self.lists {
            let mut at = 0;
            while at < self.requests[list].len() {
                let request = self.requests[list][at].1;
                let mut place = count;
                while place > 0 && all[place - 1] > request {
                    place -= 1;
                }
                let is_there = place > 0 && all[place - 1] == request;
                if (with_run || request != requests::RUN) && !is_there {
                    let mut moved = count;
                    while moved > place {
                        all[moved] = all[moved - 1];
                        moved -= 1;
                    }
                    all[place] = request;
                    count += 1;
                }
                at += 1;
            }
            list += 1;
        }
        (all, count)
    }

    const fn may_request(&self, request: u16) -> bool {
        let mut list = 0;
        while list < self.lists {
            let mut at = 0;
            while at < self.requests[list].len() {
                if self.requests[list][at].1 == request {
                    return true;
                }
                at += 1;
            }
            list += 1;
        }
        false
    }
}

/// Writes the check of a call's arguments.
const fn check(program: &mut Program, call: i64, process: u32, locks: bool) -> Place {
    let (allowed, forbidden) = (program.allowed, program.forbidden);
    let place = match call {
        libc::SYS_mmap | libc::SYS_mprotect => {
            program.if_any_of(libc::PROT_EXEC as u32, forbidden, allowed)
        }
        libc::SYS_clone => {
            let place = program.if_equal(THREAD, allowed, forbidden);
            program.mask(!DETACHED, place)
        }
        libc::SYS_prctl => {
            let place = program.if_equal(libc::PR_GET_NAME as u32, allowed, forbidden);
            program.if_equal(libc::PR_SET_NAME as u32, allowed, place)
        }
        libc::SYS_tgkill => program.if_equal(process, allowed, forbidden),
        libc::SYS_fcntl => {
            let duplicate = libc::F_DUPFD_CLOEXEC as u32;
            let place = program.if_equal(duplicate, allowed, forbidden);
            let place = match locks {
                true => {
                    let place = program.if_equal(libc::F_OFD_SETLK as u32, allowed, place);
                    program.if_equal(libc::F_OFD_GETLK as u32, allowed, place)
                }
                false => place,
            };
            program.if_above(LAST_OF_FLAGS, place, allowed)
        }
        _ => return forbidden,
    };
    match argument_of(call) {
        Some(index) => program.argument(index as u32, place),
        None => forbidden,
    }
}

/// Which argument of a call it is that is checked, from 0; `None` of one that is allowed or forbidden as
/// it is.
pub(super) const fn argument_of(call: i64) -> Option<usize> {
    match call {
        libc::SYS_mmap | libc::SYS_mprotect => Some(2),
        libc::SYS_ioctl | libc::SYS_fcntl => Some(1),
        libc::SYS_clone | libc::SYS_prctl | libc::SYS_tgkill => Some(0),
        _ => None,
    }
}

pub(super) const OTHER: OtherCalls = <HostArch as KvmArch>::OTHER_CALLS;

/// The name of a request of ioctl, if some role may make it.
pub(super) fn request_name(request: u64) -> Option<&'static str> {
    let others = [OTHER.vcpu, OTHER.machine, OTHER.save, OTHER.restore].into_iter();
    let mut all = requests::ALL.iter().copied().chain(others).flatten();
    all.find(|(_, own)| u64::from(*own) == request & 0xffff)
        .map(|(name, _)| *name)
}
