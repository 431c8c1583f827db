//! Firecracker's control interface: HTTP over a Unix socket, what its requests say and when they are
//! allowed, and the answers. What a request does is for [`Resources`] and
//! [`Machine`] to carry out.
//!
//! [`http`] reads requests and writes answers, [`route`] says what a request is, [`model`] holds the
//! bodies, [`Microvm`] what was configured and the rules of that, [`Server`] the connections.
//! Everything here works without KVM and without a guest. `docs/api.md` lists the endpoints, and what
//! differs from the original.

pub mod config_file;
pub mod host;
pub mod http;
pub mod microvm;
pub mod mmds;
pub mod model;
pub mod route;
pub mod server;

pub use host::{Machine, Refusal, Resources};
pub use http::Answer;
pub use microvm::{Microvm, Step};
pub use server::{Pending, Server};
