//! Quantised Hugging Face folders, held to the packages that write them.
//!
//! `tests/fixtures/quantised` was written by `scripts/quantised_folders.py`: every form as its own
//! package writes it, with digests of what the package itself decodes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use runner::compute::Pass;
use runner::compute::arms::{self, Task};
use runner::compute::emulated::arm::Emulated;
use runner::compute::reference::Reference;
use runner::model::{Model, WeightType};
use runner::op::{Capture, Op, Recipe};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const PASS: Op = Op::Forward { capture: Capture::EverySite, repeats: 1, decode: 0, kv_cache: None };

fn folders() -> Vec<PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantised");
    let mut folders: Vec<PathBuf> =
        fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

/// Of the values, zeros without a sign.
fn digest(values: &[f32]) -> String {
    let mut hasher = blake3::Hasher::new();
    values.iter().for_each(|value| {
        hasher.update(&(value + 0.0).to_le_bytes());
    });
    hasher.finalize().to_hex().to_string()
}

#[test]
fn every_form_decodes_to_the_bits_of_the_package_that_wrote_it() {
    let folders = folders();
    assert_eq!(folders.len(), 26);
    for folder in folders {
        let model = Model::open(&folder).unwrap_or_else(|error| panic!("{error}"));
        let wanted = fs::read(folder.join("weights.json")).unwrap();
        let wanted: BTreeMap<String, String> = serde_json::from_slice(&wanted).unwrap();
        assert_eq!(wanted.len(), 7);
        for (name, wanted) in wanted {
            let weight = model.tensor(&name).unwrap();
            let values = weight.to_vec().unwrap();
            assert_eq!(digest(&values), wanted, "{} {name}", folder.display());
            assert!(weight.is_scaled() && weight.kind() != WeightType::F32);
            // Any rows, alone.
            let (width, rows) = (weight.width(), weight.rows());
            for rows in [0..1, 5..8, 15..17, rows - 1..rows] {
                let mut part = vec![0.0; rows.len() * width];
                weight.decode_rows(rows.clone(), &mut part).unwrap();
                assert_eq!(part, values[rows.start * width..rows.end * width], "{name} {rows:?}");
            }
        }
    }
}

type Stored = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn stored(folder: &Path) -> Stored {
    let file = fs::read(folder.join("model.safetensors")).unwrap();
    let held = SafeTensors::deserialize(&file).unwrap();
    let stored = |(name, view): (String, TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    held.tensors().into_iter().map(stored).collect()
}

fn write(folder: &Path, config: &Value, tensors: &Stored) {
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

fn config_of(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// The same model with its weights in F32.
fn plain(folder: &Path) -> tempfile::TempDir {
    let model = Model::open(folder).unwrap();
    let names = [
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    let norms = |(name, _): &(String, _)| !name.contains("_proj");
    let mut tensors: Stored = stored(folder).into_iter().filter(norms).collect();
    for (own, name) in names {
        let weight = model.tensor(&format!("blk.0.{own}.weight")).unwrap();
        let values = weight.to_vec().unwrap();
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = vec![weight.rows(), weight.width()];
        tensors.insert(format!("model.layers.0.{name}.weight"), (Dtype::F32, shape, bytes));
    }
    let mut config = config_of(folder);
    config["quantization_config"] = Value::Null;
    // Of other names; phi3's forward pass is llama's.
    config["model_type"] = json!("llama");
    let plain = tempfile::tempdir().unwrap();
    write(plain.path(), &config, &tensors);
    plain
}

#[test]
fn a_pass_over_codes_has_the_bits_of_a_pass_over_their_values() {
    let tokens = [3, 60, 17, 0, 42];
    for folder in folders() {
        let plain = plain(&folder);
        let [coded, plain] =
            [folder.as_path(), plain.path()].map(|path| Model::open(path).unwrap());
        let recipe = Recipe::default();
        let emulated = Emulated::new(&recipe).unwrap();
        for (arm, backend) in [("reference", &Reference as &dyn Pass), ("emulated", &emulated)] {
            let pass = |model: &Model| {
                let task = Task { op: &PASS, model, tokens: &tokens, input: None, spill: None };
                arms::compute(&task, backend, String::new(), &mut |_| {}).unwrap()
            };
            let (coded, plain) = (pass(&coded), pass(&plain));
            assert_eq!(coded.sites.len(), plain.sites.len());
            for ((site, coded), (_, plain)) in coded.sites.iter().zip(&plain.sites) {
                let same = coded.data() == plain.data();
                assert!(same, "{} {arm} {site}", folder.display());
            }
        }
    }
}

/// What opening says of a form that was changed.
fn refused(form: &str, change: impl FnOnce(&mut Value, &mut Stored)) -> String {
    let folder = changed(form, change);
    Model::open(folder.path()).unwrap_err().to_string()
}

fn changed(form: &str, change: impl FnOnce(&mut Value, &mut Stored)) -> tempfile::TempDir {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantised");
    let (mut config, mut tensors) = (config_of(&all.join(form)), stored(&all.join(form)));
    change(&mut config, &mut tensors);
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config, &tensors);
    folder
}

const Q: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn what_is_missing_or_too_much_or_of_another_shape_is_named() {
    let set = |all: &mut Stored, name: &str, at: usize, bytes: &[u8]| {
        let held = &mut all.get_mut(&format!("{Q}{name}")).unwrap().2;
        held[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
    let cases = [
        (
            refused("gptq-4", |_, all| {
                all.remove(&format!("{Q}.qzeros"));
            }),
            "there are codes, scales, groups of it, and no zero points",
        ),
        (
            refused("gptq-4", |_, all| {
                all.remove(&format!("{Q}.qweight"));
            }),
            "there are scales, zero points, groups of it, and no codes",
        ),
        (
            refused("gptq-4", |_, all| set(all, ".g_idx", 4, &7i32.to_le_bytes())),
            "value 1 of its rows is said to be of group 7, and there are 2",
        ),
        (
            refused("gptq-4", |_, all| set(all, ".g_idx", 0, &(-2i32).to_le_bytes())),
            "value 0 of its rows is said to be of group -2",
        ),
        (
            refused("gptq-4", |_, all| set(all, ".scales", 2 * 65, &half(f32::NAN))),
            "the scale of its block at row 1, value 32 is NaN",
        ),
        (
            refused("awq", |_, all| set(all, ".scales", 0, &half(0.0))),
            "the scale of its block at row 0, value 0 is 0, no positive number",
        ),
        (
            refused("gptq-4", |_, all| set(all, ".qzeros", 0, &[0xf0])),
            "the zero point of row 1, group 0 is written as 15",
        ),
        (
            refused("gptq-4", |config, _| config["quantization_config"]["group_size"] = json!(16)),
            "its scales are [2, 32], and `quantization_config` asks for [4, 32]",
        ),
        (
            refused("gptq-4", |config, _| config["quantization_config"]["bits"] = json!(8)),
            "its scales are [2, 32], and `quantization_config` asks for [1, 32]",
        ),
        (
            refused("packed-4", |_, all| set(all, ".weight_shape", 8, &96i64.to_le_bytes())),
            "its codes are 8 words wide",
        ),
        (
            refused("packed-4", |config, _| {
                config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] =
                    json!("group");
            }),
            "no groups",
        ),
        (
            refused("nf4-nested", |_, all| set(all, ".weight.quant_map", 0, &[1])),
            "its `quant_map` is not the table of nf4",
        ),
        (
            refused("nf4", |_, all| set(all, ".weight.absmax", 0, &f32::INFINITY.to_le_bytes())),
            "the scale of its block at row 0, value 0 is inf",
        ),
        (
            refused("nf4", |_, all| {
                let state = format!("{Q}.weight.quant_state.bitsandbytes__nf4");
                all.get_mut(&state).unwrap().2[0] = b'x';
            }),
            "its state is not what bitsandbytes writes",
        ),
        (
            refused("int8-rows", |_, all| {
                all.get_mut(&format!("{Q}.weight_format")).unwrap().2 = vec![2];
            }),
            "its `weight_format` is [2]",
        ),
        (
            refused("modelopt-nvfp4", |_, all| set(all, ".weight_scale_2", 0, &0f32.to_le_bytes())),
            "its scale of the whole weight is 0, no positive number",
        ),
        (
            refused("modelopt-nvfp4", |_, all| set(all, ".weight_scale", 0, &[0x7f])),
            "the scale of its block at row 0, value 0 is NaN",
        ),
        (
            refused("phi3-nf4", |config, _| config["intermediate_size"] = json!(64)),
            "it has 192 rows, and what it holds by the config has 128",
        ),
        // Scales of one method under the config of another.
        (
            refused("awq", |config, _| {
                config["quantization_config"] =
                    json!({ "quant_method": "bitsandbytes", "load_in_4bit": true });
            }),
            "that `quantization_config` does not name",
        ),
        (
            refused("awq", |config, _| config["quantization_config"] = Value::Null),
            "that `quantization_config` does not name",
        ),
    ];
    for (said, words) in cases {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn modelopts_own_file_stands_for_the_config_or_must_say_the_same() {
    let beside = |algorithm: &str, config: bool| {
        let folder = changed("modelopt-fp8", |held, tensors| {
            // Scales of the cache belong to no weight.
            let scale = tensors[&format!("{Q}.input_scale")].clone();
            tensors.insert("model.layers.0.self_attn.k_proj.k_scale".to_owned(), scale);
            if !config {
                held.as_object_mut().unwrap().remove("quantization_config");
            }
        });
        let own = json!({ "producer": { "name": "modelopt" }, "quantization": {
            "quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"] } });
        fs::write(folder.path().join("hf_quant_config.json"), own.to_string()).unwrap();
        Model::open(folder.path()).map_err(|error| error.to_string()).map(|_| ())
    };
    assert_eq!(beside("FP8", true), Ok(()));
    assert_eq!(beside("FP8", false), Ok(()));
    let said = beside("NVFP4", true).unwrap_err();
    assert!(said.contains("and hf_quant_config.json says"), "{said}");
    let said = beside("INT8_SQ", false).unwrap_err();
    assert!(said.contains("its `quant_algo` is `INT8_SQ`"), "{said}");
}

#[test]
fn biases_of_zeros_that_early_gptq_files_have_are_dropped_and_others_are_not() {
    let with = |value: u8| {
        let folder = changed("gptq-4", |_, all| {
            all.insert(format!("{Q}.bias"), (Dtype::F16, vec![64], vec![value; 128]));
        });
        Model::open(folder.path()).map_err(|error| error.to_string())
    };
    assert!(!with(0).unwrap().has("blk.0.attn_q.bias"));
    let said = with(1).unwrap_err();
    assert!(said.contains("has no use for it"), "{said}");
}

#[test]
fn values_of_f64_are_rounded_to_f32() {
    let values: Vec<f64> = (0..64 * 64).map(|n| f64::from(n) / 3.0).collect();
    let folder = changed("gptq-4", |_, all| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        all.insert("model.embed_tokens.weight".to_owned(), (Dtype::F64, vec![64, 64], bytes));
    });
    let model = Model::open(folder.path()).unwrap();
    let read = model.tensor("token_embd.weight").unwrap().to_vec().unwrap();
    assert!(read.iter().zip(&values).all(|(read, value)| *read == *value as f32));
    let task = Task { op: &PASS, model: &model, tokens: &[1, 2], input: None, spill: None };
    arms::compute(&task, &Emulated::new(&Recipe::default()).unwrap(), String::new(), &mut |_| {})
        .unwrap();
}

#[test]
fn scales_of_activations_that_the_config_and_the_file_do_not_agree_on_are_refused_by_name() {
    let scale = format!("{Q}.input_scale");
    let without = |all: &mut Stored| {
        all.remove(&scale).unwrap();
    };
    let with = |all: &mut Stored| {
        all.insert(scale.clone(), (Dtype::F32, vec![], 0.5f32.to_le_bytes().to_vec()));
    };
    let groups = |dynamic: Value| {
        json!({ "group_0": { "targets": ["Linear"], "weights": {
        "num_bits": 8, "type": "float", "strategy": "tensor" },
        "input_activations": { "num_bits": 8, "type": "float", "dynamic": dynamic } } })
    };
    let compressed = |dynamic: Value| {
        move |config: &mut Value| {
            config["quantization_config"] = json!({ "quant_method": "compressed-tensors",
                "format": "float-quantized", "config_groups": groups(dynamic) });
        }
    };
    let fp8 = |scheme: &'static str| {
        move |config: &mut Value| {
            config["quantization_config"] =
                json!({ "quant_method": "fp8", "activation_scheme": scheme });
        }
    };
    // ModelOpt's file, whose weights have one scale each, read by every method's config.
    let open = |config: &dyn Fn(&mut Value), change: &dyn Fn(&mut Stored)| {
        let folder = changed("modelopt-fp8", |held, all| {
            config(held);
            change(all);
        });
        Model::open(folder.path()).map(|_| ()).map_err(|error| error.to_string())
    };
    let nothing = |_: &mut Stored| {};
    let none = |all: &mut Stored| all.retain(|name, _| !name.ends_with(".input_scale"));
    let one_alone = |all: &mut Stored| {
        none(all);
        with(all);
    };
    let (fixed, moving) = (fp8("static"), fp8("dynamic"));
    let (fixed_group, moving_group) =
        (|c: &mut Value| compressed(json!(false))(c), |c: &mut Value| compressed(json!(true))(c));
    let unsaid = |_: &mut Value| {};
    for config in [&fixed as &dyn Fn(&mut Value), &fixed_group, &unsaid] {
        assert_eq!(open(config, &nothing), Ok(()));
        let said = open(config, &without).unwrap_err();
        for part in [
            format!("tensor `{scale}`: it is missing"),
            "6 weights have one, as `model.layers.0.".to_owned(),
            format!("one weight lacks one (`{scale}`)"),
        ] {
            assert!(said.contains(&part), "{part}: {said}");
        }
    }
    for config in [&fixed as &dyn Fn(&mut Value), &fixed_group] {
        let said = open(config, &none).unwrap_err();
        assert!(said.contains("no weight has one, and 7 weights lack one"), "{said}");
        assert!(said.contains("`quantization_config`") && said.contains("correct the config"));
    }
    for config in [&moving as &dyn Fn(&mut Value), &moving_group] {
        assert_eq!(open(config, &none), Ok(()));
        let said = open(config, &one_alone).unwrap_err();
        let wanted = format!("tensor `{scale}`: it is a static scale of activations");
        assert!(said.contains(&wanted) && said.contains("one weight has one"), "{said}");
    }
    // Of weights alone in codes nothing is said of activations.
    assert_eq!(open(&unsaid, &none), Ok(()));
    assert!(open(&unsaid, &one_alone).unwrap_err().contains("does not say whether"));
}

#[test]
fn a_fault_of_a_folder_names_the_tensor_as_its_files_do() {
    for (form, tensor, wanted) in [
        (
            "modelopt-fp8",
            format!("{Q}.weight_scale"),
            format!("tensor `{Q}.weight`: there are codes"),
        ),
        ("gptq-4", format!("{Q}.qweight"), format!("tensor `{Q}.weight`: there are scales")),
        ("gptq-4", format!("{Q}.scales"), format!("tensor `{Q}.qweight`: there are codes")),
        (
            "phi3-fp8",
            "model.layers.0.self_attn.qkv_proj.weight_scale".to_owned(),
            "tensor `model.layers.0.self_attn.qkv_proj.weight`: there are codes".to_owned(),
        ),
        (
            "nf4",
            "model.layers.0.input_layernorm.weight".to_owned(),
            "tensor `model.layers.0.input_layernorm.weight`: it is missing".to_owned(),
        ),
        (
            "nf4",
            "model.norm.weight".to_owned(),
            "tensor `model.norm.weight`: it is missing".to_owned(),
        ),
    ] {
        let said = refused(form, |_, all| {
            all.remove(&tensor).unwrap();
        });
        assert!(said.contains(&wanted) && !said.contains("blk."), "{wanted}: {said}");
    }
}
