//! Requests as clients send them, and as they should not.

use super::*;
use proptest::prelude::*;

const MOST: usize = 51200;

fn all(bytes: &[u8]) -> Vec<Input> {
    let mut requests = Requests::default();
    requests.push(bytes);
    std::iter::from_fn(|| requests.take(MOST)).collect()
}

fn request(method: Method, path: &str, body: Option<&str>) -> Input {
    Input::Request(Request {
        method,
        path: path.to_owned(),
        body: body.map(|body| body.as_bytes().to_vec()),
    })
}

fn wrong(bytes: &[u8]) -> String {
    match &all(bytes)[..] {
        [Input::Wrong(why)] => why.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn requests_come_one_after_the_other_in_any_pieces() {
    let text = b"PUT /actions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}GET / HTTP/1.0\r\n\r\n\r\n\
        PATCH http://localhost/vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n{\"\r\n3\r\n\":1\r\n1\r\n}\r\n0\r\n\r\n\
        DELETE /drives/\xc3\xa9 HTTP/1.1\r\nContent-Length: 0\r\n\r\n";
    let expected = [
        request(Method::Put, "/actions", Some("{}")),
        request(Method::Get, "/", None),
        request(Method::Patch, "/vm", Some("{\"\":1}")),
        request(Method::Delete, "/drives/é", None),
    ];
    assert_eq!(all(text), expected);
    let mut requests = Requests::default();
    let mut got = Vec::new();
    for byte in text {
        requests.push(&[*byte]);
        got.extend(requests.take(MOST));
    }
    assert_eq!(got, expected);
}

#[test]
fn targets_are_paths() {
    for (target, path) in [
        ("/", "/"),
        ("version", "/"),
        ("https://x/version", "/"),
        ("http://x/version", "/version"),
        ("http://x", "/"),
        ("//version/", "//version/"),
    ] {
        assert_eq!(absolute(target), path, "{target}");
    }
}

#[test]
fn who_waits_with_the_body_is_told_once_to_send_it() {
    let mut requests = Requests::default();
    requests.push(b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(requests.take(MOST), Some(Input::Continue));
    assert_eq!(requests.take(MOST), None);
    requests.push(b"{}");
    assert_eq!(
        requests.take(MOST),
        Some(request(Method::Put, "/", Some("{}")))
    );
}

#[test]
fn what_is_no_request_is_said_and_forgotten() {
    assert!(wrong(b"get / HTTP/1.1\r\n\r\n").contains("Unsupported HTTP method"));
    assert!(wrong(b"POST / HTTP/1.1\r\n\r\n").contains("Unsupported HTTP method"));
    assert!(wrong(b"GET / HTTP/2.0\r\n\r\n").contains("version"));
    assert!(wrong(b"\0\0\0\0\r\n\r\n").contains("Invalid HTTP Request"));
    assert!(wrong(b"GET / HTTP/1.1\r\nno colon\r\n\r\n").contains("header"));
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(LINE));
    assert!(wrong(long.as_bytes()).contains("1024"));
    let long = "GET / HTTP/1.1\r\nX: y\r\n".to_owned() + &"Y: z\r\n".repeat(20_000);
    assert!(!wrong(long.as_bytes()).is_empty());
    let large = format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", 1 << 30);
    assert!(wrong(large.as_bytes()).contains("limit of 51200"));
    let large = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFF\r\n";
    assert!(wrong(large).contains("limit of 51200"));
    let both = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n";
    assert!(wrong(both).contains("beside"));
    let length = b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n";
    assert!(wrong(length).contains("Content-Length"));
    let mut requests = Requests::default();
    requests.push(b"POST / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n");
    assert!(matches!(requests.take(MOST), Some(Input::Wrong(_))));
    assert_eq!(requests.take(MOST), None);
    requests.push(b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(requests.take(MOST), Some(request(Method::Get, "/", None)));
}

#[test]
fn answers_are_as_clients_know_them() {
    let done = Answer::done().to_bytes();
    let text = "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
    assert_eq!(String::from_utf8_lossy(&done), text);
    let fault = Answer {
        deprecated: true,
        ..Answer::fault("no \"x\"")
    };
    assert_eq!(
        String::from_utf8_lossy(&fault.to_bytes()),
        "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nDeprecation: true\r\n\
         Content-Type: application/json\r\nContent-Length: 28\r\n\r\n{\"fault_message\":\"no \\\"x\\\"\"}"
    );
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_or_grow(pieces in prop::collection::vec(any::<Vec<u8>>(), 0..20)) {
        let mut requests = Requests::default();
        for piece in pieces {
            requests.push(&piece);
            for _ in 0..100 {
                if requests.take(64).is_none() {
                    break;
                }
            }
            prop_assert!(requests.bytes.len() <= HEAD + 64 + piece.len());
        }
    }
}
