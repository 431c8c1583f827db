//! firepilot, which throws away what the guest prints, and never says how large the machine is.

use crate::{Done, Setup, ended, until};
use firepilot::builder::drive::DriveBuilder;
use firepilot::builder::executor::FirecrackerExecutorBuilder;
use firepilot::builder::kernel::KernelBuilder;
use firepilot::builder::network_interface::NetworkInterfaceBuilder;
use firepilot::builder::{Builder, Configuration};
use firepilot::machine::Machine;
use std::time::Duration;

/// How long a guest takes to listen to its power button, at most.
const LISTENS: Duration = Duration::from_secs(1);

/// Creates, configures, starts, pauses, resumes and ends a guest.
pub async fn drive(setup: &Setup) -> Done {
    let kernel = KernelBuilder::new()
        .with_kernel_image_path(setup.guest.display().to_string())
        .with_boot_args("console=ttyS0 reboot=k panic=1 pci=off".to_owned())
        .try_build()
        .map_err(wrong)?;
    let drive = DriveBuilder::new()
        .with_drive_id("rootfs".to_owned())
        .with_path_on_host(setup.disk.clone())
        .as_root_device()
        .try_build()
        .map_err(wrong)?;
    let network = NetworkInterfaceBuilder::new()
        .with_iface_id("eth0".to_owned())
        .with_host_dev_name("pilottap".to_owned())
        .try_build()
        .map_err(wrong)?;
    let executor = FirecrackerExecutorBuilder::new()
        .with_chroot(setup.scratch.display().to_string())
        .with_exec_binary(setup.firecracker.clone())
        .try_build()
        .map_err(wrong)?;
    let configuration = Configuration::new("one".to_owned())
        .with_kernel(kernel)
        .with_executor(executor)
        .with_drive(drive)
        .with_interface(network);
    let mut machine = Machine::new();
    machine.create(configuration).await.map_err(wrong)?;
    let pid = child().ok_or("no process was started")?;
    machine.start().await.map_err(wrong)?;
    tokio::time::sleep(LISTENS).await;
    machine.pause().await.map_err(wrong)?;
    machine.resume().await.map_err(wrong)?;
    machine.stop().await.map_err(wrong)?;
    until("the guest's end", || ended(pid)).await?;
    machine.kill().await.map_err(wrong)?;
    Ok("drive, network, no machine-config; start, pause, resume, SendCtrlAltDel, kill")
}

/// What the client says is wrong.
fn wrong(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

/// Returns the one process that this one has started.
fn child() -> Option<u32> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?.flatten();
    let children =
        tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<String> = children.collect();
    children.concat().split_whitespace().next()?.parse().ok()
}
