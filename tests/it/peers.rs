//! The peers' table: a clean FP8 GEMM of 256 x 4096 x 256 and six planted bugs,
//! of which common tolerances fail the clean one or pass a broken one.

use runner::compare::fingerprints::{Case, Null, rank};
use runner::compare::{Predicted, measure};
use runner::compute::call::{Call, MadeWeight};
use runner::compute::departure::{
    Edit, Steps, keep, matmul_rows, only_inner, requantised, scaled, truncated,
};
use runner::compute::drawn::Drawn;
use runner::compute::emulated::arm::Emulated;
use runner::compute::floor::Floor;
use runner::dtype::Format;
use runner::metric::Metric;
use runner::model::Weight;
use runner::model::synthetic::Preset;
use runner::op::{
    Accumulate, ActivationScale, Arm, ChipName, Pin, Recipe, Scale, Site, Stream, WeightScale,
};
use runner::random::Random;
use runner::tensor::Tensor;

use crate::model::{open, synthetic_file};

const RECIPE: Recipe = Recipe {
    gemm: Format::E4m3,
    scale: Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor },
    accumulate: Accumulate::Promoted,
    output: Format::F32,
    chip: ChipName::Hopper,
    stream: None,
    engine: None,
    emulate: None,
    codes: runner::op::Codes::Made,
    pin: Pin::NONE,
    kv_cache: None,
    tensor_parallel: None,
};

fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::at(seed);
    (0..count).map(|_| random.normal() as f32).collect()
}

fn product<'a>(x: &'a Tensor, weight: Weight<'a>) -> Call<'a> {
    Call::Matmul { x, weight, bias: None }
}

#[test]
fn a_drawn_product_is_off_by_its_floor_and_no_two_draws_are_alike() {
    const K: usize = 1024;
    let x = Tensor::new(K, normal(64 * K, 3));
    let made = MadeWeight::new("w".to_owned(), 256, &normal(256 * K, 4));
    let weight = made.weight().expect("a weight");
    for gemm in [Format::E4m3, Format::Bf16, Format::F32] {
        let recipe = Recipe { gemm, ..RECIPE };
        let floor = Floor::new(&recipe).expect("a recipe");
        let truth = product(&x, weight).on(&floor).expect("a product");
        let sigma = floor.into_sigmas().remove(0);
        let draw = |number| {
            let drawn = Drawn::new(&recipe, number).expect("a recipe");
            product(&x, weight).on(&drawn).expect("a product")
        };
        let streams = (Stream::Arm(Arm::Emulated), Stream::Arm(Arm::Reference));
        let predicted = Predicted { floor: Some(&sigma), ..Predicted::default() };
        let site = Site("blk.0.q".to_owned());
        for number in 0..2 {
            let drawn = draw(number);
            let z = measure(&site, (streams.0, &drawn), (streams.1, &truth), predicted).metrics;
            let rms = z[&Metric::ZRms];
            assert!((0.85..1.15).contains(&rms), "{gemm}: {rms}");
        }
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2), "{gemm}");
    }
}

#[test]
fn every_row_of_the_peers_table_is_separated() {
    const K: usize = 4096;
    let x = Tensor::new(K, normal(256 * K, 1));
    let made = MadeWeight::new("w".to_owned(), 256, &normal(256 * K, 2));
    let weight = made.weight().expect("a weight");
    let arm = Emulated::new(&RECIPE).expect("a recipe");
    let floor = Floor::new(&RECIPE).expect("a recipe");
    let truth = product(&x, weight).on(&floor).expect("a product");
    let sigma = floor.into_sigmas().remove(0);
    let run = |x_edit: &Edit<'_>, w_edit: &Edit<'_>| {
        let steps = Steps { x: x_edit, w: w_edit, ..Steps::of(&RECIPE) };
        matmul_rows(&arm, &RECIPE, (&x, weight, None), 0..256, &steps).expect("a product")
    };
    let clean = run(&keep, &keep);
    let mut column = clean.clone();
    let mut swapped = clean.clone();
    for row in 0..256 {
        column.row_mut(row)[17] *= 1.2;
        swapped.row_mut(row).swap(17, 99);
    }
    let rows = [
        ("clean FP8", "", clean.clone()),
        ("last 8 of K dropped", "k-tail-dropped", run(&|o| only_inner(o, |k| k < K - 8), &keep)),
        ("scale 2 % off", "scale-wrong", run(&|o| scaled(o, |scale| scale * 1.02), &keep)),
        ("one column x1.2", "column-scale", column),
        ("two columns swapped", "columns-permuted", swapped),
        ("activation scale halved", "saturated", run(&|o| requantised(o, 0.5), &keep)),
        ("truncating cast", "truncating-cast", run(&truncated, &truncated)),
    ];
    let model = open(&synthetic_file(Preset::Qwen2Tiny)).expect("a model");
    let site = Site("blk.0.q".to_owned());
    println!(
        "case                      NMSE     cosine  z_rms   z_max  z_column  bits differ  named"
    );
    for (name, cause, subject) in rows {
        let streams = (Stream::Arm(Arm::Emulated), Stream::Arm(Arm::Reference));
        let predicted = Predicted { floor: Some(&sigma), ..Predicted::default() };
        let m = measure(&site, (streams.0, &subject), (streams.1, &truth), predicted).metrics;
        let differ = subject.data().iter().zip(clean.data());
        let differ = differ.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        let (rms, most, column) = (m[&Metric::ZRms], m[&Metric::ZMax], m[&Metric::ZColumn]);
        let call = Call::Matmul { x: &x, weight, bias: None };
        let named = if differ == 0 {
            String::new()
        } else {
            let null = Null::of(&call, &clean, &arm, &RECIPE).expect("a null model");
            let case = Case {
                site: &site,
                call: &call,
                subject: &subject,
                clean: &clean,
                truth: &truth,
                null: &null,
                arm: &arm,
                recipe: &RECIPE,
                model: Some(&model),
                recorded: &[],
            };
            rank(&case).expect("fingerprints").remove(0).cause
        };
        println!(
            "{name:24} {:8.2e}  {:.5}  {rms:.3}  {most:6.1}  {column:8.1}  {differ:11}  {named}",
            m[&Metric::Nmse],
            m[&Metric::Cosine]
        );
        let outside = !(0.8..=1.25).contains(&rms) || most > 7.5 || column > 7.5;
        assert_eq!(named, cause, "{name}");
        match name {
            "clean FP8" => assert!(!outside && (rms - 1.0).abs() < 0.02, "{rms} {most} {column}"),
            // 2 % hides below a floor of 3.7 %: bits and the gain's own fingerprint find it.
            "scale 2 % off" => assert!(rms > 1.1 && differ > 60_000, "{rms} {differ}"),
            _ => assert!(outside, "{name}: {rms} {most} {column}"),
        }
    }
}
