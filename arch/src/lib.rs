//! Pure planning of virtual machines.
