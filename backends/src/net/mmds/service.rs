//! What a metadata service answers to requests of HTTP/1.0 and 1.1.

use super::tokens::Tokens;
use super::{Metadata, MmdsOptions};
use httparse::{Header, Request, Status};
use serde_json::Value;
use std::borrow::Cow;
use std::time::Duration;

/// The most bytes of a request, with what follows its header.
pub const MOST_REQUEST: usize = 4096;
/// The most header fields of a request.
const MOST_FIELDS: usize = 32;

/// Where tokens are made.
const TOKEN_PATH: &str = "/latest/api/token";
/// Header fields with a token, and with the seconds that one is to be valid.
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TOKEN_TTL: [&str; 2] = [
    "X-metadata-token-ttl-seconds",
    "X-aws-ec2-metadata-token-ttl-seconds",
];
/// A field of requests that others pass on.
const FORWARDED: [&str; 1] = ["X-Forwarded-For"];
/// The most seconds that a token is valid.
const MOST_TTL: u32 = 21600;

const JSON: &str = "application/json";
const TEXT: &str = "text/plain";

/// An answer to a request.
pub struct Reply {
    /// What is sent.
    pub bytes: Vec<u8>,
    /// Whether the connection ends with it.
    pub closes: bool,
    /// Bytes of the request.
    pub consumed: usize,
}

/// The service, with the tokens that it gave.
pub struct Service {
    data: Metadata,
    needs_token: bool,
    imds_compat: bool,
    tokens: Tokens,
}

/// What is answered: status, type and body.
struct Answer {
    status: u16,
    kind: &'static str,
    body: String,
    /// A header field beside the usual ones.
    field: Option<(String, String)>,
}

impl Answer {
    fn new(status: u16, body: impl Into<String>) -> Answer {
        Answer {
            status,
            kind: TEXT,
            body: body.into(),
            field: None,
        }
    }

    fn not_found(path: &str) -> Answer {
        Answer::new(404, format!("Resource not found: {path}."))
    }

    /// As it is sent; without a body where only the header was asked for.
    fn write(&self, version: u8, closes: bool, with_body: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            401 => "Unauthorized",
            404 => "Not Found",
            405 => "Method Not Allowed",
            501 => "Not Implemented",
            _ => "Internal Server Error",
        };
        let connection = if closes { "close" } else { "keep-alive" };
        let mut text = format!(
            "HTTP/1.{version} {} {reason}\r\nConnection: {connection}\r\nContent-Type: {}\r\n\
             Content-Length: {}\r\n",
            self.status,
            self.kind,
            self.body.len()
        );
        if let Some((name, value)) = &self.field {
            text += &format!("{name}: {value}\r\n");
        }
        text += "\r\n";
        if with_body {
            text += &self.body;
        }
        text.into_bytes()
    }
}

impl Service {
    /// The service that `options` ask for.
    #[must_use]
    pub fn new(options: &MmdsOptions) -> Service {
        Service {
            data: options.data.clone(),
            needs_token: options.needs_token,
            imds_compat: options.imds_compat,
            tokens: Tokens::default(),
        }
    }

    /// Answers the request that `received` begins with; `None` where it is not complete yet. `now` is
    /// the time since a fixed moment.
    pub fn reply(&mut self, received: &[u8], now: Duration) -> Option<Reply> {
        let refuse = |why: String| {
            Some(Reply {
                bytes: Answer::new(400, why).write(1, true, true),
                closes: true,
                consumed: received.len(),
            })
        };
        let too_long = || format!("The request has more than {MOST_REQUEST} bytes.");
        let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
        let mut request = Request::new(&mut fields);
        let head = match request.parse(received) {
            Ok(Status::Complete(size)) => size,
            Ok(Status::Partial) if received.len() < MOST_REQUEST => return None,
            Ok(Status::Partial) => return refuse(too_long()),
            Err(error) => return refuse(format!("The request is not understood: {error}.")),
        };
        let body = match body_size(request.headers) {
            Ok(size) => size,
            Err(why) => return refuse(why.to_owned()),
        };
        let consumed = head.saturating_add(body);
        if consumed > MOST_REQUEST {
            return refuse(too_long());
        }
        if consumed > received.len() {
            return None;
        }
        let (method, path) = (request.method?, request.path?);
        let version = request.version?;
        let closes = version == 0 || lists(request.headers, "Connection", "close");
        let answer = self.answer(method, path, request.headers, now);
        Some(Reply {
            bytes: answer.write(version, closes, method != "HEAD"),
            closes,
            consumed,
        })
    }

    fn answer(&mut self, method: &str, uri: &str, fields: &[Header], now: Duration) -> Answer {
        let Some(path) = absolute_path(uri) else {
            return Answer::new(400, "Invalid URI.");
        };
        match method {
            "GET" => self.get(path, fields, now),
            "PUT" => self.make_token(path, fields, now),
            _ => Answer {
                field: Some(("Allow".to_owned(), "GET, PUT".to_owned())),
                ..Answer::new(405, "Not allowed HTTP method.")
            },
        }
    }

    fn get(&self, path: &str, fields: &[Header], now: Duration) -> Answer {
        if self.needs_token {
            match find(fields, &TOKEN) {
                None => {
                    return Answer::new(
                        401,
                        "No MMDS token provided. Use `X-metadata-token` or \
                         `X-aws-ec2-metadata-token` header to specify the session token.",
                    );
                }
                Some((_, token)) if !self.tokens.knows(&token, now) => {
                    return Answer::new(401, "MMDS token not valid.");
                }
                Some(_) => {}
            }
        }
        let data = self.data.get();
        let pointer = without_doubles(path);
        let pointer = pointer.strip_suffix('/').unwrap_or(&pointer);
        let Some(value) = data.pointer(pointer) else {
            return Answer::not_found(path);
        };
        if !self.imds_compat && lists(fields, "Accept", JSON) {
            return Answer {
                kind: JSON,
                ..Answer::new(200, value.to_string())
            };
        }
        match plain(value) {
            Some(text) => Answer::new(200, text),
            None => Answer::new(
                501,
                "Cannot retrieve value. The value has an unsupported type.",
            ),
        }
    }

    fn make_token(&mut self, path: &str, fields: &[Header], now: Duration) -> Answer {
        if let Some((name, _)) = find(fields, &FORWARDED) {
            return Answer::new(
                400,
                format!("Invalid header. Reason: Unsupported header name. Key: {name}"),
            );
        }
        if without_doubles(path) != TOKEN_PATH {
            return Answer::not_found(path);
        }
        let Some((name, text)) = find(fields, &TOKEN_TTL) else {
            return Answer::new(
                400,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                 `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
            );
        };
        let Ok(seconds) = text.parse::<u32>() else {
            return Answer::new(
                400,
                format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{text}"),
            );
        };
        if !(1..=MOST_TTL).contains(&seconds) {
            return Answer::new(
                400,
                format!(
                    "Invalid time to live value provided for token: {seconds}. Please provide a \
                     value between 1 and {MOST_TTL}."
                ),
            );
        }
        match self.tokens.make(now, Duration::from_secs(seconds.into())) {
            Ok(token) => Answer {
                field: Some((name.to_owned(), seconds.to_string())),
                ..Answer::new(200, token)
            },
            Err(error) => Answer::new(500, format!("No token can be made: {error}")),
        }
    }
}

/// A value as EC2's service shows it: a string, or the names in an object.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(members) => {
            let line = |(name, value): (&String, &Value)| match value {
                Value::Object(_) => format!("{name}/"),
                _ => name.clone(),
            };
            Some(members.iter().map(line).collect::<Vec<_>>().join("\n"))
        }
        _ => None,
    }
}

/// The path of a request's target (RFC 9112, section 3.2), if it has one.
fn absolute_path(uri: &str) -> Option<&str> {
    match uri.strip_prefix("http://") {
        Some(rest) => rest.find('/').map(|at| &rest[at..]),
        None => uri.starts_with('/').then_some(uri),
    }
}

/// A path in which each of several slashes in a row is one.
fn without_doubles(path: &str) -> Cow<'_, str> {
    if !path.contains("//") {
        return Cow::Borrowed(path);
    }
    let mut last = None;
    let kept = path
        .chars()
        .filter(|c| last.replace(*c) != Some('/') || *c != '/');
    Cow::Owned(kept.collect())
}

/// The first field with one of these names, as it is written in the request.
fn find<'a>(fields: &[Header<'a>], names: &[&str]) -> Option<(&'a str, Cow<'a, str>)> {
    let has_name = |field: &&Header| {
        names
            .iter()
            .any(|name| name.eq_ignore_ascii_case(field.name))
    };
    let field = fields.iter().find(has_name)?;
    Some((
        field.name,
        String::from_utf8_lossy(field.value.trim_ascii()),
    ))
}

/// Whether a list in a header field has this item; what it says of the item does not matter.
fn lists(fields: &[Header], name: &str, item: &str) -> bool {
    let fields = fields
        .iter()
        .filter(|field| field.name.eq_ignore_ascii_case(name));
    let mut items = fields.flat_map(|field| field.value.split(|byte| *byte == b','));
    items.any(|listed| {
        let listed = listed
            .split(|byte| *byte == b';')
            .next()
            .unwrap_or_default();
        listed.trim_ascii().eq_ignore_ascii_case(item.as_bytes())
    })
}

/// Bytes of the body behind a request's header.
fn body_size(fields: &[Header]) -> Result<usize, &'static str> {
    if find(fields, &["Transfer-Encoding"]).is_some() {
        return Err("A body is taken with Content-Length only.");
    }
    let mut size = None;
    for field in fields
        .iter()
        .filter(|field| field.name.eq_ignore_ascii_case("Content-Length"))
    {
        let digits = field.value.trim_ascii();
        let text = std::str::from_utf8(digits).ok();
        let text = text.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        let this = text.and_then(|text| text.parse::<usize>().ok());
        match this {
            Some(this) if size.is_none_or(|other| other == this) => size = Some(this),
            _ => return Err("The Content-Length is wrong."),
        }
    }
    Ok(size.unwrap_or(0))
}
