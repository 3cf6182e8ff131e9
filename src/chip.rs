//! The chips as data: for each chip and operand format, how its tensor cores add. A new chip is
//! a name and a row here, and nothing elsewhere.
//!
//! It knows what one instruction does, not how a GEMM chains instructions (that
//! is `compute/emulated/schedule.rs`), and it computes nothing.
//!
//! Sources: arXiv 2511.10909 (MMA-Sim), arXiv 2512.07004 (models with hardware
//! vectors), arXiv 2412.19437 section 3.3.2 (FP8 on Hopper). Every row is held
//! to hardware vectors by `tests/it/tensor_cores.rs`. What these vectors do not
//! show: NaN, infinities, a subnormal accumulator, exponents near the floor;
//! whether tf32 on Blackwell adds 8 products at once or 4 and 4 (the vectors have
//! 4; for Hopper a captured GEMM says 8); and how FP8 on Blackwell adds an accumulator that is not
//! zero (in the vectors it is added by an f32 addition afterwards).

use serde::{Deserialize, Serialize};

use crate::dtype::{Format, tf32_ties_away};

/// The chip whose arithmetic is prescribed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChipName {
    /// The device's own chip where a device takes part, else Hopper.
    Auto,
    /// V100.
    Volta,
    /// A100, A2.
    Ampere,
    /// RTX 4090, L40S.
    Ada,
    /// H100, H200.
    Hopper,
    /// B200.
    Blackwell,
}

impl ChipName {
    /// All names, oldest chip first.
    pub const ALL: [ChipName; 6] = [
        ChipName::Auto,
        ChipName::Volta,
        ChipName::Ampere,
        ChipName::Ada,
        ChipName::Hopper,
        ChipName::Blackwell,
    ];

    /// The name that manifests, commands and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            ChipName::Auto => "auto",
            ChipName::Volta => "volta",
            ChipName::Ampere => "ampere",
            ChipName::Ada => "ada",
            ChipName::Hopper => "hopper",
            ChipName::Blackwell => "blackwell",
        }
    }
}

impl std::fmt::Display for ChipName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A chip: its name, the products that carry it, and its units.
#[derive(Debug)]
pub struct Chip {
    /// The family's name.
    pub name: ChipName,
    /// The products known to behave like this.
    pub products: &'static [&'static str],
    /// Their compute capabilities.
    pub capabilities: &'static [(i32, i32)],
    /// What it can multiply.
    pub units: &'static [ChipUnit],
    /// How it rounds f32 operands to tf32 where they lie midway.
    pub tf32_ties: Ties,
}

/// Which neighbour a value midway between two is rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ties {
    /// The one with an even last place. Seen on an H200: of a captured GEMM's
    /// operands eight lie midway, and only this explains all of its outputs.
    ToEven,
    /// The one of larger magnitude: what PTX offers before Hopper.
    AwayFromZero,
}

/// The operand formats that share one unit of a chip.
#[derive(Debug)]
pub struct ChipUnit {
    /// Formats that either operand may have; FP8 formats may be mixed.
    pub formats: &'static [Format],
    /// Their arithmetic.
    pub unit: Unit,
}

/// The arithmetic that turns one operand pair's products into a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A tensor core's truncated fused dot product.
    TensorCore(TensorCore),
    /// Scalar fused multiply-adds in f32, one after the other along K from
    /// zero, on the CUDA cores. Seen in one captured f32 GEMM of an H200, with
    /// K split into 32 parts; that cuBLAS does so for all shapes is not known.
    SequentialFma,
}

/// One truncated fused dot-product-add; `compute/emulated/tensor_core.rs` says what it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorCore {
    /// Products that are added at once.
    pub products: usize,
    /// Blocks of that many products that one instruction adds one after the
    /// other. It changes no bit of a chained GEMM.
    pub blocks: usize,
    /// Fraction bits that an addend keeps when it is aligned (F).
    pub alignment_bits: u32,
    /// Fraction bits of the result (R); of an f32's 23, the rest are zero.
    pub result_bits: u32,
}

/// The smallest exponent to which addends are aligned (arXiv 2511.10909).
pub const EXPONENT_FLOOR: i32 = -133;

impl Unit {
    /// Products that are added at once; 1 where there are no blocks.
    pub fn products(&self) -> usize {
        match self {
            Unit::TensorCore(core) => core.products,
            Unit::SequentialFma => 1,
        }
    }
}

impl Chip {
    /// The code of an operand, as this chip's conversion makes it from f32.
    pub fn encode(&self, format: Format, value: f32) -> u32 {
        match (format, self.tf32_ties) {
            (Format::Tf32, Ties::AwayFromZero) => tf32_ties_away(value),
            _ => format.encode(value),
        }
    }

    /// The unit that multiplies `x` by `w`; none if the chip has none.
    pub fn unit(&self, x: Format, w: Format) -> Option<&Unit> {
        if x == Format::F32 && w == Format::F32 {
            return Some(&Unit::SequentialFma);
        }
        self.units
            .iter()
            .find(|row| {
                row.formats.contains(&x) && row.formats.contains(&w) && (x == w || x.is_fp8())
            })
            .map(|row| &row.unit)
    }
}

const fn tensor_core(
    products: usize,
    blocks: usize,
    alignment_bits: u32,
    result_bits: u32,
) -> Unit {
    Unit::TensorCore(TensorCore { products, blocks, alignment_bits, result_bits })
}

const FP8: &[Format] = &[Format::E4m3, Format::E5m2];
const HALVES: &[Format] = &[Format::Bf16, Format::F16];
const TF32: &[Format] = &[Format::Tf32];

/// Every chip that is modelled, oldest first.
pub static CHIPS: [Chip; 5] = [
    Chip {
        name: ChipName::Volta,
        products: &["V100"],
        capabilities: &[(7, 0)],
        tf32_ties: Ties::AwayFromZero,
        units: &[ChipUnit { formats: &[Format::F16], unit: tensor_core(4, 1, 23, 23) }],
    },
    Chip {
        name: ChipName::Ampere,
        products: &["A100", "A2"],
        capabilities: &[(8, 0), (8, 6)],
        tf32_ties: Ties::AwayFromZero,
        units: &[
            ChipUnit { formats: HALVES, unit: tensor_core(8, 2, 24, 23) },
            ChipUnit { formats: TF32, unit: tensor_core(4, 2, 24, 23) },
        ],
    },
    Chip {
        name: ChipName::Ada,
        products: &["RTX 4090", "L40S"],
        capabilities: &[(8, 9)],
        tf32_ties: Ties::AwayFromZero,
        units: &[
            ChipUnit { formats: FP8, unit: tensor_core(16, 2, 13, 13) },
            ChipUnit { formats: HALVES, unit: tensor_core(8, 2, 24, 23) },
            ChipUnit { formats: TF32, unit: tensor_core(4, 2, 24, 23) },
        ],
    },
    Chip {
        name: ChipName::Hopper,
        products: &["H100", "H200"],
        capabilities: &[(9, 0)],
        tf32_ties: Ties::ToEven,
        units: &[
            ChipUnit { formats: FP8, unit: tensor_core(32, 1, 13, 13) },
            ChipUnit { formats: HALVES, unit: tensor_core(16, 1, 25, 23) },
            ChipUnit { formats: TF32, unit: tensor_core(8, 1, 25, 23) },
        ],
    },
    Chip {
        name: ChipName::Blackwell,
        products: &["B200"],
        capabilities: &[(10, 0)],
        tf32_ties: Ties::ToEven,
        units: &[
            ChipUnit { formats: FP8, unit: tensor_core(32, 1, 25, 23) },
            ChipUnit { formats: HALVES, unit: tensor_core(16, 1, 25, 23) },
            ChipUnit { formats: TF32, unit: tensor_core(8, 1, 25, 23) },
        ],
    },
];

/// The chip of that name; `Auto` is Hopper, for where no device takes part.
pub fn chip(name: ChipName) -> &'static Chip {
    let name = if name == ChipName::Auto { ChipName::Hopper } else { name };
    CHIPS.iter().find(|chip| chip.name == name).unwrap_or(&CHIPS[3])
}

/// The chip of a compute capability, where its arithmetic is known.
pub fn of_capability(capability: (i32, i32)) -> Option<ChipName> {
    CHIPS.iter().find(|chip| chip.capabilities.contains(&capability)).map(|chip| chip.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_hopper_and_every_name_has_its_chip() {
        assert_eq!(chip(ChipName::Auto).name, ChipName::Hopper);
        for row in &CHIPS {
            assert_eq!(chip(row.name).name, row.name);
        }
        for name in ChipName::ALL.into_iter().filter(|name| *name != ChipName::Auto) {
            assert_eq!(chip(name).name, name);
        }
    }

    #[test]
    fn a_capability_is_that_of_one_chip_or_of_none() {
        assert_eq!(of_capability((8, 6)), Some(ChipName::Ampere));
        assert_eq!(of_capability((8, 9)), Some(ChipName::Ada));
        assert_eq!(of_capability((9, 0)), Some(ChipName::Hopper));
        assert_eq!(of_capability((12, 0)), None);
    }

    #[test]
    fn fp8_formats_mix_and_16_bit_formats_do_not() {
        let hopper = chip(ChipName::Hopper);
        assert!(hopper.unit(Format::E4m3, Format::E5m2).is_some());
        assert!(hopper.unit(Format::Bf16, Format::F16).is_none());
        assert!(chip(ChipName::Ampere).unit(Format::E4m3, Format::E4m3).is_none());
        assert_eq!(
            chip(ChipName::Volta).unit(Format::F32, Format::F32),
            Some(&Unit::SequentialFma)
        );
    }
}
