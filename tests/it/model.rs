//! Models: files become checked hyperparameters, tensors and tokens, or a clear error.

use std::path::Path;

use runner::model::synthetic::{self, Preset};
use runner::model::{Architecture, Model, RopeLayout};

/// A synthetic model's file, in memory.
fn synthetic(preset: Preset) -> Vec<u8> {
    let mut bytes = Vec::new();
    synthetic::write(preset, 1, &mut bytes).expect("a Vec takes everything");
    bytes
}

fn open(bytes: &[u8]) -> Result<Model, String> {
    Model::from_bytes(Path::new("test.gguf"), bytes).map_err(|error| error.to_string())
}

#[test]
fn every_tiny_preset_opens_with_its_hyperparameters() {
    for preset in [Preset::Qwen2Tiny, Preset::LlamaTiny, Preset::Qwen3Tiny] {
        let bytes = synthetic(preset);
        assert!(bytes.len() < 10 << 20, "{preset} has {} bytes", bytes.len());
        let model = open(&bytes).unwrap();
        println!("{preset}: {} bytes {:?}", bytes.len(), model.config());
        for name in model.names() {
            let t = model.tensor(name).unwrap();
            let v = t.to_vec().unwrap();
            let ms = v.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / v.len() as f64;
            let max = v.iter().fold(0f32, |m, v| m.max(v.abs()));
            println!("{t:?} rms {} max {max} {}", ms.sqrt(), v.iter().all(|v| v.is_finite()));
        }
        println!("{:?}", model.encode("The capital of France is<|im_end|>"));
        println!("{:?}", model.decode(&model.encode("The capital of France is<|im_end|> é").unwrap()));
    }
}
