//! The system calls that threads may make, by their role.

use super::filter::{MOST, Place, Program, Span};
use super::requests::{self, Request};
use super::sys::Instruction;
use crate::kvm::OtherCalls;
use armlet_backends::kind::Need;

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
/// Where numbers end that kernels have, by now, for a tree that is no deeper than it has to be.
const LAST: u32 = 470;
/// The most requests of a role.
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

/// The flags of a thread that is started, as musl and glibc have them: CLONE_VM, FS, FILES, SIGHAND,
/// THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID; and CLONE_DETACHED, which the kernel ignores.
const THREAD: u32 = 0x3d_0f00;
const DETACHED: u32 = 0x40_0000;

/// Commands of fcntl: F_DUPFD to F_SETLKW, then those of locks of open files, then those from
/// F_DUPFD_CLOEXEC to F_GET_SEALS. F_SETOWN and F_SETSIG, which signal others, are not among them.
const COMMANDS: [(u32, u32); 3] = [(0, 7), (36, 38), (1030, 1034)];

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
    pub(super) fn has(&self, call: i64) -> bool {
        let word = usize::try_from(call / 64)
            .ok()
            .and_then(|at| self.0.get(at));
        word.is_some_and(|word| word >> (call % 64) & 1 == 1)
    }

    /// Their numbers.
    fn numbers(self) -> impl Iterator<Item = i64> {
        let words = (0_i64..).step_by(64).zip(self.0);
        words.flat_map(|(base, mut word)| {
            std::iter::from_fn(move || {
                let bit = word.trailing_zeros();
                word &= word.wrapping_sub(1);
                (bit < 64).then(|| base + i64::from(bit))
            })
        })
    }
}

/// What a role may call, and the requests that it may make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    allowed: Calls,
    checked: Calls,
    missing: Calls,
    requests: Vec<Request>,
}

impl Rules {
    /// The rules of a role in a machine with these needs, on an architecture.
    #[must_use]
    pub fn of(role: Role, needs: &[Need], other: &OtherCalls) -> Rules {
        const MACHINES: Calls = VCPU.and(MACHINE);
        const STARTS: Calls = CHECKED.and(Calls::of(&[libc::SYS_clone]));
        // Its flags are in memory; the C library does without.
        const MISSING: Calls = Calls::of(&[libc::SYS_clone3]);
        let glibc = if cfg!(target_env = "gnu") {
            GLIBC
        } else {
            Calls::NONE
        };
        let (own, checked, missing) = match role {
            Role::Machine => (MACHINES.and(glibc), STARTS, MISSING),
            Role::Vcpu => (VCPU, CHECKED, Calls::NONE),
            Role::Device | Role::Console => (Calls::NONE, CHECKED, Calls::NONE),
        };
        let mut rules = Rules {
            allowed: EVERY.and(Calls::of(other.calls)).and(own),
            checked,
            missing,
            requests: Vec::with_capacity(80),
        };
        rules.requests.extend_from_slice(requests::TERMINAL);
        if matches!(role, Role::Machine | Role::Vcpu) {
            rules.requests.extend_from_slice(requests::VCPU);
            rules.requests.extend_from_slice(other.vcpu);
        }
        if role == Role::Machine {
            rules.requests.extend_from_slice(requests::MACHINE);
            rules.requests.extend_from_slice(other.machine);
        }
        if role != Role::Console {
            needs.iter().for_each(|need| rules.meet(*need, role));
        }
        rules
    }

    fn meet(&mut self, need: Need, role: Role) {
        let is_vcpu = role == Role::Vcpu;
        let (calls, requests) = match need {
            Need::Thread | Need::Storage | Need::Discards | Need::Ring if is_vcpu => return,
            Need::Thread => (DEVICE, &[][..]),
            Need::Storage => (STORAGE, &[][..]),
            Need::Pages => (PAGES, &[][..]),
            Need::Sockets if is_vcpu => (CONNECTED, requests::SOCKETS),
            Need::Sockets => (CONNECTED.and(SOCKETS), requests::SOCKETS),
            Need::Broker => (BROKER, &[][..]),
            Need::Tap => (Calls::NONE, requests::TAP),
            Need::Vhost => (Calls::NONE, requests::VHOST),
            Need::Discards => (Calls::NONE, requests::BLOCK),
            Need::Ring => (RING, &[][..]),
        };
        self.allowed = self.allowed.and(calls);
        self.requests.extend_from_slice(requests);
    }

    /// What becomes of a call.
    #[must_use]
    pub fn answer(&self, call: i64) -> Answer {
        match call {
            _ if self.checked.has(call) => Answer::Checked,
            _ if self.allowed.has(call) => Answer::Allowed,
            _ if self.missing.has(call) => Answer::Missing,
            _ => Answer::Forbidden,
        }
    }

    /// The requests of ioctl that may be made.
    #[must_use]
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// The numbers of the calls that may be made.
    pub fn calls(&self) -> impl Iterator<Item = i64> {
        self.allowed.and(self.checked).numbers()
    }

    /// Writes the filter. With `others`, those are the rules that a filter of the calling thread
    /// enforces already: this one decides only what they leave open.
    pub(super) fn write<'a>(
        &self,
        program: &'a mut Program,
        other: &OtherCalls,
        process: u32,
        others: Option<&Rules>,
    ) -> Option<&'a [Instruction]> {
        let mut spans = Spans::new(program.forbidden);
        let outer = others.unwrap_or(self);
        let open = outer.allowed.and(outer.checked).and(outer.missing);
        for call in open.numbers() {
            let to = match self.answer(call) {
                Answer::Checked if call == libc::SYS_ioctl => self.check_request(program, others),
                Answer::Checked if others.is_some() => program.allowed,
                Answer::Checked => Rules::check(program, call, process),
                Answer::Allowed => program.allowed,
                Answer::Forbidden => program.forbidden,
                Answer::Missing => program.failed(libc::ENOSYS),
            };
            spans.add(call as u32, to, others.is_some());
        }
        let spans = spans.finish(others.is_some())?;
        let tree = program.search(spans.get(), LAST);
        program.finish(other.architecture, tree)
    }

    /// Writes the check of a request; of one that `others` forbid, whatever is shorter.
    fn check_request(&self, program: &mut Program, others: Option<&Rules>) -> Place {
        let (allowed, forbidden) = (program.allowed, program.forbidden);
        let mut all: [u16; MOST_REQUESTS] = [0; MOST_REQUESTS];
        let mut count = 0;
        for (_, request) in &others.unwrap_or(self).requests {
            if *request != requests::RUN && !all[..count].contains(request) && count < MOST_REQUESTS
            {
                all[count] = *request;
                count += 1;
            }
        }
        let all = &mut all[..count];
        all.sort_unstable();
        let mut spans = Spans::new(forbidden);
        for request in all {
            let to = match others {
                Some(_) if !self.may_request(*request) => forbidden,
                _ => allowed,
            };
            spans.add((*request).into(), to, others.is_some());
        }
        let Some(spans) = spans.finish(others.is_some()) else {
            return forbidden;
        };
        let mut place = program.search(spans.get(), 1 << 16);
        if self.may_request(requests::RUN) {
            place = program.if_equal(requests::RUN.into(), allowed, place);
        }
        let place = program.mask(0xffff, place);
        program.argument(1, place)
    }

    fn may_request(&self, request: u16) -> bool {
        self.requests.iter().any(|(_, own)| *own == request)
    }

    /// Writes the check of a call's arguments.
    fn check(program: &mut Program, call: i64, process: u32) -> Place {
        let (allowed, forbidden) = (program.allowed, program.forbidden);
        match call {
            libc::SYS_mmap | libc::SYS_mprotect => {
                let place = program.if_any_of(libc::PROT_EXEC as u32, forbidden, allowed);
                program.argument(2, place)
            }
            libc::SYS_clone => {
                let place = program.if_equal(THREAD, allowed, forbidden);
                let place = program.mask(!DETACHED, place);
                program.argument(0, place)
            }
            libc::SYS_prctl => {
                let place = program.if_equal(libc::PR_GET_NAME as u32, allowed, forbidden);
                let place = program.if_equal(libc::PR_SET_NAME as u32, allowed, place);
                program.argument(0, place)
            }
            libc::SYS_tgkill => {
                let place = program.if_equal(process, allowed, forbidden);
                program.argument(0, place)
            }
            libc::SYS_fcntl => {
                let place = COMMANDS
                    .iter()
                    .rev()
                    .fold(forbidden, |above, (first, last)| {
                        let place = program.if_above(*last, above, allowed);
                        match first {
                            0 => place,
                            _ => program.if_above(first - 1, place, forbidden),
                        }
                    });
                program.argument(1, place)
            }
            _ => forbidden,
        }
    }
}

/// Numbers in order, and where each leads.
struct Spans {
    spans: [Span; MOST],
    count: usize,
    /// Where numbers lead that are not added.
    others: Place,
    /// The number after the last.
    next: u32,
}

impl Spans {
    fn new(others: Place) -> Spans {
        let mut spans = [Span::default(); MOST];
        spans[0].to = others as u16;
        Spans {
            spans,
            count: 1,
            others,
            next: 0,
        }
    }

    /// Adds a number above all so far. Those between lead to `others`, or anywhere if they do not matter.
    fn add(&mut self, number: u32, to: Place, between_do_not_matter: bool) {
        if self.next < number && !between_do_not_matter {
            self.push(self.next, self.others);
        }
        self.push(number, to);
        self.next = number + 1;
    }

    fn push(&mut self, start: u32, to: Place) {
        let last = self.spans[self.count - 1];
        let is_same = usize::from(last.to) == to;
        let span = Span {
            start,
            to: to as u16,
        };
        match self.spans.get_mut(self.count) {
            _ if is_same => {}
            _ if last.start == start => self.spans[self.count - 1] = span,
            Some(place) => {
                *place = span;
                self.count += 1;
            }
            // It is too long then, which `finish` says.
            None => self.next = u32::MAX,
        }
    }

    /// Ends them; `None` if there was no room.
    fn finish(mut self, rest_does_not_matter: bool) -> Option<Spans> {
        if !rest_does_not_matter {
            self.push(self.next, self.others);
        }
        (self.next < u32::MAX).then_some(self)
    }

    fn get(&self) -> &[Span] {
        &self.spans[..self.count]
    }
}
