//! What `armlet run` would be asked for, made of what a microVM was configured with.

use super::files::Files;
use super::limits::{bucket, limits};
use crate::boards::{self, Chosen};
use crate::cli::{ApiArgs, MachineArgs};
use crate::kvm::{self, HostArch, KvmArch};
use crate::run::{OnPanic, OnReset, RunOptions};
use crate::sandbox::Mode;
use crate::snapshot::Restore;
use crate::{config, host};
use anyhow::{Context, Result, anyhow, bail};
use armlet_api::Microvm;
use armlet_api::model::{CpuConfig, Drive, HugePages, IoEngine, MmdsVersion};
use armlet_arch::{Arch, Architecture};
use armlet_backends::balloon::BalloonOptions;
use armlet_backends::disk::{DiskOptions, EngineChoice, Format, Tail};
use armlet_backends::kind::DeviceOptions;
use armlet_backends::net::mmds::MmdsOptions;
use armlet_backends::net::{NetOptions, Network, VhostChoice};
use armlet_backends::pmem::PmemOptions;
use armlet_backends::rng::RngOptions;
use armlet_backends::vsock::VsockOptions;
use armlet_system::status::{Fault, Status};
use kvm_ioctls::Kvm;
use rustix::stdio::dup2_stdout;
use std::time::Duration;

/// The kernel's command line where a client gives none, on x86_64.
const CMDLINE: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
    i8042.dumbkbd swiotlb=noforce";

/// Makes the options of a machine.
///
/// # Errors
/// What cannot be had, and a host without KVM.
pub(super) fn options(
    args: &ApiArgs,
    microvm: &Microvm,
    files: &Files,
    restore: Option<Restore>,
) -> Result<RunOptions<HostArch>> {
    let machine = &microvm.machine;
    let boot = microvm.boot.as_ref().context("no kernel is named")?;
    let this = host::this();
    let chosen = match &restore {
        Some(restore) => restore.head.board_on(&this)?,
        None => board(args, &this)?,
    };
    if chosen.board.arch != HostArch::ARCHITECTURE {
        let (name, arch) = (&chosen.board.name, chosen.board.arch);
        bail!("board '{name}' is for {arch} guests, which this host does not run");
    }
    let default = match HostArch::ARCHITECTURE {
        Architecture::Aarch64 => &chosen.board.guest.cmdline,
        Architecture::X86_64 => CMDLINE,
    };
    let mut machine_args = MachineArgs {
        hugepages: match machine.huge_pages {
            HugePages::None => None,
            HugePages::Transparent => Some("thp".to_owned()),
            HugePages::Size2M => Some("2M".to_owned()),
        },
        ..MachineArgs::default()
    };
    match &restore {
        Some(restore) => restore.head.asked.add_to(&mut machine_args)?,
        None => {
            machine_args.kernel = Some(boot.kernel_image_path.clone());
            machine_args.initrd.clone_from(&boot.initrd_path);
            machine_args.cmdline = Some(cmdline(microvm, default));
            machine_args.cpus = Some(machine.vcpu_count.to_string());
            machine_args.memory = Some(format!("{}M", machine.mem_size_mib));
        }
    }
    let cores = this.cores(chosen.board.host.core_names());
    let devices = devices(microvm, files)?;
    let mut config =
        config::read_with::<HostArch>(&machine_args, chosen, &cores, Some(&this), devices)?;
    config.expect_clients();
    let no_kernel = match &restore {
        Some(restore) => restore.head.give(&mut config).fault(Status::Usage)?,
        None => None,
    };
    let kvm = kvm::open::open().fault(Status::Host)?;
    if let Some(cpu) = &microvm.cpu {
        check_capabilities(&kvm, cpu)?;
    }
    if let Some(path) = &microvm.serial.serial_out_path {
        let what = || format!("the serial console's output '{path}'");
        let file = armlet_system::files::append(path.as_ref()).with_context(what)?;
        dup2_stdout(&file).with_context(what)?;
    }
    let host = HostArch::probe(&kvm, HostArch::depth(&config.request)).fault(Status::Host)?;
    Ok(RunOptions {
        metrics: None,
        gdb: None,
        kvm,
        host,
        config,
        on_reset: OnReset::Exit,
        on_panic: OnPanic::Report,
        // A signal ends it at once.
        patience: Some(Duration::ZERO),
        seeded: true,
        stats: false,
        counted: files.metrics.is_wanted(),
        sandbox: Mode::parse(args.sandbox.as_deref()).fault(Status::Usage)?,
        vcpu_names: "fc_vcpu ",
        serial_limit: microvm.serial.rate_limiter.map(bucket),
        dump_dtb: None,
        control: None,
        service: None,
        restore,
        no_kernel,
        commander: None,
    })
}

/// The machine that guests made for Firecracker expect; which CPUs its vCPUs run on is for the board
/// that this host is to say.
fn board(args: &ApiArgs, this: &host::HostFiles) -> Result<Chosen> {
    let fallback = boards::fallback_of(HostArch::ARCHITECTURE);
    let own = boards::choose(boards::AUTO, fallback, || this.identity())?;
    let name = args
        .board
        .as_deref()
        .unwrap_or(match HostArch::ARCHITECTURE {
            Architecture::Aarch64 => "firecracker",
            Architecture::X86_64 => "pc",
        });
    let mut chosen = boards::choose(name, fallback, || this.identity())?;
    chosen.board.guest.pin = own.board.guest.pin;
    chosen.board.host = own.board.host;
    Ok(chosen)
}

/// The kernel's command line, with the root file system where a device has it.
fn cmdline(microvm: &Microvm, default: &str) -> String {
    let given = microvm.boot.as_ref();
    let given = given.and_then(|boot| boot.boot_args.as_deref());
    let mut words = vec![given.unwrap_or(default).to_owned()];
    let mode = |is_read_only| if is_read_only { "ro" } else { "rw" };
    if let Some(drive) = microvm.drives.iter().find(|drive| drive.is_root_device) {
        let mode = mode(drive.is_read_only);
        words.push(match &drive.partuuid {
            Some(id) => format!("root=PARTUUID={id} {mode}"),
            None => format!("root=/dev/vda {mode}"),
        });
    }
    if let Some(at) = microvm.pmem.iter().position(|pmem| pmem.root_device) {
        let mode = mode(microvm.pmem[at].read_only);
        words.push(format!("root=/dev/pmem{at} {mode}"));
    }
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

/// The metadata service on an interface, if there is to be one.
fn metadata(microvm: &Microvm, interface: &str, files: &Files) -> Option<MmdsOptions> {
    let config = microvm.mmds_config.as_ref()?;
    let mut interfaces = config.network_interfaces.iter();
    interfaces.find(|id| *id == interface)?;
    files.metadata.set(microvm.mmds.get());
    Some(MmdsOptions {
        address: config.ipv4_address,
        needs_token: config.version == MmdsVersion::V2,
        imds_compat: config.imds_compat,
        data: files.metadata.clone(),
        file: None,
    })
}

fn devices(microvm: &Microvm, files: &Files) -> Result<Vec<Box<dyn DeviceOptions>>> {
    let mut devices: Vec<Box<dyn DeviceOptions>> = Vec::new();
    for drive in &microvm.drives {
        devices.push(Box::new(disk(drive)?));
    }
    for interface in &microvm.interfaces {
        let tap = files.tap(&interface.iface_id);
        let (receive, transmit) = (interface.rx_rate_limiter, interface.tx_rate_limiter);
        devices.push(Box::new(NetOptions {
            mac: interface.guest_mac.map(|mac| mac.0),
            mtu: interface.mtu,
            receive: limits(receive),
            transmit: limits(transmit),
            network: Network::Inherited {
                descriptors: vec![tap.context("its TAP was not opened")?],
                // The kernel's part knows no limits.
                vhost: match (receive, transmit) {
                    (None, None) => VhostChoice::Auto,
                    _ => VhostChoice::Off,
                },
            },
            mmds: metadata(microvm, &interface.iface_id, files),
        }));
    }
    if let Some(vsock) = &microvm.vsock {
        devices.push(Box::new(VsockOptions {
            cid: vsock.guest_cid,
            uds: Some((&vsock.uds_path).into()),
            // Clients remove it, and take it ill if it is gone.
            stays: true,
        }));
    }
    if let Some(balloon) = &microvm.balloon {
        devices.push(Box::new(BalloonOptions {
            target: u64::from(balloon.amount_mib) << 20,
            reporting: balloon.free_page_reporting,
            deflate_on_oom: balloon.deflate_on_oom,
        }));
    }
    for pmem in &microvm.pmem {
        devices.push(Box::new(PmemOptions {
            path: (&pmem.path_on_host).into(),
            readonly: pmem.read_only,
            limits: limits(pmem.rate_limiter),
        }));
    }
    if let Some(entropy) = &microvm.entropy {
        devices.push(Box::new(RngOptions {
            limits: limits(entropy.rate_limiter),
        }));
    }
    Ok(devices)
}

fn disk(drive: &Drive) -> Result<DiskOptions> {
    let path = drive.path_on_host.as_ref();
    let path = path.with_context(|| format!("drive {} has no path", drive.drive_id))?;
    Ok(DiskOptions {
        readonly: drive.is_read_only,
        // What a guest wrote into an image is never taken for a format.
        format: Format::Raw,
        engine: match drive.io_engine {
            IoEngine::Async => EngineChoice::Auto,
            IoEngine::Sync => EngineChoice::Sync,
        },
        tail: Tail::Hidden,
        limits: limits(drive.rate_limiter),
        ..DiskOptions::new(path)
    })
}

/// Checks that KVM offers what a client asks of it: capabilities by number, with `!` before those that
/// need not be there.
fn check_capabilities(kvm: &Kvm, cpu: &CpuConfig) -> Result<()> {
    for text in &cpu.kvm_capabilities {
        let number = text.strip_prefix('!').unwrap_or(text);
        let number: u32 = number
            .parse()
            .with_context(|| format!("kvm_capabilities: '{text}' is no number"))?;
        if !text.starts_with('!') && kvm.check_extension_raw(number.into()) <= 0 {
            return Err(anyhow!("this host's KVM has no capability {number}")).fault(Status::Host);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_api::microvm::Identity;
    use armlet_api::model::{BootSource, Pmem};

    fn microvm(args: Option<&str>) -> Microvm {
        let identity = Identity {
            id: "x".to_owned(),
            version: "1",
            is_x86: false,
        };
        let mut microvm = Microvm::new(identity, 0);
        microvm.boot = Some(BootSource {
            kernel_image_path: "k".to_owned(),
            initrd_path: None,
            boot_args: args.map(str::to_owned),
        });
        microvm
    }

    #[test]
    fn the_root_file_system_is_named_where_a_device_has_it() {
        assert!(cmdline(&microvm(None), CMDLINE).starts_with("reboot=k panic=1"));
        let drive = |text: &str| serde_json::from_str::<Drive>(text).expect("a drive");
        let mut root = microvm(Some("console=ttyS0"));
        let text = r#"{"drive_id": "r", "is_root_device": true, "path_on_host": "p"}"#;
        root.drives = vec![drive(text)];
        assert_eq!(cmdline(&root, ""), "console=ttyS0 root=/dev/vda rw");
        root.drives[0].partuuid = Some("0eaa91a0-01".to_owned());
        root.drives[0].is_read_only = true;
        assert_eq!(
            cmdline(&root, ""),
            "console=ttyS0 root=PARTUUID=0eaa91a0-01 ro"
        );
        let mut pmem = microvm(Some(""));
        pmem.pmem = vec![Pmem {
            id: "p".to_owned(),
            path_on_host: "p".to_owned(),
            root_device: true,
            read_only: true,
            rate_limiter: None,
        }];
        assert_eq!(cmdline(&pmem, "x"), "root=/dev/pmem0 ro");
    }

    #[test]
    fn metadata_are_on_the_interfaces_that_are_named_and_follow_what_is_put() {
        let mut microvm = microvm(None);
        let files = Files::new("x");
        assert_eq!(metadata(&microvm, "a", &files), None);
        let text =
            r#"{"network_interfaces": ["a", "b"], "version": "V2", "ipv4_address": "169.254.1.1"}"#;
        microvm.mmds_config = Some(serde_json::from_str(text).expect("a configuration"));
        assert_eq!(metadata(&microvm, "c", &files), None);
        let options = metadata(&microvm, "b", &files).expect("it is named");
        assert_eq!(options.address.octets(), [169, 254, 1, 1]);
        assert!(options.needs_token && !options.imds_compat);
        assert_eq!(*options.data.get(), serde_json::json!({}));
        files.metadata.set(serde_json::json!({"a": "b"}));
        assert_eq!(*options.data.get(), serde_json::json!({"a": "b"}));
    }

    #[test]
    fn images_are_raw_whatever_is_in_them() {
        let text = r#"{"drive_id": "r", "is_root_device": false, "path_on_host": "p",
            "io_engine": "Async", "is_read_only": true}"#;
        let options = disk(&serde_json::from_str(text).expect("a drive")).expect("a disk");
        assert_eq!(options.format, Format::Raw);
        assert_eq!(options.engine, EngineChoice::Auto);
        assert!(options.readonly);
    }
}
