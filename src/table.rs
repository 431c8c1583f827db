//! A table of the guests that fit on each board's host, for the documentation.

use crate::boards;
use anyhow::{Context, Result};
use armlet_arch::aarch64::{Aarch64, Host};
use armlet_arch::board::Severity;
use armlet_arch::plan::{MEMORY_UNIT, most_memory};
use armlet_arch::size::show_size;
use armlet_arch::{Arch, Architecture, Board, Request, plan};
use armlet_system::status::{Fault, Status};
use std::fmt::Write;

/// Returns the table of all built-in boards for ARM64, in Markdown.
///
/// # Errors
/// When a board cannot be planned for.
pub fn of_boards() -> Result<String> {
    let mut out = String::from(
        "| board | cores | GIC | vCPUs | host pages | IPA limit | widest guest | 512M | 4G | full RAM |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for board in boards::BUILT_IN {
        let mut board = boards::find(board.name)?;
        if board.arch != Architecture::Aarch64 {
            continue;
        }
        // The usual kernel's page size, and 4 KiB where that is another one.
        let mut pages = vec![board.host.page_size, 0x1000];
        pages.dedup();
        for page in pages {
            board.host.page_size = page;
            let row = row(&board).with_context(|| format!("board '{}'", board.name));
            // Writing to a String cannot fail.
            let _ = writeln!(out, "| {} |", row.fault(Status::Failure)?.join(" | "));
        }
    }
    Ok(out)
}

fn row(board: &Board) -> Result<Vec<String>> {
    let host = Aarch64::assumed_host(board);
    let gic = match (host.gic_v2, host.gic_v3) {
        (false, false) => "none",
        (true, false) => "2",
        (false, true) => "3",
        (true, true) => "2, 3",
    };
    let clusters: Vec<String> = board
        .host
        .clusters
        .iter()
        .map(|cluster| format!("{} {}", cluster.cpus, cluster.core))
        .collect();
    let cores = match clusters.is_empty() {
        true => "any".to_owned(),
        false => clusters.join(", "),
    };
    let mut cells = vec![board.name.clone(), cores, gic.to_owned()];
    let mut notes = board.host.notes.iter();
    if notes.any(|note| note.severity == Severity::Stops) {
        cells.push("no guest runs".to_owned());
        cells.resize(10, String::new());
        return Ok(cells);
    }
    let most = most_memory(board, &request(board, 1 << 60), &host, board.host.ipa_limit)
        .context("no memory size fits")?;
    let vcpus = match host.gic_v3 {
        true => host.max_vcpus,
        false => host.max_vcpus.min(armlet_arch::aarch64::gic::V2_MAX_VCPUS),
    };
    cells.push(vcpus.to_string());
    cells.push(show_size(host.page_size));
    cells.push(format!("{} bits", board.host.ipa_limit));
    cells.push(show_size(most));
    for memory in [512 << 20, 4 << 30] {
        cells.push(width(board, &host, memory)?);
    }
    cells.push(match board.host.ram.last() {
        None => "any".to_owned(),
        Some(all) => format!("{}: {}", show_size(*all), width(board, &host, *all)?),
    });
    Ok(cells)
}

/// Returns the address bits of a guest with this much memory, and the levels of stage-2
/// translation.
fn width(board: &Board, host: &Host, memory: u64) -> Result<String> {
    let width = plan(board, &request(board, memory), host)?.width;
    Ok(format!("{} bits, {} levels", width.bits, width.levels))
}

fn request(board: &Board, memory: u64) -> Request<Aarch64> {
    Request {
        width: board.guest.width,
        gic: board.guest.gic,
        ..Request::new(1, memory / MEMORY_UNIT * MEMORY_UNIT)
    }
}
