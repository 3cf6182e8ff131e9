//! A product of llama.cpp's on CUDA: which of its kernels multiplies, and what it gives.
//!
//! It knows weights in blocks and in floats; the kernels' arithmetic is
//! `compute/engine_kernels/ggml.rs`'s and `ggml_blocks.rs`'s.

use super::engine::PROCESSORS;
use super::orders::{Operands, with_bias};
use crate::compute::ComputeError;
use crate::compute::emulated::chip::Unit;
use crate::compute::engine_kernels::{ggml, ggml_blocks};
use crate::dtype::Format;
use crate::engine::Order;
use crate::model::{Weight, WeightType};
use crate::tensor::Tensor;

/// The format of a weight that is in no blocks.
fn float_of(kind: WeightType) -> Option<Format> {
    match kind {
        WeightType::F32 => Some(Format::F32),
        WeightType::F16 => Some(Format::F16),
        WeightType::BF16 => Some(Format::Bf16),
        _ => None,
    }
}

/// A product of llama.cpp's on CUDA.
pub struct GgmlProduct<'w> {
    weight: Weight<'w>,
    bias: Option<Vec<f32>>,
    /// Where the weight is in no blocks: its format, and what cuBLAS multiplies.
    float: Option<(Format, Operands)>,
}

impl<'w> GgmlProduct<'w> {
    /// The product with that weight, and its bias in f32.
    ///
    /// # Errors
    /// If the weight cannot be read.
    pub fn of(
        unit: Unit,
        weight: Weight<'w>,
        bias: Option<Vec<f32>>,
    ) -> Result<GgmlProduct<'w>, ComputeError> {
        let float = match float_of(weight.kind()) {
            Some(format) => {
                let w = Tensor::new(weight.width(), weight.to_vec()?);
                Some((format, Operands::ggml(unit, format, w, bias.clone())))
            }
            None => None,
        };
        Ok(GgmlProduct { weight, bias, float })
    }

    /// Rows of the activation, rows of the weight, elements of K.
    pub fn shape(&self, x: &Tensor) -> [usize; 3] {
        [x.rows(), self.weight.rows(), x.width()]
    }

    fn kernel(&self, x: &Tensor) -> Option<ggml::Kernel> {
        let (format, _) = self.float.as_ref()?;
        Some(ggml::kernel(*format, ggml::Part::Weight, self.shape(x)))
    }

    /// What cuBLAS multiplies, where it does.
    pub fn by_blas(&self, x: &Tensor) -> Option<&Operands> {
        let (_, operands) = self.float.as_ref()?;
        (self.kernel(x) == Some(ggml::Kernel::Blas)).then_some(operands)
    }

    /// The kernel that multiplies so many rows, in words.
    pub fn name(&self, x: &Tensor) -> String {
        let kernel = match self.kernel(x) {
            Some(ggml::Kernel::Vectors) => "ggml mul_mat_vec_f",
            Some(ggml::Kernel::Warps) => "ggml mul_mat_f",
            Some(ggml::Kernel::Blas) => "cuBLAS",
            None if x.rows() <= ggml_blocks::VECTOR_ROWS => "ggml MMVQ",
            None => "ggml MMQ",
        };
        format!("{kernel} of {}", self.weight.kind())
    }

    /// The product; where cuBLAS makes it, in that order.
    ///
    /// # Errors
    /// If the weight's type is not known, or the shapes do not fit.
    pub fn apply(&self, x: &Tensor, order: Order) -> Result<Tensor, ComputeError> {
        let (weight, kind) = (self.weight, self.weight.kind());
        if let Some(operands) = self.by_blas(x) {
            return operands.product(x, order);
        }
        let y = match &self.float {
            Some((_, operands)) => return operands.by_ggml(x),
            None if ggml_blocks::is_known(kind) && x.width() == weight.width() => {
                ggml_blocks::product(x, kind, weight.bytes(), weight.rows(), PROCESSORS)
            }
            None => {
                return Err(ComputeError::Recipe(format!(
                    "llama.cpp's product on CUDA of `{}`, {kind} of width {}, with an activation \
                     of width {} is not known",
                    weight.name(),
                    weight.width(),
                    x.width()
                )));
            }
        };
        Ok(with_bias(y, self.bias.as_deref()))
    }
}
