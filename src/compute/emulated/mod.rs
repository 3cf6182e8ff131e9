//! The emulated arm: bit for bit what a chip's arithmetic prescribes.

pub mod arm;
pub mod dequant;
pub mod engine;
pub mod fp8_product;
mod ggml_product;
mod orders;
pub mod kernels;
pub mod schedule;
pub mod steps;
pub mod quantize;
pub mod ranks;
pub mod tensor_core;
pub mod simd;
mod grouped;
pub mod matrix_core;
pub mod gemm;
pub mod chain;
pub mod identify;
pub mod plan;
pub mod vectors;
pub mod captures;

pub use crate::chip;
