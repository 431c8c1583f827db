//! The single owner of a VM's interrupts: lines, irqfds, and KVM's GSI routing table. Nothing else
//! calls KVM_IRQ_LINE, KVM_IRQFD or KVM_SET_GSI_ROUTING.
//!
//! KVM_SET_GSI_ROUTING replaces the whole table (Documentation/virt/kvm/api.rst), including KVM's
//! default routes of pins. So the table is kept here as a value, pins and MSIs together, and always
//! set as a whole.

use anyhow::{Context, Result, ensure};
use armlet_devices::IrqLine;
use armlet_devices::ioapic::{Message, PINS};
use armlet_devices::sync::{bell, lock};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MSI_VALID_DEVID, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// The pins of KVM's interrupt controllers, to which it routes GSIs by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pins {
    /// None: KVM emulates only local APICs.
    None,
    /// GSI n is routed to SPI n, for this many SPIs of a GIC (arch/arm64/kvm/vgic/vgic-irqfd.c:
    /// `kvm_vgic_setup_default_irq_routing`).
    Spis(u32),
    /// GSI n is routed to pin n of the I/O APIC, and those of the 8259s to both controllers
    /// (arch/x86/kvm/irq.c: `default_routing`).
    Pc,
}

impl Pins {
    /// Returns GSI, controller (`KVM_IRQCHIP_*`) and pin of each route.
    fn routes(self) -> Vec<[u32; 3]> {
        match self {
            Pins::None => Vec::new(),
            Pins::Spis(count) => (0..count).map(|spi| [spi, 0, spi]).collect(),
            Pins::Pc => {
                let first = (0..8).map(|gsi| [gsi, 0, gsi]);
                let second = (8..16).map(|gsi| [gsi, 1, gsi - 8]);
                let io_apic = (0..PINS as u32).map(|gsi| [gsi, 2, gsi]);
                first.chain(second).chain(io_apic).collect()
            }
        }
    }
}

/// An MSI, as an entry of the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The message.
    pub message: Message,
    /// The DeviceID of the sender, which an ITS needs (KVM_MSI_VALID_DEVID).
    pub device: Option<u32>,
}

impl From<Message> for Route {
    /// The MSI of an interrupt controller itself.
    fn from(message: Message) -> Route {
        Route {
            message,
            device: None,
        }
    }
}

/// What an irqfd is routed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lead {
    /// The pin that KVM routes this GSI to by default.
    Pin(u32),
    /// A pin that changes, to which [`Edge::lead_to`] routes it.
    AnyPin,
    /// An MSI, which [`Edge::send`] sets.
    Msi,
}

/// The GSI routing table.
#[derive(Debug, PartialEq, Eq)]
struct Table {
    pins: Pins,
    /// MSIs by GSI.
    messages: BTreeMap<u32, Route>,
    /// The GSIs that are allocated to irqfds of MSIs.
    allocated: BTreeSet<u32>,
}

impl Table {
    fn new(pins: Pins) -> Table {
        Table {
            pins,
            messages: BTreeMap::new(),
            allocated: BTreeSet::new(),
        }
    }

    /// Allocates the lowest free GSI above those of pins, and of an I/O APIC in user space.
    fn allocate(&mut self) -> u32 {
        let first = match self.pins {
            Pins::Spis(count) => count,
            Pins::None | Pins::Pc => PINS as u32,
        };
        let free = (first..).find(|gsi| !self.allocated.contains(gsi));
        // Descriptors run out long before numbers do.
        let gsi = free.unwrap_or(u32::MAX);
        self.allocated.insert(gsi);
        gsi
    }

    /// Changes the MSIs of GSIs and, if that changes the table, passes the whole table to `give`.
    ///
    /// # Errors
    /// The error of `give`; the table is then unchanged.
    fn change(
        &mut self,
        changes: impl Iterator<Item = (u32, Option<Route>)>,
        give: impl FnOnce(&[kvm_irq_routing_entry]) -> Result<()>,
    ) -> Result<()> {
        // The previous MSI of each GSI that changes.
        let mut before = Vec::new();
        for (gsi, route) in changes {
            let old = match route {
                Some(route) => self.messages.insert(gsi, route),
                None => self.messages.remove(&gsi),
            };
            if old != route {
                before.push((gsi, old));
            }
        }
        if before.is_empty() {
            return Ok(());
        }
        give(&self.entries()).inspect_err(|_| {
            // In reverse, because a GSI may have changed twice.
            for (gsi, old) in before.into_iter().rev() {
                match old {
                    Some(route) => self.messages.insert(gsi, route),
                    None => self.messages.remove(&gsi),
                };
            }
        })
    }

    /// Returns the table in KVM's format.
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let pins = self.pins.routes().into_iter().map(|[gsi, chip, pin]| {
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip.irqchip = chip;
            entry.u.irqchip.pin = pin;
            entry
        });
        let messages = self.messages.iter().map(|(&gsi, route)| {
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = route.message.address as u32;
            entry.u.msi.address_hi = (route.message.address >> 32) as u32;
            entry.u.msi.data = route.message.data;
            if let Some(device) = route.device {
                entry.flags = KVM_MSI_VALID_DEVID;
                entry.u.msi.__bindgen_anon_1.devid = device;
            }
            entry
        });
        pins.chain(messages).collect()
    }
}

/// A VM's interrupts.
pub struct Interrupts {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

/// An irqfd, whose eventfd stays the same when its route changes. One for an MSI or for a pin that changes is
/// detached, and its GSI freed, on drop.
pub struct Edge {
    interrupts: Arc<Interrupts>,
    call: Arc<EventFd>,
    lead: Lead,
    /// The GSI that is allocated to an MSI.
    own: Option<u32>,
    /// The GSI that the eventfd is attached to, if it is attached.
    attached: Mutex<Option<u32>>,
}

impl Edge {
    /// Returns the eventfd: writing it signals an edge.
    #[must_use]
    pub fn call(&self) -> Arc<EventFd> {
        Arc::clone(&self.call)
    }

    /// Sets the MSI, or masks it: an edge that is signalled while it is masked stays in the eventfd, and
    /// arrives when there is an MSI again (virt/kvm/eventfd.c: kvm_irqfd_assign looks at it).
    ///
    /// # Errors
    /// When KVM rejects the table or the irqfd, or the irqfd is a pin's.
    pub fn send(&self, route: Option<Route>) -> Result<()> {
        let gsi = self.own.context("the irqfd of a pin sends no MSI")?;
        let mut attached = lock(&self.attached);
        if route.is_none() {
            self.detach(&mut attached)?;
        }
        self.interrupts.change([(gsi, route)].into_iter())?;
        match route {
            Some(_) => self.attach(&mut attached, gsi),
            None => Ok(()),
        }
    }

    /// Routes it to a pin by the GSI that KVM routes to that by default, or masks it as [`Self::send`] does.
    ///
    /// # Errors
    /// When KVM rejects it, or the irqfd is not one whose pin changes.
    pub fn lead_to(&self, pin: Option<u32>) -> Result<()> {
        ensure!(self.lead == Lead::AnyPin, "the pin of this irqfd is fixed");
        let mut attached = lock(&self.attached);
        if *attached != pin {
            self.detach(&mut attached)?;
        }
        match pin {
            Some(gsi) => self.attach(&mut attached, gsi),
            None => Ok(()),
        }
    }

    fn attach(&self, attached: &mut Option<u32>, gsi: u32) -> Result<()> {
        if attached.is_none() {
            let vm = &self.interrupts.vm;
            vm.register_irqfd(&self.call, gsi)
                .with_context(|| format!("KVM rejects an irqfd for GSI {gsi}"))?;
            *attached = Some(gsi);
        }
        Ok(())
    }

    fn detach(&self, attached: &mut Option<u32>) -> Result<()> {
        if let Some(gsi) = attached.take() {
            let vm = &self.interrupts.vm;
            vm.unregister_irqfd(&self.call, gsi)
                .with_context(|| format!("KVM keeps the irqfd of GSI {gsi}"))?;
        }
        Ok(())
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        if let Lead::Pin(_) = self.lead {
            return;
        }
        if let Err(error) = self.detach(&mut lock(&self.attached)) {
            log::error!("{error:#}");
        }
        let Some(gsi) = self.own else { return };
        if let Err(error) = self.send(None) {
            log::error!("KVM keeps the route of GSI {gsi}: {error:#}");
        }
        lock(&self.interrupts.table).allocated.remove(&gsi);
    }
}

impl Interrupts {
    /// Creates the owner for a VM whose controllers in KVM have these pins.
    #[must_use]
    pub fn new(vm: &Arc<VmFd>, pins: Pins) -> Arc<Interrupts> {
        Arc::new(Interrupts {
            vm: Arc::clone(vm),
            table: Mutex::new(Table::new(pins)),
        })
    }

    /// Returns a level-triggered line, by its number for KVM_IRQ_LINE.
    #[must_use]
    pub fn line(&self, number: u32) -> Arc<dyn IrqLine> {
        Arc::new(Level {
            vm: Arc::clone(&self.vm),
            number,
        })
    }

    /// Creates an irqfd. One for an MSI, or for a pin that changes, is masked at first.
    ///
    /// # Errors
    /// When the process has no room for more descriptors, and KVM's error.
    pub fn edge(self: &Arc<Self>, lead: Lead) -> Result<Edge> {
        let call = bell().context("cannot make an eventfd")?;
        let edge = Edge {
            interrupts: Arc::clone(self),
            call: Arc::new(call),
            lead,
            own: (lead == Lead::Msi).then(|| lock(&self.table).allocate()),
            attached: Mutex::new(None),
        };
        if let Lead::Pin(gsi) = lead {
            edge.attach(&mut lock(&edge.attached), gsi)?;
        }
        Ok(edge)
    }

    /// Routes each of these GSIs to an MSI, or to nothing.
    ///
    /// # Errors
    /// When KVM rejects the table; nothing has changed then.
    pub fn send(&self, changes: impl Iterator<Item = (u32, Option<Message>)>) -> Result<()> {
        self.change(changes.map(|(gsi, message)| (gsi, message.map(Route::from))))
    }

    fn change(&self, changes: impl Iterator<Item = (u32, Option<Route>)>) -> Result<()> {
        // Locked until KVM has the table, so that of two changes the later one prevails.
        let mut table = lock(&self.table);
        table.change(changes, |entries| {
            let routing = KvmIrqRouting::from_entries(entries)
                .with_context(|| format!("{} interrupt routes are too many", entries.len()))?;
            self.vm
                .set_gsi_routing(&routing)
                .with_context(|| format!("KVM rejects {} interrupt routes", entries.len()))
        })
    }
}

/// A level-triggered line of KVM's interrupt controller.
struct Level {
    vm: Arc<VmFd>,
    number: u32,
}

impl IrqLine for Level {
    fn set(&self, high: bool) {
        // It fails only for a line that the controller does not have, which the plan excludes.
        if let Err(error) = self.vm.set_irq_line(self.number, high) {
            log::error!("cannot set interrupt line {:#x}: {error}", self.number);
        }
    }

    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(data: u32) -> Route {
        Route::from(Message {
            address: 0x1_fee0_0000,
            data,
        })
    }

    fn table() -> Table {
        Table::new(Pins::Spis(2))
    }

    #[test]
    fn numbers_for_messages_lie_behind_those_of_pins_and_are_given_again() {
        for (pins, first) in [(Pins::Spis(2), 2), (Pins::Pc, 24), (Pins::None, 24)] {
            let mut table = Table::new(pins);
            let gsis = [table.allocate(), table.allocate(), table.allocate()];
            assert_eq!(gsis, [first, first + 1, first + 2], "{pins:?}");
            table.allocated.remove(&gsis[1]);
            assert_eq!([table.allocate(), table.allocate()], [gsis[1], first + 3]);
            let taken = table.pins.routes().iter().any(|[gsi, ..]| *gsi >= first);
            assert!(!taken, "{pins:?}");
        }
    }

    #[test]
    fn a_message_says_who_sends_it_and_changes_and_is_masked_by_itself() {
        let mut table = table();
        let (first, second) = (table.allocate(), table.allocate());
        let sent = |data| {
            let device = Some(0x0108);
            Some(Route {
                device,
                ..message(data)
            })
        };
        let mut shown = |gsi, route| {
            let mut shown = Vec::new();
            let give = |entries: &[kvm_irq_routing_entry]| {
                let messages = entries.iter().filter(|entry| entry.gsi >= 2);
                // SAFETY: messages have the member `msi`, and with the flag an ID.
                shown.extend(messages.map(|entry| unsafe {
                    let msi = entry.u.msi;
                    (entry.gsi, entry.flags, msi.data, msi.__bindgen_anon_1.devid)
                }));
                assert_eq!(entries.len() - shown.len(), 2, "the pins stay");
                Ok(())
            };
            let change = [(gsi, route)].into_iter();
            table.change(change, give).expect("taken");
            shown
        };
        let (id, flag) = (0x0108, KVM_MSI_VALID_DEVID);
        assert_eq!(shown(first, sent(1)), [(first, flag, 1, id)]);
        let both = [(first, flag, 1, id), (second, 0, 2, 0)];
        assert_eq!(shown(second, Some(message(2))), both);
        let changed = [(first, flag, 3, id), (second, 0, 2, 0)];
        assert_eq!(shown(first, sent(3)), changed);
        assert_eq!(shown(first, None), [(second, 0, 2, 0)]);
        assert_eq!(shown(first, sent(3)), changed);
    }

    #[test]
    fn messages_leave_the_routes_of_pins_in_the_table() {
        let mut table = table();
        let changes = [(32, Some(message(7))), (33, None)];
        table
            .change(changes.into_iter(), |_| Ok(()))
            .expect("taken");
        let entries = table.entries();
        let kinds: Vec<(u32, u32)> = entries
            .iter()
            .map(|entry| (entry.gsi, entry.type_))
            .collect();
        assert_eq!(
            kinds,
            [
                (0, KVM_IRQ_ROUTING_IRQCHIP),
                (1, KVM_IRQ_ROUTING_IRQCHIP),
                (32, KVM_IRQ_ROUTING_MSI)
            ]
        );
        // SAFETY: the type says which member of the union is the valid one.
        let (pin, sent) = unsafe { (entries[1].u.irqchip, entries[2].u.msi) };
        assert_eq!((pin.irqchip, pin.pin), (0, 1));
        assert_eq!((sent.address_lo, sent.address_hi), (0xfee0_0000, 1));
        assert_eq!(sent.data, 7);
    }

    #[test]
    fn pins_of_a_pc_are_those_that_kvm_makes() {
        let routes = Pins::Pc.routes();
        assert_eq!(routes.len(), 40);
        let of = |gsi| -> Vec<[u32; 3]> {
            let routes = routes.iter().copied();
            routes.filter(|route| route[0] == gsi).collect()
        };
        assert_eq!(of(4), [[4, 0, 4], [4, 2, 4]]);
        assert_eq!(of(12), [[12, 1, 4], [12, 2, 12]]);
        assert_eq!(of(23), [[23, 2, 23]]);
        assert_eq!(Pins::None.routes(), [[0; 3]; 0]);
    }

    #[test]
    fn what_changes_nothing_is_not_given_to_kvm_again() {
        let mut table = table();
        let mut is_given = |change| {
            let mut given = false;
            let give = |_: &[_]| {
                given = true;
                Ok(())
            };
            table
                .change([(32, change)].into_iter(), give)
                .expect("taken");
            given
        };
        assert!(!is_given(None));
        assert!(is_given(Some(message(1))));
        assert!(!is_given(Some(message(1))));
        assert!(is_given(Some(message(2))));
        assert!(is_given(None));
        assert_eq!(table, self::table());
    }

    #[test]
    fn what_kvm_refuses_is_taken_back_and_given_again_when_it_is_asked_for_again() {
        let mut table = table();
        let first = [(32, Some(message(1))), (34, Some(message(4)))];
        table.change(first.into_iter(), |_| Ok(())).expect("taken");
        let changes = [
            (32, Some(message(2))),
            (33, Some(message(3))),
            (34, None),
            (32, Some(message(5))),
        ];
        let before = table.entries().len();
        let refused = table.change(changes.into_iter(), |_| anyhow::bail!("no room"));
        assert_eq!(refused.expect_err("refused").to_string(), "no room");
        assert_eq!(
            table.messages.iter().collect::<Vec<_>>(),
            [(&32, &message(1)), (&34, &message(4))]
        );
        assert_eq!(table.entries().len(), before);
        let mut given = 0;
        let give = |entries: &[kvm_irq_routing_entry]| {
            given = entries.len();
            Ok(())
        };
        table.change(changes.into_iter(), give).expect("taken");
        assert_eq!(given, before, "two messages beside the pins, as before");
        assert_eq!(table.messages.get(&32), Some(&message(5)));
    }
}
