//! How a transport reaches its device: by a lock, or by the mailbox of the thread that owns it.
//!
//! A vCPU that resets or configures a device needs it for a moment, while the thread that works with
//! a busy one may be in the middle of a request for long. So that thread owns the device; others post
//! what they want done and wait for it, and the thread looks for post between two requests.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use crate::sync::{bell, lock, ring};

/// How long someone waits for a device before the user hears of it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked whether a lock is free.
const GLANCE: Duration = Duration::from_micros(100);

/// Something to be done with a device.
pub type Letter = Box<dyn FnOnce(&mut dyn VirtioDevice) + Send>;

/// The way to a device, whoever has it.
pub trait Access: Send + Sync {
    /// Has something done with the device, and returns when it is. `what` is done to which device,
    /// for the message of a wait that takes long: there is no end to it but the device's, because
    /// a driver may use its memory again when its write to a register returns.
    fn run(&self, what: fmt::Arguments<'_>, letter: Letter);
}

/// Says that a wait takes long, at falling rate.
struct Patience {
    begun: Instant,
    told: Duration,
}

impl Patience {
    fn new() -> Patience {
        Patience {
            begun: Instant::now(),
            told: PATIENCE,
        }
    }

    /// Says so if it is time to; returns how long it is until the next time.
    fn look(&mut self, what: fmt::Arguments<'_>) -> Duration {
        let waited = self.begun.elapsed();
        if waited >= self.told {
            self.told *= 2;
            log::warn!(
                "{what} has waited {} s for the end of a request that the host is at work on",
                waited.as_secs()
            );
        }
        self.told.saturating_sub(waited)
    }
}

/// The way to a device that nobody keeps for long: its lock.
pub(crate) struct Direct(pub(crate) Arc<Mutex<dyn VirtioDevice>>);

impl Access for Direct {
    fn run(&self, what: fmt::Arguments<'_>, letter: Letter) {
        let mut patience = Patience::new();
        let mut device = loop {
            match self.0.try_lock() {
                Ok(device) => break device,
                Err(TryLockError::Poisoned(device)) => break device.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
            patience.look(what);
            std::thread::sleep(GLANCE);
        };
        letter(&mut *device);
    }
}

/// The mailbox of a device that one thread owns, for as long as it runs.
pub struct Mailbox {
    device: Arc<Mutex<dyn VirtioDevice>>,
    /// Whether there is post.
    has_post: AtomicBool,
    /// Rings when there is.
    bell: EventFd,
    post: Mutex<Post>,
    answered: Condvar,
}

#[derive(Default)]
struct Post {
    /// Whether a thread owns the device; without one who wants something does it.
    is_owned: bool,
    letters: VecDeque<Letter>,
    /// Letters that were posted so far, and those of them that were answered.
    posted: u64,
    answered: u64,
}

impl Mailbox {
    /// The mailbox of a device that nobody owns yet.
    ///
    /// # Errors
    /// A process without room for another descriptor.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>) -> io::Result<Mailbox> {
        Ok(Mailbox {
            device,
            has_post: AtomicBool::new(false),
            bell: bell()?,
            post: Mutex::default(),
            answered: Condvar::new(),
        })
    }

    /// The descriptor that is readable when there is post, or the owner is to look up.
    #[must_use]
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// The calling thread owns the device from here on, until it drops what it gets.
    #[must_use]
    pub fn own(&self) -> Owner<'_> {
        // In this order: who does something without an owner has both.
        let mut post = lock(&self.post);
        let device = lock(&self.device);
        post.is_owned = true;
        Owner {
            mailbox: self,
            device,
        }
    }
}

impl Access for Mailbox {
    fn run(&self, what: fmt::Arguments<'_>, letter: Letter) {
        let mut post = lock(&self.post);
        if !post.is_owned {
            letter(&mut *lock(&self.device));
            return;
        }
        let number = post.posted;
        post.posted += 1;
        post.letters.push_back(letter);
        self.has_post.store(true, Ordering::Release);
        ring(&self.bell);
        let mut patience = Patience::new();
        while post.answered <= number {
            let most = patience.look(what).max(GLANCE);
            let waited = self.answered.wait_timeout(post, most);
            post = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A device in the hands of the thread that owns it.
pub struct Owner<'a> {
    mailbox: &'a Mailbox,
    device: MutexGuard<'a, dyn VirtioDevice + 'static>,
}

impl Owner<'_> {
    /// The device.
    #[must_use]
    pub fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut *self.device
    }

    /// Does what has been posted up to now, if anything: to be called between two requests. What is
    /// posted meanwhile waits for the next call, so that whoever posts again and again does not keep
    /// the owner from its work.
    pub fn answer_post(&mut self) {
        if !self.mailbox.has_post.load(Ordering::Acquire) {
            return;
        }
        // What is posted later rings again.
        let _ = self.mailbox.bell.read();
        self.mailbox.has_post.store(false, Ordering::Release);
        let count = lock(&self.mailbox.post).letters.len();
        for _ in 0..count {
            self.answer_one();
        }
    }

    fn answer_one(&mut self) -> bool {
        let letter = lock(&self.mailbox.post).letters.pop_front();
        let Some(letter) = letter else {
            return false;
        };
        letter(&mut *self.device);
        lock(&self.mailbox.post).answered += 1;
        self.mailbox.answered.notify_all();
        true
    }
}

impl Drop for Owner<'_> {
    /// Nobody waits for a thread that ends.
    fn drop(&mut self) {
        loop {
            while self.answer_one() {}
            let mut post = lock(&self.mailbox.post);
            if post.letters.is_empty() {
                post.is_owned = false;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rng::Rng;
    use std::sync::mpsc::channel;

    fn mailbox() -> Arc<Mailbox> {
        let device = Rng::new(Box::new(|_| true));
        Arc::new(Mailbox::new(Arc::new(Mutex::new(device))).expect("a descriptor"))
    }

    fn note(notes: &Arc<Mutex<Vec<u32>>>, number: u32) -> Letter {
        let notes = Arc::clone(notes);
        Box::new(move |device| {
            assert_eq!(device.id(), 4);
            lock(&notes).push(number);
        })
    }

    #[test]
    fn without_an_owner_who_wants_something_does_it() {
        let (mailbox, notes) = (mailbox(), Arc::default());
        mailbox.run(format_args!("a test"), note(&notes, 1));
        assert_eq!(*lock(&notes), [1]);
        drop(mailbox.own());
        mailbox.run(format_args!("a test"), note(&notes, 2));
        assert_eq!(*lock(&notes), [1, 2]);
        assert!(mailbox.bell().read().is_err(), "nobody had to be called");
    }

    #[test]
    fn the_owner_answers_between_two_requests_and_whoever_posted_waits_for_it() {
        let (mailbox, notes) = (mailbox(), Arc::default());
        let mut owner = mailbox.own();
        let (done, is_done) = channel();
        let (poster, posted) = (Arc::clone(&mailbox), Arc::clone(&notes));
        let thread = std::thread::spawn(move || {
            for number in 0..1000 {
                poster.run(format_args!("a test"), note(&posted, number));
                done.send(number).expect("the test listens");
            }
        });
        for number in 0..1000 {
            // At work on a request until someone wants something.
            while !mailbox.has_post.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            assert!(is_done.try_recv().is_err(), "it does not wait");
            owner.answer_post();
            assert_eq!(is_done.recv(), Ok(number));
        }
        thread.join().expect("it did not panic");
        assert!(lock(&notes).iter().copied().eq(0..1000));
    }

    #[test]
    fn nobody_waits_for_an_owner_that_ended() {
        let (mailbox, notes) = (mailbox(), Arc::default());
        let owner = mailbox.own();
        let poster = Arc::clone(&mailbox);
        let letter = note(&notes, 1);
        let thread = std::thread::spawn(move || poster.run(format_args!("a test"), letter));
        while !mailbox.has_post.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        drop(owner);
        thread.join().expect("it did not panic");
        mailbox.run(format_args!("a test"), note(&notes, 2));
        assert_eq!(*lock(&notes), [1, 2]);
    }
}
