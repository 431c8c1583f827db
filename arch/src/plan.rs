//! Plans a machine.

mod advice;
mod map;

pub use advice::most_memory;
pub use map::{MEMORY_UNIT, PMEM_UNIT};

use crate::arch::{Arch, Layout, Plan, Request};
use crate::board::Board;
use crate::error::PlanError;
use crate::machine::PlacedGeneration;
use crate::size::show_size;
use advice::{with_advice, with_bank_limit, with_memory_limit};
use map::{Map, check_overlaps, map};

/// Plans a machine: check, layout, overlap check, width, vCPUs, blobs.
///
/// # Errors
/// [`PlanError`], with the numbers and what would work.
pub fn plan<A: Arch>(
    board: &Board,
    request: &Request<A>,
    host: &A::Host,
) -> Result<Plan<A>, PlanError> {
    check::<A>(board, request)?;
    let map = map::<A>(board, request, host, request.memory)
        .map_err(|error| with_memory_limit::<A>(error, board, request, host))?;
    let highest = check_overlaps::<A>(board, &map)?;
    let width = A::width(&highest, request.width, host)
        .map_err(|error| with_advice::<A>(error, board, request, host))?;
    let features = A::features(request, host)?;
    let Map {
        ram,
        devices,
        ports,
        irqchip,
        pmem,
        pci,
        generation_irq,
    } = map;
    let payload = A::payload(&ram, request, host)
        .map_err(|error| with_bank_limit::<A>(error, board, request, host))?;
    let vcpus: Vec<_> = (0..request.cpus)
        .map(|index| A::vcpu(index, &payload, &features, request))
        .collect();
    let generation = generation_irq.and_then(|irq| {
        let [id, clock] = A::generation(&payload, request)?;
        Some(PlacedGeneration { id, clock, irq })
    });
    let layout = Layout {
        ram,
        devices,
        ports,
        irqchip,
        pmem,
        pci,
        payload,
        generation,
    };
    let blobs = match request.goes_on {
        true => Vec::new(),
        false => A::blobs(board, &layout, &vcpus, &features, request)
            .map_err(|error| with_bank_limit::<A>(error, board, request, host))?,
    };
    Ok(Plan {
        board: board.name.clone(),
        layout,
        width,
        features,
        vcpus,
        blobs,
    })
}

fn check<A: Arch>(board: &Board, request: &Request<A>) -> Result<(), PlanError> {
    if board.arch != A::ARCHITECTURE {
        return Err(PlanError::WrongArchitecture {
            board: board.name.clone(),
            has: board.arch,
            wants: A::ARCHITECTURE,
        });
    }
    if request.cpus == 0 {
        return Err(PlanError::NoCpus);
    }
    if request.memory == 0 {
        return Err(PlanError::NoMemory);
    }
    if !request.memory.is_multiple_of(MEMORY_UNIT) {
        let next = (request.memory / MEMORY_UNIT).saturating_add(1);
        return Err(PlanError::UnalignedMemory {
            asked: request.memory,
            next: show_size(next.saturating_mul(MEMORY_UNIT)),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
