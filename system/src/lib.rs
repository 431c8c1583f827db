//! The process and its operating system: files that users name, messages, signals, the terminal,
//! waits, and interrupted system calls.
//!
//! It knows nothing of virtual machines except the meaning of armlet's exit statuses.

pub mod deadline;
pub mod descriptors;
pub mod eintr;
pub mod files;
pub mod huge;
pub mod landlock;
pub mod messages;
pub mod page_size;
pub mod raise;
pub mod rights;
pub mod scheduling;
pub mod seccomp;
pub mod signals;
pub mod sockets;
pub mod status;
pub mod terminal;
pub mod visible;
