//! Arms on small synthetic models: the same bits whatever the threads and the
//! cache, and differences of the predicted size where the arithmetic differs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use runner::block_format::BlockFormat;
use runner::compute::arms::{self, Output, Task};
use runner::compute::call::Call;
use runner::compute::drawn::{Drawn, Draws};
use runner::compute::emulated::arm::Emulated;
use runner::compute::floor::Floor;
use runner::compute::forward::{Discard, KvCache, Sites, forward};
use runner::compute::recorded::recorded;
use runner::compute::reference::Reference;
use runner::compute::{ComputeError, Pass};
use runner::dtype::Format;
use runner::engine::EngineFile;
use runner::layer_sites::LAYER_SITES;
use runner::model::synthetic::{Preset, ensure};
use runner::model::{Model, Weight, WeightType};
use runner::op::{
    Accumulate, ActivationScale, Capture, ChipName, Op, Recipe, Recorded, Scale, Site, WeightScale,
    in_layer,
};
use runner::tensor::Tensor;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::model::{TINY, open, smollm2, synthetic_file};

const EVERY_SITE: Op =
    Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache: None };

const PER_TENSOR: Scale =
    Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor };
const PER_ROW: Scale = Scale { weight: WeightScale::Channel, activation: ActivationScale::Token };
const PER_BLOCK: Scale =
    Scale { weight: WeightScale::Block128, activation: ActivationScale::Block128 };

/// The default recipe: E4M3, promoted, one scale per tensor, bf16 out.
const E4M3: Recipe = Recipe {
    gemm: Format::E4m3,
    scale: PER_TENSOR,
    accumulate: Accumulate::Promoted,
    output: Format::Bf16,
    chip: ChipName::Hopper,
    stream: None,
    engine: None,
    emulate: None,
    codes: runner::op::Codes::Made,
    pin: runner::op::Pin::NONE,
    kv_cache: None,
    tensor_parallel: None,
};

fn model(preset: Preset) -> Model {
    open(&synthetic_file(preset)).expect("a synthetic model")
}

/// Tokens spread over the vocabulary, none twice.
fn prompt(model: &Model, count: usize) -> Vec<u32> {
    let vocabulary = model.config().vocabulary;
    (0..count).map(|index| ((index * 797 + 13) % vocabulary) as u32).collect()
}

fn emulated(recipe: &Recipe) -> Emulated {
    Emulated::new(recipe).expect("a Hopper recipe")
}

fn every_site(model: &Model, ops: &dyn Pass, tokens: &[u32]) -> Output {
    let task = Task { op: &EVERY_SITE, model, tokens, input: None, spill: None };
    arms::compute(&task, ops, String::new(), &mut |_| {}).expect("a forward pass")
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.data().iter().map(|value| value.to_bits()).collect()
}

fn assert_same_bits(what: &str, a: &[(Site, Tensor)], b: &[(Site, Tensor)]) {
    assert!(!a.is_empty() && a.len() == b.len(), "{what}: {} and {} sites", a.len(), b.len());
    for ((site, a), (other, b)) in a.iter().zip(b) {
        assert_eq!(site, other, "{what}");
        assert!(bits(a) == bits(b), "{what}: `{site}` has other bits");
    }
}

#[test]
fn the_last_tokens_logits_alone_are_those_of_a_pass_that_keeps_all() {
    let model = model(Preset::Qwen2Tiny);
    let tokens = prompt(&model, 5);
    let pass = |capture, ops: &dyn Pass| {
        let op = Op::Forward { capture, repeats: 1, decode: 3, kv_cache: None };
        let task = Task { op: &op, model: &model, tokens: &tokens, input: None, spill: None };
        arms::compute(&task, ops, String::new(), &mut |_| {}).expect("a forward pass")
    };
    // With a scale for each row no row sees another one.
    let emulated = emulated(&Recipe { scale: PER_ROW, ..E4M3 });
    for ops in [&Reference as &dyn Pass, &emulated] {
        let (all, last) = (pass(Capture::Logits, ops), pass(Capture::LastLogits, ops));
        let sites = |output: &Output| -> Vec<Site> {
            output.sites.iter().map(|(site, _)| site.clone()).collect()
        };
        assert_eq!(sites(&all), sites(&last));
        for ((site, all), (_, last)) in all.sites.iter().zip(&last.sites) {
            assert_eq!((last.rows(), last.width()), (1, all.width()), "{site}");
            assert_eq!(last.row(0), all.row(all.rows() - 1), "{site}");
        }
        assert_eq!(all.greedy, last.greedy);
    }
    // Draws stand one above the other, and each keeps its own last token.
    let op = Op::Forward { capture: Capture::LastLogits, repeats: 1, decode: 0, kv_cache: None };
    let task = Task { op: &op, model: &model, tokens: &tokens, input: None, spill: None };
    let drawn = arms::drawn(&task, &Recipe { scale: PER_ROW, ..E4M3 }, &|_| false).expect("draws");
    let reference = pass(Capture::LastLogits, &Reference);
    for draw in &drawn {
        assert_eq!((draw.rows(), draw.width()), (1, reference.sites[0].1.width()));
        assert_ne!(bits(draw), bits(&reference.sites[0].1), "a draw is off by roundings");
    }
}

#[test]
fn a_recording_of_all_logits_gives_its_last_row_to_a_stage_that_keeps_the_last() {
    let model = model(Preset::Qwen2Tiny);
    let tokens = prompt(&model, 5);
    let width = model.config().vocabulary;
    let op = Op::Forward { capture: Capture::LastLogits, repeats: 1, decode: 0, kv_cache: None };
    let folder = tempfile::tempdir().expect("a folder");
    let read = |rows: usize| {
        let values: Vec<u8> = (0..rows * width).flat_map(|at| (at as f32).to_le_bytes()).collect();
        let view = TensorView::new(safetensors::Dtype::F32, vec![rows, width], &values);
        let file = folder.path().join(format!("{rows}.safetensors"));
        let tensors = [("logits", view.expect("a view"))];
        fs::write(&file, safetensors::serialize(tensors, None).expect("a file")).expect("written");
        let from = Recorded { file, names: BTreeMap::new(), format: None, shape: None };
        recorded(&op, &from, Some(&model), Some(&tokens))
    };
    let first_of = |rows: usize| {
        let output = read(rows).expect("a recording");
        let (site, tensor) = &output.sites[0];
        assert_eq!((site.0.as_str(), tensor.rows(), tensor.width()), ("logits", 1, width));
        tensor.data()[0]
    };
    assert_eq!(first_of(5), (4 * width) as f32);
    assert_eq!(first_of(1), 0.0);
    let refused = read(3).expect_err("a pass of other tokens").to_string();
    assert!(refused.contains("has 3 rows") && refused.contains("5 tokens"), "{refused}");
}

/// Both arms; the emulated one with a recipe whose rows do not share a scale.
fn both_arms() -> [(&'static str, Box<dyn Pass>); 2] {
    let recipe = Recipe { scale: PER_ROW, ..E4M3 };
    [("reference", Box::new(Reference)), ("emulated", Box::new(emulated(&recipe)))]
}

#[test]
fn every_site_appears_once_and_in_the_order_of_the_flow() {
    for preset in TINY {
        let model = model(preset);
        // Sites that other architectures have.
        let absent = |name: &str| match name {
            "q_norm" | "k_norm" => preset != Preset::Qwen3Tiny,
            "q_a" | "q_a_norm" | "kv_a" | "kv_a_norm" | "kv" | "attn_gated" => true,
            "kv_a_cache" | "k_cache" | "v_cache" => true,
            "ffn_router" | "ffn_route" | "ffn_mix" | "ffn_act" | "ffn_out" => true,
            name => {
                name.ends_with("_post_norm")
                    || name.ends_with("_scaled")
                    || name.starts_with("lin_")
                    || name.starts_with("ffn_shared_")
            }
        };
        let mut expected = vec!["embed".to_owned()];
        for layer in 0..model.config().layers {
            let present = LAYER_SITES.into_iter().filter(|name| !absent(name));
            expected.extend(present.map(|name| format!("blk.{layer}.{name}")));
        }
        expected.extend(["output_norm", "logits"].map(str::to_owned));
        for (arm, ops) in both_arms() {
            let output = every_site(&model, &*ops, &prompt(&model, 3));
            let sites: Vec<&str> = output.sites.iter().map(|(site, _)| site.0.as_str()).collect();
            assert_eq!(sites, expected, "{} {arm}", preset.name());
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for preset in TINY {
        let model = model(preset);
        let tokens = prompt(&model, 7);
        for (arm, ops) in both_arms() {
            let [one, three] = [1, 3].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| every_site(&model, &*ops, &tokens))
            });
            assert_same_bits(&format!("{} {arm}", preset.name()), &one.sites, &three.sites);
        }
    }
}

/// Keeps every site's rows; those of later passes go below those of earlier ones.
#[derive(Default)]
struct Rows(BTreeMap<Site, Vec<u32>>);

impl Sites for Rows {
    fn visit(&mut self, site: Site, tensor: Tensor) -> Result<Tensor, ComputeError> {
        self.0.entry(site).or_default().extend(bits(&tensor));
        Ok(tensor)
    }
}

fn in_passes(model: &Model, ops: &dyn Pass, passes: &[&[u32]]) -> Rows {
    let mut cache = KvCache::new(model.config(), None);
    let mut rows = Rows::default();
    for tokens in passes {
        forward(model, ops, tokens, &mut cache, &mut rows).expect("a forward pass");
    }
    assert_eq!(cache.positions(), passes.concat().len());
    rows
}

#[test]
fn a_prompt_at_once_and_token_by_token_have_the_same_bits() {
    // One scale for the whole batch is left out: it depends on the batch, so
    // there the two differ by design.
    for preset in TINY {
        let model = model(preset);
        let tokens = prompt(&model, 9);
        for (arm, ops) in both_arms() {
            let whole = in_passes(&model, &*ops, &[&tokens]);
            let single: Vec<&[u32]> = tokens.chunks(1).collect();
            let uneven = [&tokens[..4], &tokens[4..5], &tokens[5..]];
            for passes in [&single[..], &uneven] {
                let parts = in_passes(&model, &*ops, passes);
                for (site, rows) in &whole.0 {
                    assert!(rows == &parts.0[site], "{} {arm}: `{site}`", preset.name());
                }
            }
        }
    }
}

#[test]
fn the_reference_anchored_on_itself_is_itself() {
    for preset in TINY {
        let model = model(preset);
        let tokens = prompt(&model, 5);
        let reference = every_site(&model, &Reference, &tokens);
        let task =
            Task { op: &EVERY_SITE, model: &model, tokens: &tokens, input: None, spill: None };
        let anchored = arms::anchored(&task, &reference).expect("every site is there");
        assert_same_bits(preset.name(), &reference.sites, &anchored);
    }
}

#[test]
fn both_arms_look_up_the_same_bits() {
    let same = |weight: Weight<'_>| {
        let tokens: Vec<u32> = (0..weight.rows() as u32).rev().collect();
        let (site, call) = (Site("embed".to_owned()), Call::Embed { weight, tokens: &tokens });
        let [reference, emulated] =
            both_arms().map(|(_, ops)| bits(&ops.answer(&site, &call).expect("known tokens")));
        assert!(reference == emulated, "{} as {}", weight.name(), weight.kind());
    };
    for preset in TINY {
        same(model(preset).tensor("token_embd.weight").unwrap());
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/blocks.safetensors");
    let file = fs::read(path).unwrap();
    let fixture = SafeTensors::deserialize(&file).unwrap();
    for kind in WeightType::ALL {
        let bytes = fixture.tensor(&format!("{kind}.bytes")).unwrap();
        let shape = fixture.tensor(&format!("{kind}.values")).unwrap();
        let [rows, width] = *shape.shape() else { panic!("{kind}: not a matrix") };
        same(Weight::new("fixture", kind, rows, width, bytes.data()).unwrap());
    }
}

/// The name of a site within its layer.
fn kind_of(site: &Site) -> &str {
    in_layer(&site.0).map_or(&site.0, |(_, name)| name)
}

/// An emulated pass, and the reference on its own inputs.
fn emulated_and_anchored(
    model: &Model,
    recipe: &Recipe,
    tokens: &[u32],
) -> (Output, Vec<(Site, Tensor)>) {
    let output = every_site(model, &emulated(recipe), tokens);
    let task = Task { op: &EVERY_SITE, model, tokens, input: None, spill: None };
    let anchored = arms::anchored(&task, &output).expect("every site is there");
    (output, anchored)
}

/// Distance in steps from one f32 to the next.
fn ulps(a: f32, b: f32) -> u64 {
    let ordered = |value: f32| {
        let magnitude = i64::from(value.to_bits() & 0x7fff_ffff);
        if value.is_sign_negative() { -magnitude } else { magnitude }
    };
    ordered(a).abs_diff(ordered(b))
}

/// Largest difference in units of the last place of the row's largest magnitude.
fn row_ulp(a: &Tensor, b: &Tensor) -> f64 {
    let mut most = 0.0f64;
    for row in 0..b.rows() {
        let largest = b.row(row).iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let place = f64::from(f32::from_bits(largest.to_bits() + 1)) - f64::from(largest);
        for (&a, &b) in a.row(row).iter().zip(b.row(row)) {
            let difference = (f64::from(a) - f64::from(b)).abs() / place;
            assert!(difference.is_finite());
            most = most.max(difference);
        }
    }
    most
}

/// Largest differences of the emulated arm from the reference on the same inputs,
/// per kind of site that no GEMM makes: `row_ulp`, and ULP of each element.
type Largest = BTreeMap<String, (f64, u64)>;

fn measure_ops(model: &Model, recipe: &Recipe, tokens: usize, largest: &mut Largest) {
    let (output, anchored) = emulated_and_anchored(model, recipe, &prompt(model, tokens));
    for ((site, subject), (_, truth)) in output.sites.iter().zip(&anchored) {
        if !arms::is_gemm(site) {
            let ulp = subject.data().iter().zip(truth.data()).map(|(&a, &b)| ulps(a, b));
            let most = largest.entry(kind_of(site).to_owned()).or_default();
            *most = (most.0.max(row_ulp(subject, truth)), most.1.max(ulp.max().unwrap_or(0)));
        }
    }
}

fn assert_ops(largest: &Largest) {
    for (kind, (row_ulp, ulp)) in largest {
        println!("{kind:14} row_ulp {row_ulp:8.3}  ulp {ulp}");
    }
    for (kind, &(row_ulp, ulp)) in largest {
        match kind.as_str() {
            // Looked up, or one correctly rounded addition.
            "embed" | "attn_residual" | "ffn_residual" => assert_eq!(ulp, 0, "{kind}"),
            "attn_norm" | "q_norm" | "k_norm" | "ffn_norm" | "output_norm" => {
                assert!(ulp <= 1, "{kind}: {ulp} ULP");
            }
            // Where a difference cancels, only the row's largest is a yardstick.
            "q_rope" | "k_rope" => assert!(row_ulp <= 2.0, "{kind}: {row_ulp}"),
            "ffn_swiglu" => assert!(ulp <= 5, "{kind}: {ulp} ULP"),
            // A score's absolute error is its weight's relative one, so that a few
            // roundings of a score of 10 are tens of units here; 14 were seen.
            "attn" => assert!(row_ulp <= 64.0, "{kind}: {row_ulp}"),
            other => panic!("`{other}` is no site that was thought of"),
        }
    }
}

const BF16: Recipe = Recipe { gemm: Format::Bf16, output: Format::F32, ..E4M3 };

#[test]
fn ops_that_are_no_gemm_stay_within_a_few_units_of_the_last_place() {
    let mut largest = Largest::new();
    for preset in TINY {
        let model = model(preset);
        for recipe in [E4M3, BF16] {
            measure_ops(&model, &recipe, 64, &mut largest);
        }
    }
    assert_eq!(largest.len(), 12, "{largest:?}");
    assert_ops(&largest);
}

#[test]
#[ignore = "needs RUNNER_SMOLLM2, see scripts/fetch-smollm2.sh"]
fn ops_of_smollm2_stay_within_a_few_units_of_the_last_place() {
    let model = Model::open(&smollm2()).expect("the file that the script fetched");
    let mut largest = Largest::new();
    measure_ops(&model, &E4M3, 32, &mut largest);
    assert_eq!(largest.len(), 10, "{largest:?}");
    assert_ops(&largest);
}

/// `z = (emulated - anchored reference) / floor` over some outputs.
#[derive(Clone, Copy, Default)]
struct Z {
    square: f64,
    most: f64,
    count: usize,
}

impl Z {
    fn of(subject: &Tensor, truth: &Tensor, floor: &Tensor) -> Z {
        let mut z = Z::default();
        let pairs = subject.data().iter().zip(truth.data());
        for ((&subject, &truth), &floor) in pairs.zip(floor.data()) {
            assert!(floor > 0.0 && floor.is_finite());
            let value = (f64::from(subject) - f64::from(truth)) / f64::from(floor);
            z = z.and(Z { square: value * value, most: value.abs(), count: 1 });
        }
        z
    }

    fn and(self, other: Z) -> Z {
        Z {
            square: self.square + other.square,
            most: if other.most > self.most { other.most } else { self.most },
            count: self.count + other.count,
        }
    }

    fn rms(self) -> f64 {
        (self.square / self.count as f64).sqrt()
    }
}

/// The z of every GEMM of a forward pass.
fn measure_floors(
    model: &Model,
    recipe: &Recipe,
    tokens: usize,
    kernels: &mut BTreeMap<String, f64>,
) -> Vec<(Site, Z)> {
    let tokens = prompt(model, tokens);
    let (subject, anchored) = emulated_and_anchored(model, recipe, &tokens);
    let task = Task { op: &EVERY_SITE, model, tokens: &tokens, input: None, spill: None };
    let locals = arms::local(&task, recipe, &subject).expect("every site is there");
    let truths: Vec<(Site, Tensor)> =
        locals.iter().map(|local| (local.site.clone(), local.truth.clone())).collect();
    assert_same_bits("the floor's truth", &truths, &anchored);
    let mut gemms = Vec::new();
    for arms::Local { site, truth, sigma, energies } in &locals {
        let tensor = subject.site(site).expect("a recorded site");
        let sigma = sigma.as_ref().expect("all that the op read");
        if arms::is_gemm(site) {
            let shares = energies.and_then(|energies| energies.shares()).expect("an error");
            let sum: f64 = shares.named().iter().map(|(_, share)| share).sum();
            assert!((sum - 1.0).abs() < 1e-9 && shares.unexplained == 0.0, "{site}: {shares:?}");
            gemms.push((site.clone(), Z::of(tensor, truth, &sigma.each)));
        } else if site.0 != "embed" {
            let z = Z::of(tensor, truth, &sigma.each);
            let most = kernels.entry(kind_of(site).to_owned()).or_insert(0.0f64);
            *most = if z.most > *most { z.most } else { *most };
        }
    }
    assert_eq!(gemms.len(), 7 * model.config().layers + 1);
    gemms
}

/// Prints a summary, and holds every site's z_rms to `low..=high`.
fn assert_floors(name: &str, zs: &[(Site, Z)], (low, high): (f64, f64)) {
    let all = zs.iter().fold(Z::default(), |all, (_, z)| all.and(*z));
    let mut sites: Vec<(f64, &Site)> = zs.iter().map(|(site, z)| (z.rms(), site)).collect();
    sites.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (least, most) = (sites[0], sites[sites.len() - 1]);
    println!(
        "{name:40} z_rms {:.3}, {:.3} at {} to {:.3} at {}; |z| up to {:.1}",
        all.rms(),
        least.0,
        least.1,
        most.0,
        most.1,
        all.most
    );
    // All sites together keep to a site's usual bounds, also where single ones have wider ones.
    assert!((0.9..=1.1).contains(&all.rms()), "{name}: z_rms of all sites is {:.3}", all.rms());
    for (rms, site) in sites {
        assert!((low..=high).contains(&rms), "{name}: z_rms of `{site}` is {rms:.3}");
    }
}

/// Recipes of every kind, by name.
fn recipes() -> [(&'static str, Recipe); 15] {
    let blocks = |format: BlockFormat| Recipe {
        gemm: format.element(),
        scale: Scale::of_blocks(format),
        accumulate: Accumulate::Fast,
        chip: ChipName::Blackwell,
        ..E4M3
    };
    [
        ("e4m3 promoted", E4M3),
        ("e4m3 fast", Recipe { accumulate: Accumulate::Fast, ..E4M3 }),
        ("e4m3 channel, token", Recipe { scale: PER_ROW, ..E4M3 }),
        ("e4m3 block128", Recipe { scale: PER_BLOCK, ..E4M3 }),
        ("e5m2 promoted", Recipe { gemm: Format::E5m2, ..E4M3 }),
        ("bf16", Recipe { gemm: Format::Bf16, ..E4M3 }),
        ("f16", Recipe { gemm: Format::F16, ..E4M3 }),
        ("tf32", Recipe { gemm: Format::Tf32, ..E4M3 }),
        ("f32", Recipe { gemm: Format::F32, ..E4M3 }),
        ("int8", Recipe { gemm: Format::Int8, ..E4M3 }),
        ("int8 channel, token", Recipe { gemm: Format::Int8, scale: PER_ROW, ..E4M3 }),
        (
            "e4m3fnuz channel, token",
            Recipe { gemm: Format::E4m3fnuz, scale: PER_ROW, chip: ChipName::Cdna3, ..E4M3 },
        ),
        ("mxfp8", blocks(BlockFormat::Mxfp8)),
        ("mxfp4", blocks(BlockFormat::Mxfp4)),
        ("nvfp4", blocks(BlockFormat::Nvfp4)),
    ]
}

#[test]
fn every_recipe_deviates_by_its_predicted_floor() {
    let mut kernels = BTreeMap::new();
    for preset in TINY {
        let model = model(preset);
        for (name, recipe) in recipes() {
            for output in [Format::F32, Format::Bf16] {
                let recipe = Recipe { output, ..recipe };
                let zs = measure_floors(&model, &recipe, 32, &mut kernels);
                let name = format!("{} {name}, {output} out", preset.name());
                assert_floors(&name, &zs, (0.9, 1.1));
            }
        }
    }
    assert_kernels(&kernels);
}

/// Partial sums of several GPUs are rounded, and their sum again: the floor knows of both.
#[test]
fn products_over_several_gpus_deviate_by_their_predicted_floor() {
    let model = model(Preset::Qwen2Tiny);
    let mut kernels = BTreeMap::new();
    for (name, recipe) in recipes() {
        let by_block = recipe.scale.weight == WeightScale::Block128;
        for ranks in [2, 4].into_iter().filter(|ranks| !by_block || *ranks == 2) {
            for output in [Format::F32, Format::Bf16] {
                let tensor_parallel = std::num::NonZeroU32::new(ranks);
                let recipe = Recipe { output, tensor_parallel, ..recipe };
                let zs = measure_floors(&model, &recipe, 32, &mut kernels);
                assert_floors(&format!("{name}, {output} out, {ranks} GPUs"), &zs, (0.9, 1.1));
            }
        }
    }
    assert_kernels(&kernels);
}

/// Ops that are no GEMM stay within the deviations that no value exceeds.
fn assert_kernels(kernels: &BTreeMap<String, f64>) {
    println!("{kernels:.2?}");
    for (kind, most) in kernels {
        assert!(*most <= runner::compare::MOST_DEVIATIONS, "{kind}: {most}");
    }
}

#[test]
#[ignore = "needs RUNNER_SMOLLM2, see scripts/fetch-smollm2.sh"]
fn smollm2_deviates_by_the_predicted_floor() {
    let model = Model::open(&smollm2()).expect("the file that the script fetched");
    let mut kernels = BTreeMap::new();
    for (name, recipe) in recipes() {
        // A step of integers is as wide for small values as for the token's largest: what is below half
        // of one becomes zero, its error is the value itself, and to that real weights are not random.
        // There the bounds of the shipped contracts hold.
        let bounds = if recipe.gemm == Format::Int8 { (0.8, 1.25) } else { (0.9, 1.1) };
        assert_floors(name, &measure_floors(&model, &recipe, 16, &mut kernels), bounds);
    }
    assert_kernels(&kernels);
}

/// One pass of all draws shares what it knows of the weights, and nothing else.
#[test]
fn draws_that_share_a_pass_have_the_bits_that_each_has_alone() {
    let tensor = E4M3;
    let block = Recipe { scale: PER_BLOCK, ..E4M3 };
    let bf16 = Recipe { gemm: Format::Bf16, kv_cache: Some(Format::E4m3), ..E4M3 };
    for (preset, recipe) in [
        (Preset::Qwen2Tiny, tensor),
        (Preset::Qwen2Tiny, block),
        (Preset::DeepSeekV3Tiny, bf16),
        (Preset::Qwen3NextTiny, tensor),
        (Preset::GptOssTiny, bf16),
        (Preset::Starcoder2Tiny, tensor),
    ] {
        let store = tempfile::tempdir().expect("a temporary folder");
        let path = ensure(preset, 1, store.path()).expect("a synthetic model");
        let model = Model::open(&path).expect("a model");
        let tokens = prompt(&model, 5);
        let pass = |draws: &dyn Pass| {
            let mut cache = KvCache::new(model.config(), recipe.kv_cache);
            forward(&model, draws, &tokens, &mut cache, &mut Discard).expect("a pass")
        };
        let draws = Draws::new(&recipe, 3..6).expect("a recipe");
        let together = draws.apart(&pass(&draws));
        let alone = [3, 4, 5].map(|number| pass(&Drawn::new(&recipe, number).expect("a recipe")));
        assert_eq!(together, alone, "{preset:?}");
        assert_ne!(together[0], together[1]);
    }
}

/// The floor of an engine's FP8 product is that of the engine's own conversions: DeepGEMM's powers of
/// two convert a weight twice.
#[test]
fn the_floor_of_an_engines_fp8_product_is_of_its_own_codes() {
    let model = model(Preset::Qwen2Tiny);
    let width = model.config().hidden;
    let values = (0..24 * width).map(|at| {
        let sum: u32 =
            (0..6).map(|turn| ((at as u32 * 6 + turn).wrapping_mul(2_654_435_761)) >> 24).sum();
        Format::Bf16.round(sum as f32 / 128.0 - 6.0)
    });
    let x = Tensor::new(width, values.collect());
    for engine in ["vllm-fp8", "vllm-fp8-channel", "vllm-fp8-block", "sglang-fp8", "torchao"] {
        let found = EngineFile::find(engine, Path::new(".")).expect("ships");
        let (kernels, stream) = found.known().expect("known");
        let recipe = Recipe::of_engine(kernels, stream);
        let arm = Emulated::new(&recipe).expect("a recipe");
        for name in ["attn_k", "ffn_up", "ffn_gate"] {
            let weight = model.tensor(&format!("blk.1.{name}.weight")).expect("a weight");
            let call = Call::Matmul { x: &x, weight, bias: None };
            let floor = Floor::new(&recipe).expect("a recipe");
            let (truth, made) =
                (call.on(&floor).expect("a truth"), call.on(&arm).expect("a product"));
            let sigma = floor.take_sigma().expect("a floor");
            let pairs = made.data().iter().zip(truth.data()).zip(sigma.data());
            let squares = pairs.map(|((made, truth), sigma)| {
                (f64::from(made - truth) / f64::from(*sigma)).powi(2)
            });
            let z = (squares.sum::<f64>() / truth.data().len() as f64).sqrt();
            assert!((0.93..1.07).contains(&z), "{engine}, {name}: {z}");
        }
    }
}
