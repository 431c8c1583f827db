use super::*;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a child of [`child`] is to try.
const VARIABLE: &str = "ARMLET_TRY_IN_SANDBOX";

/// What whoever broke out of a guest might try, and that no thread of armlet may do.
const ATTEMPTS: [&str; 17] = [
    "open",
    "execve",
    "inet",
    "ptrace",
    "peek",
    "kill",
    "mmap",
    "mprotect",
    "fork",
    "rings",
    "unshare",
    "mount",
    "bpf",
    "keyctl",
    "userfaultfd",
    "tiocsti",
    "chmod",
];

fn sandbox(mode: Mode, needs: Vec<Need>) -> Sandbox {
    Sandbox { mode, needs }
}

/// All that devices may need.
fn all_needs() -> Vec<Need> {
    vec![
        Need::Thread,
        Need::Storage,
        Need::Pages,
        Need::Sockets,
        Need::Broker,
        Need::Tap,
        Need::Vhost,
        Need::Discards,
        Need::Ring,
    ]
}

fn role(name: &str) -> Role {
    let mut all = Role::ALL.into_iter();
    all.find(|role| role.name() == name)
        .unwrap_or(Role::Machine)
}

/// Runs [`tried_in_a_child`] in a process of its own, which has `what` to do.
fn child(what: &str) -> (Option<i32>, String) {
    let tests = std::env::current_exe().expect("this program");
    let name = "sandbox::tests::tried_in_a_child";
    let output = Command::new(tests)
        .args([
            "--exact",
            name,
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(VARIABLE, what)
        .output()
        .expect("a child");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.code(), said)
}

/// Does nothing unless [`child`] started it.
#[test]
#[ignore = "other tests run it in processes of their own"]
fn tried_in_a_child() {
    let Ok(what) = std::env::var(VARIABLE) else {
        return;
    };
    let mut words = what.split(' ');
    let mut word = || words.next().unwrap_or_default();
    let (name, what, folder) = (word().replace('_', " "), word(), word());
    let mode = match name.as_str() {
        "log" => Mode::Log,
        _ => Mode::On,
    };
    let needs = match folder {
        "" => Vec::new(),
        "all" => all_needs(),
        other => panic!("{other} is not known"),
    };
    let sandbox = sandbox(mode, needs);
    sandbox.enter().expect("a sandbox");
    let role = role(&name);
    if role != Role::Machine {
        sandbox.enter_as(role).expect("a narrower one");
    }
    match what {
        "sweep" => sweep(&sandbox.rules(role)),
        what => println!("result {}", attempt(what)),
    }
}

/// Makes every call once, by number, and prints which come back: forbidden ones are counted by a handler
/// in place of the one that ends armlet.
fn sweep(rules: &Rules) {
    extern "C" fn forbidden(_: i32, _: *const libc::siginfo_t, _: *mut libc::c_void) {
        FORBIDDEN.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: as in `trap`; the handler counts.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = forbidden as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
    }
    let mut differ = Vec::new();
    let mut allowed = 0;
    // Numbers that no kernel has, and those of other ways to call it, too.
    let beyond = [511, 512, 1000, 0x4000_0000, 0x4000_0101, 0x7fff_ffff];
    for call in (0..NUMBERS as i64).chain(beyond) {
        let answer = rules.answer(call);
        // The kernel lets those by which PCs trace functions pass every filter (kernel/seccomp.c), and
        // has them end the process.
        if PROBES.contains(&call) {
            continue;
        }
        if answer == Answer::Allowed {
            allowed += 1;
            // What would not come back, or change what the test stands on.
            continue;
        }
        let before = FORBIDDEN.load(Ordering::Relaxed);
        // SAFETY: arguments of all ones are no valid pointers, descriptors, commands or flags.
        unsafe { libc::syscall(call, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64) };
        let error = std::io::Error::last_os_error().raw_os_error();
        let trapped = FORBIDDEN.load(Ordering::Relaxed) > before;
        let is_right = match answer {
            // All of these arguments are wrong.
            Answer::Forbidden | Answer::Checked => trapped,
            _ => !trapped && error == Some(libc::ENOSYS),
        };
        if !is_right {
            differ.push(call);
        }
    }
    println!("allowed {allowed}, differ {differ:?}");
}

/// uretprobe and uprobe (arch/x86/entry/syscalls/syscall_64.tbl); no other architecture has these numbers.
const PROBES: [i64; 2] = [335, 336];

static FORBIDDEN: AtomicU32 = AtomicU32::new(0);

/// Makes the call, and returns the error that it met, 0 for none.
fn attempt(what: &str) -> i32 {
    let path = c"/etc/passwd".as_ptr();
    let here = libc::AT_FDCWD;
    let mut page = [0_u8; 64];
    let pointer = page.as_mut_ptr();
    // SAFETY: the calls get valid pointers or none; those that would change this process do not
    // come back to code that relies on what they change.
    let result = unsafe {
        match what {
            "nothing" => 0,
            "open" => libc::syscall(libc::SYS_openat, here, path, libc::O_RDONLY),
            "execve" => libc::syscall(libc::SYS_execve, path, 0, 0),
            "inet" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0),
            "peek" => libc::syscall(libc::SYS_process_vm_readv, libc::getppid(), 0, 0, 0, 0, 0),
            "kill" => libc::syscall(libc::SYS_kill, libc::getpid(), 0),
            "mmap" => libc::syscall(
                libc::SYS_mmap,
                0,
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            ),
            "mprotect" => libc::syscall(libc::SYS_mprotect, 0, 0, libc::PROT_EXEC),
            "fork" => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
            "rings" => libc::syscall(libc::SYS_io_uring_setup, 0, 0),
            "unshare" => libc::syscall(libc::SYS_unshare, 0),
            "mount" => libc::syscall(libc::SYS_mount, path, path, 0, 0, 0),
            "bpf" => libc::syscall(libc::SYS_bpf, 0, 0, 0),
            "keyctl" => libc::syscall(libc::SYS_keyctl, 0, 0, 0, 0, 0),
            "userfaultfd" => libc::syscall(libc::SYS_userfaultfd, 0),
            "tiocsti" => libc::syscall(libc::SYS_ioctl, 0, 0x5412, pointer),
            "chmod" => libc::syscall(libc::SYS_fchmodat, here, path, 0o644),
            other => panic!("{other} is not known"),
        }
    };
    match result {
        0.. => 0,
        _ => std::io::Error::last_os_error().raw_os_error().unwrap_or(-1),
    }
}

#[test]
fn whoever_breaks_out_can_do_nothing_of_it() {
    for role in Role::ALL {
        let role = role.name().replace(' ', "_");
        let (status, said) = child(&format!("{role} nothing"));
        assert_eq!(status, Some(0), "{role}: {said}");
        assert!(said.contains("result 0"), "{said}");
        for what in ATTEMPTS {
            let (status, said) = child(&format!("{role} {what}"));
            assert_eq!(status, Some(7), "{role}: {what}: {said}");
            assert!(said.contains("which the sandbox forbids"), "{what}: {said}");
        }
    }
}

/// Whether this kernel has Landlock, in whatever version.
fn has_landlock() -> bool {
    // SAFETY: with this flag the call takes no pointer and makes nothing.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) > 0 }
}

#[test]
fn landlock_alone_keeps_files_away() {
    if !has_landlock() {
        println!("skipped: this kernel has no Landlock");
        return;
    }
    // Where calls are only logged.
    let (status, said) = child("log open");
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains(&format!("result {}", libc::EACCES)), "{said}");
}

#[test]
fn of_all_system_calls_only_those_of_the_table_come_back() {
    for role in Role::ALL {
        for needs in ["", "all"] {
            let role = role.name().replace(' ', "_");
            let (status, said) = child(&format!("{role} sweep {needs}"));
            assert_eq!(status, Some(0), "{role} {needs}: {said}");
            assert!(said.contains("differ []"), "{role} {needs}: {said}");
        }
    }
}

#[test]
fn a_vcpu_may_make_few_calls() {
    let count = |role, needs: &[Need]| {
        Rules::of(role, needs, &HostArch::OTHER_CALLS)
            .calls()
            .count()
    };
    let all = all_needs();
    assert!(count(Role::Vcpu, &[]) <= 45, "{}", count(Role::Vcpu, &[]));
    assert!(count(Role::Vcpu, &all) <= 60, "{}", count(Role::Vcpu, &all));
    for role in [Role::Vcpu, Role::Device, Role::Console] {
        for needs in [&[][..], &all] {
            let machine = Rules::of(Role::Machine, needs, &HostArch::OTHER_CALLS);
            let rules = Rules::of(role, needs, &HostArch::OTHER_CALLS);
            assert!(rules.calls().count() < machine.calls().count());
            // A thread is bound to what the event loop may do.
            for call in rules.calls() {
                assert_eq!(rules.answer(call), machine.answer(call), "{role:?}: {call}");
            }
            for request in rules.requests() {
                assert!(
                    machine.requests().contains(request),
                    "{role:?}: {request:?}"
                );
            }
        }
    }
}

#[test]
fn filters_are_short() {
    for role in Role::ALL {
        for needs in [vec![], all_needs()] {
            let mut program = Program::new(false);
            let other = &HostArch::OTHER_CALLS;
            let machine = Rules::of(Role::Machine, &needs, other);
            let others = (role != Role::Machine).then_some(&machine);
            let rules = Rules::of(role, &needs, other);
            let code = rules.write(&mut program, other, 1, others).expect("fits");
            println!("{role:?} {}: {}", needs.len(), code.len());
            assert!(code.len() <= 255, "{role:?}: {}", code.len());
        }
    }
}

/// The table of docs/security.md: which call each thread may make, and for which device.
fn table() -> String {
    let other = &HostArch::OTHER_CALLS;
    let glibc = calls::GLIBC;
    let needs = [
        (Need::Thread, "any"),
        (Need::Storage, "storage"),
        (Need::Pages, "memory"),
        (Need::Sockets, "sockets"),
        (Need::Broker, "broker"),
        (Need::Ring, "ring"),
    ];
    let every = Rules::of(Role::Machine, &all_needs(), other);
    let mut rows = Vec::new();
    for call in every.calls() {
        if glibc.has(call) || other.calls.contains(&call) {
            continue;
        }
        let mut row = format!("| `{}` |", name(call, other.known).expect("a name"));
        for role in Role::ALL {
            let may = |needs: &[Need]| Rules::of(role, needs, other).answer(call);
            let cell = match may(&[]) {
                Answer::Allowed => "yes".to_owned(),
                Answer::Checked => "checked".to_owned(),
                _ => {
                    let of = needs
                        .iter()
                        .filter(|(need, _)| may(&[*need]) == Answer::Allowed);
                    of.map(|(_, word)| *word).collect::<Vec<_>>().join(", ")
                }
            };
            row += &format!(" {cell} |");
        }
        rows.push(row);
    }
    rows.sort();
    let head = Role::ALL.map(|role| format!(" {} |", role.name())).concat();
    format!(
        "| call |{head}\n|---|---|---|---|---|\n{}\n",
        rows.join("\n")
    )
}

#[test]
fn docs_have_the_table_of_calls() {
    let text = std::fs::read_to_string("docs/security.md").expect("the document");
    let table = table();
    assert!(
        text.contains(&table),
        "docs/security.md is to have\n{table}"
    );
    for call in HostArch::OTHER_CALLS.calls {
        let name = name(*call, HostArch::OTHER_CALLS.known).expect("a name");
        assert!(text.contains(&format!("`{name}`")), "{name}");
    }
}

#[test]
fn a_sandbox_is_shown() {
    let all = sandbox(Mode::On, all_needs());
    let text = all.text();
    for part in ["\nvCPU (", "mmap*", "KVM_RUN", "ask the broker", "landlock"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.lines().all(|line| line.len() <= 110), "{text}");
    let json = all.json();
    assert_eq!(json["threads"][1]["thread"], "vCPU");
    assert_eq!(json["threads"][1]["ioctl"][6], "KVM_RUN");
    assert!(
        json["threads"][0]["calls"]
            .as_array()
            .is_some_and(|calls| calls.len() > 60)
    );
}

#[test]
fn without_a_sandbox_nothing_changes() {
    assert!(sandbox(Mode::Off, Vec::new()).enter().is_ok());
    assert_eq!(attempt("open"), 0);
    for (text, mode) in [
        (None, Mode::On),
        (Some("strict"), Mode::Strict),
        (Some("off"), Mode::Off),
    ] {
        assert_eq!(Mode::parse(text).expect("a mode"), mode);
    }
    let error = Mode::parse(Some("maybe")).expect_err("no mode").to_string();
    assert!(error.contains("use on, strict, log or off"), "{error}");
}
