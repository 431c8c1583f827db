//! Parses the arguments, and reports what is wrong with them in one line.

use super::devices::{self, DeviceArgs};
use super::{Cli, unknown};
use argh::EarlyExit;

/// The result of parsing: a command line, or a text to print.
pub enum Parsed {
    /// Execute this, with these devices.
    Cli(Box<Cli>, DeviceArgs),
    /// Print this help on standard output and leave.
    Help(String),
    /// Print this line on standard error and leave with [`armlet_system::status::Status::Usage`].
    Wrong(String),
}

/// Parses the arguments that follow the program's name.
#[must_use]
pub fn parse(arguments: &[String]) -> Parsed {
    let split = split_assignments(arguments);
    let words: Vec<&str> = split.iter().map(String::as_str).collect();
    match devices::parse(&words) {
        Ok((cli, devices)) => Parsed::Cli(Box::new(cli), devices),
        Err(EarlyExit {
            output,
            status: Ok(()),
        }) => Parsed::Help(output),
        Err(EarlyExit {
            output,
            status: Err(()),
        }) => Parsed::Wrong(one_line(&output, &words)),
    }
}

/// Splits `--option=value` into the two words that argh expects.
/// What follows `--` is another program's.
fn split_assignments(arguments: &[String]) -> Vec<String> {
    let end = arguments.iter().position(|word| word == "--");
    let (ours, others) = arguments.split_at(end.unwrap_or(arguments.len()));
    ours.iter()
        .flat_map(|word| match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") && name.len() > 2 => {
                vec![name.to_owned(), value.to_owned()]
            }
            _ => vec![word.clone()],
        })
        .chain(others.iter().cloned())
        .collect()
}

/// Puts argh's message on one line, and suggests an option in place of an unknown one.
fn one_line(output: &str, words: &[&str]) -> String {
    let message = output
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    match message.strip_prefix("Unrecognized argument: ") {
        Some(word) => unknown::explain(word, words),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, habits};

    fn parse_words(words: &str) -> Parsed {
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        parse(&words)
    }

    fn wrong(words: &str) -> String {
        match parse_words(words) {
            Parsed::Wrong(line) => line,
            _ => panic!("{words}: not refused"),
        }
    }

    #[test]
    fn values_may_follow_an_equals_sign_or_a_space() {
        for words in [
            "run --kernel=Image --memory=1G --cmdline=root=/dev/vda",
            "run --kernel Image --memory 1G --cmdline root=/dev/vda",
            "run -k Image -m 1G -p root=/dev/vda",
        ] {
            let Parsed::Cli(cli, _) = parse_words(words) else {
                panic!("{words}");
            };
            let Some(Command::Run(run)) = cli.command else {
                panic!("{words}");
            };
            assert_eq!(run.kernel.as_deref(), Some("Image"));
            assert_eq!(run.memory.as_deref(), Some("1G"));
            assert_eq!(run.cmdline.as_deref(), Some("root=/dev/vda"));
        }
    }

    #[test]
    fn options_of_other_vmms_are_answered_with_the_one_that_is_meant() {
        for (words, meant) in [
            // QEMU.
            ("run -kernel Image", "-kernel Image: use --kernel Image"),
            ("run -initrd i.img", "-initrd i.img: use --initrd i.img"),
            ("run -append quiet", "-append quiet: use --cmdline quiet"),
            ("run --append=quiet", "--append quiet: use --cmdline quiet"),
            ("run -append", "-append: use --cmdline STR"),
            ("run -smp 4", "-smp 4: use --cpus 4"),
            ("run -smp cpus=4,cores=2", "use --cpus 4"),
            ("run -smp -m 1G", "-smp: use --cpus N"),
            (
                "run -drive file=x,format=qcow2,if=none,id=d0",
                "-drive file=x,format=qcow2,if=none,id=d0: use --disk path=x,format=qcow2",
            ),
            ("run -drive if=pflash", "use --disk path=IMG"),
            ("run -hda x.img", "use --disk x.img"),
            ("run -cdrom x.iso", "use --disk path=x.iso,readonly"),
            (
                "run -device virtio-blk-pci,drive=d0",
                "use --disk path=IMG, in place of the drive",
            ),
            (
                "run -device virtio-net-device,mac=02:00:00:00:00:01",
                "use --net user,mac=02:00:00:00:00:01",
            ),
            (
                "run -device vhost-vsock-pci,guest-cid=3",
                "use --vsock cid=3",
            ),
            (
                "run -device virtio-rng-pci",
                "leave it out: a guest has one",
            ),
            (
                "run -netdev user,id=n0,hostfwd=tcp::22-:22",
                "use --net user,hostfwd=tcp::22-:22",
            ),
            ("run -netdev tap,id=n0,ifname=tap0", "use --net tap=tap0"),
            ("run -nic user,model=virtio", "use --net user"),
            ("run -net user", "-net user: use --net user"),
            ("run -net nic,model=virtio", "-net: leave it out"),
            (
                "run -machine virt,gic-version=3",
                "use --board virt --gic 3",
            ),
            ("run -M q35", "-M q35: use --board pc"),
            (
                "run -cpu host",
                "-cpu: leave it out: a guest has the host's CPU",
            ),
            ("run -cpu host,pmu=off", "use --pmu off"),
            ("run -accel kvm", "-accel: leave it out"),
            ("run -enable-kvm -m 1G", "-enable-kvm: leave it out"),
            (
                "run -nographic",
                "-nographic: leave it out: the guest's console",
            ),
            (
                "run -serial mon:stdio",
                "-serial: leave it out: the serial console is this terminal",
            ),
            ("run -s -S", "-s: use --gdb tcp:127.0.0.1:1234"),
            ("run -gdb tcp::1234", "use --gdb tcp::1234"),
            ("run -no-reboot", "-no-reboot: use --on-reset exit"),
            // kvmtool.
            ("run --params quiet", "use --cmdline quiet"),
            ("run --network mode=user", "use --net user"),
            ("run --network mode=tap,tapif=tap0", "use --net tap=tap0"),
            ("run --mem 512", "--mem 512: use --memory 512M"),
            ("run --9p /srv,data", "use --share tag=data,path=/srv"),
            ("run --irqchip gicv3", "use --gic 3"),
            (
                "run --balloon --cpus 2",
                "No value provided for option '--balloon'",
            ),
            // Cloud Hypervisor and crosvm.
            ("run --initramfs i.img", "use --initrd i.img"),
            ("run --mem size=1024", "use --memory 1024M"),
            (
                "run --block path=r.img,ro",
                "use --disk path=r.img,readonly",
            ),
            ("run --rwdisk r.img", "use --disk r.img"),
            (
                "run --shared-dir /srv:data:type=fs",
                "use --share tag=data,path=/srv",
            ),
            ("run --cid 3", "use --vsock cid=3"),
            ("run --tap-name tap0", "use --net tap=tap0"),
            // Firecracker.
            ("run --api-sock /tmp/s", "'armlet api' serves"),
            ("run --config-file f", "'armlet api' takes it"),
            ("run --no-seccomp", "use --sandbox off"),
            // Ours, almost.
            ("plan --mem 1G", "use --memory 1G"),
            ("plan --ram=1G", "use --memory 1G"),
            ("run -m1G", "use -m 1G"),
            ("run -m=1G", "use -m 1G"),
            ("run --cpu 4", "use --cpus 4"),
            ("run --memroy 1G", "--memroy 1G: use --memory 1G"),
            ("run -verbose x", "-verbose x: use --verbose"),
            ("run vmlinuz", "a kernel is named by --kernel"),
            ("-kernel Image", "armlet run -kernel"),
            ("--kernel Image", "armlet run --kernel"),
            ("-m 1G", "armlet run -m"),
            ("probe --kernel Image", "an option of 'armlet run'"),
            ("--versoin", "(valid here: --version, --help)"),
        ] {
            let line = wrong(words);
            assert!(!line.contains('\n') && line.len() < 260, "{line}");
            assert!(line.contains(meant), "{words}: {line}");
            assert!(
                words.contains("versoin") || !line.contains("valid here"),
                "{line}"
            );
        }
        // A text of several words is quoted; one that is too long to be read is not shown.
        let append = |text: &str| {
            let words = ["run", "-append", text].map(str::to_owned);
            match parse(&words) {
                Parsed::Wrong(line) => line,
                _ => panic!("not refused"),
            }
        };
        assert_eq!(
            append("console=ttyS0 quiet"),
            "-append console=ttyS0 quiet: use --cmdline 'console=ttyS0 quiet'"
        );
        assert_eq!(append(&"x".repeat(5000)), "-append: use --cmdline");
        // What is advised is there.
        let Parsed::Help(help) = parse_words("run --help") else {
            panic!("no help");
        };
        for word in habits::advised() {
            assert!(help.contains(&format!("{word} ")), "{word}");
        }
    }

    #[test]
    fn an_unknown_option_is_refused_in_one_line_with_the_valid_ones() {
        let line = wrong("run --kernle Image");
        assert!(!line.contains('\n'));
        assert!(
            line.contains("--kernle") && line.contains("--kernel"),
            "{line}"
        );
        let line = wrong("plan --on-reset exit");
        assert!(line.contains("an option of 'armlet run'"), "{line}");
        let line = wrong("run --frobnicate");
        assert!(line.contains("--kernel, --initrd"), "{line}");
    }

    #[test]
    fn an_unknown_command_is_refused_with_the_valid_ones() {
        let line = wrong("start");
        assert!(line.contains("run, plan, probe, boards"), "{line}");
    }

    #[test]
    fn each_command_has_help_with_examples() {
        for command in ["run", "plan", "probe", "boards", "jail", "snapshot"] {
            match parse_words(&format!("{command} --help")) {
                Parsed::Help(text) => assert!(text.contains("Examples:"), "{text}"),
                _ => panic!("{command}: no help"),
            }
        }
    }
}
