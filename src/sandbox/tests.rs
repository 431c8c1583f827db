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
    Sandbox::new(mode, needs)
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
        Need::Pci,
        Need::Images,
        Need::Debugger,
        Need::Snapshots,
        Need::Restoring,
        Need::Recording,
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
            "make_a_VM" => libc::syscall(libc::SYS_ioctl, 0, 0xae01, pointer),
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

#[test]
fn the_line_of_a_forbidden_call_names_what_was_refused() {
    for (role, what, parts) in [
        ("vCPU", "tiocsti", "ioctl ( with request 0x5412"),
        (
            "vCPU",
            "make a VM",
            "ioctl ( with request KVM_CREATE_VM 0xae01",
        ),
        ("device", "mprotect", "mprotect ( with argument 3 of 0x4"),
        ("event_loop", "fork", "clone ( with argument 1 of 0x11"),
        ("event_loop", "open", "openat ( , which"),
    ] {
        let (status, said) = child(&format!("{role} {}", what.replace(' ', "_")));
        assert_eq!(status, Some(7), "{role}: {what}: {said}");
        for part in parts.split(" ( ") {
            assert!(said.contains(part), "{role}: {what}: {said}");
        }
        assert!(said.contains("which the sandbox forbids"), "{said}");
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
                    machine.requests().any(|other| other == request),
                    "{role:?}: {request:?}"
                );
            }
        }
    }
}

/// The filters of a thread, from the first that it enters.
fn filters(role: Role, needs: &[Need]) -> Vec<Vec<Instruction>> {
    let sandbox = sandbox(Mode::On, needs.to_vec());
    let other = &HostArch::OTHER_CALLS;
    let first = match needs {
        [] => made::started::first(PROCESS).to_vec(),
        [Need::Restoring] => made::restored::first(PROCESS).to_vec(),
        _ => {
            let program = sandbox.rules(Role::Machine);
            program.write(Outcome::Trap, other, PROCESS).code().to_vec()
        }
    };
    let mut filters = vec![first];
    if role != Role::Machine {
        filters.push(sandbox.narrower(role).to_vec());
    }
    filters
}

const PROCESS: u32 = 77;

#[test]
fn filters_are_short() {
    for role in Role::ALL {
        for needs in [vec![], all_needs()] {
            let filters = filters(role, &needs);
            let code = filters.last().expect("a filter");
            println!("{role:?} {}: {}", needs.len(), code.len());
            assert!((10..=255).contains(&code.len()), "{role:?}: {}", code.len());
        }
    }
    let of = |role| filters(role, &[]).last().expect("a filter").len();
    assert!(of(Role::Machine) <= 112, "{}", of(Role::Machine));
    assert!(of(Role::Vcpu) <= 35, "{}", of(Role::Vcpu));
}

#[test]
fn what_is_made_at_compile_time_is_what_would_be_made_later() {
    let other = &HostArch::OTHER_CALLS;
    let made = [
        (
            &[] as &[Need],
            made::started::first(PROCESS).to_vec(),
            &made::started::VCPU_CODE as &[Instruction],
        ),
        (
            &[Need::Restoring],
            made::restored::first(PROCESS).to_vec(),
            &made::restored::VCPU_CODE,
        ),
    ];
    for (needs, first, vcpu) in made {
        let outer = Rules::of(Role::Machine, needs, other);
        let program = outer.write(Outcome::Trap, other, PROCESS);
        assert_eq!(first, program.code());
        let program = Rules::of(Role::Vcpu, needs, other).write_within(&outer, Outcome::Trap);
        assert_eq!(vcpu, program.code());
    }
}

/// What filters say of a call together: whether it is allowed.
fn allow(filters: &[Vec<Instruction>], call: i64, arguments: [u64; 6]) -> bool {
    filters.iter().all(|code| {
        let (mut at, mut value) = (0, 0);
        loop {
            let Instruction {
                code: kind,
                yes,
                no,
                value: operand,
            } = code[at];
            let holds = match kind {
                0x15 => value == operand,
                0x25 => value > operand,
                0x35 => value >= operand,
                0x45 => value & operand != 0,
                _ => false,
            };
            at += 1;
            match kind {
                0x20 if operand == 0 => value = call as u32,
                0x20 if operand == 4 => value = HostArch::OTHER_CALLS.native.architecture,
                0x20 => {
                    let (index, half) = ((operand - 16) / 8, (operand - 16) % 8);
                    value = (arguments[index as usize] >> (8 * half)) as u32;
                }
                0x54 => value &= operand,
                0x05 => at += operand as usize,
                0x06 => return operand == 0x7fff_0000,
                _ => at += usize::from(if holds { yes } else { no }),
            }
        }
    })
}

#[test]
fn filters_say_what_the_rules_say() {
    let other = &HostArch::OTHER_CALLS;
    let mut cases: Vec<Vec<Need>> = all_needs().into_iter().map(|need| vec![need]).collect();
    cases.extend([vec![], all_needs()]);
    for (role, needs) in Role::ALL
        .into_iter()
        .flat_map(|role| cases.iter().map(move |needs| (role, needs)))
    {
        let rules = Rules::of(role, needs, other);
        let filters = filters(role, needs);
        for request in 0..=u16::MAX {
            let arguments = [0, 0xc0de_0000 | u64::from(request), 0, 0, 0, 0];
            let is_allowed = allow(&filters, libc::SYS_ioctl, arguments);
            let is_known = rules.requests().any(|(_, own)| *own == request);
            let next = u32::from(request) + 1;
            if !other.are_unknown(next - 1, next) {
                assert_eq!(is_allowed, is_known, "{role:?} {needs:?}: {request:#x}");
            }
        }
        for call in 0..600 {
            let answer = rules.answer(call);
            if answer != Answer::Checked {
                let is_allowed = allow(&filters, call, [0; 6]);
                assert_eq!(
                    is_allowed,
                    answer == Answer::Allowed,
                    "{role:?} {needs:?}: {call}"
                );
            }
        }
        let cases = [
            (libc::SYS_mmap, 2, 3, 7),
            (libc::SYS_mprotect, 2, 1, 5),
            (libc::SYS_prctl, 0, 15, 38),
            (libc::SYS_prctl, 0, 16, 4),
            (libc::SYS_tgkill, 0, u64::from(PROCESS), 1),
            (libc::SYS_fcntl, 1, 4, 8),
            (libc::SYS_fcntl, 1, 1030, 1031),
            (libc::SYS_fcntl, 1, 0, 38),
        ];
        let locks = allow(&filters, libc::SYS_fcntl, [0, 37, 0, 0, 0, 0]);
        assert_eq!(locks, needs.contains(&Need::Images), "{role:?} {needs:?}");
        for (call, at, allowed, forbidden) in cases {
            assert_eq!(calls::argument_of(call), Some(at));
            let with = |value| {
                let mut arguments = [0; 6];
                arguments[at] = value;
                allow(&filters, call, arguments)
            };
            assert!(with(allowed), "{role:?} {needs:?}: {call} {allowed}");
            assert!(!with(forbidden), "{role:?} {needs:?}: {call} {forbidden}");
        }
        let starts = allow(&filters, libc::SYS_clone, [0x7d_0f00, 0, 0, 0, 0, 0]);
        assert_eq!(starts, role == Role::Machine);
        assert!(!allow(&filters, libc::SYS_clone, [17, 0, 0, 0, 0, 0]));
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
        (Need::Images, "images"),
    ];
    let every = Rules::of(Role::Machine, &all_needs(), other);
    let mut rows = Vec::new();
    for call in every.calls() {
        if glibc.has(call) || other.native.calls.contains(&call) {
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
    for call in HostArch::OTHER_CALLS.native.calls {
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
