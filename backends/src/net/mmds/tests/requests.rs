//! Requests and answers, without a network.

use super::super::service::MOST_REQUEST;
use super::*;
use proptest::prelude::*;

/// Answers of a service to requests.
struct Client {
    service: Service,
    now: Duration,
}

impl Client {
    fn new(options: &MmdsOptions) -> Client {
        Client {
            service: Service::new(options),
            now: Duration::ZERO,
        }
    }

    /// Status and body of the answer to a request without a body, and the whole answer.
    fn ask(&mut self, line: &str, fields: &[&str]) -> (u16, String, String) {
        let fields: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
        let request = format!("{line} HTTP/1.1\r\n{fields}\r\n");
        let reply = self.service.reply(request.as_bytes(), self.now);
        let reply = reply.expect("it is complete");
        assert_eq!(reply.consumed, request.len());
        let whole = String::from_utf8(reply.bytes).expect("text");
        let (status, body, closes) = parse(whole.as_bytes()).expect("an answer");
        assert_eq!(closes, reply.closes);
        (status, body, whole)
    }

    fn status(&mut self, line: &str, fields: &[&str]) -> (u16, String) {
        let (status, body, _) = self.ask(line, fields);
        (status, body)
    }
}

#[test]
fn values_are_shown_as_text_or_as_json() {
    let mut client = Client::new(&options(false));
    let json = ["Accept: application/json"];
    let both = ["Accept: text/html;q=1 , APPLICATION/json;q=0.1"];
    let list = r#"["a",2]"#;
    for (path, fields, status, body) in [
        ("/", &[][..], 200, "age\nlatest/\n~/"),
        ("/latest/meta-data", &[], 200, "ami-id\nlist\nmacs/"),
        ("/latest//meta-data///", &[], 200, "ami-id\nlist\nmacs/"),
        ("/latest/meta-data/ami-id", &[], 200, "ami-1"),
        ("/latest/meta-data/ami-id", &["Accept: */*"], 200, "ami-1"),
        ("/latest/meta-data/ami-id", &json, 200, "\"ami-1\""),
        ("/latest/meta-data/ami-id", &both, 200, "\"ami-1\""),
        ("/latest/meta-data/list", &json, 200, list),
        ("/latest/meta-data/list/1", &json, 200, "2"),
        (
            "/latest/meta-data/macs",
            &json,
            200,
            r#"{"02:00:00:00:00:07":{"n":"0"}}"#,
        ),
        ("/age", &json, 200, "43"),
        ("/~0~1", &[], 200, "odd"),
        (
            "http://169.254.169.254/latest/meta-data/ami-id",
            &[],
            200,
            "ami-1",
        ),
        (
            "/age",
            &[],
            501,
            "Cannot retrieve value. The value has an unsupported type.",
        ),
        ("/none", &json, 404, "Resource not found: /none."),
        (
            "/latest/none/",
            &[],
            404,
            "Resource not found: /latest/none/.",
        ),
        (
            "/latest/meta-data/list/2",
            &[],
            404,
            "Resource not found: /latest/meta-data/list/2.",
        ),
        ("http://169.254.169.254", &[], 400, "Invalid URI."),
        ("*", &[], 400, "Invalid URI."),
    ] {
        let answer = client.status(&format!("GET {path}"), fields);
        assert_eq!(answer, (status, body.to_owned()), "{path}");
    }
    let whole = client.ask("GET /age", &json).2;
    assert!(
        whole.contains("Content-Type: application/json\r\n"),
        "{whole}"
    );
    let mut compatible = options(false);
    compatible.imds_compat = true;
    let mut client = Client::new(&compatible);
    assert_eq!(
        client.status("GET /latest/meta-data/ami-id", &json).1,
        "ami-1"
    );
}

#[test]
fn a_guest_sees_what_is_set_while_it_runs() {
    let options = MmdsOptions::default();
    let mut client = Client::new(&options);
    assert_eq!(client.status("GET /a", &[]).0, 404);
    options.data.set(json!({"a": "b"}));
    assert_eq!(client.status("GET /a", &[]), (200, "b".to_owned()));
}

#[test]
fn other_methods_are_refused() {
    let mut client = Client::new(&options(false));
    for method in ["POST", "DELETE", "PATCH", "OPTIONS"] {
        let (status, body, whole) = client.ask(&format!("{method} /"), &[]);
        assert_eq!((status, &body[..]), (405, "Not allowed HTTP method."));
        assert!(whole.contains("\r\nAllow: GET, PUT\r\n"), "{whole}");
    }
    let reply = client
        .service
        .reply(b"HEAD / HTTP/1.1\r\n\r\n", Duration::ZERO);
    let text = String::from_utf8(reply.expect("complete").bytes).expect("text");
    assert!(
        text.starts_with("HTTP/1.1 405 ") && text.ends_with("\r\n\r\n"),
        "{text}"
    );
}

#[test]
fn the_second_version_needs_a_token() {
    for (ttl, token) in [
        ("X-metadata-token-ttl-seconds", "X-metadata-token"),
        (
            "x-AWS-ec2-metadata-token-TTL-seconds",
            "x-aws-ec2-metadata-token",
        ),
    ] {
        let mut client = Client::new(&options(true));
        let (status, body) = client.status("GET /age", &[]);
        assert_eq!(status, 401);
        assert!(body.starts_with("No MMDS token provided."), "{body}");
        let wrong = client.status("GET /latest", &[&format!("{token}: 00")]);
        assert_eq!(wrong, (401, "MMDS token not valid.".to_owned()));
        let (status, given, whole) =
            client.ask("PUT //latest/api//token", &[&format!("{ttl}: 60")]);
        assert_eq!(status, 200);
        assert!(whole.contains(&format!("\r\n{ttl}: 60\r\n")), "{whole}");
        let field = format!("{token}:  {given} ");
        client.now += Duration::from_secs(59);
        assert_eq!(
            client.status("GET /latest/meta-data/ami-id", &[&field]).1,
            "ami-1"
        );
        client.now += Duration::from_secs(1);
        assert_eq!(
            client.status("GET /latest/meta-data/ami-id", &[&field]).0,
            401
        );
    }
    // The first version gives tokens too, and asks for none.
    let mut client = Client::new(&options(false));
    let ttl = "X-metadata-token-ttl-seconds: 21600";
    assert_eq!(client.status("PUT /latest/api/token", &[ttl]).0, 200);
    assert_eq!(
        client.status("GET /latest", &["X-metadata-token: 00"]).0,
        200
    );
}

#[test]
fn requests_for_tokens_are_checked() {
    let mut client = Client::new(&options(true));
    let right = "X-metadata-token-ttl-seconds: 60";
    for (path, fields, status, body) in [
        (
            "/latest/api/token",
            &[right, "x-forwarded-for: 10.0.0.1"][..],
            400,
            "Invalid header. Reason: Unsupported header name. Key: x-forwarded-for",
        ),
        ("/token", &[right], 404, "Resource not found: /token."),
        (
            "/latest/api/token",
            &[],
            400,
            "Token time to live value not found.",
        ),
        (
            "/latest/api/token",
            &["X-metadata-token-ttl-seconds: soon"],
            400,
            "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:soon",
        ),
        (
            "/latest/api/token",
            &["X-metadata-token-ttl-seconds: 0"],
            400,
            "Invalid time to live value provided for token: 0. Please provide a value between 1 and 21600.",
        ),
        (
            "/latest/api/token",
            &["X-metadata-token-ttl-seconds: 21601"],
            400,
            "Invalid time to live value provided for token: 21601.",
        ),
    ] {
        let answer = client.status(&format!("PUT {path}"), fields);
        assert_eq!(answer.0, status, "{fields:?}");
        assert!(answer.1.starts_with(body), "{}", answer.1);
    }
}

#[test]
fn what_is_not_understood_ends_the_connection() {
    let mut service = Service::new(&options(false));
    let mut refused = |request: &[u8]| {
        let reply = service.reply(request, Duration::ZERO).expect("an answer");
        let (status, body, closes) = parse(&reply.bytes).expect("an answer");
        assert_eq!((status, closes, reply.consumed), (400, true, request.len()));
        body
    };
    let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(MOST_REQUEST));
    assert!(refused(long.as_bytes()).contains("more than 4096 bytes"));
    assert!(refused(b"\x16\x03\x01\x02").contains("not understood"));
    assert!(refused(b"GET / HTTP/2.0\r\n\r\n").contains("not understood"));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(40));
    assert!(refused(many.as_bytes()).contains("not understood"));
    for fields in [
        "Content-Length: 5000",
        "Content-Length: 18446744073709551615",
    ] {
        let request = format!("PUT / HTTP/1.1\r\n{fields}\r\n\r\n");
        assert!(refused(request.as_bytes()).contains("more than 4096 bytes"));
    }
    for fields in [
        "Content-Length: +1",
        "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: chunked",
    ] {
        let request = format!("PUT / HTTP/1.1\r\n{fields}\r\n\r\n");
        assert!(
            refused(request.as_bytes()).contains("Content-Length"),
            "{fields}"
        );
    }
}

#[test]
fn a_body_is_waited_for_and_skipped() {
    let mut service = Service::new(&options(false));
    let request = b"GET /age HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET";
    for size in 0..request.len() - 3 {
        assert!(service.reply(&request[..size], Duration::ZERO).is_none());
    }
    let reply = service.reply(request, Duration::ZERO).expect("complete");
    assert_eq!(reply.consumed, request.len() - 3);
    assert!(!reply.closes);
    let old = service.reply(b"GET /age HTTP/1.0\r\n\r\n", Duration::ZERO);
    let old = old.expect("complete");
    assert!(old.closes && old.bytes.starts_with(b"HTTP/1.0 501 "));
    let last = service.reply(
        b"GET /age HTTP/1.1\r\nConnection: close\r\n\r\n",
        Duration::ZERO,
    );
    assert!(last.expect("complete").closes);
}

proptest! {
    #[test]
    fn whatever_is_sent_is_answered_or_waited_for(
        start in prop_oneof![Just("GET /"), Just("PUT /latest/api/token HTTP/1.1\r\n"), Just("")],
        rest in proptest::collection::vec(any::<u8>(), 0..5000),
    ) {
        let mut service = Service::new(&options(true));
        let mut request = start.as_bytes().to_vec();
        request.extend(rest);
        request.truncate(MOST_REQUEST);
        match service.reply(&request, Duration::ZERO) {
            Some(reply) => {
                prop_assert!((1..=request.len()).contains(&reply.consumed));
                prop_assert!(parse(&reply.bytes).is_some() || request.starts_with(b"HEAD"));
            }
            None => prop_assert!(request.len() < MOST_REQUEST),
        }
    }
}
