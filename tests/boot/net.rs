use crate::guest::{Armlet, GLANCE, Guest, Input, noise};
use crate::rig;
pub(crate) use crate::rig::TRANSFER;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle, sleep};

/// Data is made and looked at in pieces of this size.
const PIECE: usize = 1 << 16;

/// Writes `length` bytes that tell their place.
pub(crate) fn give(mut to: impl Write, length: usize) {
    for piece in 0..length / PIECE {
        to.write_all(&noise(piece as u64, PIECE)).expect("a reader");
    }
}

/// Reads to the end, and fails unless it is what [`give`] writes.
pub(crate) fn take(mut from: impl Read, length: usize) {
    let mut buffer = vec![0; PIECE];
    for piece in 0..length / PIECE {
        let got = from.read_exact(&mut buffer);
        assert!(got.is_ok(), "it ended in piece {piece}: {got:?}");
        assert!(
            buffer == noise(piece as u64, PIECE),
            "piece {piece} differs"
        );
    }
    let more = from.read(&mut buffer).expect("an end");
    assert_eq!(more, 0, "bytes too many");
}

/// A host's two ports: by one a guest gets the data, by the other it gives them back.
struct Mirror {
    ports: [u16; 2],
    threads: [JoinHandle<()>; 2],
}

impl Mirror {
    fn listen(length: usize) -> Mirror {
        let listen = |work: fn(TcpStream, usize)| {
            let listener = TcpListener::bind("0.0.0.0:0").expect("a port");
            let port = listener.local_addr().expect("a port").port();
            let thread = thread::spawn(move || work(listener.accept().expect("a guest").0, length));
            (port, thread)
        };
        let (out, giver) = listen(give);
        let (back, taker) = listen(take);
        Mirror {
            ports: [out, back],
            threads: [giver, taker],
        }
    }

    /// What a guest runs to send everything back to `host` while it comes.
    fn at_once(&self, host: &str) -> String {
        let [out, back] = self.ports;
        format!("nc {host} {out} </dev/null | nc {host} {back}")
    }

    /// What a guest runs to send everything back to `host` when it has it all. It does not close
    /// its half of the connection before that.
    fn in_turn(&self, host: &str) -> String {
        let [out, back] = self.ports;
        format!(
            "mkfifo /tmp/open; exec 4<>/tmp/open
nc {host} {out} <&4 >/tmp/all && nc {host} {back} </tmp/all"
        )
    }

    fn finish(self) {
        for thread in self.threads {
            thread.join().expect("all bytes, as they were sent");
        }
    }
}

/// Runs busybox's or the system's program; says why the test is skipped where it does not work.
pub(crate) fn runs(words: &str) -> bool {
    let mut parts = words.split(' ');
    let mut command = Command::new(parts.next().expect("a program"));
    let status = command
        .args(parts)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// An interface of the host by which guests are reached. It is removed with this.
pub(crate) struct Tap {
    pub(crate) name: &'static str,
    subnet: u8,
}

impl Tap {
    /// What a guest does to say PINGED once it reaches the host, and to start again if it is told to.
    pub(crate) fn ping_and_reboot(&self) -> String {
        format!(
            "{}
ping -c 2 -W 20 {} >/dev/null && echo PINGED
read -r what </dev/console
[ \"$what\" = again ] && reboot -f",
            self.up(),
            self.host()
        )
    }

    /// The host is 10.88.`subnet`.1. `None` where the host does not let us; this was said then.
    pub(crate) fn new(name: &'static str, subnet: u8, queues: usize) -> Option<Tap> {
        let many = if queues > 1 { " multi_queue" } else { "" };
        let made = match rig::program("ip") {
            Some(ip) => runs(&format!(
                "{} tuntap add dev {name} mode tap{many}",
                ip.display()
            )),
            None => return None,
        };
        let tap = Tap { name, subnet };
        let works = made
            && runs(&format!("ip addr add 10.88.{subnet}.1/24 dev {name}"))
            && runs(&format!("ip link set {name} up"));
        if !works {
            println!("skipped: this user may not make network interfaces");
            return None;
        }
        Some(tap)
    }

    pub(crate) fn host(&self) -> String {
        format!("10.88.{}.1", self.subnet)
    }

    fn guest(&self) -> String {
        format!("10.88.{}.2", self.subnet)
    }

    /// What a guest runs first.
    pub(crate) fn up(&self) -> String {
        format!(
            "ip link set eth0 up; ip addr add {}/24 dev eth0\n",
            self.guest()
        )
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Some(ip) = rig::program("ip") {
            runs(&format!("{} link del {}", ip.display(), self.name));
        }
    }
}

/// A guest talks over TAP in every direction.
fn talk(tap: &'static str, subnet: u8, options: &str, queues: usize) {
    let Some(rig) = rig::main() else { return };
    let Some(tap) = Tap::new(tap, subnet, queues) else {
        return;
    };
    let mirror = Mirror::listen(TRANSFER);
    let host = tap.host();
    let script = format!(
        "{}
cat /sys/class/net/eth0/address
ping -c 3 -W 20 {host} >/dev/null && echo PINGED
ping -c 1 -W 20 -s 1400 {host} >/dev/null && echo PINGED LARGE
echo pong | nc -l -p 7000 &
echo LISTENS
wait
{} || echo BAD
echo SENT BACK",
        tap.up(),
        mirror.at_once(&host)
    );
    let mut guest = Armlet::devices(rig, &script)
        .cpus(queues)
        .option(
            "--net",
            format!("tap={},mac=02:00:00:00:00:{subnet:02x}{options}", tap.name),
        )
        .start();
    guest.expect(&format!("02:00:00:00:00:{subnet:02x}"));
    guest.expect("PINGED");
    guest.expect("PINGED LARGE");
    guest.expect("LISTENS");
    let mut answer = String::new();
    // The guest says that it listens just before it does.
    let mut stream = loop {
        match TcpStream::connect((tap.guest(), 7000)) {
            Ok(stream) => break stream,
            Err(_) if guest.runs() => sleep(GLANCE),
            Err(error) => panic!("the guest is gone: {error}"),
        }
    };
    stream.read_to_string(&mut answer).expect("an answer");
    assert_eq!(answer, "pong\n");
    drop(stream);
    guest.expect("SENT BACK");
    mirror.finish();
    let outcome = guest.end();
    assert!(!outcome.script().contains("BAD"));
    assert_eq!(outcome.complaints(), "");
}

#[test]
fn a_guest_talks_over_tap_without_vhost() {
    talk("armtap0", 10, ",vhost=off", 1);
}

#[test]
fn a_guest_talks_over_tap_with_vhost() {
    talk("armtap1", 11, ",vhost=on", 1);
}

#[test]
fn a_guest_talks_over_several_queues() {
    talk("armtap2", 12, ",vhost=off,queues=2", 2);
}

#[test]
fn a_network_works_on_after_a_reboot() {
    let Some(rig) = rig::main() else { return };
    for (name, subnet, vhost) in [("armtap3", 13, "off"), ("armtap4", 14, "on")] {
        let Some(tap) = Tap::new(name, subnet, 1) else {
            return;
        };
        let script = tap.ping_and_reboot();
        let mut guest = Armlet::devices(rig, &script)
            .input(Input::Pipe)
            .option("--net", format!("tap={name},vhost={vhost}"))
            .start();
        for word in ["again\n", "again\n", "enough\n"] {
            guest.expect("PINGED");
            guest.send(word.as_bytes());
        }
        guest.end().assert_status(0);
    }
}

#[test]
fn a_tap_that_goes_away_takes_the_link_down() {
    let Some(rig) = rig::main() else { return };
    let Some(tap) = Tap::new("armtap5", 15, 1) else {
        return;
    };
    let script = format!(
        "{}
echo UP
until [ \"$(cat /sys/class/net/eth0/carrier 2>/dev/null)\" = 0 ]; do
    ping -c 1 -W 1 {} >/dev/null
done
echo LINK DOWN",
        tap.up(),
        tap.host()
    );
    let mut guest = Armlet::devices(rig, &script)
        .option("--net", format!("tap={},vhost=off", tap.name))
        .start();
    guest.expect("UP");
    drop(tap);
    guest.expect("LINK DOWN");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert!(outcome.errors.contains("net0"), "{}", outcome.errors);
}

/// What a guest runs to be configured by the network.
const DHCP: &str = "
cat >/dhcp.sh <<'END'
[ \"$1\" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
for gateway in $router; do ip route add default via $gateway dev $interface; done
echo \"GATEWAY $router\"
END
chmod 755 /dhcp.sh
ip link set eth0 up
udhcpc -i eth0 -n -q -s /dhcp.sh >/dev/null 2>&1 || echo NO LEASE
gateway=$(ip route | awk '/^default/ { print $3; exit }')
";

/// Passt shows guests the network that the host has; the rig's host has none.
pub(crate) fn outside() {
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let has_default = routes
        .lines()
        .any(|line| line.split('\t').nth(1) == Some("00000000"));
    if has_default {
        return;
    }
    if let Some(ip) = rig::program("ip") {
        runs(&format!(
            "{} tuntap add dev outside0 mode tap",
            ip.display()
        ));
        runs("ip addr add 192.0.2.2/24 dev outside0");
        runs("ip link set outside0 up");
        runs("ip route add default via 192.0.2.1 dev outside0");
    }
}

/// A port that nobody listens at, for the moment.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("a port").port()
}

#[test]
fn a_guest_is_reached_through_a_forwarded_port_and_reaches_its_host() {
    let Some(rig) = rig::main() else { return };
    if rig::program("passt").is_none() {
        return;
    }
    outside();
    // One way at a time, and no half-closed connections: passt of May 2025 crashes when its socket is
    // full while it acknowledges, and loses the end of what comes after the guest's FIN.
    let mirror = Mirror::listen(TRANSFER / 2);
    let port = free_port();
    let script = format!(
        "{DHCP}
mkdir /www; echo 'from the guest' >/www/index.html
httpd -p 8080 -h /www
echo SERVES
{} || echo BAD
echo SENT BACK
read -r line </dev/console",
        mirror.in_turn("$gateway")
    );
    let mut guest = Armlet::devices(rig, &script)
        .input(Input::Pipe)
        .option("--net", format!("user,hostfwd=tcp:127.0.0.1:{port}-:8080"))
        .start();
    guest.expect("SERVES");
    let page = fetch(&mut guest, port);
    assert!(page.ends_with("from the guest\n"), "{page}");
    guest.expect("SENT BACK");
    mirror.finish();
    guest.send(b"\n");
    let outcome = guest.end();
    let script = outcome.script();
    assert!(
        !script.contains("BAD") && !script.contains("NO LEASE"),
        "{script}"
    );
}

/// What the guest's web server at the forwarded `port` says.
fn fetch(guest: &mut Guest, port: u16) -> String {
    loop {
        let mut page = String::new();
        let asked = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            stream.read_to_string(&mut page)
        });
        // A forwarder accepts before it knows whether the guest will.
        if asked.is_ok() && !page.is_empty() {
            return page;
        }
        assert!(guest.runs(), "armlet is gone");
        sleep(GLANCE);
    }
}

/// The processes of that name that `parent` started, directly or not.
pub(crate) fn started(parent: u32, name: &str) -> Vec<u32> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc").expect("procfs").flatten() {
        // proc(5): the name is in parentheses; behind it state and parent.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((head, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        let its_parent: Option<u32> = rest
            .split_whitespace()
            .nth(1)
            .and_then(|pid| pid.parse().ok());
        if let (Some(its_parent), Some((pid, comm))) = (its_parent, head.split_once(" ("))
            && let Ok(pid) = pid.parse::<u32>()
        {
            processes.push((pid, its_parent, comm.to_owned()));
        }
    }
    let mut tree = vec![parent];
    let mut found = Vec::new();
    let mut next = 0;
    while let Some(parent) = tree.get(next).copied() {
        next += 1;
        for (pid, _, comm) in processes.iter().filter(|process| process.1 == parent) {
            tree.push(*pid);
            if comm.starts_with(name) {
                found.push(*pid);
            }
        }
    }
    found
}

/// Waits until none of these processes is left. Nobody may be there to ask how they ended.
pub(crate) fn wait_until_gone(pids: &[u32]) {
    let is_gone = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    while !pids.iter().all(is_gone) {
        sleep(GLANCE);
    }
}

/// Kills a process that armlet started, if it is there still.
pub(crate) fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process");
    let _ = kill_process(pid, Signal::KILL);
}

#[test]
fn passt_killed_takes_the_link_down_and_nothing_else() {
    let Some(rig) = rig::main() else { return };
    if rig::program("passt").is_none() {
        return;
    }
    outside();
    let script = format!(
        "{DHCP}
echo UP
until [ \"$(cat /sys/class/net/eth0/carrier 2>/dev/null)\" = 0 ]; do
    ping -c 1 -W 1 $gateway >/dev/null
done
echo LINK DOWN"
    );
    let mut guest = Armlet::devices(rig, &script)
        .option("--net", "user")
        .start();
    guest.expect("UP");
    let started = started(guest.pid(), "passt");
    assert!(!started.is_empty(), "armlet runs no passt");
    started.into_iter().for_each(kill);
    guest.expect("LINK DOWN");
    let outcome = guest.end();
    outcome.assert_status(0);
    assert!(outcome.errors.contains("passt"), "{}", outcome.errors);
}

#[test]
fn passt_ends_with_armlet() {
    let Some(rig) = rig::main() else { return };
    if rig::program("passt").is_none() {
        return;
    }
    outside();
    for signal in [Signal::INT, Signal::KILL] {
        let mut guest = Armlet::devices(rig, "echo UP; sleep 1000")
            .option("--net", "user")
            .start();
        guest.expect("UP");
        assert!(
            !started(guest.pid(), "passt").is_empty(),
            "armlet runs no passt"
        );
        // The broker, too.
        let started = started(guest.pid(), "");
        guest.signal(signal);
        drop(guest.end());
        wait_until_gone(&started);
    }
}
