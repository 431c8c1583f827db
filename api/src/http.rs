//! HTTP/1.1 as far as this interface uses it: requests from bytes, answers to bytes.

use httparse::{EMPTY_HEADER, Error, Status};
use serde_json::json;

/// The most bytes of a request line or of a header.
pub const LINE: usize = 1024;
/// The most headers of a request.
const HEADERS: usize = 100;
/// The most bytes of the request line and all headers, and of what frames a chunked body.
const HEAD: usize = 64 << 10;

/// The methods that the interface has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// GET.
    Get,
    /// PUT.
    Put,
    /// PATCH.
    Patch,
    /// DELETE.
    Delete,
}

impl Method {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
        }
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// Its absolute path.
    pub path: String,
    /// Its body; `None` where it is empty.
    pub body: Option<Vec<u8>>,
}

/// What the bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A request.
    Request(Request),
    /// A client that waits with its body until it is told to send it.
    Continue,
    /// No request, and why.
    Wrong(String),
}

/// The bytes of a connection, as they come.
#[derive(Default)]
pub struct Requests {
    bytes: Vec<u8>,
    /// Whether the client whose request is at the front was told to go on.
    continued: bool,
}

/// The head of a request, and where it ends.
struct Head {
    method: Method,
    path: String,
    length: usize,
    is_chunked: bool,
    expects: bool,
    end: usize,
}

impl Requests {
    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes what is there whole; `most` are the most bytes of a body. After [`Input::Wrong`] nothing
    /// is left.
    pub fn take(&mut self, most: usize) -> Option<Input> {
        let taken = self.read(most).unwrap_or_else(|why| {
            self.bytes.clear();
            Some(Input::Wrong(why))
        });
        if !matches!(taken, None | Some(Input::Continue)) {
            self.continued = false;
        }
        taken
    }

    fn read(&mut self, most: usize) -> Result<Option<Input>, String> {
        // Clients may send an empty line between requests (RFC 9112, section 2.2).
        let blank = self.bytes.iter().take_while(|byte| b"\r\n".contains(byte));
        let blank = blank.count();
        self.bytes.drain(..blank);
        let Some(head) = self.head()? else {
            return match self.bytes.len() > HEAD {
                true => Err("Invalid HTTP Request: the headers are too long.".to_owned()),
                false => Ok(None),
            };
        };
        if head.length > most {
            return Err(format!(
                "Request payload with size {} is larger than the limit of {most} allowed by server.",
                head.length
            ));
        }
        let rest = &self.bytes[head.end..];
        let (body, used) = match head.is_chunked {
            true => match unchunked(rest, most)? {
                Some(found) => found,
                None => return Ok(self.wait(&head)),
            },
            false => match rest.get(..head.length) {
                Some(body) => (body.to_vec(), head.length),
                None => return Ok(self.wait(&head)),
            },
        };
        self.bytes.drain(..head.end + used);
        Ok(Some(Input::Request(Request {
            method: head.method,
            path: head.path,
            body: Some(body).filter(|body| !body.is_empty()),
        })))
    }

    fn wait(&mut self, head: &Head) -> Option<Input> {
        let tells = head.expects && !self.continued;
        self.continued |= tells;
        tells.then_some(Input::Continue)
    }

    fn head(&self) -> Result<Option<Head>, String> {
        // httparse takes lines of any length.
        let mut line = 0;
        for byte in &self.bytes {
            line = if *byte == b'\n' { 0 } else { line + 1 };
            if line >= LINE {
                let what = "Invalid HTTP Request: a request line or header is longer than";
                return Err(format!("{what} {LINE} bytes."));
            }
            if line == 1 && *byte == b'\r' {
                break;
            }
        }
        let mut headers = [EMPTY_HEADER; HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let end = match request.parse(&self.bytes) {
            Ok(Status::Complete(end)) => end,
            Ok(Status::Partial) => return Ok(None),
            Err(error) => return Err(refusal(error)),
        };
        let method = match request.method.unwrap_or_default() {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            "PATCH" => Method::Patch,
            "DELETE" => Method::Delete,
            _ => return Err("Invalid HTTP Method: Unsupported HTTP method.".to_owned()),
        };
        let mut head = Head {
            method,
            path: absolute(request.path.unwrap_or_default()).to_owned(),
            length: 0,
            is_chunked: false,
            expects: false,
            end,
        };
        for header in &*request.headers {
            let value = std::str::from_utf8(header.value)
                .map_err(|_| format!("Invalid HTTP Header: {} is no UTF-8.", header.name))?;
            let value = value.trim();
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            if is("content-length") {
                head.length = value
                    .parse()
                    .map_err(|_| format!("Invalid HTTP Header: Content-Length: {value}"))?;
            } else if is("transfer-encoding") {
                if !value.eq_ignore_ascii_case("chunked") {
                    return Err(format!("Invalid HTTP Header: Transfer-Encoding: {value}"));
                }
                head.is_chunked = true;
            } else if is("expect") {
                if !value.eq_ignore_ascii_case("100-continue") {
                    return Err(format!("Invalid HTTP Header: Expect: {value}"));
                }
                head.expects = true;
            }
        }
        // Which of the two holds is what request smuggling plays with (RFC 9112, section 6.3).
        if head.is_chunked && head.length > 0 {
            let both = "Content-Length beside Transfer-Encoding";
            return Err(format!("Invalid HTTP Header: {both}"));
        }
        Ok(Some(head))
    }
}

fn refusal(error: Error) -> String {
    match error {
        Error::Version => "Invalid HTTP Version: Unsupported HTTP version.".to_owned(),
        error => format!("Invalid HTTP Request: {error}."),
    }
}

/// The absolute path of a request's target. What is none counts as the root.
fn absolute(target: &str) -> &str {
    if target.starts_with('/') {
        return target;
    }
    let rest = target.strip_prefix("http://").unwrap_or_default();
    rest.find('/').map_or("/", |slash| &rest[slash..])
}

/// The body that these chunks make, and how many bytes they take; `None` while they are not whole.
fn unchunked(bytes: &[u8], most: usize) -> Result<Option<(Vec<u8>, usize)>, String> {
    let wrong = |what: &str| format!("Invalid HTTP Request: a chunk {what}.");
    let mut body = Vec::new();
    let mut at = 0;
    loop {
        if at > most + HEAD {
            return Err(wrong("is framed by too many bytes"));
        }
        let rest = &bytes[at..];
        let size = httparse::parse_chunk_size(rest);
        let (start, size) = match size.map_err(|_| wrong("has no valid size"))? {
            Status::Complete((start, size)) => (start, size),
            Status::Partial if rest.len() > LINE => return Err(wrong("has no valid size")),
            Status::Partial => return Ok(None),
        };
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > most - body.len() {
            return Err(format!(
                "Request payload is larger than the limit of {most} allowed by server."
            ));
        }
        let rest = &rest[start..];
        // A chunk of no bytes is the last, with no trailer here; each ends with a line's end.
        let Some(chunk) = rest.get(..size + 2) else {
            return Ok(None);
        };
        let (chunk, end) = chunk.split_at(size);
        if end != b"\r\n" {
            return Err(wrong("does not end where its size says"));
        }
        body.extend_from_slice(chunk);
        at += start + size + 2;
        if size == 0 {
            return Ok(Some((body, at)));
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 200, 204, 400 or 413.
    pub status: u16,
    /// Whether the request used what will go away.
    pub deprecated: bool,
    /// JSON; empty with 204.
    pub body: String,
}

impl Answer {
    /// It was done.
    #[must_use]
    pub fn done() -> Answer {
        Answer {
            status: 204,
            deprecated: false,
            body: String::new(),
        }
    }

    /// What was asked for.
    #[must_use]
    pub fn with(value: &impl serde::Serialize) -> Answer {
        match serde_json::to_string(value) {
            Ok(body) => Answer {
                status: 200,
                body,
                ..Answer::done()
            },
            Err(error) => Answer::fault(error),
        }
    }

    /// It was not done, and why.
    #[must_use]
    pub fn fault(why: impl std::fmt::Display) -> Answer {
        Answer {
            status: 400,
            body: json!({ "fault_message": why.to_string() }).to_string(),
            ..Answer::done()
        }
    }

    /// These bytes are no request.
    #[must_use]
    pub fn wrong(why: &str) -> Answer {
        let error = format!("{why}\nAll previous unanswered requests will be dropped.");
        Answer {
            status: 400,
            body: json!({ "fault_message": why, "error": error }).to_string(),
            ..Answer::done()
        }
    }

    /// As it goes to a client.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let deprecation = match self.deprecated {
            true => "Deprecation: true\r\n",
            false => "",
        };
        let mut text = format!(
            "HTTP/1.1 {} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n{deprecation}",
            self.status
        );
        if self.status != 204 {
            text.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                self.body.len()
            ));
        }
        text.push_str("\r\n");
        text.push_str(&self.body);
        text.into_bytes()
    }
}

/// Has a client send its body.
pub const CONTINUE: &[u8] =
    b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
/// For a client that is one too many.
pub const BUSY: &[u8] = b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\n\
    Content-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }";

#[cfg(test)]
mod tests;
