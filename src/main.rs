//! Armlet.
fn main() {}
