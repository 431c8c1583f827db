//! Where the debugger listens, as text.

use anyhow::{Result, anyhow, bail};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// What is said of an address that is none.
const USE: &str = "use unix:PATH or tcp:127.0.0.1:PORT";

/// Where the debugger listens, and whether the guest waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Where.
    pub place: Place,
    /// Whether the guest waits before its first instruction.
    pub waits: bool,
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// TCP on this host, reachable from it alone.
    Tcp(SocketAddr),
}

impl Address {
    /// Reads `unix:PATH` or `tcp:[LOOPBACK]:PORT`, with `,nowait` or without.
    ///
    /// # Errors
    /// Another text, or an address that others could reach.
    pub fn parse(text: &str) -> Result<Address> {
        let (place, waits) = match text.strip_suffix(",nowait") {
            Some(place) => (place, false),
            None => (text, true),
        };
        let place = match place.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Place::Unix(path.into()),
            Some(("tcp", address)) => Place::Tcp(loopback(address, text)?),
            _ => bail!("--gdb '{text}' is not known; {USE}"),
        };
        Ok(Address { place, waits })
    }
}

fn loopback(address: &str, text: &str) -> Result<SocketAddr> {
    let (host, port) = address
        .rsplit_once(':')
        .ok_or_else(|| anyhow!("--gdb '{text}' has no port; {USE}"))?;
    let port = port
        .parse()
        .map_err(|_| anyhow!("--gdb '{text}': '{port}' is no port; {USE}"))?;
    let host = match host.trim_start_matches('[').trim_end_matches(']') {
        "" | "localhost" => Ipv4Addr::LOCALHOST.into(),
        host => host
            .parse::<IpAddr>()
            .map_err(|_| anyhow!("--gdb '{text}': '{host}' is no address; {USE}"))?,
    };
    if !host.is_loopback() {
        bail!(
            "--gdb '{text}': whoever reaches {host} would own the guest; {USE}, and ssh -L from elsewhere"
        );
    }
    Ok(SocketAddr::new(host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_this_host_are_read_and_others_refused() {
        let is = |text: &str| Address::parse(text).expect(text);
        assert_eq!(
            is("unix:/run/a,b.sock").place,
            Place::Unix("/run/a,b.sock".into())
        );
        assert!(is("unix:x").waits && !is("unix:x,nowait").waits);
        for (text, address) in [
            ("tcp:127.0.0.1:1234", "127.0.0.1:1234"),
            ("tcp::1234", "127.0.0.1:1234"),
            ("tcp:localhost:1234,nowait", "127.0.0.1:1234"),
            ("tcp:[::1]:1234", "[::1]:1234"),
        ] {
            let expected = Place::Tcp(address.parse().expect("an address"));
            assert_eq!(is(text).place, expected, "{text}");
        }
        for (text, why) in [
            ("", "use unix:PATH"),
            ("1234", "use unix:PATH"),
            ("unix:", "use unix:PATH"),
            ("tcp:1234", "no port"),
            ("tcp::0x10", "no port"),
            ("tcp::70000", "no port"),
            ("tcp:0.0.0.0:1234", "would own the guest"),
            ("tcp:[::]:1234", "would own the guest"),
            ("tcp:192.168.0.1:1234", "ssh -L"),
            ("tcp:example.org:1234", "no address"),
            ("udp:127.0.0.1:1", "use unix:PATH"),
        ] {
            let error = Address::parse(text).expect_err(text).to_string();
            assert!(
                error.contains(why) || error.contains("is no port"),
                "{error}"
            );
        }
    }
}
