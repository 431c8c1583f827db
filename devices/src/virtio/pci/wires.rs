//! How a function interrupts the guest: by MSI-X, by INTA, or, where the driver polls, by ISR status alone.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::IrqLine;
use crate::pci::MsiVectors;
use crate::pci::msix::{Calls, Msix};
use crate::sync::ring;
use crate::virtio::transport::{DRIVER_OK, NEEDS_RESET};
use crate::virtio::{Interrupts, Vector, lock};

/// ISR status: a queue was used; the configuration changed (section 4.1.4.5).
pub(super) const ISR_QUEUE: u8 = 1;
pub(super) const ISR_CONFIG: u8 = 2;

/// How a function interrupts the guest.
pub enum Wires {
    /// By MSI-X.
    Msix(Arc<dyn MsiVectors>),
    /// By INTA, where there is no MSI.
    Pin {
        /// The level-triggered line.
        line: Arc<dyn IrqLine>,
        /// An eventfd that drives it until the guest has handled it (an irqfd with a resample eventfd),
        /// for whoever interrupts the guest in our stead. ISR then always shows a used queue.
        call: Option<Arc<EventFd>>,
    },
}

/// State that the device's thread changes too.
pub(super) struct Shared {
    pub(super) msix: Option<Mutex<Msix>>,
    calls: Option<Arc<Calls>>,
    line: Option<Arc<dyn IrqLine>>,
    call: Option<Arc<EventFd>>,
    pub(super) state: Mutex<State>,
}

/// The sources of device_status and ISR status.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct State {
    pub(super) status: u32,
    pub(super) isr: u8,
    /// INTx disable (Command).
    pub(super) no_intx: bool,
}

impl Shared {
    /// Creates the state of a function whose device has so many queues, and that the driver has not
    /// touched.
    pub(super) fn new(wires: Wires, queues: usize) -> Shared {
        let (msix, line, call) = match wires {
            Wires::Msix(vectors) => (Some(Msix::new(1 + queues, vectors)), None, None),
            Wires::Pin { line, call } => (None, Some(line), call),
        };
        Shared {
            calls: msix.as_ref().map(Msix::calls),
            msix: msix.map(Mutex::new),
            line,
            call,
            state: Mutex::default(),
        }
    }

    /// Interrupts by INTA, or by nothing but ISR status, which a driver may poll.
    fn signal_isr(&self, bits: u8) {
        let mut state = lock(&self.state);
        state.isr |= bits;
        let is_silent = state.no_intx;
        match (&self.call, &self.line) {
            _ if is_silent => {}
            (Some(call), _) => ring(call),
            (None, Some(line)) => line.set(true),
            (None, None) => {}
        }
    }

    /// Returns ISR status and clears it, as a read does.
    pub(super) fn take_isr(&self) -> u8 {
        let mut state = lock(&self.state);
        let mut isr = std::mem::take(&mut state.isr);
        if self.call.is_some() && state.status & DRIVER_OK != 0 {
            isr |= ISR_QUEUE;
        }
        self.drive(*state);
        isr
    }

    /// Drives the line as the state says, unless an irqfd does.
    pub(super) fn drive(&self, state: State) {
        if let (Some(line), None) = (&self.line, &self.call) {
            line.set(state.isr != 0 && !state.no_intx);
        }
    }
}

/// The device's end of [`Shared`].
pub(super) struct Wire(pub(super) Arc<Shared>);

/// Returns the MSI-X source of an interrupt.
fn source(vector: Vector) -> usize {
    match vector {
        Vector::Config => 0,
        Vector::Queue(queue) => 1 + usize::from(queue),
    }
}

impl Interrupts for Wire {
    fn signal(&self, vector: Vector) {
        let calls = self.0.calls.as_ref();
        if calls.is_some_and(|calls| calls.signal(source(vector))) {
            return;
        }
        self.0.signal_isr(match vector {
            Vector::Config => ISR_CONFIG,
            Vector::Queue(_) => ISR_QUEUE,
        });
    }

    fn needs_reset(&self) {
        let works = {
            let mut state = lock(&self.0.state);
            state.status |= NEEDS_RESET;
            state.status & DRIVER_OK != 0
        };
        if works {
            self.signal(Vector::Config);
        }
    }

    fn descriptor(&self, vector: Vector) -> Option<Arc<EventFd>> {
        match &self.0.msix {
            Some(msix) => lock(msix).call(source(vector)),
            None => self.0.call.clone(),
        }
    }
}
