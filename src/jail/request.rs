//! What a jail consists of: decided from the arguments, before anything is made.

use super::cgroup;
use crate::cli::JailArgs;
use anyhow::{Context as _, Result, bail, ensure};
use std::path::{Component, Path, PathBuf};

/// The most characters of an ID.
const LONGEST_ID: usize = 64;
/// How many descriptors the program may have unless `--resource-limit no-file` says otherwise.
const DESCRIPTORS: u64 = 2048;

/// The folders of a jail, which belong to the program's user.
pub(super) const FOLDERS: [&str; 4] = ["/", "/dev", "/dev/net", "/run"];

/// The devices of a jail. Those that have fixed numbers (Documentation/admin-guide/devices.txt) are
/// made in any case, the others if the host has them.
pub(super) const DEVICES: [(&str, Option<(u32, u32)>); 7] = [
    ("/dev/net/tun", Some((10, 200))),
    ("/dev/kvm", Some((10, 232))),
    ("/dev/urandom", Some((1, 9))),
    ("/dev/null", Some((1, 3))),
    ("/dev/userfaultfd", None),
    ("/dev/vhost-net", None),
    ("/dev/vhost-vsock", None),
];

/// The host's files that a VMM reads to find out about CPUs, where `*` stands for one name; copied
/// on hosts where CPUs say of which kind they are in such a file, the first.
pub(super) const FACTS: [&str; 16] = [
    "sys/devices/system/cpu/cpu*/regs/identification/midr_el1",
    "sys/devices/system/cpu/cpu*/cpu_capacity",
    "sys/devices/system/cpu/cpu0/cache/index*/size",
    "sys/devices/system/cpu/cpu0/cache/index*/level",
    "sys/devices/system/cpu/cpu0/cache/index*/type",
    "sys/devices/system/cpu/cpu0/cache/index*/shared_cpu_map",
    "sys/devices/system/cpu/cpu0/cache/index*/shared_cpu_list",
    "sys/devices/system/cpu/cpu0/cache/index*/coherency_line_size",
    "sys/devices/system/cpu/cpu0/cache/index*/number_of_sets",
    "sys/devices/system/cpu/cpu0/cache/index*/ways_of_associativity",
    "sys/bus/event_source/devices/*/cpus",
    "sys/bus/event_source/devices/*/type",
    "sys/kernel/mm/transparent_hugepage/enabled",
    "sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "proc/device-tree/compatible",
    "proc/device-tree/model",
];

/// What was asked for.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    /// The program, as an absolute path without symbolic links.
    pub(super) program: PathBuf,
    /// Its name, which is that of its copy in the jail.
    pub(super) name: String,
    /// The folder that becomes the program's root.
    pub(super) root: PathBuf,
    /// The program's user and group.
    pub(super) owner: (u32, u32),
    /// The file of the network namespace to join.
    pub(super) network: Option<PathBuf>,
    /// The limit to the sizes of files, bytes.
    pub(super) file_size: Option<u64>,
    /// The limit to the number of descriptors.
    pub(super) descriptors: u64,
    /// What is done to control groups, in this order.
    pub(super) groups: Vec<cgroup::Step>,
    /// Whether it runs in the background, without a terminal.
    pub(super) daemonize: bool,
    /// Whether it is the first process of a PID namespace.
    pub(super) new_pid_namespace: bool,
    /// The program's arguments. Firecracker's times are appended to the first two.
    pub(super) id: Option<String>,
    pub(super) arguments: Vec<String>,
}

impl Request {
    /// Decides from the arguments, the resolved paths of the program and of the folder of jails, if
    /// they are there, and the text of `/proc/mounts`.
    pub(super) fn new(
        args: &JailArgs,
        program: Result<PathBuf>,
        base: Result<PathBuf>,
        mounts: &str,
    ) -> Result<Request> {
        let mut missing = Vec::new();
        let mut take = |name, value: &Option<String>| {
            value.clone().unwrap_or_else(|| {
                missing.push(name);
                String::new()
            })
        };
        let id = take("--id", &args.id);
        let (uid, gid) = (take("--uid", &args.uid), take("--gid", &args.gid));
        ensure!(missing.is_empty(), "a jail needs {}", missing.join(", "));
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if !(1..=LONGEST_ID).contains(&id.len()) || !id.bytes().all(is_allowed) {
            bail!("--id '{id}': an ID has 1 to {LONGEST_ID} letters, digits and '-'");
        }
        let owner = (number("--uid", &uid)?, number("--gid", &gid)?);
        let (program, base) = (program?, base?);
        let name = program.file_name().and_then(|name| name.to_str());
        let name = name.context("the program's name is no UTF-8")?.to_owned();
        let parent = Path::new(args.parent_cgroup.as_deref().unwrap_or(&name));
        if !parent
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            bail!(
                "--parent-cgroup {}: it begins at the root of control groups, and has no '..'",
                parent.display()
            );
        }
        let groups = cgroup::plan(&args.cgroup_version, mounts, parent, &id, &args.cgroup)?;
        let (mut file_size, mut descriptors) = (None, DESCRIPTORS);
        for limit in &args.resource_limit {
            match limit.split_once('=') {
                Some(("fsize", value)) => file_size = Some(number("fsize", value)?),
                Some(("no-file", value)) => descriptors = number("no-file", value)?,
                _ => bail!("--resource-limit '{limit}': use fsize=BYTES or no-file=N"),
            }
        }
        Ok(Request {
            root: base.join(&name).join(&id).join("root"),
            owner,
            network: args.netns.as_ref().map(PathBuf::from),
            file_size,
            descriptors,
            groups,
            daemonize: args.daemonize,
            new_pid_namespace: args.new_pid_ns,
            // Armlet has no names for guests.
            id: (!name.starts_with("armlet")).then_some(id),
            arguments: args.arguments.clone(),
            program,
            name,
        })
    }
}

fn number<T: std::str::FromStr>(what: &str, text: &str) -> Result<T> {
    let number = text.parse().ok();
    number.with_context(|| format!("{what} '{text}' is no such number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &str) -> JailArgs {
        use crate::cli::{Command, Parsed, parse};
        let words = format!("jail {words}");
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        match parse(&words) {
            Parsed::Cli(cli, _) => match cli.command {
                Some(Command::Jail(args)) => args,
                _ => panic!("{words:?}"),
            },
            Parsed::Wrong(line) | Parsed::Help(line) => panic!("{line}"),
        }
    }

    fn request(program: &str, words: &str) -> Result<Request> {
        Request::new(
            &args(words),
            Ok(program.into()),
            Ok("/srv/jailer".into()),
            "",
        )
    }

    #[test]
    fn a_request_is_what_firecrackers_jailer_would_make_of_it() {
        let request = request(
            "/usr/bin/firecracker",
            "--id vm-1 --exec-file /x --uid 123 --gid 100 --netns /run/netns/a --daemonize \
             --new-pid-ns --resource-limit fsize=250 --resource-limit no-file=1024 -- --config-file \
             /c.json --id=x --help",
        );
        let request = request.expect("a request");
        assert_eq!(request.name, "firecracker");
        let root = Path::new("/srv/jailer/firecracker/vm-1/root");
        assert_eq!(request.root, root);
        assert_eq!(request.owner, (123, 100));
        assert_eq!(request.network.as_deref(), Some(Path::new("/run/netns/a")));
        assert!(request.daemonize && request.new_pid_namespace);
        assert_eq!((request.file_size, request.descriptors), (Some(250), 1024));
        assert_eq!(request.id.as_deref(), Some("vm-1"));
        let words = ["--config-file", "/c.json", "--id=x", "--help"];
        assert_eq!(request.arguments, words);
    }

    #[test]
    fn armlet_gets_its_own_arguments_alone() {
        let request = request("/usr/bin/armlet", "--id a --uid 1 --gid 2 -- run -k /Image");
        let request = request.expect("a request");
        assert_eq!(request.id, None);
        assert_eq!(request.arguments, ["run", "-k", "/Image"]);
        assert_eq!((request.file_size, request.descriptors), (None, 2048));
        assert_eq!(request.groups, []);
        assert!(!request.daemonize && !request.new_pid_namespace);
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line_with_what_would_work() {
        let long = "x".repeat(65);
        for (words, said) in [
            ("--uid 1", "a jail needs --id, --gid"),
            ("--id a/b --uid 1 --gid 1", "--id 'a/b': an ID has 1 to 64"),
            ("--id .. --uid 1 --gid 1", "--id '..': an ID has"),
            (&format!("--id {long} --uid 1 --gid 1"), "1 to 64"),
            (
                "--id a --uid root --gid 1",
                "--uid 'root' is no such number",
            ),
            ("--id a --uid 1 --gid -1", "--gid '-1' is no such number"),
            (
                "--id a --uid 4294967296 --gid 1",
                "--uid '4294967296' is no",
            ),
            (
                "--id a --uid 1 --gid 1 --resource-limit nofile=1",
                "use fsize=BYTES or no-file=N",
            ),
            (
                "--id a --uid 1 --gid 1 --resource-limit no-file=x",
                "no-file 'x' is no such number",
            ),
            (
                "--id a --uid 1 --gid 1 --parent-cgroup ../x",
                "--parent-cgroup ../x",
            ),
            (
                "--id a --uid 1 --gid 1 --parent-cgroup /x",
                "--parent-cgroup /x",
            ),
        ] {
            let error = request("/usr/bin/armlet", words).expect_err(words);
            let line = format!("{error:#}");
            assert!(line.contains(said) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn every_device_is_in_a_folder_of_the_jail() {
        for (path, _) in DEVICES {
            let (folder, _) = path.rsplit_once('/').expect("a folder");
            assert!(FOLDERS.contains(&folder), "{path}");
        }
    }
}
