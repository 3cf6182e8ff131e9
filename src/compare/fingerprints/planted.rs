//! Bugs as data: what each is, where it lives, which causes name it rightly, and what it does to a
//! call.
//!
//! A fingerprint's own bugs stand in its file, so that a new one is where it is recognised; older ones,
//! and those that several fingerprints name, stand in `falsify`. It runs nothing.

use std::collections::BTreeMap;

use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::emulated::arm::Emulated;
use crate::dtype::Format;
use crate::model::Model;
use crate::op::{Recipe, Site};
use crate::random::Random;
use crate::tensor::Tensor;

/// One bug.
#[derive(Clone, Copy)]
pub struct Bug {
    /// Its name.
    pub name: &'static str,
    /// The causes that name it rightly, the best first.
    pub causes: &'static [&'static str],
    /// The sites whose op it spoils, by their names within a layer.
    pub at: &'static [&'static str],
    /// How it is planted.
    pub plant: &'static dyn Plant,
    /// Whether it exists with FP8 operands only.
    pub fp8: bool,
    /// Whether it exists with operands of 8 bits only, FP8 or integers, whose scales are values beside
    /// the codes.
    pub scaled: bool,
    /// Whether it exists with integers only.
    pub int8: bool,
    /// Whether it exists with block-scaled operands only.
    pub blocks: bool,
    /// Whether several GPUs must compute the pass together.
    pub of_ranks: bool,
    /// Whether it needs an earlier layer.
    pub after_layer_0: bool,
    /// Whether it shows only where the prompt stands in a longer batch.
    pub in_batch: bool,
    /// Whether the op does not repeat itself.
    pub of_repeats: bool,
    /// Whether it was reported in public.
    pub public: bool,
}

/// What a call returns with a bug; nothing where the bug does not apply to the call.
pub type Made = Result<Option<Tensor>, ComputeError>;

/// What is done to a call: most often a function.
pub trait Plant: Sync {
    /// What the call returns with the bug.
    ///
    /// # Errors
    /// As the call.
    fn planted(&self, call: &Call<'_>, ground: &Ground<'_>) -> Made;
}

impl<F: Fn(&Call<'_>, &Ground<'_>) -> Made + Sync> Plant for F {
    fn planted(&self, call: &Call<'_>, ground: &Ground<'_>) -> Made {
        self(call, ground)
    }
}

/// What a bug has at hand.
pub struct Ground<'a> {
    /// Where it is planted.
    pub site: &'a Site,
    /// What the clean arm returned.
    pub clean: &'a Tensor,
    /// The clean arm.
    pub arm: &'a Emulated,
    /// Its recipe.
    pub recipe: &'a Recipe,
    /// The model.
    pub model: &'a Model,
    /// Decides columns, blocks and the like.
    pub seed: u64,
    /// Whether the prompt stands in a longer batch.
    pub in_batch: bool,
    /// How often this site was computed, this time included.
    pub call_number: u64,
    /// The last tensor of each site so far.
    pub made: &'a BTreeMap<Site, Tensor>,
    /// The last activation of each GEMM so far.
    pub inputs: &'a BTreeMap<Site, Tensor>,
}

/// A bug in every recipe and layer, which nobody reported in public.
pub const fn bug(
    name: &'static str,
    causes: &'static [&'static str],
    at: &'static [&'static str],
    plant: &'static dyn Plant,
) -> Bug {
    Bug {
        name,
        causes,
        at,
        plant,
        fp8: false,
        scaled: false,
        int8: false,
        blocks: false,
        of_ranks: false,
        after_layer_0: false,
        in_batch: false,
        of_repeats: false,
        public: false,
    }
}

#[expect(missing_docs, reason = "the fields' names say what each of them is")]
impl Bug {
    pub const fn fp8(self) -> Bug {
        Bug { fp8: true, ..self }
    }

    pub const fn scaled(self) -> Bug {
        Bug { scaled: true, ..self }
    }

    pub const fn int8(self) -> Bug {
        Bug { int8: true, ..self }
    }

    pub const fn blocks(self) -> Bug {
        Bug { blocks: true, ..self }
    }

    pub const fn of_ranks(self) -> Bug {
        Bug { of_ranks: true, ..self }
    }

    pub const fn after_layer_0(self) -> Bug {
        Bug { after_layer_0: true, ..self }
    }

    pub const fn in_batch(self) -> Bug {
        Bug { in_batch: true, ..self }
    }

    pub const fn of_repeats(self) -> Bug {
        Bug { of_repeats: true, ..self }
    }

    pub const fn public(self) -> Bug {
        Bug { public: true, ..self }
    }

    /// Whether operands of this recipe can have it.
    pub fn may_be_in(&self, recipe: &Recipe) -> bool {
        let of_blocks = recipe.blocks().is_some();
        (!self.fp8 || recipe.gemm.is_fp8() && !of_blocks)
            && (!self.scaled || recipe.gemm.is_scaled() && !of_blocks)
            && (!self.int8 || recipe.gemm == Format::Int8)
            && (!self.blocks || of_blocks)
    }
}

/// The products of a block.
pub const GEMMS: &[&str] = &["q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_down"];
/// The norms of the residual stream.
pub const NORMS: &[&str] = &["attn_norm", "ffn_norm", "output_norm"];
/// Turned queries and keys.
pub const ROPES: &[&str] = &["q_rope", "k_rope"];
/// Additions to the residual stream.
pub const ADDS: &[&str] = &["attn_residual", "ffn_residual"];

/// A seeded choice below `count`.
pub fn chosen(seed: u64, count: usize) -> usize {
    (Random::at(seed).bits() % count.max(1) as u64) as usize
}
