//! Devices whose state can be taken out of one machine and put into another.
//!
//! A state is plain data: what the guest could find out, and nothing of this process: no descriptor,
//! no time of a clock that only this host has. Who saves a device has stopped the vCPUs before.

/// A device that can be made to go on where another of its kind stopped.
pub trait Persist {
    /// All that the guest did to it, and what came of it.
    type State: Clone + std::fmt::Debug + PartialEq;

    /// Returns the state as it is now.
    fn save(&self) -> Self::State;

    /// Makes this device, which no guest has accessed yet, the one that was saved, and drives its
    /// interrupt line accordingly.
    ///
    /// # Errors
    /// A state that no device of this kind can have; the device is then as it was. States come from
    /// files, which anybody may have written.
    fn restore(&mut self, state: &Self::State) -> Result<(), RestoreError>;
}

/// Why a device cannot be made the same as one that was saved, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RestoreError(pub String);

impl RestoreError {
    /// Refuses `value` of `what` unless all of its bits are among those of `mask`.
    pub(crate) fn check(
        device: &str,
        what: &str,
        value: impl Into<u64>,
        mask: impl Into<u64>,
    ) -> Result<(), RestoreError> {
        let (value, mask) = (value.into(), mask.into());
        match value & !mask {
            0 => Ok(()),
            wrong => Err(RestoreError(format!(
                "the state of the {device} is not valid: {what} {value:#x} has bits that are always 0 ({wrong:#x})"
            ))),
        }
    }

    /// Refuses more than `most` of `what`.
    pub(crate) fn check_count(
        device: &str,
        what: &str,
        count: usize,
        most: usize,
    ) -> Result<(), RestoreError> {
        match count <= most {
            true => Ok(()),
            false => Err(RestoreError(format!(
                "the state of the {device} is not valid: it has {count} {what}, and there is room for {most}"
            ))),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    //! What holds of every device that can be saved: it goes on as if nothing had happened.

    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::Device;
    use crate::action::Action;
    use crate::fake::FakeLine;

    /// What a guest does to a device.
    #[derive(Clone, Debug)]
    pub(crate) enum Access {
        Read(u64, usize),
        Write(u64, Vec<u8>),
    }

    impl Access {
        /// Does it; returns what was read, and what it means for the machine.
        pub(crate) fn make(&self, device: &mut impl Device) -> (Vec<u8>, Action) {
            match self {
                Access::Read(offset, size) => {
                    let mut data = vec![0xee; *size];
                    let action = device.read(*offset, &mut data);
                    (data, action)
                }
                Access::Write(offset, data) => (Vec::new(), device.write(*offset, data)),
            }
        }
    }

    /// Accesses to these offsets, of these widths.
    pub(crate) fn accesses(
        offsets: &'static [u64],
        widths: &'static [usize],
    ) -> impl Strategy<Value = Access> {
        let offset = prop::sample::select(offsets);
        let width = prop::sample::select(widths);
        // Small numbers are single bits of registers more often than others.
        let value = prop_oneof![
            any::<u64>(),
            0_u64..16,
            (0..32).prop_map(|bit| 1_u64 << bit)
        ];
        (offset, width, any::<bool>(), value).prop_map(
            |(offset, width, write, value)| match write {
                true => Access::Write(offset, value.to_le_bytes()[..width].to_vec()),
                false => Access::Read(offset, width),
            },
        )
    }

    /// Does what is in `before` to a device of `make`'s, and what is in `after` to it and to another
    /// that was made from its state: both answer the same and drive their lines alike.
    pub(crate) fn goes_on<D: Persist, E, A: PartialEq + std::fmt::Debug>(
        make: impl Fn() -> (D, Arc<FakeLine>),
        act: impl Fn(&mut D, &E) -> A,
        before: &[E],
        after: &[E],
    ) {
        let (mut kept, kept_line) = make();
        for event in before {
            act(&mut kept, event);
        }
        let state = kept.save();
        let (mut fresh, fresh_line) = make();
        fresh.restore(&state).expect("a state that was saved");
        assert_eq!(fresh.save(), state);
        assert_eq!(fresh_line.is_high(), kept_line.is_high());
        let (kept_edges, fresh_edges) = (kept_line.history().len(), fresh_line.history().len());
        for event in after {
            assert_eq!(act(&mut fresh, event), act(&mut kept, event));
            let edges = &fresh_line.history()[fresh_edges..];
            assert_eq!(edges, &kept_line.history()[kept_edges..]);
        }
        assert_eq!(fresh.save(), kept.save());
    }

    /// A state that is refused leaves the device as it was, and the reason in one line.
    pub(crate) fn refuses<D: Persist>(device: &mut D, state: &D::State, reason: &str) {
        let before = device.save();
        let error = device.restore(state).expect_err(reason).to_string();
        assert!(error.contains(reason) && !error.contains('\n'), "{error}");
        assert_eq!(device.save(), before);
    }
}
