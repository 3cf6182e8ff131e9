//! Tensors of a Hugging Face folder that hold all experts of a block: gpt-oss.
//!
//! Plain, `gate_up_proj` is `[experts, hidden, 2 ffn]` and `down_proj` is `[experts, ffn, hidden]`,
//! the transposes of what a product reads; as MXFP4, `*_blocks` is `[experts, outputs, inputs / 32,
//! 16]` of bytes with two codes each, beside `*_scales`. Gate and up take turns along the outputs.
//! It says where each expert's matrices lie; it reads no values.

use safetensors::tensor::{Dtype, TensorInfo as Entry};

use super::architecture::Architecture;
use super::config::Config;
use super::error::{FETCH_AGAIN, Fault};
use super::quantised::{Part, Piece, Quantised};
use super::safetensors::{Held, TensorInfo};
use super::weights::{Steps, WeightType};

/// Codes of a block that share a scale (OCP Microscaling Formats 1.0).
const BLOCK: usize = 32;

/// What a tensor holds of each expert.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    /// Transposed matrices.
    Values,
    /// Biases.
    Biases,
    /// Codes of MXFP4, two in a byte.
    Codes,
    /// Their scales.
    Scales,
}

/// The canonical names of a tensor's parts, with how many turns the outputs take, and what it holds.
fn parts(part: &str) -> Option<(&'static [&'static str], Holds)> {
    let (names, rest): (&'static [&'static str], &str) = match part {
        _ if part.starts_with("gate_up_proj") => {
            (&["ffn_gate_exps", "ffn_up_exps"], &part["gate_up_proj".len()..])
        }
        _ if part.starts_with("down_proj") => (&["ffn_down_exps"], &part["down_proj".len()..]),
        _ => return None,
    };
    let holds = match rest {
        "" => Holds::Values,
        "_bias" => Holds::Biases,
        "_blocks" => Holds::Codes,
        "_scales" => Holds::Scales,
        _ => return None,
    };
    Some((names, holds))
}

/// A tensor of all experts of one block.
pub(super) struct Mixture {
    layer: u32,
    names: &'static [&'static str],
    holds: Holds,
    experts: usize,
    /// Of each of the named matrices.
    outputs: usize,
    inputs: usize,
}

impl Mixture {
    /// The tensor of this Hugging Face name, where the architecture has it.
    pub fn of(name: &str, config: &Config) -> Option<Mixture> {
        let experts = config.experts.as_ref();
        let experts = experts.filter(|_| config.architecture == Architecture::GptOss)?;
        let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer = layer.parse::<u32>().ok().filter(|number| number.to_string() == layer)?;
        let (names, holds) = parts(part.strip_prefix("mlp.experts.")?)?;
        let (outputs, inputs) = match names.len() {
            1 => (config.hidden, experts.ffn),
            _ => (experts.ffn, config.hidden),
        };
        Some(Mixture { layer, names, holds, experts: experts.count, outputs, inputs })
    }

    fn canonical(&self, name: &str, expert: usize) -> String {
        let ending = match self.holds {
            Holds::Biases => "bias",
            _ => "weight",
        };
        format!("blk.{}.{name}.{expert}.{ending}", self.layer)
    }

    /// The canonical names of all that it holds.
    pub fn held(&self) -> Vec<String> {
        let of = |expert: usize| self.names.iter().map(move |name| self.canonical(name, expert));
        (0..self.experts).flat_map(of).collect()
    }

    /// Each expert's matrices, vectors, codes or scales, by their places among the data.
    ///
    /// # Errors
    /// If type or shape are not those that the config asks for.
    pub fn cut(&self, entry: &Entry, quantised: Option<&Quantised>) -> Result<Vec<Held>, Fault> {
        let turns = self.names.len();
        let (experts, outputs, inputs) = (self.experts, self.outputs, self.inputs);
        let all = turns * outputs;
        let shape = match self.holds {
            Holds::Values => vec![experts, inputs, all],
            Holds::Biases => vec![experts, all],
            Holds::Codes => vec![experts, all, inputs / BLOCK, BLOCK / 2],
            Holds::Scales => vec![experts, all, inputs / BLOCK],
        };
        let packed = matches!(self.holds, Holds::Codes | Holds::Scales);
        if packed && !inputs.is_multiple_of(BLOCK) {
            let problem = format!("its rows of {inputs} values are no whole blocks of {BLOCK}");
            return Err(Fault::malformed(problem, FETCH_AGAIN));
        }
        if packed && !quantised.is_some_and(Quantised::is_mixture) {
            return Err(Fault::malformed(
                "it holds MXFP4, and `quantization_config` does not say so",
                FETCH_AGAIN,
            ));
        }
        if entry.shape != shape {
            return Err(Fault::malformed(
                format!("its shape is {:?}, and the config makes it {shape:?}", entry.shape),
                FETCH_AGAIN,
            ));
        }
        let (kind, size) = match (self.holds, entry.dtype) {
            // Pieces, whose type is that of the tensor.
            (Holds::Codes | Holds::Scales, Dtype::U8) => (WeightType::E2m1, 1),
            (Holds::Values | Holds::Biases, Dtype::F32) => (WeightType::F32, 4),
            (Holds::Values | Holds::Biases, Dtype::F16) => (WeightType::F16, 2),
            (Holds::Values | Holds::Biases, Dtype::BF16) => (WeightType::BF16, 2),
            (_, other) => {
                return Err(Fault::unsupported(
                    format!("its type is {other:?}"),
                    "save the model in F32, F16 or BF16, or as MXFP4",
                ));
            }
        };
        // Values, or bytes, of an expert; of one step along the outputs; and along the inputs.
        let (each, row, value, row_length) = match self.holds {
            Holds::Values => (inputs * all, turns, all, 1),
            Holds::Biases => (all, all, turns, 1),
            Holds::Codes => (all * inputs / 2, turns * inputs / 2, 1, inputs / 2),
            Holds::Scales => (all * inputs / BLOCK, turns * inputs / BLOCK, 1, inputs / BLOCK),
        };
        // From one of the parts that take turns to the next.
        let turn = match self.holds {
            Holds::Values | Holds::Biases => 1,
            Holds::Codes | Holds::Scales => row_length,
        };
        let (rows, width) = match self.holds {
            Holds::Biases => (1, outputs),
            Holds::Scales => (outputs, inputs / BLOCK),
            Holds::Codes => (outputs, inputs / 2),
            Holds::Values => (outputs, inputs),
        };
        let last = match self.holds {
            Holds::Values => (rows - 1) * row + (width - 1) * value + 1,
            Holds::Biases => (width - 1) * value + 1,
            Holds::Codes | Holds::Scales => (rows - 1) * row + row_length,
        };
        let mut tensors = Vec::with_capacity(experts * turns);
        for expert in 0..experts {
            for (place, name) in self.names.iter().enumerate() {
                let start = entry.data_offsets.0 + (expert * each + place * turn) * size;
                let name = self.canonical(name, expert);
                let bytes = start..start + last * size;
                let steps = Some(Steps { row: row * size, value: value * size });
                let part = match self.holds {
                    Holds::Codes => Part::Codes,
                    Holds::Scales => Part::Scales,
                    Holds::Values | Holds::Biases => {
                        let tensor = TensorInfo { name, kind, rows, width, bytes, steps };
                        tensors.push(Held::Tensor(tensor));
                        continue;
                    }
                };
                let (dtype, shape) = (entry.dtype, vec![rows, width]);
                let piece = Piece { file: 0, bytes, dtype, shape, steps };
                tensors.push(Held::Piece { weights: vec![(name, 0)], part, piece });
            }
        }
        Ok(tensors)
    }
}
