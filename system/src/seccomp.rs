//! Programs of classic BPF that decide over system calls (Documentation/userspace-api/seccomp_filter.rst).
//!
//! A filter costs when it is installed: the kernel runs it once for each number of a call, to know which
//! are always allowed (kernel/seccomp.c: seccomp_cache_prepare), and compiles it, which takes it above a
//! thousand instructions of the CPU for each of the filter. So numbers are searched by a tree, and no
//! instruction is there twice. All is done by constant functions, so that a filter that depends on
//! nothing is made when the program is compiled.

use rustix::io::Errno;

/// What the kernel is told to do with a call (include/uapi/linux/seccomp.h).
const KILL_PROCESS: u32 = 0x8000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

/// Codes of instructions (include/uapi/linux/bpf_common.h).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const RETURN: u16 = 0x06;
const IF_EQUAL: u16 = 0x15;
const IF_ABOVE: u16 = 0x25;
const IF_NOT_BELOW: u16 = 0x35;
const IF_BITS: u16 = 0x45;

/// Where struct seccomp_data has the number, the architecture, and the lower halves of arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
const ARGUMENT: u32 = 8;

/// The most instructions of a filter here; the kernel takes 4096.
pub const MOST: usize = 256;
/// Where numbers end that kernels have, by now, for a tree that is no deeper than it has to be.
pub const LAST_CALL: u32 = 470;
/// How far a conditional jump goes at most, with room for one more instruction.
const NEAR: usize = 254;
/// How many single numbers are compared one by one, before the tree goes on.
const FEW: usize = 3;

/// An instruction of classic BPF (include/uapi/linux/filter.h: struct sock_filter).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// How many instructions are passed over after a comparison that holds.
    pub yes: u8,
    /// The same after one that does not.
    pub no: u8,
    /// What it works with.
    pub value: u32,
}

/// How this program makes system calls.
#[derive(Clone, Copy, Debug)]
pub struct Native {
    /// AUDIT_ARCH (include/uapi/linux/audit.h).
    pub architecture: u32,
    /// Harmless calls that the C library makes on this architecture in place of others, to wait and the
    /// like.
    pub calls: &'static [i64],
    /// The same of calls that open files and look at them.
    pub files: &'static [i64],
}

/// None yet.
const NOTHING: Instruction = Instruction {
    code: 0,
    yes: 0,
    no: 0,
    value: 0,
};

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Allow,
    /// It is done, and the kernel's log tells of it.
    Log,
    /// It fails with this error.
    Fail(i32),
    /// It is not done, and SIGSYS comes.
    Trap,
    /// It ends the process.
    Kill,
}

/// A place in a program to jump to.
pub type Place = usize;

/// A program that is written from its end to its start, as jumps only go forwards.
pub struct Program {
    code: [Instruction; MOST],
    start: usize,
    /// Whether it did not fit.
    is_full: bool,
    /// Where a call is allowed.
    pub allowed: Place,
    /// Where it is not.
    pub forbidden: Place,
}

impl Program {
    /// A program of its ends alone.
    #[must_use]
    pub const fn new(forbidden: Outcome) -> Program {
        let mut program = Program {
            code: [NOTHING; MOST],
            start: MOST,
            is_full: false,
            allowed: 0,
            forbidden: 0,
        };
        program.allowed = program.end(Outcome::Allow);
        program.forbidden = program.end(forbidden);
        program
    }

    /// One more end.
    pub const fn end(&mut self, outcome: Outcome) -> Place {
        let value = match outcome {
            Outcome::Allow => ALLOW,
            Outcome::Log => LOG,
            Outcome::Fail(error) => ERRNO | error.unsigned_abs(),
            Outcome::Trap => TRAP,
            Outcome::Kill => KILL_PROCESS,
        };
        self.put(RETURN, value)
    }

    /// Loads the number of the call and goes to `place` with it.
    pub const fn number(&mut self, place: Place) -> Place {
        self.reach(place);
        self.put(LOAD, NUMBER)
    }

    /// Goes to `place` if the call is one of `architecture` (include/uapi/linux/audit.h). One of
    /// another ends the process.
    pub const fn only(&mut self, architecture: u32, place: Place) -> Place {
        self.reach(place);
        let here = self.start;
        let foreign = self.put(RETURN, KILL_PROCESS);
        self.branch(IF_EQUAL, architecture, here, foreign);
        self.put(LOAD, ARCHITECTURE)
    }

    /// How many instructions it has. A program that did not fit has none.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self.is_full {
            true => 0,
            false => MOST - self.start,
        }
    }

    /// Whether it did not fit.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its instructions.
    #[must_use]
    pub const fn code(&self) -> &[Instruction] {
        self.code.split_at(MOST - self.len()).1
    }

    /// Its instructions, of which there are N.
    #[must_use]
    pub const fn exactly<const N: usize>(&self) -> [Instruction; N] {
        let mut code = [NOTHING; N];
        code.copy_from_slice(self.code());
        code
    }

    /// Loads the lower half of an argument and goes to `place`.
    pub const fn argument(&mut self, index: u32, place: Place) -> Place {
        self.reach(place);
        self.put(LOAD, ARGUMENTS + ARGUMENT * index)
    }

    /// Keeps these bits and goes to `place`.
    pub const fn mask(&mut self, bits: u32, place: Place) -> Place {
        self.reach(place);
        self.put(AND, bits)
    }

    /// Goes on where the value at hand is this one, or is not.
    pub const fn if_equal(&mut self, value: u32, yes: Place, no: Place) -> Place {
        self.branch(IF_EQUAL, value, yes, no)
    }

    /// Goes on where the value at hand is above this one, or is not.
    pub const fn if_above(&mut self, value: u32, yes: Place, no: Place) -> Place {
        self.branch(IF_ABOVE, value, yes, no)
    }

    /// Goes on where the value at hand has one of these bits, or has none.
    pub const fn if_any_of(&mut self, bits: u32, yes: Place, no: Place) -> Place {
        self.branch(IF_BITS, bits, yes, no)
    }

    /// Goes where the span of the number at hand leads. Numbers end before `last`.
    ///
    /// First come runs of spans: one, or several of which every other is a single number and the rest
    /// lead to one place, so that a comparison for each number does. A tree of comparisons leads to the
    /// runs, as deep as their numbers are few.
    pub const fn search(&mut self, spans: &Spans, last: u32) -> Place {
        if spans.is_full {
            self.is_full = true;
            return self.forbidden;
        }
        let mut runs = [Run {
            from: 0,
            first: 0,
            last: 0,
        }; MOST];
        let (mut count, mut first, mut from) = (0, 0, 0);
        while first < spans.count {
            let mut end = first;
            while end < first + 2 * FEW && spans.goes_on(first, end) {
                end += 2;
            }
            runs[count] = Run {
                from,
                first: first as u16,
                last: end as u16,
            };
            count += 1;
            // The next run may begin with the span that this one ends with.
            let is_shared = end > first && !spans.is_single(end) && spans.goes_on(first, end);
            first = match is_shared {
                true => end,
                false => end + 1,
            };
            from = match first < spans.count {
                true => spans.spans[first].start,
                false => last,
            };
            if is_shared {
                from += (spans.spans[first + 1].start - from) / 2;
            }
        }
        self.tree(spans, &runs, 0, count, last)
    }

    /// Leads to the runs from `first` to before `end`.
    const fn tree(
        &mut self,
        spans: &Spans,
        runs: &[Run; MOST],
        first: usize,
        end: usize,
        last: u32,
    ) -> Place {
        if end - first == 1 {
            return self.chain(spans, runs[first]);
        }
        let from = runs[first].from;
        let middle = from + (last - from) / 2;
        // The run whose start is nearest to the middle.
        let mut at = first + 1;
        while at + 1 < end && runs[at].from.abs_diff(middle) > runs[at + 1].from.abs_diff(middle) {
            at += 1;
        }
        let above = self.tree(spans, runs, at, end, last);
        let below = self.tree(spans, runs, first, at, runs[at].from);
        self.branch(IF_NOT_BELOW, runs[at].from, above, below)
    }

    const fn chain(&mut self, spans: &Spans, run: Run) -> Place {
        let mut place = spans.spans[run.first as usize].to as Place;
        let mut at = run.first as usize + 1;
        while at < run.last as usize {
            let span = spans.spans[at];
            place = self.branch(IF_EQUAL, span.start, span.to as Place, place);
            at += 2;
        }
        place
    }

    const fn branch(&mut self, code: u16, value: u32, yes: Place, no: Place) -> Place {
        if yes == no {
            return yes;
        }
        let (yes, no) = (self.near(yes), self.near(no));
        let here = self.put(code, value);
        self.code[here].yes = (yes - here - 1) as u8;
        self.code[here].no = (no - here - 1) as u8;
        here
    }

    /// A place that a conditional jump reaches, and from which it goes to `place`.
    const fn near(&mut self, place: Place) -> Place {
        match place - self.start < NEAR {
            true => place,
            false => self.put(JUMP, (place - self.start) as u32),
        }
    }

    /// Has what is written next go on to `place`.
    const fn reach(&mut self, place: Place) {
        if place != self.start {
            self.put(JUMP, (place - self.start) as u32);
        }
    }

    const fn put(&mut self, code: u16, value: u32) -> Place {
        match self.start {
            0 => self.is_full = true,
            _ => self.start -= 1,
        }
        self.code[self.start] = Instruction {
            code,
            yes: 0,
            no: 0,
            value,
        };
        self.start
    }
}

/// Where a program that was made beforehand compares with a value, to have another put there.
#[must_use]
pub const fn compares_with(code: &[Instruction], value: u32) -> usize {
    let mut at = 0;
    while code[at].code != IF_EQUAL || code[at].value != value {
        at += 1;
    }
    at
}

/// A range of numbers, from `start` to the start of the next, and where it leads.
#[derive(Clone, Copy)]
struct Span {
    start: u32,
    to: u16,
}

/// Spans that are told apart one by one, from a number on.
#[derive(Clone, Copy)]
struct Run {
    from: u32,
    first: u16,
    last: u16,
}

/// Numbers in order, and where each leads.
pub struct Spans {
    spans: [Span; MOST],
    count: usize,
    is_full: bool,
    /// Where numbers lead that are not added.
    others: Place,
    /// The number after the last.
    next: u32,
}

impl Spans {
    /// No number yet. Those that are not added lead to `others`.
    #[must_use]
    pub const fn new(others: Place) -> Spans {
        Spans {
            spans: [Span {
                start: 0,
                to: others as u16,
            }; MOST],
            count: 1,
            is_full: false,
            others,
            next: 0,
        }
    }

    /// Adds a number above all so far.
    pub const fn add(&mut self, number: u32, to: Place) {
        if self.next < number {
            self.push(self.next, self.others);
        }
        self.add_next(number, to);
    }

    /// The same, where it does not matter to where those lead that lie between.
    pub const fn add_next(&mut self, number: u32, to: Place) {
        self.push(number, to);
        self.next = number + 1;
    }

    /// The number after the last.
    #[must_use]
    pub const fn next(&self) -> u32 {
        self.next
    }

    /// Has the rest lead to where numbers lead that are not added.
    pub const fn finish(&mut self) {
        self.push(self.next, self.others);
    }

    const fn push(&mut self, start: u32, to: Place) {
        let last = self.spans[self.count - 1];
        if last.to as Place == to {
            return;
        }
        let to = to as u16;
        if last.start == start {
            self.spans[self.count - 1].to = to;
        } else if self.count < MOST {
            self.spans[self.count] = Span { start, to };
            self.count += 1;
        } else {
            self.is_full = true;
        }
    }

    const fn is_single(&self, index: usize) -> bool {
        index + 1 < self.count && self.spans[index + 1].start - self.spans[index].start == 1
    }

    /// Whether a run that begins with a span goes on after another.
    const fn goes_on(&self, first: usize, at: usize) -> bool {
        self.is_single(at + 1)
            && at + 2 < self.count
            && self.spans[at + 2].to == self.spans[first].to
    }
}

/// Numbers of system calls, for [`Program::decide`].
pub type Calls<'a> = &'a [i64];

impl Program {
    /// Ends the writing of a filter: each of some calls leads to a place, and all others to `others`.
    pub const fn decide(&mut self, native: &Native, cases: &[(Calls<'_>, Place)], others: Place) {
        let mut spans = Spans::new(others);
        let mut call = 0;
        while call < LAST_CALL as i64 {
            let mut at = 0;
            while at < cases.len() && !contains(cases[at].0, call) {
                at += 1;
            }
            if at < cases.len() {
                spans.add(call as u32, cases[at].1);
            }
            call += 1;
        }
        spans.finish();
        let tree = self.search(&spans, LAST_CALL);
        let tree = self.number(tree);
        self.only(native.architecture, tree);
    }
}

const fn contains(calls: &[i64], call: i64) -> bool {
    let mut at = 0;
    while at < calls.len() && calls[at] != call {
        at += 1;
    }
    at < calls.len()
}

/// `struct sock_fprog`.
#[repr(C)]
struct Filter {
    length: u16,
    code: *const Instruction,
}

/// Adds a filter to those of the calling thread, which may gain no rights (no_new_privs).
///
/// # Errors
/// What the kernel says.
pub fn add_filter(code: &[Instruction]) -> Result<(), Errno> {
    let filter = Filter {
        length: code.len() as u16,
        code: code.as_ptr(),
    };
    let add = |flags: libc::c_ulong| {
        // SAFETY: the kernel reads the instructions that `filter` points to, while `code` is there.
        let added = unsafe {
            let mode = libc::SECCOMP_SET_MODE_FILTER;
            libc::syscall(libc::SYS_seccomp, mode, flags, &raw const filter)
        };
        match added {
            0 => Ok(()),
            _ => {
                Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
            }
        }
    };
    // Before Linux 5.16, loads would otherwise no longer be done before earlier stores to addresses
    // that are not known yet, which costs guests some percent.
    match add(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW) {
        // Before Linux 4.17.
        Err(Errno::INVAL) => add(0),
        added => added,
    }
}
