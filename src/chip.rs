//! The chips as data: for each chip and operand format, how its tensor cores add. A new chip is
//! a name and a row here, and nothing elsewhere.
//!
//! It knows what one instruction does, not how a GEMM chains instructions (that
//! is `compute/emulated/schedule.rs`), and it computes nothing.
//!
//! Sources: arXiv 2511.10909 (MMA-Sim), arXiv 2512.07004 (models with hardware
//! vectors), arXiv 2412.19437 section 3.3.2 (FP8 on Hopper). What each row rests on stands in the
//! row; whatever rests on vectors is held to them by `tests/it/tensor_cores.rs`. What these vectors
//! do not show: NaN, infinities, a subnormal accumulator, exponents near the floor; and
//! whether tf32 on Blackwell adds 8 products at once or 4 and 4 (the vectors have
//! 4; for Hopper a captured GEMM says 8). FP8 on B200 they show of `mma.sync` alone, which is no
//! instruction of that chip for FP8: it is an f16 product there, with the accumulator added in f32
//! afterwards (the mmaemu package). What `tcgen05` does is MMA-Sim's model.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::block_format::BlockFormat;
use crate::dtype::{Format, tf32_ties_away};

/// The chip whose arithmetic is prescribed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChipName {
    /// The device's own chip where a device takes part, else Hopper.
    Auto,
    /// V100.
    Volta,
    /// T4, RTX 2080.
    Turing,
    /// A100, A2.
    Ampere,
    /// RTX 4090, L40S.
    Ada,
    /// H100, H200.
    Hopper,
    /// B200.
    Blackwell,
    /// RTX 5090: other tensor cores than Blackwell's of data centres.
    #[serde(rename = "rtx-blackwell")]
    RtxBlackwell,
    /// MI100.
    Cdna1,
    /// MI210, MI250X.
    Cdna2,
    /// MI300X.
    Cdna3,
}

impl ChipName {
    /// All names, oldest chip first, NVIDIA's and then AMD's.
    pub const ALL: [ChipName; 11] = [
        ChipName::Auto,
        ChipName::Volta,
        ChipName::Turing,
        ChipName::Ampere,
        ChipName::Ada,
        ChipName::Hopper,
        ChipName::Blackwell,
        ChipName::RtxBlackwell,
        ChipName::Cdna1,
        ChipName::Cdna2,
        ChipName::Cdna3,
    ];

    /// The name that manifests, commands and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            ChipName::Auto => "auto",
            ChipName::Volta => "volta",
            ChipName::Turing => "turing",
            ChipName::Ampere => "ampere",
            ChipName::Ada => "ada",
            ChipName::Hopper => "hopper",
            ChipName::Blackwell => "blackwell",
            ChipName::RtxBlackwell => "rtx-blackwell",
            ChipName::Cdna1 => "cdna1",
            ChipName::Cdna2 => "cdna2",
            ChipName::Cdna3 => "cdna3",
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
    /// What it can multiply of block-scaled operands.
    pub block_units: &'static [BlockUnit],
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
    /// None is rounded: the low bits are cut off, ties or not (MMA-Sim, of CDNA3).
    Cut,
}

/// The operand formats that share one unit of a chip.
#[derive(Debug)]
pub struct ChipUnit {
    /// Formats that either operand may have; FP8 formats of one kind may be mixed.
    pub formats: &'static [Format],
    /// Their arithmetic.
    pub unit: Unit,
    /// What the arithmetic of one instruction rests on, for each instruction that was looked at.
    pub instructions: &'static [(&'static str, Basis)],
    /// What whole products rest on whose accumulator carries all along K.
    pub chained: Basis,
    /// The same of FP8 products with promoted accumulation.
    pub promoted: Option<Basis>,
}

/// The block-scaled formats that share one unit of a chip.
#[derive(Debug)]
pub struct BlockUnit {
    /// Formats that both operands have.
    pub formats: &'static [BlockFormat],
    /// Their arithmetic.
    pub unit: Unit,
    /// What the arithmetic of one instruction rests on, for each instruction.
    pub instructions: &'static [(&'static str, Basis)],
    /// What whole products rest on.
    pub chained: Basis,
}

/// What a claim about a chip's arithmetic rests on, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Evidence {
    /// Receipts of this project: what a chip of the kind returned is computed again in its tests.
    Replayed,
    /// What others recorded of a chip of the kind, computed again in the tests.
    Vectors,
    /// A model that somebody published; nothing of the chip was computed again here.
    Published,
    /// It follows from other chips.
    Assumed,
}

impl Evidence {
    /// All, the best first.
    pub const ALL: [Evidence; 4] =
        [Evidence::Replayed, Evidence::Vectors, Evidence::Published, Evidence::Assumed];

    /// The name that contracts and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            Evidence::Replayed => "replayed",
            Evidence::Vectors => "vectors",
            Evidence::Published => "published",
            Evidence::Assumed => "assumed",
        }
    }
}

impl std::fmt::Display for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a claim rests on, and where that stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basis {
    /// How good it is.
    pub evidence: Evidence,
    /// Receipts, vectors, a paper, or why it is assumed.
    pub source: Cow<'static, str>,
}

impl Basis {
    const fn of(evidence: Evidence, source: &'static str) -> Basis {
        Basis { evidence, source: Cow::Borrowed(source) }
    }
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
    /// A tensor core's truncated fused dot product of block-scaled operands.
    BlockScaled(BlockScaled),
    /// A matrix core of AMD's.
    MatrixCore(MatrixCore),
    /// Products of 8-bit integers, added exactly in 32 bits, so in any order; where a sum leaves those,
    /// instructions wrap unless they are told to saturate (PTX ISA, `mma`, `.satfinite`).
    Integers,
}

/// How a matrix core of AMD's adds (MMA-Sim, arXiv 2511.10909); `compute/emulated/matrix_core.rs` says
/// what it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixCore {
    /// Products and accumulator exactly, rounded once.
    Exact {
        /// Products that are added at once.
        products: usize,
    },
    /// In f32, in pairs; subnormals are zero.
    Pairwise {
        /// Products that are added to each other before they meet the accumulator.
        products: usize,
    },
    /// Products cut and added, then rounded down beside the accumulator.
    TwoStages {
        /// Products that are added at once.
        products: usize,
        /// Fraction bits that a product, and the accumulator, keeps when it is aligned (F).
        alignment_bits: u32,
        /// Fraction bits of the sum before it is rounded to nearest (F2).
        sum_bits: u32,
    },
    /// The same, but that products at even and at odd places are cut and added for themselves first.
    EvenOdd {
        /// Products that are added at once.
        products: usize,
        /// Fraction bits that a product, and the accumulator, keeps when it is aligned (F).
        alignment_bits: u32,
        /// Fraction bits of the sum before it is rounded to nearest (F2).
        sum_bits: u32,
    },
}

impl MatrixCore {
    /// Products that are added at once.
    pub fn products(&self) -> usize {
        match self {
            MatrixCore::Exact { products }
            | MatrixCore::Pairwise { products }
            | MatrixCore::TwoStages { products, .. }
            | MatrixCore::EvenOdd { products, .. } => *products,
        }
    }
}

/// One truncated fused dot-product-add of operands whose blocks have scales (MMA-Sim, arXiv 2511.10909);
/// `compute/emulated/tensor_core.rs` says what it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockScaled {
    /// The addition.
    pub core: TensorCore,
    /// Products that are added exactly, before the scales of their block multiply the sum and it
    /// becomes one addend. 1 where every product is an addend, whose exponent the scales raise.
    pub group: usize,
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
    /// The smallest exponent to which addends are aligned (arXiv 2511.10909).
    pub exponent_floor: i32,
}

impl Unit {
    /// Products that are added at once; 1 where there are no blocks.
    pub fn products(&self) -> usize {
        match self {
            Unit::TensorCore(core) => core.products,
            Unit::SequentialFma | Unit::Integers => 1,
            Unit::BlockScaled(scaled) => scaled.core.products,
            Unit::MatrixCore(core) => core.products(),
        }
    }
}

impl Chip {
    /// The code of an operand, as this chip's conversion makes it from f32.
    pub fn encode(&self, format: Format, value: f32) -> u32 {
        match (format, self.tf32_ties) {
            (Format::Tf32, Ties::AwayFromZero) => tf32_ties_away(value),
            (Format::Tf32, Ties::Cut) if !value.is_nan() => value.to_bits() & !0x1fff,
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
                let mixes = x.is_fp8() || x.is_fnuz();
                row.formats.contains(&x) && row.formats.contains(&w) && (x == w || mixes)
            })
            .map(|row| &row.unit)
    }

    /// The unit that multiplies block-scaled operands of a format; none if the chip has none.
    pub fn block_unit(&self, format: BlockFormat) -> Option<&BlockUnit> {
        self.block_units.iter().find(|row| row.formats.contains(&format))
    }

    /// Whether a chip of the kind was seen to compute anything, here or by others.
    pub fn is_seen(&self) -> bool {
        let instructions = self.units.iter().flat_map(|unit| unit.instructions);
        let of_blocks = self.block_units.iter().flat_map(|unit| unit.instructions);
        instructions
            .chain(of_blocks)
            .into_iter()
            .any(|(_, basis)| basis.evidence <= Evidence::Vectors)
    }

    /// What whole products of operands of one format rest on; `promoted` is of FP8 alone. Nothing
    /// if the chip does not multiply them.
    pub fn basis(&self, format: Format, promoted: bool) -> Option<&'static Basis> {
        if format == Format::F32 {
            return Some(if self.name == ChipName::Hopper { &FMA_OF_H200 } else { &FMA });
        }
        let row = self.units.iter().find(|row| row.formats.contains(&format))?;
        Some(row.promoted.as_ref().filter(|_| promoted).unwrap_or(&row.chained))
    }
}

/// Products at once, blocks of an instruction, F, R, and the exponent's floor.
const fn tensor_core(
    products: usize,
    blocks: usize,
    alignment_bits: u32,
    result_bits: u32,
    exponent_floor: i32,
) -> Unit {
    Unit::TensorCore(TensorCore { products, blocks, alignment_bits, result_bits, exponent_floor })
}

const fn block_core(products: usize, alignment_bits: u32, exponent_floor: i32) -> TensorCore {
    TensorCore { products, blocks: 1, alignment_bits, result_bits: 23, exponent_floor }
}

/// Block-scaled operands, as Blackwell's two families have them; the instruction differs.
const fn block_units(instructions: &'static [(&'static str, Basis)]) -> [BlockUnit; 2] {
    [
        BlockUnit {
            formats: &[
                BlockFormat::Mxfp8,
                BlockFormat::Mxfp8E5m2,
                BlockFormat::Mxfp6E2m3,
                BlockFormat::Mxfp6E3m2,
            ],
            unit: Unit::BlockScaled(BlockScaled { core: block_core(32, 25, -133), group: 1 }),
            instructions,
            chained: NO_PRODUCT,
        },
        BlockUnit {
            formats: &[BlockFormat::Mxfp4, BlockFormat::Nvfp4],
            unit: Unit::BlockScaled(BlockScaled { core: block_core(64, 35, -139), group: 16 }),
            instructions,
            chained: NO_PRODUCT,
        },
    ]
}

static BY_TCGEN05: [(&str, Basis); 1] = [("tcgen05", MMA_SIM)];
static BY_MMA_SYNC: [(&str, Basis); 1] = [("mma.sync", MMA_SIM)];
static BLOCKS_OF_BLACKWELL: [BlockUnit; 2] = block_units(&BY_TCGEN05);
static BLOCKS_OF_RTX_BLACKWELL: [BlockUnit; 2] = block_units(&BY_MMA_SYNC);

const FP8: &[Format] = &[Format::E4m3, Format::E5m2];
const HALVES: &[Format] = &[Format::Bf16, Format::F16];
const TF32: &[Format] = &[Format::Tf32];
const FNUZ: &[Format] = &[Format::E4m3fnuz, Format::E5m2fnuz];
const INT8: &[Format] = &[Format::Int8];

const MMA_SIM: Basis = Basis::of(Evidence::Published, "MMA-Sim, arXiv 2511.10909");
const NO_PRODUCT: Basis = Basis::of(
    Evidence::Assumed,
    "that products chain instructions along K was seen on Hopper; no product of this chip was",
);
const NO_PROMOTION: Basis = Basis::of(
    Evidence::Assumed,
    "that sums are promoted every 128 elements of K was seen on Hopper; no product of this chip was",
);
const PTX: Basis = Basis::of(Evidence::Published, "PTX ISA: exact sums in 32-bit integers");
const ANY_ORDER: Basis =
    Basis::of(Evidence::Published, "PTX ISA: sums in 32-bit integers are exact in any order");
const OF_AMDS_ISA: Basis = Basis::of(
    Evidence::Published,
    "AMD's ISA documents (v_mfma_i32_*_i8): sums in 32-bit integers are exact in any order",
);
const PASSES_IN_INT8: Basis = Basis::of(
    Evidence::Replayed,
    "passes in int8 on an H200: vLLM's, examples/vllm-checkpoints, and cuBLASLt's, runs/receipts",
);
const PRODUCTS_OF_H200: Basis =
    Basis::of(Evidence::Replayed, "products and passes of an H200, runs/receipts");

const fn vectors(source: &'static str) -> Basis {
    Basis::of(Evidence::Vectors, source)
}

/// Every chip that is modelled, oldest first.
pub static CHIPS: [Chip; 10] = [
    Chip {
        name: ChipName::Volta,
        products: &["V100"],
        capabilities: &[(7, 0)],
        tf32_ties: Ties::AwayFromZero,
        block_units: &[],
        units: &[ChipUnit {
            formats: &[Format::F16],
            unit: tensor_core(4, 1, 23, 23, -133),
            instructions: &[("mma.sync", vectors("vectors of a V100, arXiv 2512.07004"))],
            chained: NO_PRODUCT,
            promoted: None,
        }],
    },
    Chip {
        name: ChipName::Turing,
        products: &["T4", "RTX 2080"],
        capabilities: &[(7, 5)],
        tf32_ties: Ties::AwayFromZero,
        block_units: &[],
        units: &[
            ChipUnit {
                formats: &[Format::F16],
                unit: tensor_core(8, 1, 24, 23, -133),
                instructions: &[("mma.sync", MMA_SIM)],
                chained: NO_PRODUCT,
                promoted: None,
            },
            integers(BY_MMA_SYNC_PTX, ANY_ORDER),
        ],
    },
    Chip {
        name: ChipName::Ampere,
        products: &["A100", "A2"],
        capabilities: &[(8, 0), (8, 6)],
        tf32_ties: Ties::AwayFromZero,
        block_units: &[],
        units: &[
            ChipUnit {
                formats: HALVES,
                unit: tensor_core(8, 2, 24, 23, -132),
                instructions: &[("mma.sync", OF_AMPERE)],
                chained: Basis::of(
                    Evidence::Published,
                    "a pass of Qwen3-4B in bf16 on an A100, arXiv 2606.00279",
                ),
                promoted: None,
            },
            ChipUnit {
                formats: TF32,
                unit: tensor_core(4, 2, 24, 23, -132),
                instructions: &[("mma.sync", OF_AMPERE)],
                chained: NO_PRODUCT,
                promoted: None,
            },
            integers(BY_MMA_SYNC_PTX, ANY_ORDER),
        ],
    },
    Chip {
        name: ChipName::Ada,
        products: &["RTX 4090", "L40S"],
        capabilities: &[(8, 9)],
        tf32_ties: Ties::AwayFromZero,
        block_units: &[],
        units: &[
            ChipUnit {
                formats: FP8,
                unit: tensor_core(16, 2, 13, 13, -132),
                instructions: &[("mma.sync", OF_ADA)],
                chained: NO_PRODUCT,
                promoted: Some(NO_PROMOTION),
            },
            ChipUnit {
                formats: HALVES,
                unit: tensor_core(8, 2, 24, 23, -132),
                instructions: &[("mma.sync", OF_ADA)],
                chained: NO_PRODUCT,
                promoted: None,
            },
            ChipUnit {
                formats: TF32,
                unit: tensor_core(4, 2, 24, 23, -132),
                instructions: &[("mma.sync", OF_ADA)],
                chained: NO_PRODUCT,
                promoted: None,
            },
            integers(BY_MMA_SYNC_PTX, ANY_ORDER),
        ],
    },
    Chip {
        name: ChipName::Hopper,
        products: &["H100", "H200"],
        capabilities: &[(9, 0)],
        tf32_ties: Ties::ToEven,
        block_units: &[],
        units: &[
            ChipUnit {
                formats: FP8,
                unit: tensor_core(32, 1, 13, 13, -133),
                instructions: &[("wgmma", PRODUCTS_OF_H200)],
                chained: PRODUCTS_OF_H200,
                promoted: Some(PRODUCTS_OF_H200),
            },
            ChipUnit {
                formats: HALVES,
                unit: tensor_core(16, 1, 25, 23, -133),
                instructions: &[("wgmma", PRODUCTS_OF_H200), ("mma.sync", OF_HOPPER)],
                chained: PRODUCTS_OF_H200,
                promoted: None,
            },
            ChipUnit {
                formats: TF32,
                unit: tensor_core(8, 1, 25, 23, -133),
                instructions: &[("wgmma", PRODUCTS_OF_H200), ("mma.sync", OF_HOPPER)],
                chained: PRODUCTS_OF_H200,
                promoted: None,
            },
            integers(BY_WGMMA, PASSES_IN_INT8),
        ],
    },
    Chip {
        name: ChipName::Blackwell,
        products: &["B200"],
        capabilities: &[(10, 0)],
        tf32_ties: Ties::ToEven,
        block_units: &BLOCKS_OF_BLACKWELL,
        units: &[
            ChipUnit {
                formats: FP8,
                unit: tensor_core(32, 1, 25, 23, -133),
                instructions: &[
                    ("tcgen05", MMA_SIM),
                    ("mma.sync", vectors("vectors of a B200 with c = 0: f16 products there")),
                ],
                chained: NO_PRODUCT,
                promoted: Some(NO_PROMOTION),
            },
            ChipUnit {
                formats: HALVES,
                unit: tensor_core(16, 1, 25, 23, -133),
                instructions: &[("tcgen05", MMA_SIM), ("mma.sync", OF_BLACKWELL)],
                chained: NO_PRODUCT,
                promoted: None,
            },
            ChipUnit {
                formats: TF32,
                unit: tensor_core(8, 1, 25, 23, -133),
                instructions: &[("tcgen05", MMA_SIM), ("mma.sync", OF_BLACKWELL)],
                chained: NO_PRODUCT,
                promoted: None,
            },
            integers(BY_TCGEN05_PTX, ANY_ORDER),
        ],
    },
    Chip {
        name: ChipName::RtxBlackwell,
        products: &["RTX 5090"],
        capabilities: &[(12, 0)],
        tf32_ties: Ties::ToEven,
        block_units: &BLOCKS_OF_RTX_BLACKWELL,
        units: &[
            ChipUnit {
                formats: FP8,
                unit: tensor_core(32, 1, 25, 23, -133),
                instructions: &[("mma.sync", MMA_SIM)],
                chained: NO_PRODUCT,
                promoted: Some(NO_PROMOTION),
            },
            ChipUnit {
                formats: HALVES,
                unit: tensor_core(16, 1, 25, 23, -133),
                instructions: &[("mma.sync", MMA_SIM)],
                chained: NO_PRODUCT,
                promoted: None,
            },
            ChipUnit {
                formats: TF32,
                unit: tensor_core(8, 1, 25, 23, -133),
                instructions: &[("mma.sync", MMA_SIM)],
                chained: NO_PRODUCT,
                promoted: None,
            },
            integers(BY_MMA_SYNC_PTX, ANY_ORDER),
        ],
    },
    Chip {
        name: ChipName::Cdna1,
        products: &["MI100"],
        capabilities: &[],
        tf32_ties: Ties::Cut,
        block_units: &[],
        units: &[
            matrix_core(&[Format::F16], MatrixCore::Exact { products: 4 }),
            matrix_core(&[Format::Bf16], MatrixCore::Exact { products: 2 }),
            integers(BY_MFMA_ISA, OF_AMDS_ISA),
        ],
    },
    Chip {
        name: ChipName::Cdna2,
        products: &["MI210", "MI250X"],
        capabilities: &[],
        tf32_ties: Ties::Cut,
        block_units: &[],
        units: &[
            matrix_core(HALVES, MatrixCore::Pairwise { products: 4 }),
            integers(BY_MFMA_ISA, OF_AMDS_ISA),
        ],
    },
    Chip {
        name: ChipName::Cdna3,
        products: &["MI300X"],
        capabilities: &[],
        tf32_ties: Ties::Cut,
        block_units: &[],
        units: &[
            matrix_core(HALVES, two_stages(8)),
            matrix_core(TF32, two_stages(4)),
            matrix_core(FNUZ, EVEN_ODD),
            integers(BY_MFMA_ISA, OF_AMDS_ISA),
        ],
    },
];

const EVEN_ODD: MatrixCore = MatrixCore::EvenOdd { products: 16, alignment_bits: 24, sum_bits: 31 };

const fn two_stages(products: usize) -> MatrixCore {
    MatrixCore::TwoStages { products, alignment_bits: 24, sum_bits: 31 }
}

/// AMD's units, by MMA-Sim's models of `v_mfma`.
const fn matrix_core(formats: &'static [Format], core: MatrixCore) -> ChipUnit {
    ChipUnit {
        formats,
        unit: Unit::MatrixCore(core),
        instructions: BY_MFMA,
        chained: NO_PRODUCT,
        promoted: None,
    }
}

/// Integers, which all units add alike.
const fn integers(instructions: &'static [(&'static str, Basis)], chained: Basis) -> ChipUnit {
    ChipUnit { formats: INT8, unit: Unit::Integers, instructions, chained, promoted: None }
}

static MMA_SYNC_PTX: [(&str, Basis); 1] = [("mma.sync", PTX)];
const BY_MMA_SYNC_PTX: &[(&str, Basis)] = &MMA_SYNC_PTX;
static TCGEN05_PTX: [(&str, Basis); 1] = [("tcgen05", PTX)];
const BY_TCGEN05_PTX: &[(&str, Basis)] = &TCGEN05_PTX;
static WGMMA: [(&str, Basis); 1] = [("wgmma", PASSES_IN_INT8)];
const BY_WGMMA: &[(&str, Basis)] = &WGMMA;
static MFMA_ISA: [(&str, Basis); 1] = [("v_mfma", OF_AMDS_ISA)];
const BY_MFMA_ISA: &[(&str, Basis)] = &MFMA_ISA;

static MFMA: [(&str, Basis); 1] = [("v_mfma", MMA_SIM)];
const BY_MFMA: &[(&str, Basis)] = &MFMA;

const OF_AMPERE: Basis = vectors("vectors of an A100 and an A2, arXiv 2512.07004");
const OF_ADA: Basis = vectors("vectors of an RTX 4090 and an L40S, arXiv 2512.07004");
const OF_HOPPER: Basis = vectors("vectors of an H100 and an H200, arXiv 2512.07004");
const OF_BLACKWELL: Basis = vectors("vectors of a B200, arXiv 2512.07004");

/// Products in f32 on the CUDA cores of Hopper, and of any other chip.
static FMA_OF_H200: Basis =
    Basis::of(Evidence::Replayed, "passes of an H200 in f32, runs/receipts");
static FMA: Basis = Basis::of(
    Evidence::Assumed,
    "that products in f32 are added one after the other was seen on Hopper alone",
);

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
        assert_eq!(of_capability((12, 0)), Some(ChipName::RtxBlackwell));
        assert_eq!(of_capability((12, 1)), None);
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
