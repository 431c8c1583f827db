//! Programs of classic BPF that decide over system calls (Documentation/userspace-api/seccomp_filter.rst).
//!
//! A filter costs when it is installed: the kernel runs it once for each number of a call, to know which
//! are always allowed (kernel/seccomp.c: seccomp_cache_prepare), and compiles it, which takes it above a
//! thousand instructions of the CPU for each of the filter. So numbers are searched by a tree, and no
//! instruction is there twice.

use super::sys::Instruction;

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
pub(super) const MOST: usize = 256;
/// How far a conditional jump goes at most, with room for one more instruction.
const NEAR: usize = 254;
/// How many single numbers are compared one by one, before the tree goes on.
const FEW: usize = 3;

/// A place in a program to jump to.
pub(super) type Place = usize;

/// A range of numbers, from `start` to the start of the next, and where it leads.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Span {
    pub(super) start: u32,
    pub(super) to: u16,
}

/// Spans that are told apart one by one, from a number on.
struct Run<'a> {
    from: u32,
    spans: &'a [Span],
}

/// A program that is written from its end to its start, as jumps only go forwards.
pub(super) struct Program {
    code: [Instruction; MOST],
    start: usize,
    /// Whether it did not fit.
    is_full: bool,
    /// Where all ends: the call is allowed, or is not.
    pub(super) allowed: Place,
    pub(super) forbidden: Place,
}

impl Program {
    /// A program of its ends alone; what is forbidden traps, or is only `logged`.
    pub(super) fn new(logged: bool) -> Program {
        let mut program = Program {
            code: [Instruction::default(); MOST],
            start: MOST,
            is_full: false,
            allowed: 0,
            forbidden: 0,
        };
        program.allowed = program.put(RETURN, ALLOW);
        program.forbidden = program.put(RETURN, if logged { LOG } else { TRAP });
        program
    }

    /// An end where the call fails with this error.
    pub(super) fn failed(&mut self, error: i32) -> Place {
        self.put(RETURN, ERRNO | error.unsigned_abs())
    }

    /// Ends the writing: the filter is only for calls of `architecture` (include/uapi/linux/audit.h),
    /// and goes to `place` with their number. `None` if it did not fit.
    pub(super) fn finish(&mut self, architecture: u32, place: Place) -> Option<&[Instruction]> {
        self.reach(place);
        self.put(LOAD, NUMBER);
        let here = self.start;
        let foreign = self.put(RETURN, KILL_PROCESS);
        self.branch(IF_EQUAL, architecture, here, foreign);
        self.put(LOAD, ARCHITECTURE);
        (!self.is_full).then_some(&self.code[self.start..])
    }

    /// Loads the lower half of an argument and goes to `place`.
    pub(super) fn argument(&mut self, index: u32, place: Place) -> Place {
        self.reach(place);
        self.put(LOAD, ARGUMENTS + ARGUMENT * index)
    }

    /// Keeps these bits and goes to `place`.
    pub(super) fn mask(&mut self, bits: u32, place: Place) -> Place {
        self.reach(place);
        self.put(AND, bits)
    }

    pub(super) fn if_equal(&mut self, value: u32, yes: Place, no: Place) -> Place {
        self.branch(IF_EQUAL, value, yes, no)
    }

    pub(super) fn if_above(&mut self, value: u32, yes: Place, no: Place) -> Place {
        self.branch(IF_ABOVE, value, yes, no)
    }

    pub(super) fn if_any_of(&mut self, bits: u32, yes: Place, no: Place) -> Place {
        self.branch(IF_BITS, bits, yes, no)
    }

    /// Goes where the span of the number at hand leads. Numbers end before `last`.
    ///
    /// First come runs of spans: one, or several of which every other is a single number and the rest
    /// lead to one place, so that a comparison for each number does. A tree of comparisons leads to the
    /// runs, as deep as their numbers are few.
    pub(super) fn search(&mut self, spans: &[Span], last: u32) -> Place {
        let mut runs = Vec::with_capacity(spans.len());
        let is_single = |index: usize| match spans.get(index..index + 2) {
            Some([one, next]) => next.start - one.start == 1,
            _ => false,
        };
        let (mut first, mut from) = (0, spans.first().map_or(0, |span| span.start));
        while let Some(span) = spans.get(first) {
            let goes_on = |at: usize| {
                let other = spans.get(at + 2);
                is_single(at + 1) && other.is_some_and(|other| other.to == span.to)
            };
            let mut end = first;
            while end < first + 2 * FEW && goes_on(end) {
                end += 2;
            }
            runs.push(Run {
                from,
                spans: &spans[first..=end],
            });
            // The next run may begin with the span that this one ends with.
            let is_shared = end > first && !is_single(end) && goes_on(end);
            first = if is_shared { end } else { end + 1 };
            from = spans.get(first).map_or(last, |span| span.start);
            if is_shared {
                from += (spans[first + 1].start - from) / 2;
            }
        }
        self.tree(&runs, last)
    }

    fn tree(&mut self, runs: &[Run<'_>], last: u32) -> Place {
        let (first, rest) = match runs {
            [] => return self.forbidden,
            [only] => return self.chain(only.spans),
            [first, rest @ ..] => (first, rest),
        };
        let middle = first.from + (last - first.from) / 2;
        let beyond = rest.partition_point(|run| run.from <= middle);
        // Of the two around it, the nearer.
        let near = |at: &usize| {
            rest.get(*at)
                .map_or(u32::MAX, |run| run.from.abs_diff(middle))
        };
        let at = [beyond, beyond.saturating_sub(1)]
            .into_iter()
            .min_by_key(near);
        let at = at.unwrap_or(0) + 1;
        let above = self.tree(&runs[at..], last);
        let below = self.tree(&runs[..at], runs[at].from);
        self.branch(IF_NOT_BELOW, runs[at].from, above, below)
    }

    fn chain(&mut self, spans: &[Span]) -> Place {
        let others = spans.first().map_or(self.forbidden, |span| span.to.into());
        let singles = spans.iter().skip(1).step_by(2);
        singles.fold(others, |no, span| {
            self.branch(IF_EQUAL, span.start, span.to.into(), no)
        })
    }

    fn branch(&mut self, code: u16, value: u32, yes: Place, no: Place) -> Place {
        if yes == no {
            return yes;
        }
        let (yes, no) = (self.near(yes), self.near(no));
        let here = self.put(code, value);
        let instruction = &mut self.code[here];
        instruction.yes = (yes - here - 1) as u8;
        instruction.no = (no - here - 1) as u8;
        here
    }

    /// A place that a conditional jump reaches, and from which it goes to `place`.
    fn near(&mut self, place: Place) -> Place {
        match place - self.start < NEAR {
            true => place,
            false => self.put(JUMP, (place - self.start) as u32),
        }
    }

    /// Has what is written next go on to `place`.
    fn reach(&mut self, place: Place) {
        if place != self.start {
            self.put(JUMP, (place - self.start) as u32);
        }
    }

    fn put(&mut self, code: u16, value: u32) -> Place {
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
