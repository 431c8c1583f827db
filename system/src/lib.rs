//! How a process deals with its own system: files that users name, messages, signals, the terminal,
//! waits, and system calls that are interrupted.
//!
//! It knows nothing of virtual machines but what an exit status of armlet's says.

pub mod deadline;
pub mod eintr;
pub mod files;
pub mod huge;
pub mod messages;
pub mod signals;
pub mod status;
pub mod terminal;
pub mod visible;
