//! What an access to a device means for the machine that the device is part of.

/// What the guest asked of the machine, or told about itself, by an access to a device.
///
/// A device does none of it: whoever made the access for the guest passes the action on.
#[must_use = "the guest asked for it, and nobody else knows"]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Nothing beyond the device.
    #[default]
    None,
    /// The machine is to be reset.
    Reset,
    /// The machine is to be switched off.
    PowerOff,
    /// The guest's kernel printed that it panicked. Boxed, so that an action fits into two registers.
    Panicked(Box<Panic>),
}

/// A panic of the guest's kernel, as far as its console tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panic {
    /// The reason that the kernel gave, without control characters.
    pub reason: String,
}

impl Action {
    /// A panic of the guest's kernel for `reason`.
    pub fn panicked(reason: String) -> Action {
        Action::Panicked(Box::new(Panic { reason }))
    }

    /// The action of two accesses in a row: the first that there is, as a guest that asked for one
    /// has no say in what comes after.
    pub fn or(self, later: Action) -> Action {
        match self {
            Action::None => later,
            action => action,
        }
    }

    /// Adds the action of a later access, as [`Action::or`] does.
    pub fn add(&mut self, later: Action) {
        // Hardly ever is there one.
        if !matches!(later, Action::None) {
            *self = std::mem::take(self).or(later);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_action_of_several_is_the_one() {
        let mut action = Action::None;
        action.add(Action::None);
        assert_eq!(action, Action::None);
        action.add(Action::panicked("first".to_owned()));
        action.add(Action::PowerOff);
        action.add(Action::panicked("second".to_owned()));
        assert_eq!(action, Action::panicked("first".to_owned()));
        assert_eq!(Action::None.or(Action::Reset), Action::Reset);
        assert_eq!(Action::Reset.or(Action::PowerOff), Action::Reset);
    }

    #[test]
    fn an_action_fits_into_two_registers() {
        assert!(size_of::<Action>() <= 2 * size_of::<usize>());
    }
}
