//! `runner model compare`: two forms of a model are the same function, or it is said what differs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use runner::compare::models::{Difference, Found, Models, compare};
use runner::model::{Architecture, Model};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::command::Project;
use crate::hugging_face::write_folder;
use crate::model::{TINY, open, synthetic_file};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The tensors of a Hugging Face folder in f32.
fn tensors(folder: &Path) -> Tensors {
    let file = fs::read(folder.join("model.safetensors")).unwrap();
    let held = safetensors::SafeTensors::deserialize(&file).unwrap();
    let values = |view: &TensorView<'_>| {
        view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    let all = held.tensors().into_iter();
    all.map(|(name, view)| (name, (view.shape().to_vec(), values(&view)))).collect()
}

fn write(folder: &Path, tensors: &Tensors, dtype: Dtype) {
    let bytes = |values: &[f32]| -> Vec<u8> {
        match dtype {
            Dtype::BF16 => {
                let halves = values.iter().map(|value| half::bf16::from_f32(*value));
                halves.flat_map(|half| half.to_le_bytes()).collect()
            }
            _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }
    };
    let data: Vec<_> =
        tensors.iter().map(|(name, (shape, values))| (name, shape, bytes(values))).collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        ((*name).clone(), TensorView::new(dtype, (*shape).clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// Puts rows that a converter turned for so many heads back.
fn unturned(values: &[f32], width: usize, heads: usize) -> Vec<f32> {
    let rows = values.len() / width;
    let head_dim = rows / heads;
    let mut back = vec![0.0; values.len()];
    for row in 0..rows {
        let (head, place) = (row / head_dim, row % head_dim);
        let to = head * head_dim + place % 2 * (head_dim / 2) + place / 2;
        back[to * width..(to + 1) * width].copy_from_slice(&values[row * width..(row + 1) * width]);
    }
    back
}

struct Forms {
    gguf: Model,
    folder: tempfile::TempDir,
}

impl Forms {
    /// A llama as a GGUF file and as the folder that it would have been made of.
    fn new() -> Forms {
        Forms::of("llama-tiny")
    }

    fn of(preset: &str) -> Forms {
        let preset = TINY.into_iter().find(|other| other.name() == preset).unwrap();
        let gguf = open(&synthetic_file(preset)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write_folder(&gguf, folder.path(), |_| {});
        let forms = Forms { gguf, folder };
        let config = forms.gguf.config();
        let (heads, kv_heads) = (config.heads, config.kv_heads);
        assert!(kv_heads > 1 && kv_heads < heads);
        if forms.gguf.config().architecture != Architecture::Llama {
            return forms;
        }
        forms.change(|all| {
            for (name, (shape, values)) in all.iter_mut() {
                let heads = match name {
                    _ if name.contains("q_proj.weight") => heads,
                    _ if name.contains("k_proj.weight") => kv_heads,
                    _ => continue,
                };
                *values = unturned(values, shape[1], heads);
            }
        });
        forms
    }

    fn change(&self, change: impl FnOnce(&mut Tensors)) {
        let mut all = tensors(self.folder.path());
        change(&mut all);
        write(self.folder.path(), &all, Dtype::F32);
    }

    fn found(&self) -> Models {
        compare(&self.gguf, &Model::open(self.folder.path()).unwrap()).unwrap()
    }

    /// The only tensor that differs.
    fn difference(&self) -> (String, Difference) {
        let found = self.found();
        assert!(!found.are_same());
        let mut all = found.tensors.into_iter().filter_map(|pair| match pair.found {
            Found::Differs(what) => Some((pair.name, what)),
            _ => None,
        });
        let first = all.next().expect("a difference");
        assert!(all.next().is_none(), "one tensor alone was changed");
        first
    }
}

const K: &str = "model.layers.0.self_attn.k_proj.weight";
const UP: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn a_gguf_file_and_its_folder_are_the_same_function() {
    let forms = Forms::new();
    let mut found = forms.found();
    // The built-in llama has factors of RoPE's frequencies, which the folder lacks.
    let settings = std::mem::take(&mut found.settings);
    assert!(settings.len() == 1 && settings[0].0 == "rope.factors", "{settings:?}");
    assert!(found.are_same(), "{found:?}");
    let forms = Forms::of("qwen2-tiny");
    let found = forms.found();
    assert!(found.are_same(), "{found:?}");
    let all = tensors(forms.folder.path());
    write(forms.folder.path(), &all, Dtype::BF16);
    let found = forms.found();
    let differs = |pair: &&runner::compare::models::Pair| matches!(pair.found, Found::Differs(_));
    assert!(found.are_same(), "{:?}", found.tensors.iter().filter(differs).collect::<Vec<_>>());
    let rounded = |pair: &&runner::compare::models::Pair| matches!(pair.found, Found::Rounded(_));
    assert!(found.tensors.iter().filter(rounded).count() > 5, "{found:?}");
}

#[test]
fn a_value_a_scale_and_rows_in_another_order_are_told_apart() {
    let forms = Forms::new();
    forms.change(|all| all.get_mut(UP).unwrap().1[17] += 3.0);
    let (name, what) = forms.difference();
    let width = forms.gguf.config().hidden;
    assert_eq!(name, "blk.1.ffn_up.weight");
    let Difference::Values { count, at, .. } = what else { panic!("{what}") };
    assert_eq!((count, at), (1, [17 / width, 17 % width]));

    let forms = Forms::new();
    forms.change(|all| all.get_mut(UP).unwrap().1.iter_mut().for_each(|value| *value *= 1.02));
    let (name, what) = forms.difference();
    assert_eq!(name, "blk.1.ffn_up.weight");
    let Difference::Factor(factor) = what else { panic!("{what}") };
    assert!((factor - 1.02).abs() < 1e-6, "{factor}");

    // Converted with the number of query heads, as public reports have it.
    let forms = Forms::new();
    let (heads, kv_heads) = (forms.gguf.config().heads, forms.gguf.config().kv_heads);
    let held = forms.gguf.tensor("blk.0.attn_k.weight").unwrap().to_vec().unwrap();
    forms.change(|all| {
        let (shape, values) = all.get_mut(K).unwrap();
        *values = unturned(&held, shape[1], heads);
    });
    let wanted = Difference::Heads { taken: heads, has: kv_heads };
    assert_eq!(forms.difference(), ("blk.0.attn_k.weight".to_owned(), wanted));

    // Not at all.
    let forms = Forms::new();
    forms.change(|all| all.get_mut(K).unwrap().1.clone_from(&held));
    assert_eq!(forms.difference(), ("blk.0.attn_k.weight".to_owned(), Difference::Order));
}

#[test]
fn the_command_says_what_differs_and_ends_with_1() {
    let project = Project::new();
    let forms = Forms::of("qwen2-tiny");
    let gguf = project.path("m.gguf");
    let preset = TINY.into_iter().find(|preset| preset.name() == "qwen2-tiny").unwrap();
    fs::write(&gguf, synthetic_file(preset)).unwrap();
    let folder = forms.folder.path().display().to_string();
    let run = || project.runner(&["model", "compare", "m.gguf", &folder]);
    run().expect(0, "the two are the same function");
    let path = forms.folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["rope_theta"] = json!(5000.0);
    fs::write(&path, config.to_string()).unwrap();
    run().expect(1, "in the first, 5000.0 in the second");
    project.runner(&["model", "compare", "m.gguf", "nothing"]).expect(2, "nothing");
    let named = ["model", "compare", "synthetic:qwen2-tiny", "m.gguf"];
    project.runner(&named).expect(0, "the two are the same function");
    let other = ["model", "compare", "synthetic:qwen2-tiny", "synthetic:qwen2-tiny@2"];
    project.runner(&other).expect(1, "setting    hidden: 256 in the first, 512 in the second");
    let none = ["model", "compare", "synthetic:none", "m.gguf"];
    project.runner(&none).expect(2, "no synthetic model is called `none`");
}

/// A copy of a folder, whose config or tensors are changed.
fn copied(name: &str, change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let file = entry.unwrap().path();
        fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    change(folder.path());
    folder
}

#[test]
fn another_scale_of_activations_is_a_difference_and_one_beside_values_is_told() {
    let name = "examples/vllm-checkpoints/static";
    let scale = "model.layers.0.mlp.down_proj.input_scale";
    let other = copied(name, |folder| {
        let path = folder.join("model.safetensors");
        let mut file = fs::read(&path).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        let at = header[scale]["data_offsets"][0].as_u64().unwrap() as usize + 8 + length;
        let bytes = match header[scale]["dtype"].as_str().unwrap() {
            "F32" => 0.75f32.to_le_bytes().to_vec(),
            _ => half::bf16::from_f32(0.75).to_le_bytes().to_vec(),
        };
        file[at..at + bytes.len()].copy_from_slice(&bytes);
        fs::write(&path, file).unwrap();
    });
    let open = |folder: &Path| Model::open(folder).unwrap();
    let own = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(name));
    assert!(compare(&own, &own).unwrap().are_same());
    let found = compare(&own, &open(other.path())).unwrap();
    assert!(!found.are_same());
    let [(weight, [Some(_), Some(second)])] = &found.input_scales[..] else { panic!("{found:?}") };
    assert_eq!((weight.as_str(), *second), ("blk.0.ffn_down.weight", 0.75));
    let project = Project::new();
    let folders = [&own.path().display().to_string(), &other.path().display().to_string()];
    let said = project.runner(&["model", "compare", folders[0], folders[1]]);
    said.expect(1, "blk.0.ffn_down.weight: the scale of its activations is ");
}

#[test]
fn a_chat_template_that_lays_another_text_is_a_difference() {
    let with = |template: &str| {
        let forms = Forms::of("qwen2-tiny");
        let config = json!({ "chat_template": template, "bos_token": "<s>" });
        fs::write(forms.folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        forms.folder
    };
    const PLAIN: &str =
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    let found = |one: &str, other: &str| {
        let folders = [with(one), with(other)];
        let [one, other] = [&folders[0], &folders[1]].map(|f| Model::open(f.path()).unwrap());
        compare(&one, &other).unwrap()
    };
    let same = found(PLAIN, PLAIN);
    assert!(same.are_same() && same.no_chats.is_none(), "{same:?}");
    // Written otherwise, and laying the same.
    let same = found(PLAIN, &PLAIN.replace("m.role", "m['role']"));
    assert!(same.are_same(), "{same:?}");
    let trimmed = found(PLAIN, &PLAIN.replace("m.content", "m.content | trim"));
    assert_eq!(trimmed.chats.len(), 1, "{trimmed:?}");
    assert!(trimmed.chats[0].0.contains("spaces") && trimmed.chats[0].1.starts_with("other text"));
    assert!(!trimmed.are_same());
    let refuses =
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}";
    let refused = found(PLAIN, &format!("{refuses}{PLAIN}"));
    assert_eq!(refused.chats.len(), 1);
    assert!(refused.chats[0].1.contains("the second lays no text"), "{refused:?}");
    // What one form lacks cannot be compared, and is said.
    let forms = Forms::of("qwen2-tiny");
    let folder = with(PLAIN);
    let alone = compare(&forms.gguf, &Model::open(folder.path()).unwrap()).unwrap();
    assert!(alone.are_same() && alone.no_chats.is_some(), "{alone:?}");
}
