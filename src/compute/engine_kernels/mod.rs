//! The arithmetic of other people's kernels, to the bit: what PyTorch, transformers,
//! vLLM, SGLang and torchao compute on a Hopper GPU beside their products.
//!
//! Plain functions over tensors and slices; each file says where its rules come
//! from and what has been seen. Nothing here knows of arms, sites or recipes, and
//! nothing chooses between kernels.

pub mod sfu;
mod sfu_rows;
pub mod cuda_math;
pub mod cpu_math;
pub mod row_sum;
pub mod norm;
pub mod softmax;
pub mod activation;
pub mod rope;
pub mod int8;
pub mod linear;
pub mod attention;
pub mod flash;
pub mod fp8;
pub mod ggml;
pub mod ggml_blocks;
