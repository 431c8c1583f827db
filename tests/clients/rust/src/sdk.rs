//! firecracker-rs-sdk, plain and in the jailer's jail.

use crate::{Done, PRESSED, READY, Setup, ended, has, until};
use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::jailer::JailerOption;
use firecracker_rs_sdk::models::{
    Balloon, BootSource, Drive, EntropyDevice, Logger, MachineConfiguration, Metrics, MmdsConfig,
    MmdsConfigVersion, NetworkInterface, Vsock,
};
use std::error::Error;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;

/// The user and the group of the jail.
const OWNER: u32 = 12345;

/// Creates, configures, starts, pauses, resumes and ends a guest.
pub async fn drive(setup: &Setup) -> Done {
    let console = setup.scratch.join("console");
    let mut options = FirecrackerOption::new(&setup.firecracker);
    let options = options
        .api_sock(setup.scratch.join("api.sock"))
        .id("one")
        .no_seccomp()
        .stdin("/dev/null")
        .stdout(&console)
        .stderr(setup.scratch.join("errors"));
    let mut instance = options.build()?;
    instance.start_vmm().await?;
    let log_path = setup.scratch.join("log");
    instance
        .put_logger(&Logger {
            log_path,
            level: None,
            show_level: Some(true),
            show_log_origin: Some(true),
            module: None,
        })
        .await?;
    let metrics_path = setup.scratch.join("metrics");
    instance
        .put_metrics(&Metrics {
            metrics_path: metrics_path.clone(),
        })
        .await?;
    configure(&mut instance, setup).await?;
    let added = Command::new("ip")
        .args(["tuntap", "add", "dev", "sdktap", "mode", "tap"])
        .status()?;
    assert!(added.success(), "no TAP");
    instance
        .put_guest_network_interface_by_id(&NetworkInterface {
            guest_mac: Some("06:00:ac:10:00:02".to_owned()),
            host_dev_name: "sdktap".into(),
            iface_id: "eth0".to_owned(),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        })
        .await?;
    instance
        .put_mmds_config(&MmdsConfig {
            version: Some(MmdsConfigVersion::V2),
            ipv4_address: None,
            network_interfaces: vec!["eth0".to_owned()],
        })
        .await?;
    instance.put_mmds(&"text".to_owned()).await?;
    instance
        .put_guest_vsock(&Vsock {
            guest_cid: 3,
            uds_path: setup.scratch.join("vsock"),
            vsock_id: Some("one".to_owned()),
        })
        .await?;
    let pid = instance.firecracker_pid().ok_or("no process")?;
    run(&mut instance).await?;
    until("the guest's console", || has(&console, READY)).await?;
    pause(&mut instance).await?;
    assert_eq!(instance.get_mmds().await?, "text");
    instance.stop().await?;
    until("the guest's end", || ended(pid)).await?;
    assert!(has(&console, PRESSED), "the guest was killed");
    assert!(has(&metrics_path, "utc_timestamp_ms"), "no metrics");
    Ok(
        "logger, metrics, drive, network, MMDS, balloon, entropy, vsock; start, pause, resume, SendCtrlAltDel",
    )
}

/// As [`drive`], in a jail, where the kernel and the image become links.
pub async fn drive_jailed(setup: &Setup) -> Done {
    for path in [&setup.guest, &setup.disk] {
        chown(path, Some(OWNER), Some(OWNER))?;
    }
    let mut options = FirecrackerOption::new(&setup.firecracker);
    let options = options.api_sock("/run/firecracker.socket");
    let console = setup.scratch.join("console");
    let (user, group) = (OWNER as usize, OWNER as usize);
    let mut jail = JailerOption::new(&setup.jailer, &setup.firecracker, "one", group, user);
    let jail = jail
        .chroot_base_dir(Some(&setup.scratch))
        .remove_jailer_workspace_dir()
        .stdin("/dev/null")
        .stdout(&console)
        .stderr(setup.scratch.join("errors"))
        .firecracker_option(Some(options));
    let mut instance = jail.build()?;
    instance.start_vmm().await?;
    let pid = instance.firecracker_pid().ok_or("no process")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let user = status.lines().find(|line| line.starts_with("Uid:"));
    assert!(
        user.is_some_and(|line| line.contains(&OWNER.to_string())),
        "{user:?}"
    );
    configure(&mut instance, setup).await?;
    run(&mut instance).await?;
    until("the guest's console", || has(&console, READY)).await?;
    pause(&mut instance).await?;
    instance.stop().await?;
    until("the guest's end", || ended(pid)).await?;
    assert!(has(&console, PRESSED), "the guest was killed");
    let root = instance.jailer_workspace_dir().ok_or("no jail")?;
    drop(instance);
    assert!(!Path::new(&root).exists(), "the jail is still there");
    Ok("in a jail: drive, balloon, entropy; start, pause, resume, SendCtrlAltDel")
}

/// Says what every guest has.
async fn configure(instance: &mut Instance, setup: &Setup) -> Result<(), Box<dyn Error>> {
    let version = instance.get_firecracker_version().await?;
    assert!(version.firecracker_version.starts_with("1."), "{version:?}");
    instance
        .put_machine_configuration(&MachineConfiguration {
            cpu_template: None,
            smt: None,
            mem_size_mib: 128,
            track_dirty_pages: None,
            vcpu_count: 1,
            huge_pages: None,
        })
        .await?;
    instance
        .put_guest_boot_source(&BootSource {
            boot_args: Some("console=ttyS0 reboot=k panic=1 pci=off".to_owned()),
            initrd_path: None,
            kernel_image_path: setup.guest.clone(),
        })
        .await?;
    instance
        .put_guest_drive_by_id(&Drive {
            drive_id: "rootfs".to_owned(),
            partuuid: None,
            is_root_device: true,
            cache_type: None,
            is_read_only: false,
            path_on_host: setup.disk.clone(),
            rate_limiter: None,
            io_engine: None,
            socket: None,
        })
        .await?;
    instance
        .put_balloon(&Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: Some(1),
        })
        .await?;
    instance
        .put_entropy_device(&EntropyDevice { rate_limiter: None })
        .await?;
    Ok(())
}

/// Starts the guest, and looks at it.
async fn run(instance: &mut Instance) -> Result<(), Box<dyn Error>> {
    instance.start().await?;
    assert!(matches!(state(instance).await?.as_str(), "Running"));
    let machine = instance.get_machine_configuration().await?;
    assert_eq!((machine.vcpu_count, machine.mem_size_mib), (1, 128));
    assert_eq!(
        instance
            .describe_balloon_config()
            .await?
            .stats_polling_interval_s,
        Some(1)
    );
    instance.get_export_vm_config().await?;
    Ok(())
}

/// Pauses the guest, and has it go on.
async fn pause(instance: &mut Instance) -> Result<(), Box<dyn Error>> {
    instance.pause().await?;
    assert_eq!(state(instance).await?, "Paused");
    instance.resume().await?;
    assert_eq!(state(instance).await?, "Running");
    Ok(())
}

async fn state(instance: &mut Instance) -> Result<String, Box<dyn Error>> {
    let state = instance.describe_instance().await?.state;
    Ok(format!("{state:?}"))
}
