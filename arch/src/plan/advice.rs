//! Completes errors with what would work, which takes another look at the whole machine.

use super::map::{MEMORY_UNIT, check_overlaps, map, place_ram};
use crate::arch::{Arch, Request};
use crate::board::{Board, Share};
use crate::error::PlanError;
use crate::range::{Range, Region};
use crate::size::{parse_size, show_size};
use crate::width::{MAX_BITS, WidthPolicy};

/// Turns an error about memory past 2^64 into one that says what fits the host.
pub(super) fn with_memory_limit<A: Arch>(
    error: PlanError,
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
) -> PlanError {
    let PlanError::Wraps { start, .. } = error else {
        return error;
    };
    let bank = board.memory.iter().find(|bank| bank.base == start);
    let end = Range::new(u64::MAX, 1).filter(|_| bank.is_some());
    let too_wide = end.map(|range| {
        let name = "guest RAM".into();
        A::width(&Region { name, range }, WidthPolicy::Fit, host)
    });
    match too_wide {
        Some(Err(PlanError::TooWide { limit, .. })) => PlanError::MemoryWraps {
            asked: show_size(request.memory),
            limit,
            advice: advice_on_memory(most_memory::<A>(board, request, host, limit), &board.name),
        },
        _ => error,
    }
}

fn advice_on_memory(fits: Option<u64>, board: &str) -> String {
    match fits {
        Some(memory) => format!("use --memory {} or less", show_size(memory)),
        None => format!("no memory size makes board '{board}' fit"),
    }
}

/// Completes an error about the width by the largest memory that fits.
pub(super) fn with_advice<A: Arch>(
    error: PlanError,
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
) -> PlanError {
    let bits = match &error {
        PlanError::TooWide { limit, .. } => *limit,
        PlanError::TooNarrow { asked, .. } => *asked,
        _ => return error,
    };
    let fits = most_memory::<A>(board, request, host, bits);
    let smaller = advice_on_memory(fits, &board.name);
    match error {
        PlanError::TooWide {
            name,
            last,
            need,
            limit,
            fixed,
            ..
        } => PlanError::TooWide {
            name,
            last,
            need,
            limit,
            fixed,
            advice: match fits {
                Some(_) => smaller,
                None if need <= MAX_BITS => {
                    format!("{smaller}: use a host with {need} bits or another board")
                }
                None => format!("{smaller}: use another board"),
            },
        },
        PlanError::TooNarrow {
            asked,
            name,
            last,
            need,
            ..
        } => PlanError::TooNarrow {
            asked,
            name,
            last,
            need,
            advice: format!("use --ipa-bits fit, or {smaller}"),
        },
        other => other,
    }
}

/// Corrects an error about too little memory whose advice does not work with the board's banks.
pub(super) fn with_bank_limit<A: Arch>(
    error: PlanError,
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
) -> PlanError {
    let PlanError::TooSmall {
        memory,
        needs,
        advice,
    } = error
    else {
        return error;
    };
    let more = |size| {
        let ram = place_ram(board, size)?;
        A::payload(&ram, request, host).map(|_| ())
    };
    // Banks may fill so that no memory size does, and hold less than was advised.
    match parse_size(&advice).map(more) {
        Ok(Err(PlanError::TooSmall { .. } | PlanError::BanksFull { .. })) => {
            PlanError::BankTooSmall {
                board: board.name.clone(),
                memory,
                needs,
            }
        }
        _ => PlanError::TooSmall {
            memory,
            needs,
            advice,
        },
    }
}

/// Returns the most memory in bytes, at most what was asked for, with which the machine fits `bits`
/// address bits; `None` if none does.
#[must_use]
pub fn most_memory<A: Arch>(
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
    bits: u8,
) -> Option<u64> {
    let fits = |units: u64| {
        map::<A>(board, request, host, units * MEMORY_UNIT)
            .and_then(|map| check_overlaps::<A>(board, &map))
            .is_ok_and(|highest| highest.range.bits() <= bits)
    };
    let fixed: u64 = board
        .memory
        .iter()
        .map(|bank| match bank.share {
            Share::Exactly(size) => size / MEMORY_UNIT,
            _ => 0,
        })
        .sum();
    // More memory never lowers the highest address, so the sizes that fit come first.
    let (mut low, mut high) = (fixed.max(1), request.memory / MEMORY_UNIT);
    if !fits(low) {
        return None;
    }
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    Some(low * MEMORY_UNIT)
}
