//! The control socket (`--control PATH`): other programs ask a running machine for its state, and
//! have it paused, resumed, reset, stopped, or a device changed. `armlet ctl` is its client.
//!
//! One thread serves the socket. It sees requests and answers only; the machine belongs to the event
//! loop, which carries out commands (`run/command.rs`). A client's request is one line of words, and
//! the answer one line of JSON (`docs/control.md`).

mod answer;
mod client;
mod line;
mod request;
mod server;
#[cfg(test)]
mod tests;

pub use client::ask;
pub use server::{Control, Fixed};
