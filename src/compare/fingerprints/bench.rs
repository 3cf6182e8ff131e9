//! What the fingerprints' tests share: a small model, the default recipe, and a
//! check that of all fingerprints the right one gives the bug its name.

use std::path::Path;

use super::{Case, Fit, Null, rank};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::departure::{Steps, matmul_rows};
use crate::compute::emulated::arm::Emulated;
use crate::compute::reference::Reference;
use crate::dtype::Format;
use crate::model::synthetic::{Preset, write};
use crate::model::{Model, Weight};
use crate::op::{Accumulate, ActivationScale, ChipName, Pin, Recipe, Scale, Site, WeightScale};
use crate::tensor::Tensor;

pub struct Bench {
    pub recipe: Recipe,
    pub arm: Emulated,
    pub model: Model,
    /// What the subject made before.
    pub recorded: Vec<(Site, Tensor)>,
}

impl Default for Bench {
    fn default() -> Bench {
        let recipe = Recipe {
            gemm: Format::E4m3,
            scale: Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor },
            accumulate: Accumulate::Promoted,
            output: Format::Bf16,
            chip: ChipName::Hopper,
            stream: None,
            engine: None,
            emulate: None,
            codes: crate::op::Codes::Made,
            pin: Pin::NONE,
            kv_cache: None,
            tensor_parallel: None,
        };
        let mut file = Vec::new();
        write(Preset::Qwen2Tiny, 1, &mut file).expect("a synthetic model");
        let model = Model::from_bytes(Path::new("qwen2-tiny"), &file).expect("a model");
        let arm = Emulated::new(&recipe).expect("a recipe");
        Bench { recipe, arm, model, recorded: Vec::new() }
    }
}

impl Bench {
    /// A bench whose recipe has scales of this granularity.
    pub fn with_scales(weight: WeightScale, activation: ActivationScale) -> Bench {
        let bench = Bench::default();
        let recipe = Recipe { scale: Scale { weight, activation }, ..bench.recipe };
        Bench { recipe, arm: Emulated::new(&recipe).expect("a recipe"), ..bench }
    }

    /// Seeded values with a few that are large.
    pub fn tensor(&self, rows: usize, width: usize, seed: u32) -> Tensor {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        Tensor::new(width, (0..rows * width).map(|_| 4.0 * draw() * draw() * draw()).collect())
    }

    pub fn weight(&self, name: &str) -> Weight<'_> {
        self.model.tensor(name).expect("a tensor of the model")
    }

    /// A product by other steps.
    pub fn matmul(&self, x: &Tensor, weight: Weight<'_>, steps: &Steps<'_>) -> Tensor {
        let rows = 0..weight.rows();
        matmul_rows(&self.arm, &self.recipe, (x, weight, None), rows, steps).expect("a product")
    }

    /// What the recipe prescribes.
    pub fn clean(&self, call: &Call<'_>) -> Tensor {
        call.on(&self.arm).expect("a call that the arm can compute")
    }

    /// What `test` finds in a call that returned `wrong`.
    pub fn found(
        &self,
        call: &Call<'_>,
        wrong: &Tensor,
        test: impl Fn(&Case<'_>) -> Result<Vec<Fit>, ComputeError>,
    ) -> Vec<Fit> {
        let clean = self.clean(call);
        let truth = call.on(&Reference).expect("a call that the reference can compute");
        let null = Null::of(call, &clean, &self.arm, &self.recipe).expect("a null model");
        let case = Case {
            site: &Site("blk.1.q".to_owned()),
            call,
            subject: wrong,
            clean: &clean,
            truth: &truth,
            null: &null,
            arm: &self.arm,
            recipe: &self.recipe,
            model: Some(&self.model),
            recorded: &self.recorded,
        };
        test(&case).expect("fingerprints")
    }

    /// The fingerprints of a call that returned `wrong`, the best first.
    pub fn fits(&self, call: &Call<'_>, wrong: &Tensor) -> Vec<Fit> {
        self.found(call, wrong, rank)
    }

    /// The cause that is named must be this one.
    pub fn expect(&self, cause: &str, call: &Call<'_>, wrong: &Tensor) {
        let fits = self.fits(call, wrong);
        let best = fits.first().expect("a fit");
        assert!(best.names_the_bug() && best.cause == cause, "expected {cause}: {fits:#?}");
    }
}
