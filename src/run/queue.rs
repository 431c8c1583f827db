//! What other threads tell the event loop: at most one of each kind at a time, however often a guest
//! causes it.

use crate::vcpu::Told;
use armlet_devices::action::Action;
use armlet_devices::sync::{lock, ring};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// Something that happened.
#[derive(Debug)]
pub(super) enum Event {
    /// A vCPU has something to tell.
    Told(Told),
    /// The console takes input.
    Room,
    /// A burst of output began.
    Burst,
    /// The clock's alarm was set anew.
    Deadline,
}

/// What happened since the event loop looked.
#[derive(Debug, Default)]
pub(super) struct News {
    /// The guest's kernel said that it panicked; the first time that it did.
    pub(super) panicked: Option<String>,
    /// The guest's end or reset: the first that was told.
    pub(super) end: Option<Told>,
    /// A vCPU is asked whether it is off.
    pub(super) asked: bool,
    /// All vCPUs are off.
    pub(super) all_off: bool,
    /// The console takes input.
    pub(super) room: bool,
    /// A burst of output began.
    pub(super) burst: bool,
    /// The clock's alarm was set anew.
    pub(super) deadline: bool,
}

impl News {
    /// Adds an event; returns whether it says what was not said yet.
    fn add(&mut self, event: Event) -> bool {
        let flag = match event {
            Event::Told(Told::Panicked(what)) => {
                let is_first = self.panicked.is_none();
                self.panicked.get_or_insert(what);
                return is_first;
            }
            Event::Told(Told::Asked) => &mut self.asked,
            Event::Told(Told::AllOff) => &mut self.all_off,
            Event::Told(told) => {
                let is_first = self.end.is_none();
                self.end.get_or_insert(told);
                return is_first;
            }
            Event::Room => &mut self.room,
            Event::Burst => &mut self.burst,
            Event::Deadline => &mut self.deadline,
        };
        !std::mem::replace(flag, true)
    }
}

/// One end of the queue. Whoever tells something wakes the event loop.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    news: Arc<Mutex<News>>,
    bell: Arc<EventFd>,
}

impl Queue {
    /// A queue that rings `bell`, which does not wait and is readable when there is something to
    /// take.
    pub(super) fn new(bell: EventFd) -> Queue {
        Queue {
            news: Arc::default(),
            bell: Arc::new(bell),
        }
    }

    pub(super) fn tell(&self, event: Event) {
        // What was said and not taken yet has rung already.
        if lock(&self.news).add(event) {
            ring(&self.bell);
        }
    }

    /// Tells what the guest's console output means for the machine.
    pub(super) fn tell_action(&self, action: Action) {
        if let Some(told) = Told::by(action) {
            self.tell(Event::Told(told));
        }
    }

    /// Takes what was told.
    pub(super) fn take(&self) -> News {
        // What is told after this read rings again.
        let _ = self.bell.read();
        std::mem::take(&mut lock(&self.news))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn queue() -> Queue {
        Queue::new(EventFd::new(EFD_NONBLOCK).expect("a descriptor"))
    }

    #[test]
    fn a_flood_of_events_is_one_of_each_kind() {
        let queue = queue();
        for number in 0..65_776 {
            queue.tell(Event::Deadline);
            queue.tell(Event::Room);
            queue.tell(Event::Told(Told::Panicked(number.to_string())));
            queue.tell(Event::Told(Told::Asked));
        }
        assert_eq!(queue.bell.read().expect("it rang"), 4);
        queue.tell(Event::Burst);
        let news = queue.take();
        assert_eq!(news.panicked.as_deref(), Some("0"));
        assert!(news.deadline && news.room && news.burst && news.asked);
        assert!(news.end.is_none() && !news.all_off);
        let news = queue.take();
        assert!(!news.deadline && !news.room && !news.burst && news.panicked.is_none());
        queue.tell(Event::Deadline);
        assert_eq!(queue.bell.read().expect("it rings again"), 1);
    }

    #[test]
    fn the_first_end_is_the_one() {
        let queue = queue();
        queue.tell(Event::Told(Told::Reset));
        queue.tell(Event::Told(Told::PowerOff));
        assert_eq!(queue.take().end, Some(Told::Reset));
    }
}
