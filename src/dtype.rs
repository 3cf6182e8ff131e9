//! Number formats of tensor-core operands and results, and their codecs.
//!
//! It knows bits and rounding only: no tensors, no scales, no chips.

use serde::{Deserialize, Serialize};

/// A number format that a GEMM can read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// IEEE binary32.
    F32,
    /// 8-bit exponent, 10-bit fraction, kept in 32 bits.
    Tf32,
    /// 8-bit exponent, 7-bit fraction.
    Bf16,
    /// IEEE binary16.
    F16,
    /// OCP FP8 E4M3 (no infinities, NaN is 0x7f and 0xff, largest finite 448).
    E4m3,
    /// OCP FP8 E5M2 (IEEE-like, largest finite 57344).
    E5m2,
}
