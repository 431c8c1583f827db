//! Applies a diff to the snapshot that it changes.

use crate::PAGE;
use crate::content::each_extent;
use crate::copy::Output;
use crate::draft::Draft;
use crate::open::Snapshot;
use crate::paths::Paths;
use crate::state::{Id, State};
use anyhow::{Context, Result, bail};

/// What a merge came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The snapshot that is now at the base's place: it has the id of the diff.
    pub id: Id,
    /// The pages that were applied; none if that had been done before.
    pub pages: u64,
}

/// Puts the snapshot that a base and a diff describe together into the base's place. It is written
/// beside the base first, so that a kill at any moment leaves the base or the new snapshot, and either
/// way the same merge can be done again. The diff stays. The base may be a diff itself: then the result
/// is one, of the base's own base.
///
/// # Errors
/// Two that do not belong together; what is wrong with either; what the system says.
pub fn merge(base: &Paths, diff: &Paths) -> Result<Merged> {
    let apply = Snapshot::open(diff).context("the diff")?;
    let id = apply.state.id;
    let onto = Snapshot::open(base).context("the base")?;
    let Some(wanted) = apply.state.base else {
        bail!(
            "{}: it is a whole snapshot and no diff; restore it as it is",
            diff.state.display()
        );
    };
    if onto.state == apply.state {
        bail!(
            "{} and {} are the same snapshot; name the one that the diff changes first",
            base.state.display(),
            diff.state.display()
        );
    }
    if onto.state.id == id {
        return Ok(Merged { id, pages: 0 });
    }
    if onto.state.id != wanted {
        bail!(
            "{} has the changes since snapshot {wanted}, and {} is snapshot {}; merge diffs in the order in which they were made",
            diff.state.display(),
            base.state.display(),
            onto.state.id
        );
    }
    if onto.state.banks != apply.state.banks {
        bail!("base and diff have different memory banks; they are not of one machine");
    }
    let draft = Draft::create_as(base, id)?;
    // Another one may have taken its place before this draft kept others away.
    let onto = Snapshot::open(base).context("the base")?;
    if onto.state.id != wanted {
        bail!(
            "{}: it was replaced meanwhile; try again",
            base.state.display()
        );
    }
    write(&onto, &apply, &draft).with_context(|| base.memory.display().to_string())?;
    let changed = match onto.state.base {
        Some(_) => onto.state.changed.union(&apply.state.changed),
        None => Default::default(),
    };
    let state = State {
        base: onto.state.base,
        changed,
        ..apply.state.clone()
    };
    let written = state.write(draft.state());
    written.with_context(|| base.state.display().to_string())?;
    draft.commit()?;
    let pages = apply.state.changed.pages();
    Ok(Merged { id, pages })
}

/// Writes the memory of both: where the diff has pages, from it, and else from the base.
fn write(onto: &Snapshot, apply: &Snapshot, draft: &Draft) -> Result<()> {
    let total = onto.state.memory_size();
    let mut output = Output::new(draft.memory(), total)?;
    let mut at = 0;
    let ends = std::iter::once(total / PAGE..total / PAGE);
    for run in apply.state.changed.iter().chain(ends) {
        let run = run.start * PAGE..run.end * PAGE;
        if at < run.start {
            each_extent(
                &onto.memory,
                0,
                at..run.start,
                |kept, is_data| match is_data {
                    true => {
                        output.copy(&onto.memory, kept.start, kept.start, kept.end - kept.start)
                    }
                    false => Ok(()),
                },
            )?;
        }
        output.copy(&apply.memory, run.start, run.start, run.end - run.start)?;
        at = run.end;
    }
    Ok(())
}
