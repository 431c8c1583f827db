//! `armlet jail`, by what a program in a jail can see and do, and by what the kernel says of it. It
//! needs root's rights, and is skipped without.

use rustix::process::{Gid, Pid, Resource, Signal, Uid, getrlimit, kill_process};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;
use tempfile::TempDir;

const ARMLET: &str = env!("CARGO_BIN_EXE_armlet");
const USER: u32 = 12345;
const GROUP: u32 = 54321;
/// The name of the program in these jails, which is this test. It is one like armlet's, so that the
/// program gets its arguments alone.
const NAME: &str = "armlet-inside";
/// The word by which the program says that it has said all.
const READY: &str = "READY";

/// Prints what is seen from inside, and stays until standard input ends.
#[test]
#[ignore = "is the program that other tests jail"]
fn inside() {
    println!();
    let say = |name: &str, value: String| println!("{name}: {value}");
    let result = |result: std::io::Result<()>| match result {
        Ok(()) => "done".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    };
    say("uid", rustix::process::getuid().as_raw().to_string());
    say("gid", rustix::process::getgid().as_raw().to_string());
    say("pid", std::process::id().to_string());
    let environment: Vec<_> = std::env::vars_os().collect();
    say("environment", format!("{environment:?}"));
    let folder = std::env::current_dir().expect("a folder");
    say("folder", folder.display().to_string());
    for path in ["/", "/dev", "/dev/net", "/run"] {
        let entries = fs::read_dir(path).expect("a folder").flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| !name.starts_with("lib")).collect();
        names.sort();
        say(path, names.join(" "));
    }
    let most = |resource| format!("{:?}", getrlimit(resource).maximum);
    say("no-file", most(Resource::Nofile));
    say("fsize", most(Resource::Fsize));
    say("null", result(fs::write("/dev/null", "x")));
    let random = fs::File::open("/dev/urandom");
    let random = random.and_then(|mut file| file.read_exact(&mut [0; 8]));
    say("urandom", result(random));
    for path in ["/etc/passwd", "/proc/self/root", "/../../../../etc/passwd"] {
        say(path, result(fs::File::open(path).map(drop)));
    }
    let root = rustix::thread::set_thread_uid(Uid::ROOT);
    say("root", result(root.map_err(Into::into)));
    let group = rustix::thread::set_thread_gid(Gid::ROOT);
    say("root's group", result(group.map_err(Into::into)));
    let device = rustix::fs::mknodat(
        rustix::fs::CWD,
        "/disk",
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::RUSR,
        rustix::fs::makedev(8, 0),
    );
    say("mknod", result(device.map_err(Into::into)));
    say("write", result(fs::write("/run/file", "x")));
    println!("{READY}");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// Runs until it is killed, or for a minute.
#[test]
#[ignore = "is the program that other tests jail"]
fn inside_for_long() {
    sleep(Duration::from_secs(60));
}

/// A folder of jails.
struct Base {
    folder: TempDir,
    program: PathBuf,
}

impl Base {
    /// Makes one, unless this user cannot make jails; then this was said.
    fn new() -> Option<Base> {
        let status = fs::read_to_string("/proc/self/status").expect("/proc");
        let rights = field(&status, "CapEff");
        let rights = u64::from_str_radix(rights, 16).expect("a mask");
        // linux/capability.h: CAP_SYS_CHROOT, CAP_SYS_ADMIN, CAP_MKNOD.
        let needed = 1 << 18 | 1 << 21 | 1 << 27;
        if rights & needed != needed {
            println!("skipped: jails are made by root only");
            return None;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), mode).expect("its mode");
        let program = folder.path().join(NAME);
        let this = std::env::current_exe().expect("this program");
        fs::copy(this, &program).expect("a copy");
        Some(Base { folder, program })
    }

    fn root(&self, id: &str) -> PathBuf {
        self.folder
            .path()
            .join("jails")
            .join(NAME)
            .join(id)
            .join("root")
    }

    /// Puts the libraries of the program in a jail, as users put a guest's files there.
    fn with_libraries(&self, id: &str) {
        let root = self.root(id);
        fs::create_dir_all(&root).expect("a folder");
        // It fails for a static program.
        let said = Command::new("ldd").arg(&self.program).output();
        let said = said.map_or_else(|_| Vec::new(), |output| output.stdout);
        let said = String::from_utf8_lossy(&said);
        for path in said.split_whitespace().filter(|word| word.starts_with('/')) {
            let copy = root.join(&path[1..]);
            fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder");
            fs::copy(path, copy).expect("a copy");
        }
    }

    /// A call of the jailer, with two descriptors too many.
    fn command(&self, id: &str, options: &[&str], program: &str) -> Command {
        fs::create_dir_all(self.folder.path().join("jails")).expect("a folder");
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec \"$@\" 7</dev/null 9>/dev/null", "sh", ARMLET])
            .args(["jail", "--id", id, "--uid", &USER.to_string()])
            .args(["--gid", &GROUP.to_string(), "--chroot-base-dir"])
            .arg(self.folder.path().join("jails"))
            .arg("--exec-file")
            .arg(&self.program)
            .args(options)
            .args(["--", "--exact", program, "--ignored", "--nocapture"])
            .args(["--test-threads", "1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        command
    }

    /// The process that runs in the background in a jail.
    fn daemon(&self, id: &str) -> i32 {
        let path = self.root(id).join(format!("{NAME}.pid"));
        let text = fs::read_to_string(path).expect("a file with a process ID");
        text.parse().expect("a process ID")
    }
}

/// The value of a line `name: value`.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim()
}

/// What the program says until it is ready.
fn said(output: &mut impl BufRead) -> String {
    let mut text = String::new();
    while !text.contains(READY) {
        let got = output.read_line(&mut text).expect("UTF-8");
        assert!(got > 0, "it ended: {text}");
    }
    text
}

fn of(pid: i32, name: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{name}")).expect("a process")
}

fn namespace(pid: &str, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a process")
}

fn line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// The version of cgroups whose `pids` controller can be used here, and where it is mounted.
fn pids_controller() -> Option<(&'static str, PathBuf)> {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc");
    let find = |kind: &str, option: &str| {
        let mut lines = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>());
        let found = lines.find(|words| {
            words[2] == kind && (option.is_empty() || words[3].split(',').any(|w| w == option))
        });
        found.map(|words| PathBuf::from(words[1]))
    };
    let probe = |root: &Path| {
        let folder = root.join("armlet-probe");
        let made = fs::create_dir(&folder).is_ok();
        made && fs::remove_dir(folder).is_ok()
    };
    if let Some(root) = find("cgroup", "pids").filter(|root| probe(root)) {
        return Some(("1", root));
    }
    let root = find("cgroup2", "").filter(|root| probe(root))?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).ok()?;
    let has_it = controllers.split_whitespace().any(|name| name == "pids");
    has_it.then_some(("2", root))
}

#[test]
fn a_program_has_its_folder_user_and_devices_and_nothing_else() {
    let Some(base) = Base::new() else { return };
    base.with_libraries("one");
    let group = pids_controller();
    if group.is_none() {
        println!("without a control group: there is none that can be changed");
    }
    let parent = format!("armlet-test-{}", std::process::id());
    let version = group.as_ref().map_or("1", |(version, _)| version);
    let mut options = vec!["--resource-limit", "fsize=1000000"];
    if group.is_some() {
        options.extend(["--cgroup", "pids.max=64", "--cgroup-version", version]);
        options.extend(["--parent-cgroup", &parent]);
    }
    let mut child = base
        .command("one", &options, "inside")
        .env("SECRET", "x")
        .spawn()
        .expect("armlet");
    let mut output = BufReader::new(child.stdout.take().expect("its output"));
    let inside = said(&mut output);
    // The jailer has become the program.
    let pid = i32::try_from(child.id()).expect("a process ID");
    let root = base.root("one");
    for (name, value) in [
        ("uid", "12345"),
        ("gid", "54321"),
        ("folder", "/"),
        ("/run", ""),
        ("/dev/net", "tun"),
        ("no-file", "Some(2048)"),
        ("fsize", "Some(1000000)"),
        ("null", "done"),
        ("urandom", "done"),
        ("/etc/passwd", "NotFound"),
        ("/proc/self/root", "NotFound"),
        ("/../../../../etc/passwd", "NotFound"),
        ("root", "PermissionDenied"),
        ("root's group", "PermissionDenied"),
        ("mknod", "PermissionDenied"),
        ("write", "done"),
    ] {
        assert_eq!(field(&inside, name), value, "{name} in {inside}");
    }
    assert!(
        !field(&inside, "environment").contains("SECRET"),
        "{inside}"
    );
    let devices = field(&inside, "/dev");
    assert!(devices.contains("kvm net null urandom") || devices.contains("kvm net null "));
    let entries = field(&inside, "/");
    assert!(
        entries.starts_with("armlet-inside armlet-inside.pid dev"),
        "{entries}"
    );
    // What the kernel says.
    let status = of(pid, "status");
    for name in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, name), "0000000000000000", "{name}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(field(&status, "Groups"), "");
    assert_eq!(field(&status, "Uid"), "12345\t12345\t12345\t12345");
    let place = |path: &Path| {
        let found = fs::metadata(path).expect("a folder");
        (found.dev(), found.ino())
    };
    assert_eq!(
        place(Path::new(&format!("/proc/{pid}/root/"))),
        place(&root)
    );
    assert_ne!(namespace(&pid.to_string(), "mnt"), namespace("self", "mnt"));
    // Nothing of the host is mounted there.
    assert_eq!(
        of(pid, "mounts").lines().count(),
        1,
        "{}",
        of(pid, "mounts")
    );
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    let mut numbers: Vec<String> = descriptors
        .map(|entry| {
            entry
                .expect("one")
                .file_name()
                .into_string()
                .expect("a number")
        })
        .collect();
    numbers.sort();
    assert_eq!(numbers, ["0", "1", "2"]);
    assert_eq!(base.daemon("one"), pid);
    let kvm = fs::metadata(root.join("dev/kvm")).expect("/dev/kvm");
    assert_eq!((kvm.uid(), kvm.gid()), (USER, GROUP));
    assert_eq!(kvm.mode() & 0o7777, 0o600);
    if let Some((_, folder)) = &group {
        let group = folder.join(&parent).join("one");
        assert!(of(pid, "cgroup").contains(&format!("/{parent}/one")));
        let most = fs::read_to_string(group.join("pids.max")).expect("a value");
        assert_eq!(most.trim(), "64");
    }
    drop(child.stdin.take());
    assert!(child.wait().expect("its end").success());
    if let Some((_, folder)) = group {
        for group in [folder.join(&parent).join("one"), folder.join(&parent)] {
            fs::remove_dir(group).expect("an empty group");
        }
    }
    // The next one of this ID does not take what this one left.
    let again = base.command("one", &[], "inside").output().expect("armlet");
    assert_eq!(again.status.code(), Some(1));
    let line = line(&again);
    assert!(line.contains("an earlier jail of this ID"), "{line}");
}

#[test]
fn a_program_in_the_background_has_namespaces_of_its_own_and_no_terminal() {
    let Some(base) = Base::new() else { return };
    base.with_libraries("two");
    let mut other = Command::new("unshare")
        .args(["--net", "sleep", "60"])
        .spawn()
        .expect("unshare");
    let network = format!("/proc/{}/ns/net", other.id());
    // It becomes sleep in its namespace.
    let ours = namespace("self", "net");
    while namespace(&other.id().to_string(), "net") == ours {
        sleep(Duration::from_millis(5));
    }
    let options = ["--daemonize", "--new-pid-ns", "--netns", &network];
    let output = base.command("two", &options, "inside_for_long").output();
    let output = output.expect("armlet");
    assert!(output.status.success(), "{output:?}");
    // The program has begun when the jailer ends.
    let pid = base.daemon("two");
    assert_eq!(of(pid, "comm").trim(), NAME);
    let number = pid.to_string();
    let theirs = namespace(&number, "net");
    assert_eq!(theirs, namespace(&other.id().to_string(), "net"));
    assert_ne!(namespace(&number, "pid"), namespace("self", "pid"));
    let status = of(pid, "status");
    assert!(field(&status, "NSpid").ends_with("\t1"), "{status}");
    // Fields 3 to 7 of proc(5), "/proc/pid/stat": state, parent, group, session, terminal.
    let stat = of(pid, "stat");
    let (_, words) = stat.rsplit_once(") ").expect("a name");
    let words: Vec<&str> = words.split(' ').collect();
    assert_ne!(words[3], number, "it leads its session");
    // Not by getsid: where this session's leader is in another PID namespace, it is 0 and rustix
    // panics.
    let own = of(std::process::id().cast_signed(), "stat");
    let (_, own) = own.rsplit_once(") ").expect("a name");
    assert_ne!(Some(words[3]), own.split(' ').nth(3), "its session");
    assert_eq!(words[4], "0", "it has a terminal");
    for descriptor in 0..3 {
        let path = fs::read_link(format!("/proc/{pid}/fd/{descriptor}"));
        assert!(path.expect("a descriptor").ends_with("null"));
    }
    let pid = Pid::from_raw(pid).expect("a process");
    kill_process(pid, Signal::KILL).expect("it runs");
    other.kill().expect("it runs");
    other.wait().expect("its end");
}

#[test]
fn a_jail_is_made_where_the_sessions_leader_is_in_another_namespace() {
    let Some(base) = Base::new() else { return };
    base.with_libraries("five");
    let call = base.command("five", &["--new-pid-ns"], "inside");
    // getsid(2) says 0 then, as in a session of the kernel's first process.
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child"])
        .arg(call.get_program())
        .args(call.get_args())
        .stdin(Stdio::null())
        .output()
        .expect("unshare");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_program_that_cannot_begin_is_an_error_in_the_background_too() {
    let Some(base) = Base::new() else { return };
    let program = &base.program;
    fs::write(program, "#!/no/such/interpreter\n").expect("written");
    for (id, options) in [("three", &["--daemonize"][..]), ("four", &[])] {
        let output = base.command(id, options, "inside").output();
        let output = output.expect("armlet");
        assert_eq!(output.status.code(), Some(1));
        let line = line(&output);
        assert!(
            line.contains("cannot start /armlet-inside in the jail"),
            "{line}"
        );
        assert!(line.contains("linked statically"), "{line}");
    }
}

#[test]
fn a_link_that_an_earlier_program_left_leads_nowhere() {
    let Some(base) = Base::new() else { return };
    let outside = base.folder.path().join("outside");
    fs::create_dir(&outside).expect("a folder");
    let before = fs::metadata(&outside).expect("a folder");
    for (index, name) in ["dev", "run", NAME].into_iter().enumerate() {
        let id = format!("link-{index}");
        let root = base.root(&id);
        fs::create_dir_all(&root).expect("a folder");
        let target = if name == NAME {
            outside.join("file")
        } else {
            outside.clone()
        };
        symlink(target, root.join(name)).expect("a link");
        let output = base.command(&id, &[], "inside").output().expect("armlet");
        assert_eq!(output.status.code(), Some(1), "{name}");
        line(&output);
    }
    assert_eq!(fs::read_dir(&outside).expect("a folder").count(), 0);
    let after = fs::metadata(&outside).expect("a folder");
    assert_eq!((after.uid(), after.mode()), (before.uid(), before.mode()));
}

#[test]
fn another_user_than_root_is_told_so() {
    let Some(base) = Base::new() else { return };
    let copy = base.folder.path().join("armlet");
    fs::copy(ARMLET, &copy).expect("a copy");
    let output = Command::new(copy)
        .args(["jail", "--id", "a", "--uid", "1", "--gid", "1"])
        .args(["--chroot-base-dir", "/tmp"])
        .uid(USER)
        .output()
        .expect("armlet");
    assert_eq!(output.status.code(), Some(1));
    assert!(line(&output).contains("'armlet jail' is for root"));
}

#[test]
fn under_the_name_jailer_it_is_firecrackers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let jailer = folder.path().join("jailer");
    symlink(ARMLET, &jailer).expect("a link");
    let call = |words: &[&str]| Command::new(&jailer).args(words).output().expect("armlet");
    let version = call(&["--version"]);
    // Clients expect one version of both programs.
    let api = Command::new(ARMLET).args(["api", "--version"]).output();
    let first = |output: &Output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().next().unwrap_or_default().to_owned()
    };
    let name = first(&api.expect("armlet")).replace("Firecracker", "Jailer");
    assert!(name.starts_with("Jailer v1."), "{name}");
    assert_eq!(first(&version), name);
    assert!(version.status.success());
    for (words, said) in [
        (&["--id", "x"][..], "a jail needs --uid, --gid"),
        (&["--frobnicate"], "--frobnicate"),
        (&["--id"], "--id"),
        (
            &[
                "--id",
                "x",
                "--uid",
                "1",
                "--gid",
                "1",
                "--exec-file",
                "/no/such",
            ],
            "cannot find /no/such",
        ),
    ] {
        let output = call(words);
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        let line = line(&output);
        assert!(line.contains(said), "{line}");
    }
}
