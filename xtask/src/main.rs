//! What a developer runs. fn main
fn main() {}
