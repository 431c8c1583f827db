//! What an access to a device means for the machine as a whole.

/// What the guest requested of the machine, or revealed about itself, by an access to a device.
///
/// The device does not carry it out: it returns the action, and the caller passes it on.
#[must_use = "the guest's request is lost if the action is dropped"]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Nothing beyond the device.
    #[default]
    None,
    /// Reset the machine.
    Reset,
    /// Power the machine off.
    PowerOff,
    /// The guest's kernel printed that it panicked. Boxed, so that an action fits in two registers.
    Panicked(Box<Panic>),
}

/// A panic of the guest's kernel, as far as its console tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panic {
    /// The reason that the kernel gave, without control characters.
    pub reason: String,
}

impl Action {
    /// Returns the action for a panic of the guest's kernel with `reason`.
    pub fn panicked(reason: String) -> Action {
        Action::Panicked(Box::new(Panic { reason }))
    }

    /// Combines the actions of two accesses in a row: the first one wins, because a guest that
    /// asked for a reset or power-off does not get to ask for anything after it.
    pub fn or(self, later: Action) -> Action {
        match self {
            Action::None => later,
            action => action,
        }
    }

    /// Combines this action with that of a later access, as [`Action::or`] does.
    pub fn add(&mut self, later: Action) {
        // The common case, kept free of a move.
        if !matches!(later, Action::None) {
            *self = std::mem::take(self).or(later);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_several_actions_wins() {
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
    fn an_action_fits_in_two_registers() {
        assert!(size_of::<Action>() <= 2 * size_of::<usize>());
    }
}
