//! Guests that are debugged: by gdb's protocol, and by gdb itself.

use crate::guest::{Armlet, Guest};
use crate::tools;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

/// How long what must come may take.
const LONG: Duration = Duration::from_secs(240);

/// A guest that puts [`CONSTANT`] into its first register, writes that to memory and does nothing twice, and
/// then prints "one" and powers off; offsets are from its first instruction.
pub(crate) struct Debugged {
    pub(crate) armlet: Armlet,
    /// The numbers of the first register and of the program counter.
    pub(crate) first: u32,
    pub(crate) pc: u32,
    /// The bytes of a breakpoint instruction.
    pub(crate) kind: u64,
    /// Where a step from the first instruction leads.
    pub(crate) second: u64,
    /// The instruction that writes, and the one behind it.
    pub(crate) write: [u64; 2],
    /// The address that it writes 4 bytes to.
    pub(crate) written: u64,
    /// Whether the CPU stops at a watchpoint before the access is made.
    pub(crate) stops_before: bool,
    /// The second of the instructions that do nothing.
    pub(crate) nothing: u64,
    /// What KVM stops at here: hardware breakpoints everywhere.
    pub(crate) meets: Meets,
}

/// What KVM stops at.
#[derive(Clone, Copy)]
pub(crate) struct Meets {
    pub(crate) instructions: bool,
    pub(crate) watchpoints: bool,
}

impl Meets {
    /// The packet's number and the answer of a breakpoint.
    fn breakpoint(self) -> (u32, &'static str) {
        match self.instructions {
            true => (0, "swbreak:;"),
            false => (1, "hwbreak:;"),
        }
    }
}

/// What the guest writes.
pub(crate) const CONSTANT: u32 = 0x1122_3344;

/// A client of gdb's protocol (gdb's manual, appendix E).
struct Client(UnixStream);

impl Client {
    /// Connects as soon as armlet listens.
    fn connect(path: &Path) -> Client {
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(LONG)).expect("a socket");
                    return Client(stream);
                }
                Err(error) => assert!(
                    matches!(
                        error.kind(),
                        ErrorKind::NotFound | ErrorKind::ConnectionRefused
                    ),
                    "{error}"
                ),
            }
            sleep(Duration::from_millis(10));
        }
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.0.read_exact(&mut byte).expect("an answer");
        byte[0]
    }

    fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        let text = format!("${packet}#{sum:02x}");
        self.0.write_all(text.as_bytes()).expect("a server");
    }

    fn receive(&mut self) -> String {
        while self.byte() != b'$' {}
        let mut text = String::new();
        loop {
            match self.byte() {
                b'#' => break,
                // The last character, as often again.
                b'*' => {
                    let count = usize::from(self.byte() - 29);
                    let last = text.chars().last().expect("a character");
                    text.extend(std::iter::repeat_n(last, count));
                }
                byte => text.push(byte.into()),
            }
        }
        self.byte();
        self.byte();
        // It hangs up after some answers.
        let _ = self.0.write_all(b"+");
        text
    }

    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive()
    }

    fn done(&mut self, packet: &str) {
        assert_eq!(self.ask(packet), "OK", "{packet}");
    }

    /// Asks for a register of up to 64 bits.
    fn register(&mut self, number: u32) -> u64 {
        number_in(&self.ask(&format!("p{number:x}")))
    }

    fn memory(&mut self, address: u64, count: usize) -> u64 {
        number_in(&self.ask(&format!("m{address:x},{count:x}")))
    }

    /// Waits until the server has hung up.
    fn is_let_go(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

/// A number in hexadecimal digits, the lowest byte first.
fn number_in(text: &str) -> u64 {
    let value = u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("'{text}' is no number"));
    value.swap_bytes() >> (64 - 4 * text.len())
}

/// Starts a guest that waits for a debugger, or with `more` does not.
fn start(armlet: Armlet, more: &str) -> (Guest, PathBuf) {
    let path = armlet.file("gdb", b"");
    fs::remove_file(&path).expect("a file of ours");
    let address = format!("unix:{}{more}", path.display());
    (armlet.option("--gdb", address).start(), path)
}

pub(crate) fn a_guest_is_debugged_from_its_first_instruction(debugged: Debugged) {
    let Debugged {
        first, pc, kind, ..
    } = debugged;
    let (guest, path) = start(debugged.armlet, "");
    let mut gdb = Client::connect(&path);
    assert!(gdb.ask("?").starts_with("T05thread:01;"));
    let entry = gdb.register(pc);
    assert_eq!(guest.said(), "", "it waits");
    // One step.
    assert!(gdb.ask("vCont;s:1;c").starts_with("T05thread:01;"));
    assert_eq!(gdb.register(pc), entry + debugged.second);
    // A breakpoint instruction, by which memory is as before once it is gone.
    let [write, after] = debugged.write.map(|offset| entry + offset);
    let original = gdb.memory(write, 4);
    let (number, met) = debugged.meets.breakpoint();
    gdb.done(&format!("Z{number},{write:x},{kind:x}"));
    assert!(gdb.ask("vCont;c").contains(met));
    assert_eq!(gdb.register(pc), write);
    assert_eq!(gdb.register(first) as u32, CONSTANT);
    gdb.done(&format!("z{number},{write:x},{kind:x}"));
    assert_eq!(gdb.memory(write, 4), original);
    // Registers and memory are changed, and a watchpoint sees it written.
    let written = debugged.written;
    gdb.done(&format!("M{written:x},4:01020304"));
    assert_eq!(gdb.memory(written, 4), 0x0403_0201);
    gdb.done(&format!("P{first:x}={:016x}", 0x5566_u64.swap_bytes()));
    if debugged.meets.watchpoints {
        gdb.done(&format!("Z2,{written:x},4"));
        let met = gdb.ask("vCont;c");
        assert!(met.contains(&format!("watch:{written:08x};")), "{met}");
        gdb.done(&format!("z2,{written:x},4"));
    }
    if debugged.stops_before || !debugged.meets.watchpoints {
        assert_eq!(
            (gdb.register(pc), gdb.memory(written, 4)),
            (write, 0x0403_0201)
        );
        assert!(gdb.ask("vCont;s:1;c").starts_with("T05"));
    }
    assert_eq!((gdb.register(pc), gdb.memory(written, 4)), (after, 0x5566));
    // A hardware breakpoint.
    let nothing = entry + debugged.nothing;
    gdb.done(&format!("Z1,{nothing:x},{kind:x}"));
    assert!(gdb.ask("vCont;c").contains("hwbreak:;"));
    assert_eq!(gdb.register(pc), nothing);
    gdb.done(&format!("z1,{nothing:x},{kind:x}"));
    // What is not possible is refused, and nothing else happens.
    assert_ne!(gdb.ask(&format!("Z2,{:x},d", written + 1)), "OK");
    assert_ne!(gdb.ask("Z0,f000000000000000,1"), "OK");
    assert_ne!(gdb.ask("mf000000000000000,4"), "OK");
    assert_eq!(guest.said(), "");
    assert_eq!(gdb.ask("vCont;c"), "W00");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "one\n");
    assert!(!path.exists(), "the socket is left");
}

/// Clients that do what no debugger does; the guest ticks on after each. Its ticks contain `tick`, its
/// breakpoint instructions have so many bytes, if it meets any.
pub(crate) fn no_client_harms_a_guest(armlet: Armlet, tick: &str, pc: u32, kind: Option<u64>) {
    let (mut guest, path) = start(armlet, ",nowait");
    guest.expect(tick);
    let stands_still = |guest: &mut Guest| {
        // What it had printed arrives.
        sleep(Duration::from_millis(300));
        let said = guest.said();
        sleep(Duration::from_millis(200));
        assert_eq!(guest.said(), said, "it does not stand still");
    };
    for garbage in [
        b"$vCont;c#00" as &[u8],
        b"$p",
        b"$p7fffffff#37",
        b"$vCont;s#b8",
        b"$Hg0#df$vCont;x:1#00",
        b"\xff\x00$$$###+++---\x03\x03\x03",
        b"$Z0,zzzz,1#00",
        b"$m0,ffffffffffffffff#2d",
    ] {
        let mut gdb = Client::connect(&path);
        // It may be let go at once.
        let _ = gdb.0.write_all(garbage);
        sleep(Duration::from_millis(50));
        drop(gdb);
        guest.expect(tick);
    }
    // A packet without an end.
    let mut gdb = Client::connect(&path);
    let _ = gdb.0.write_all(b"$m");
    for _ in 0..64 {
        if gdb.0.write_all(&[b'0'; 4096]).is_err() {
            break;
        }
    }
    assert!(gdb.is_let_go());
    guest.expect(tick);

    // One stops the guest, and another is refused meanwhile.
    let mut gdb = Client::connect(&path);
    gdb.ask("?");
    stands_still(&mut guest);
    assert!(Client::connect(&path).is_let_go());
    gdb.send("vCont;c");
    guest.expect(tick);
    gdb.0.write_all(b"\x03").expect("a server");
    assert!(gdb.receive().starts_with("T02"));
    stands_still(&mut guest);
    // It goes away with a breakpoint where the guest is: nothing is left of it, in the middle of a run
    // either.
    drop(gdb);
    guest.expect(tick);
    for runs in [false, true] {
        let mut gdb = Client::connect(&path);
        let at = gdb.register(pc);
        gdb.done(&format!("Z1,{at:x},{}", kind.unwrap_or(1)));
        if let Some(kind) = kind {
            gdb.done(&format!("Z0,{at:x},{kind:x}"));
        }
        if runs {
            gdb.send("vCont;c");
            sleep(Duration::from_millis(100));
        }
        drop(gdb);
        guest.expect(tick);
        guest.expect(tick);
    }
    let mut gdb = Client::connect(&path);
    gdb.done("D");
    guest.expect(tick);
    // The last one ends the guest.
    let mut gdb = Client::connect(&path);
    gdb.send("k");
    let outcome = guest.end();
    outcome.assert_status(6);
    assert!(
        outcome.errors.contains("stopped by the debugger"),
        "{}",
        outcome.errors
    );
}

/// A guest that prints "again" and resets itself, for ever.
pub(crate) fn a_reset_keeps_the_session(armlet: Armlet, pc: u32, kind: u64) {
    let (mut guest, path) = start(armlet, "");
    let mut gdb = Client::connect(&path);
    gdb.ask("?");
    let entry = gdb.register(pc);
    for _ in 0..3 {
        assert!(gdb.ask("vCont;c").starts_with("T05thread:01;"));
        guest.expect("again\n");
        assert_eq!(gdb.register(pc), entry);
    }
    // Debug registers are those of the new vCPUs, too.
    gdb.done(&format!("Z1,{entry:x},{kind:x}"));
    for _ in 0..3 {
        assert!(
            gdb.ask("vCont;c").contains("hwbreak"),
            "before the first instruction"
        );
        assert_eq!(gdb.register(pc), entry);
        gdb.done(&format!("z1,{entry:x},{kind:x}"));
        assert!(gdb.ask("vCont;s:1").starts_with("T05"));
        gdb.done(&format!("Z1,{entry:x},{kind:x}"));
        assert!(gdb.ask("vCont;c").starts_with("T05"), "the next life");
    }
    gdb.done("D");
    for _ in 0..10 {
        guest.expect("again\n");
    }
    guest.signal(rustix::process::Signal::INT);
    guest.end().assert_status(6);
}

/// A guest that executes a breakpoint instruction of its own, whose handler prints "own" and powers off.
/// `elsewhere` is memory that it does not execute.
pub(crate) fn the_guests_own_breakpoints_are_its_own(
    armlet: Armlet,
    elsewhere: u64,
    kind: u64,
    prepare: &[(u64, u64, usize)],
) {
    let (guest, path) = start(armlet, "");
    let mut gdb = Client::connect(&path);
    gdb.ask("?");
    for (from, to, count) in prepare {
        let bytes = gdb.ask(&format!("m{from:x},{count:x}"));
        gdb.done(&format!("M{to:x},{count:x}:{bytes}"));
    }
    gdb.done(&format!("Z0,{elsewhere:x},{kind:x}"));
    assert_eq!(gdb.ask("vCont;c"), "W00");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "own\n");
}

/// A guest whose second vCPU prints "two" once the first has started it.
pub(crate) fn threads_are_vcpus(armlet: Armlet, pc: u32) {
    let (mut guest, path) = start(armlet.cpus(2), "");
    let mut gdb = Client::connect(&path);
    assert_eq!(gdb.ask("qfThreadInfo"), "m01,02");
    assert_eq!(gdb.ask("qsThreadInfo"), "l");
    let entry = gdb.register(pc);
    gdb.done("Hg2");
    assert_ne!(gdb.register(pc), entry, "the second is where it was left");
    gdb.done("Hg1");
    // With the others held, the second stays where it is.
    assert!(gdb.ask("vCont;s:1").starts_with("T05thread:01;"));
    gdb.send("vCont;c");
    guest.expect("two");
    gdb.0.write_all(b"\x03").expect("a server");
    assert!(gdb.receive().starts_with("T02"));
    gdb.send("k");
    guest.end().assert_status(6);
}

/// What a guest does that [`linux_stops_at_start_kernel`]: it tells addresses, and starts again.
pub(crate) const SYMBOLS: &str = "grep -E ' (start_kernel|rest_init)$' /proc/kallsyms\nreboot -f\n";

/// Linux, whose own breakpoints are at work, too.
pub(crate) fn linux_stops_at_start_kernel(armlet: Armlet, pc: u32, kind: u64, meets: Meets) {
    let (guest, path) = start(armlet, "");
    let mut gdb = Client::connect(&path);
    gdb.ask("?");
    let next_life = gdb.ask("vCont;c");
    assert!(next_life.starts_with("T05"), "{next_life}");
    let said = guest.said();
    let address = |symbol: &str| {
        let line = said.lines().find(|line| line.trim_end().ends_with(symbol));
        let digits = line.and_then(|line| line.split_whitespace().next());
        let digits = digits.unwrap_or_else(|| panic!("no {symbol}: {said}"));
        u64::from_str_radix(digits, 16).expect("an address")
    };
    let (begin, rest) = (address(" start_kernel"), address(" rest_init"));
    gdb.done(&format!("Z1,{begin:x},{kind:x}"));
    assert!(gdb.ask("vCont;c").contains("hwbreak:;"));
    assert_eq!(gdb.register(pc), begin);
    gdb.done(&format!("z1,{begin:x},{kind:x}"));
    // Memory is that of the kernel's tables by now, a page's end in it.
    let code = gdb.memory(rest, kind as usize);
    assert_ne!(code, 0);
    let across = (rest | 0xfff) - 3;
    assert_eq!(gdb.ask(&format!("m{across:x},8")).len(), 16);
    let (number, met) = meets.breakpoint();
    gdb.done(&format!("Z{number},{rest:x},{kind:x}"));
    assert!(gdb.ask("vCont;c").contains(met));
    assert_eq!(gdb.register(pc), rest);
    gdb.done(&format!("z{number},{rest:x},{kind:x}"));
    // Where nothing of ours is written, the kernel may patch it (x86_64: a call of ftrace's).
    if meets.instructions {
        assert_eq!(gdb.memory(rest, kind as usize), code);
    }
    // Interrupts are pending by now, and no step leads to one.
    for _ in 0..2 {
        assert!(gdb.ask("vCont;s:1").starts_with("T05"));
        let at = gdb.register(pc).wrapping_sub(rest);
        assert!((1..16).contains(&at), "{at:#x} behind rest_init");
    }
    // One that is never met, and stays while the kernel patches itself.
    gdb.done(&format!("Z{number},{begin:x},{kind:x}"));
    let next_life = gdb.ask("vCont;c");
    assert!(next_life.starts_with("T05"), "{next_life}");
    assert_eq!(guest.said().matches("start_kernel").count(), 2);
    gdb.send("k");
    guest.end().assert_status(6);
}

/// What gdb prints when it carries out `commands`; `None`, and this was said, where there is none.
fn real_gdb(path: &Path, commands: &[&str]) -> Option<String> {
    let program = tools::program("gdb-multiarch")?;
    let mut gdb = Command::new(program);
    gdb.args(["-batch", "-nx", "-ex", "set pagination off"]);
    gdb.arg("-ex")
        .arg(format!("target remote {}", path.display()));
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = gdb.output().expect("gdb");
    let said = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&said).into_owned())
}

pub(crate) fn gdb_itself_debugs_a_guest(debugged: Debugged) {
    if tools::program("gdb-multiarch").is_none() {
        return;
    }
    let (guest, path) = start(debugged.armlet, "");
    while !path.exists() {
        sleep(Duration::from_millis(10));
    }
    let [write, after] = debugged.write;
    let (number, _) = debugged.meets.breakpoint();
    let is_watched = debugged.meets.watchpoints;
    let commands = [
        "set $entry = $pc".to_owned(),
        "stepi".to_owned(),
        "printf \"second %d\\n\", $pc - $entry".to_owned(),
        format!(
            "{} *($entry + {write})",
            ["break", "hbreak"][number as usize]
        ),
        "continue".to_owned(),
        "delete".to_owned(),
        match is_watched {
            true => format!("watch *(unsigned int *) {}", debugged.written),
            false => "info registers".to_owned(),
        },
        if is_watched { "continue" } else { "stepi" }.to_owned(),
        "printf \"behind %d\\n\", $pc - $entry".to_owned(),
        format!(
            "printf \"memory %x\\n\", *(unsigned int *) {}",
            debugged.written
        ),
        "delete".to_owned(),
        format!("hbreak *($entry + {})", debugged.nothing),
        "continue".to_owned(),
        "printf \"nothing %d\\n\", $pc - $entry".to_owned(),
        "info threads".to_owned(),
        "delete".to_owned(),
        "continue".to_owned(),
    ];
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    let said = real_gdb(&path, &commands).expect("it is there");
    let outcome = guest.end();
    for line in [
        format!("second {}\n", debugged.second),
        format!("behind {after}\n"),
        format!("memory {CONSTANT:x}\n"),
        format!("nothing {}\n", debugged.nothing),
        "exited normally".to_owned(),
    ] {
        assert!(said.contains(&line), "{line}: {said}");
    }
    outcome.assert_status(0);
    assert_eq!(outcome.text(), "one\n");
}
