//! One op on one arm.

pub mod emulated;
