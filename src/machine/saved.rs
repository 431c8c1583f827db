//! The state of a paused machine, as plain data, and a machine that is made the one that was saved.

use super::Machine;
use crate::kvm::KvmArch;
use crate::serial::{SerialConsole, UartState};
use anyhow::{Context, Result, bail, ensure};
use armlet_devices::action::Action;
use armlet_devices::cmos::CmosState;
use armlet_devices::i8042::I8042State;
use armlet_devices::ioapic::IoApicState;
use armlet_devices::persist::{Persist, RestoreError};
use armlet_devices::pl031::Pl031State;
use armlet_devices::pl061::Pl061State;
use armlet_devices::power::{AcpiPowerState, ResetControlState};
use armlet_devices::sync::lock;
use armlet_devices::virtio::{DeviceState, FsState, RegistersState};
use armlet_system::status::{Fault, Status, status_of};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// The state of a machine but for guest memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState<V, C> {
    /// The vCPUs by index.
    pub vcpus: Vec<V>,
    /// What KVM emulates beside them.
    pub chip: C,
    /// The devices that are not virtio.
    pub devices: DevicesState,
    /// The virtio devices by name, in the order of their windows.
    pub virtio: Vec<(String, RegistersState)>,
}

/// The state of a machine of an architecture.
pub type StateOf<A> = MachineState<<A as KvmArch>::VcpuState, <A as KvmArch>::ChipState>;

/// The states of the devices that are not virtio; `None` where the board has none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DevicesState {
    serial: Option<UartState>,
    clock: Option<Pl031State>,
    gpio: Option<Pl061State>,
    acpi: Option<AcpiPowerState>,
    cmos: Option<CmosState>,
    i8042: Option<I8042State>,
    reset_control: Option<ResetControlState>,
    io_apic: Option<IoApicState>,
}

fn saved<D: Persist>(device: &Option<Arc<Mutex<D>>>) -> Option<D::State> {
    device.as_ref().map(|device| lock(device).save())
}

/// Makes the device called `what` the one that was saved.
fn restored<D: Persist>(
    what: &str,
    device: &Option<Arc<Mutex<D>>>,
    state: &Option<D::State>,
) -> Result<()> {
    one(what, device, state, |device, state| device.restore(state))
}

fn one<D: ?Sized, S>(
    what: &str,
    device: &Option<Arc<Mutex<D>>>,
    state: &Option<S>,
    restore: impl FnOnce(&mut D, &S) -> Result<(), RestoreError>,
) -> Result<()> {
    match (device, state) {
        (None, None) => Ok(()),
        (Some(device), Some(state)) => {
            let mut device = lock(device);
            restore(&mut device, state).with_context(|| format!("cannot restore the {what}"))
        }
        (Some(_), None) => bail!("it has no state of the {what}, which this machine has"),
        (None, Some(_)) => bail!("it has the state of a {what}, which this machine has not"),
    }
}

impl<A: KvmArch> Machine<A> {
    /// Returns the state of the machine, which is paused, and what the console's last output means for
    /// it.
    ///
    /// # Errors
    /// What cannot be read, and KVM's error; a vCPU that has ended.
    pub fn save(&self) -> Result<(StateOf<A>, Action)> {
        let mut vcpus = Vec::new();
        for index in 0..self.vcpus.count() {
            let chip = Arc::clone(&self.chip);
            vcpus.push(self.on_vcpu(index, move |vcpu| A::save_vcpu(vcpu, &chip))?);
        }
        let mut chip = A::save_chip(&self.vm, &self.chip, &vcpus)?;
        if let Some(time) = &*lock(&self.time) {
            A::stop_time(time, &mut vcpus, &mut chip);
        }
        let mut virtio = Vec::new();
        for (name, device) in self.workers.devices() {
            let state = lock(device).save().with_context(|| name.clone())?;
            if let DeviceState::Fs(FsState { served: Some(_) }) = &state.transport().device {
                bail!(
                    "{name} cannot be saved: virtiofsd keeps what the guest has open there; unmount it in the guest and unload its driver (modprobe -r virtiofs)"
                );
            }
            virtio.push((name.clone(), state));
        }
        let devices = &self.devices;
        let (serial, action) = match &devices.serial {
            Some(serial) => {
                let (state, action) = lock(serial).save();
                (Some(state), action)
            }
            None => (None, Action::None),
        };
        let devices = DevicesState {
            serial,
            clock: saved(&devices.clock),
            gpio: saved(&devices.gpio),
            acpi: saved(&devices.acpi),
            cmos: saved(&devices.cmos),
            i8042: saved(&devices.i8042),
            reset_control: saved(&devices.reset_control),
            io_apic: saved(&devices.io_apic),
        };
        let state = MachineState {
            vcpus,
            chip,
            devices,
            virtio,
        };
        Ok((state, action))
    }

    /// Makes this machine, which was assembled and has not run, the one that was saved. Its virtio
    /// devices are quiesced then: it is to be started paused ([`Machine::start`]). The state is not
    /// trusted.
    ///
    /// # Errors
    /// What is not valid ([`Status::Usage`]), or what this host cannot have ([`Status::Host`]).
    pub fn restore(&mut self, state: &StateOf<A>) -> Result<()> {
        match self.restore_parts(state) {
            Err(error) if status_of(&error) == Status::Failure => Err(error).fault(Status::Usage),
            done => done,
        }
    }

    fn restore_parts(&mut self, state: &StateOf<A>) -> Result<()> {
        let (vcpus, saved) = (self.idle.len(), state.vcpus.len());
        ensure!(
            vcpus == saved,
            "it has the states of {saved} vCPUs, and the machine has {vcpus}"
        );
        let virtio = self.workers.devices();
        let names = |wanted: &[String]| match wanted.is_empty() {
            true => "none".to_owned(),
            false => wanted.join(" "),
        };
        let ours: Vec<String> = virtio.iter().map(|(name, _)| name.clone()).collect();
        let theirs: Vec<String> = state.virtio.iter().map(|(name, _)| name.clone()).collect();
        ensure!(
            ours == theirs,
            "it has the states of other virtio devices ({}) than the machine ({})",
            names(&theirs),
            names(&ours)
        );
        let states = (&state.vcpus[..], &state.chip);
        match A::restore(&self.vm, &self.chip, &self.idle, states) {
            Err(error) if status_of(&error) == Status::Failure => Err(error).fault(Status::Host)?,
            done => done?,
        }
        // After the interrupt controller: it drives lines, whose levels are theirs.
        let (devices, from) = (&self.devices, &state.devices);
        one(
            "serial console",
            &devices.serial,
            &from.serial,
            |device: &mut (dyn SerialConsole + 'static), state| device.restore(state),
        )?;
        restored("real-time clock", &devices.clock, &from.clock)?;
        restored("GPIO controller", &devices.gpio, &from.gpio)?;
        restored("ACPI registers", &devices.acpi, &from.acpi)?;
        restored("CMOS clock", &devices.cmos, &from.cmos)?;
        restored("keyboard controller", &devices.i8042, &from.i8042)?;
        let (register, state_of) = (&devices.reset_control, &from.reset_control);
        restored("reset register", register, state_of)?;
        restored("I/O APIC", &devices.io_apic, &from.io_apic)?;
        for ((name, device), (_, state)) in virtio.iter().zip(&state.virtio) {
            let mut device = lock(device);
            device.quiesce();
            device
                .restore(state)
                .with_context(|| format!("cannot restore {name}"))?;
            if A::LATE_INTERRUPTS && device.is_driven() {
                // Once more, for one that was lost: drivers do not mind.
                device.link().queue_used(0);
            }
        }
        self.held.are_quiesced();
        Ok(())
    }
}
