//! Armlet.
