//! Metadata that a guest reads on its network card.

use crate::guest::{Armlet, Input};
use crate::net::Tap;
use crate::rig;

/// Bytes of a value that takes many frames.
const LONG: usize = 40_000;

#[test]
fn a_guest_reads_metadata_on_its_card() {
    let Some(rig) = rig::main() else { return };
    let Some(tap) = Tap::new("armtap6", 16, 2) else {
        return;
    };
    let script = format!(
        "{}
get() {{ wget -q -O - \"$@\"; echo; }}
# By way of a router first, which never sees it.
ip route add 169.254.0.0/16 via {} || echo BAD
get http://169.254.169.254/latest/meta-data/name
ip route del 169.254.0.0/16
ip route add 169.254.169.254 dev eth0 || echo BAD
get http://169.254.169.254/latest/
get --header 'Accept: application/json' http://169.254.169.254/latest/meta-data
get http://169.254.169.254/latest/user-data | wc -c
for n in 1 2 3 4 5 6 7 8; do get http://169.254.169.254/latest/user-data | wc -c >/tmp/$n & done
wait
cat /tmp/[1-8] | sort -u
wget -q -O - http://169.254.169.254/none || echo REFUSED
ping -c 1 -W 20 {} >/dev/null && echo PINGED
ping -c 1 -W 1 169.254.169.254 >/dev/null && echo BAD
echo DONE
read -r what </dev/console
[ \"$what\" = again ] && reboot -f",
        tap.up(),
        tap.host(),
        tap.host()
    );
    let armlet = Armlet::devices(rig, &script);
    let data = format!(
        r#"{{"latest": {{"meta-data": {{"name": "kiwi"}}, "user-data": "{}"}}}}"#,
        "x".repeat(LONG)
    );
    let file = armlet.file("data.json", data.as_bytes());
    let mut guest = armlet
        .cpus(2)
        .input(Input::Pipe)
        .option(
            "--net",
            format!("tap={},queues=2,metadata={}", tap.name, file.display()),
        )
        .start();
    for again in [true, false] {
        guest.expect("kiwi");
        guest.expect("meta-data/");
        guest.expect("user-data");
        guest.expect(r#"{"name":"kiwi"}"#);
        guest.expect(&(LONG + 1).to_string());
        guest.expect(&(LONG + 1).to_string());
        guest.expect("REFUSED");
        guest.expect("PINGED");
        guest.expect("DONE");
        if again {
            guest.send(b"again\n");
        }
    }
    guest.send(b"enough\n");
    let outcome = guest.end();
    assert!(!outcome.text().contains("BAD"));
    assert_eq!(outcome.complaints(), "");
}
