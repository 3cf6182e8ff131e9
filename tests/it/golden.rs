//! The reference arm against a forward pass that somebody else computed in f64.

use std::fs;

use runner::compute::arms::{self, Output, Task};
use runner::compute::reference::Reference;
use runner::model::Model;
use runner::op::{Capture, Op, Site};
use safetensors::SafeTensors;
use serde::de::DeserializeOwned;

use crate::data::large;
use crate::model::smollm2;

/// Share of a site's largest magnitude by which the two passes may differ: both
/// round their results to f32, and the sums between are in f64.
const TOLERANCE: f64 = 2e-5;

/// The recorded pass; it lies beside the project, not in it.
fn golden() -> Vec<u8> {
    fs::read(large("golden/smollm2-135m-q4_1.safetensors")).expect("the recorded pass")
}

/// A value of the file's header, which holds JSON in strings.
fn header<T: DeserializeOwned>(file: &[u8], key: &str) -> T {
    let (_, metadata) = SafeTensors::read_metadata(file).expect("a safetensors file");
    let values = metadata.metadata().as_ref().expect("a header with values");
    serde_json::from_str(&values[key]).unwrap_or_else(|error| panic!("header `{key}`: {error}"))
}

/// The reference arm over the recorded prompt, and the tokens that follow.
fn reference(file: &[u8]) -> Output {
    let model = Model::open(&smollm2()).expect("the file that the script fetched");
    let tokens: Vec<u32> = header(file, "tokens");
    let op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 8, kv_cache: None };
    let task = Task { op: &op, model: &model, tokens: &tokens, input: None, spill: None };
    arms::compute(&task, &Reference, String::new(), &mut |_| {}).expect("a forward pass")
}

#[test]
#[ignore = "needs RUNNER_SMOLLM2 and RUNNER_DATA, see scripts/fetch-smollm2.sh and tests/it/data.rs"]
fn smollm2_agrees_with_the_golden_pass_at_every_recorded_site() {
    let file = golden();
    let recorded = SafeTensors::deserialize(&file).expect("a safetensors file");
    let output = reference(&file);
    let mut compared = 0;
    let mut worst = (0.0f64, String::new());
    for (name, expected) in recorded.iter() {
        let site = output.site(&Site(name.to_owned()));
        let site = site.unwrap_or_else(|| panic!("the reference arm makes no site `{name}`"));
        assert_eq!(expected.shape(), [site.rows(), site.width()], "shape of `{name}`");
        let (values, _) = expected.data().as_chunks();
        let expected: Vec<f64> =
            values.iter().map(|&bytes| f64::from(f32::from_le_bytes(bytes))).collect();
        let largest = expected.iter().fold(0.0f64, |most, value| most.max(value.abs()));
        assert!(largest > 0.0 && largest.is_finite(), "`{name}` holds nothing to compare with");
        for (index, (&value, expected)) in site.data().iter().zip(&expected).enumerate() {
            let share = (f64::from(value) - expected).abs() / largest;
            // A NaN fails this too.
            assert!(
                share <= TOLERANCE,
                "`{name}` element {index}: {value:e}, golden {expected:e}: {share:e} of the \
                 largest magnitude {largest:e}"
            );
            if share > worst.0 {
                worst = (share, format!("`{name}` element {index}"));
            }
        }
        compared += 1;
    }
    assert!(compared > 0 && compared == recorded.len(), "{compared} sites were compared");
    println!("{compared} sites, worst {:.2e} of the largest magnitude at {}", worst.0, worst.1);
}

#[test]
#[ignore = "needs RUNNER_SMOLLM2 and RUNNER_DATA, see scripts/fetch-smollm2.sh and tests/it/data.rs"]
fn smollm2_decodes_the_golden_tokens_by_the_golden_margins() {
    let file = golden();
    let greedy = reference(&file).greedy.expect("the op decodes");
    assert_eq!(greedy.tokens, header::<Vec<u32>>(&file, "greedy_next_8"));
    let margins: Vec<f32> = header(&file, "top1_margins");
    assert_eq!(greedy.margins.len(), margins.len());
    for (margin, expected) in greedy.margins.iter().zip(&margins) {
        // The header has four decimals; logits of this size have an error of 1e-5.
        assert!((margin - expected).abs() <= 1e-4, "{:?}, golden {margins:?}", greedy.margins);
    }
    println!("{:?}, golden {margins:?}", greedy.margins);
}
