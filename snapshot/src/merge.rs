//! Applies a diff to the snapshot that it changes.

use crate::PAGE;
use crate::content::each_extent;
use crate::copy::Output;
use crate::draft::Draft;
use crate::open::Snapshot;
use crate::paths::Paths;
use crate::runs::Runs;
use crate::state::{Id, State};
use anyhow::{Context, Result, bail};
use std::path::Path;

/// What a merge came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The snapshot that is now at the base's place: it has the id of the diff.
    pub id: Id,
    /// The pages that were applied; none if that had been done before.
    pub pages: u64,
}

/// A base and a diff of it, open and checked.
#[derive(Debug)]
pub struct Pair<'a> {
    paths: &'a Paths,
    base: Snapshot,
    diff: Snapshot,
}

impl<'a> Pair<'a> {
    /// Opens both. The base may be a diff itself.
    ///
    /// # Errors
    /// What is wrong with either; two that do not belong together.
    pub fn open(base: &'a Paths, diff: &Paths) -> Result<Pair<'a>> {
        let shown = (base.state.display(), diff.state.display());
        let diff = Snapshot::open(diff).context("the diff")?;
        let Some(wanted) = diff.state.base else {
            bail!(
                "{}: it is a whole snapshot and no diff; restore it as it is",
                shown.1
            );
        };
        let pair = Pair {
            paths: base,
            base: Snapshot::open(base).context("the base")?,
            diff,
        };
        let id = pair.base.state.id;
        if pair.base.state == pair.diff.state {
            bail!(
                "{} and {} are the same snapshot; name the one that the diff changes first",
                shown.0,
                shown.1
            );
        }
        if id != wanted && !pair.is_applied() {
            bail!(
                "{} has the changes since snapshot {wanted}, and {} is snapshot {id}; merge diffs in the order in which they were made",
                shown.1,
                shown.0
            );
        }
        if pair.base.state.banks != pair.diff.state.banks {
            bail!("base and diff have different memory banks; they are not of one machine");
        }
        Ok(pair)
    }

    /// Whether the base has the diff already.
    fn is_applied(&self) -> bool {
        self.base.state.id == self.diff.state.id
    }

    /// Puts the snapshot that both describe together into the base's place. It is written beside the
    /// base first, so that a kill at any moment leaves the base or the new snapshot, and either way the
    /// same merge can be done again. The diff stays. If the base is a diff, the result is one, of the
    /// same snapshot.
    ///
    /// # Errors
    /// What the system says; a base that was replaced meanwhile.
    pub fn apply(self) -> Result<Merged> {
        let id = self.diff.state.id;
        if self.is_applied() {
            return Ok(Merged { id, pages: 0 });
        }
        let draft = Draft::create_as(self.paths, id)?;
        // Another one may have taken its place before the draft kept others away.
        let base = Snapshot::open(self.paths).context("the base")?;
        if base.state.id != self.base.state.id {
            bail!(
                "{}: it was replaced meanwhile; try again",
                self.paths.state.display()
            );
        }
        let shown = |path: &Path| path.display().to_string();
        write(&base, &self.diff, &draft).with_context(|| shown(&self.paths.memory))?;
        let changed = match base.state.base {
            Some(_) => base.state.changed.union(&self.diff.state.changed),
            None => Runs::default(),
        };
        let pages = self.diff.state.changed.pages();
        let state = State {
            base: base.state.base,
            changed,
            ..self.diff.state
        };
        let written = state.write(draft.state());
        written.with_context(|| shown(&self.paths.state))?;
        draft.commit()?;
        Ok(Merged { id, pages })
    }
}

/// Writes the memory of both: where the diff has pages, from it, and else from the base.
fn write(base: &Snapshot, diff: &Snapshot, draft: &Draft) -> Result<()> {
    let total = base.state.memory_size();
    let mut output = Output::new(draft.memory(), total)?;
    let mut at = 0;
    let ends = std::iter::once(total / PAGE..total / PAGE);
    for run in diff.state.changed.iter().chain(ends) {
        let run = run.start * PAGE..run.end * PAGE;
        if at < run.start {
            each_extent(
                &base.memory,
                0,
                at..run.start,
                |kept, is_data| match is_data {
                    true => {
                        output.copy(&base.memory, kept.start, kept.start, kept.end - kept.start)
                    }
                    false => Ok(()),
                },
            )?;
        }
        output.copy(&diff.memory, run.start, run.start, run.end - run.start)?;
        at = run.end;
    }
    Ok(())
}
