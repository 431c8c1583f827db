//! A flattened device tree as a value.
