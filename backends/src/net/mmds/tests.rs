//! The metadata service, with a guest's TCP/IP stack and a driver as its peers.

mod card;
mod guest;
mod link;
mod requests;

use super::service::Service;
use super::stack::{MAC, MOST_CONNECTIONS, MOST_FRAMES, Stack};
use super::*;
use serde_json::json;
use std::time::Duration;

/// The guest's addresses.
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const GUEST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);

fn data() -> Value {
    json!({
        "latest": {
            "meta-data": {"ami-id": "ami-1", "macs": {"02:00:00:00:00:07": {"n": "0"}}, "list": ["a", 2]},
            "user-data": "x".repeat(20_000),
        },
        "age": 43,
        "~/": "odd",
    })
}

fn options(needs_token: bool) -> MmdsOptions {
    let options = MmdsOptions {
        needs_token,
        ..MmdsOptions::default()
    };
    options.data.set(data());
    options
}

fn stack(options: &MmdsOptions) -> Stack {
    Stack::new(Service::new(options), options.address, None, 0, 1)
}

/// Status and body of an answer, and whether it is the last.
fn parse(answer: &[u8]) -> Option<(u16, String, bool)> {
    let text = String::from_utf8(answer.to_vec()).expect("text");
    let (head, body) = text.split_once("\r\n\r\n")?;
    let field = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name));
        line.expect("a header field").to_owned()
    };
    let size: usize = field("Content-Length: ").parse().expect("a number");
    let status = head.split(' ').nth(1).expect("a status");
    let body = body.get(..size)?.to_owned();
    let closes = field("Connection: ") == "close";
    Some((status.parse().expect("a number"), body, closes))
}

#[test]
fn data_are_shared_and_changed_as_a_whole() {
    let ours = Metadata::default();
    let theirs = ours.clone();
    assert_eq!(ours, theirs);
    assert_ne!(ours, Metadata::default(), "equal, but not shared");
    theirs.set(json!({"a": 1}));
    assert_eq!(*ours.get(), json!({"a": 1}));
}

#[test]
fn addresses_are_of_the_link() {
    let with = |address: [u8; 4]| MmdsOptions {
        address: address.into(),
        ..MmdsOptions::default()
    };
    for right in [[169, 254, 169, 254], [169, 254, 1, 0], [169, 254, 254, 255]] {
        with(right).check().expect("of the link");
    }
    for wrong in [
        [10, 0, 2, 2],
        [169, 254, 0, 1],
        [169, 254, 255, 1],
        [0, 0, 0, 0],
    ] {
        let why = with(wrong)
            .check()
            .expect_err("not of the link")
            .to_string();
        assert!(why.contains("such as 169.254.169.254"), "{why}");
    }
}

#[test]
fn a_file_is_read_or_said_to_be_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("data.json");
    let load = || {
        let options = MmdsOptions {
            file: Some(path.clone()),
            ..MmdsOptions::default()
        };
        file::load(&options).map(|()| options.data.get())
    };
    let wrong = || format!("{:#}", load().expect_err("wrong"));
    assert!(wrong().contains("No such file"), "{}", wrong());
    std::fs::write(&path, r#"{"a": "b"}"#).expect("written");
    assert_eq!(*load().expect("right"), json!({"a": "b"}));
    std::fs::write(&path, "{").expect("written");
    assert!(wrong().contains("it is not JSON"), "{}", wrong());
    std::fs::write(&path, vec![b' '; 70_000]).expect("written");
    assert!(wrong().contains("65536 bytes at most"), "{}", wrong());
}
