//! What `quantization_config` says of a checkpoint's weights.

use serde_json::Value;

use super::{Names, PackedBy, Quantised, Strategy};
use crate::model::error::{FETCH_AGAIN, Fault, OTHER_MODEL, shown};
use crate::model::hf_config::Keys;
use crate::model::weights::WeightType;

/// How `quantization_config` says that the weights are quantised.
///
/// # Errors
/// If it names a method, a format or a key that is not known, with its value.
pub fn read(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    // Early files of bitsandbytes name none.
    let of_bits = |key: &&str| keys.get(key).is_some();
    let unnamed = ["load_in_4bit", "load_in_8bit"].iter().any(of_bits).then_some("bitsandbytes");
    let read = match keys.text("quant_method")?.or(unnamed) {
        Some("fp8") => fp8(keys),
        Some("compressed-tensors") => compressed_tensors(keys),
        Some("mxfp4") => mxfp4(keys),
        Some("gptq") => gptq(keys),
        Some("awq") => awq(keys),
        Some("bitsandbytes") => bitsandbytes(keys),
        Some("modelopt" | "modelopt_fp4") => modelopt(keys),
        Some(other) => Err(unknown(format!("its weights are quantised by `{}`", shown(other)))),
        None => Err(unknown("its `quantization_config` names no `quant_method`".to_owned())),
    }?;
    keys.refuse_unread()?;
    Ok(read)
}

/// How ModelOpt's own `hf_quant_config.json` says it.
///
/// # Errors
/// As [`read`].
pub fn read_sidecar(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    keys.get("producer");
    let Some(inner) = keys.object("quantization")? else {
        return Err(unknown("its `hf_quant_config.json` has no `quantization`".to_owned()));
    };
    let read = modelopt(&inner)?;
    inner.refuse_unread()?;
    keys.refuse_unread()?;
    Ok(read)
}

/// What a config says of the scales of a product's activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// The file holds them; by these words of the config.
    Static(&'static str),
    /// They are found as the activations come; by these words.
    Dynamic(&'static str),
    /// Nothing.
    Unsaid,
    /// Groups of layers differ, so that each layer's tensors tell.
    ByGroup,
}

/// What the whole config of a folder says of the scales of activations; a config that cannot be
/// read says nothing, and is refused elsewhere.
pub fn activations(config: &[u8]) -> Activations {
    let config: Value = serde_json::from_slice(config).unwrap_or_default();
    let of = &config["quantization_config"];
    match of["activation_scheme"].as_str() {
        Some("static") => return Activations::Static("`activation_scheme` is `static`"),
        Some("dynamic") => return Activations::Dynamic("`activation_scheme` is `dynamic`"),
        _ => {}
    }
    let groups = of["config_groups"].as_object();
    let mut said: Option<Activations> = None;
    for group in groups.iter().flat_map(|groups| groups.values()) {
        let input = &group["input_activations"];
        let here = match &input["dynamic"] {
            _ if !input.is_object() => Activations::Unsaid,
            Value::Bool(true) => Activations::Dynamic("`input_activations.dynamic` is true"),
            Value::Bool(false) => Activations::Static("`input_activations.dynamic` is false"),
            // What compressed-tensors takes where nothing is written.
            Value::Null => Activations::Static("`input_activations` is without `dynamic`"),
            _ => Activations::Unsaid,
        };
        if said.is_some_and(|said| said != here) {
            return Activations::ByGroup;
        }
        said = Some(here);
    }
    said.unwrap_or(Activations::Unsaid)
}

fn unknown(problem: String) -> Fault {
    Fault::unsupported(
        format!(
            "{problem}; `fp8`, `mxfp4`, `compressed-tensors`, `modelopt`, `gptq`, `awq` and \
             `bitsandbytes` are read, in the forms that docs/models.md lists"
        ),
        OTHER_MODEL,
    )
}

/// Settings of how the codes were found, or of the kernels that read them: no value depends on
/// them.
fn pass_over(keys: &Keys<'_>, names: &[&str]) {
    for name in names {
        keys.get(name);
    }
}

/// A key whose value must be one of these, where it is written.
fn must_be(keys: &Keys<'_>, key: &str, known: &[&str]) -> Result<(), Fault> {
    match keys.text(key)? {
        Some(value) if !known.contains(&value.to_ascii_lowercase().as_str()) => {
            Err(unknown(format!("its `{key}` is `{}`", shown(value))))
        }
        _ => Ok(()),
    }
}

/// A key that must be absent, false or empty.
fn must_be_off(keys: &Keys<'_>, key: &str) -> Result<(), Fault> {
    let off = |value: &Value| match value {
        Value::Bool(flag) => !flag,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    match keys.get(key).filter(|value| !off(value)) {
        None => Ok(()),
        Some(value) => Err(unknown(format!("its `{key}` is {}", shown(&value.to_string())))),
    }
}

/// Which activations are quantised how changes no weight, nor does the list of layers that are
/// not: the tensors' types say that.
fn fp8(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    for key in ["activation_scheme", "modules_to_not_convert", "ignored_layers"] {
        keys.get(key);
    }
    let codes = match keys.text("fmt")? {
        None | Some("e4m3" | "float8_e4m3fn") => WeightType::E4m3,
        Some("e5m2") => WeightType::E5m2,
        Some(other) => return Err(unknown(format!("its `fmt` is `{}`", shown(other)))),
    };
    match keys.text("scale_fmt")? {
        None | Some("float" | "ue8m0") => {}
        Some(other) => return Err(unknown(format!("its `scale_fmt` is `{}`", shown(other)))),
    }
    if keys.flag("dequantize")? == Some(true) {
        return Err(unknown("its `dequantize` is true".to_owned()));
    }
    let strategy = match keys.list("weight_block_size")? {
        // What transformers takes where nothing is written, and vLLM one scale for a weight: the
        // scales tell. Null is one scale for all.
        None if !keys.names().any(|key| key == "weight_block_size") => {
            let (strategy, names) = (Strategy::Block([128, 128]), Names::Either);
            return Ok(Quantised::Scaled { codes, strategy, names, converts: true });
        }
        None => Strategy::Tensor,
        Some(list) => Strategy::Block(block(list, "weight_block_size")?),
    };
    Ok(Quantised::Scaled { codes, strategy, names: Names::Inverse, converts: true })
}

/// gpt-oss: the experts' matrices alone. Which layers are not converted their tensors say.
fn mxfp4(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    keys.get("modules_to_not_convert");
    if keys.flag("dequantize")? == Some(true) {
        return Err(unknown("its `dequantize` is true".to_owned()));
    }
    let (codes, strategy) = (WeightType::E2m1, Strategy::Group(32));
    Ok(Quantised::Scaled { codes, strategy, names: Names::Mixture, converts: false })
}

/// How wide a group is; -1 is a whole row.
fn group_size(keys: &Keys<'_>, usual: Option<usize>) -> Result<Option<usize>, Fault> {
    match keys.number("group_size")? {
        None => Ok(usual),
        Some(-1.0) => Ok(None),
        Some(size) if size.fract() == 0.0 && (1.0..=1_048_576.0).contains(&size) => {
            Ok(Some(size as usize))
        }
        Some(size) => Err(unknown(format!("its `group_size` is {size}"))),
    }
}

/// GPTQ, as AutoGPTQ, GPTQModel, AutoRound and optimum write it.
fn gptq(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    pass_over(
        keys,
        &[
            "act_group_aware",
            "autoround_version",
            "backend",
            "batch_size",
            "block_name_to_quantize",
            "cache_block_outputs",
            "damp_auto_increment",
            "damp_percent",
            "dataset",
            "desc_act",
            "exllama_config",
            "inside_layer_modules",
            "iters",
            "lm_head",
            "lr",
            "max_input_length",
            "meta",
            "minmax_lr",
            "model_file_base_name",
            "model_name_or_path",
            "model_seqlen",
            "module_name_preceding_first_block",
            "modules_in_block_to_quantize",
            "mse",
            "nsamples",
            "pad_token_id",
            "quantizer",
            "seqlen",
            "static_groups",
            "sym",
            "task",
            "tokenizer",
            "true_sequential",
            "use_cuda_fp16",
            "use_exllama",
            "method",
        ],
    );
    for key in ["dynamic", "is_marlin_format", "adapter", "rotation"] {
        must_be_off(keys, key)?;
    }
    must_be(keys, "pack_dtype", &["int32"])?;
    let (format, older) = (keys.text("checkpoint_format")?, keys.text("format")?);
    let less = match (format.or(older).unwrap_or("gptq"), older) {
        (format, Some(older)) if format != older => {
            return Err(Fault::malformed(
                format!(
                    "its `checkpoint_format` is `{}` and its `format` is `{}`",
                    shown(format),
                    shown(older)
                ),
                "remove the one that is out of date",
            ));
        }
        ("gptq", _) => 1,
        ("gptq_v2", _) => 0,
        (other, _) => {
            return Err(unknown(format!("its `checkpoint_format` is `{}`", shown(other))));
        }
    };
    let bits = keys.required("bits")?;
    if !matches!(bits, 2 | 3 | 4 | 8) {
        return Err(unknown(format!("its weights are {bits} bits of `gptq`")));
    }
    let group = group_size(keys, Some(128))?;
    Ok(Quantised::Packed { bits: bits as usize, group, of: PackedBy::Gptq { less } })
}

/// AWQ, as AutoAWQ and GPTQModel write it.
fn awq(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    pass_over(
        keys,
        &[
            "backend",
            "damp_percent",
            "desc_act",
            "do_fuse",
            "exllama_config",
            "fuse_max_seq_len",
            "lm_head",
            "meta",
            "method",
            "modules_to_fuse",
            "modules_to_not_convert",
            "sym",
            "true_sequential",
            "static_groups",
        ],
    );
    must_be_off(keys, "dynamic")?;
    must_be(keys, "pack_dtype", &["int32"])?;
    for key in ["version", "format", "checkpoint_format"] {
        must_be(keys, key, &["gemm"])?;
    }
    must_be(keys, "backend", &["autoawq", "auto", "gemm", "marlin", "exllama_v2"])?;
    let bits = keys.whole("bits")?.or(keys.whole("w_bit")?).unwrap_or(4);
    if bits != 4 {
        return Err(unknown(format!("its weights are {bits} bits of `awq`")));
    }
    if keys.flag("zero_point")? == Some(false) {
        return Err(unknown("its `zero_point` is false".to_owned()));
    }
    let group = match keys.get("q_group_size") {
        Some(_) => keys.whole("q_group_size")?.map(|size| size.max(1) as usize),
        None => group_size(keys, Some(128))?,
    };
    Ok(Quantised::Packed { bits: 4, group, of: PackedBy::Awq })
}

fn bitsandbytes(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    pass_over(
        keys,
        &[
            "bnb_4bit_compute_dtype",
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_has_fp16_weight",
            "llm_int8_skip_modules",
            "llm_int8_threshold",
            "_load_in_4bit",
            "_load_in_8bit",
        ],
    );
    must_be(keys, "bnb_4bit_quant_storage", &["uint8"])?;
    match (keys.flag("load_in_4bit")?, keys.flag("load_in_8bit")?) {
        (Some(true), None | Some(false)) => Ok(Quantised::Table),
        (None | Some(false), Some(true)) => Ok(Quantised::Scaled {
            codes: WeightType::I8,
            strategy: Strategy::Channel,
            names: Names::BitsAndBytes,
            converts: false,
        }),
        (four, eight) => Err(unknown(format!(
            "its `load_in_4bit` is {}, and its `load_in_8bit` is {}",
            four.unwrap_or(false),
            eight.unwrap_or(false)
        ))),
    }
}

/// NVIDIA's ModelOpt, in `config.json` or in its own file.
fn modelopt(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    // Layers that are not quantised have plain tensors; scales of a cache belong to no weight.
    pass_over(
        keys,
        &[
            "config_groups",
            "exclude_modules",
            "ignore",
            "kv_cache_quant_algo",
            "kv_cache_scheme",
            "producer",
            "has_zero_point",
            "quant_library",
            "quantized_layers",
        ],
    );
    must_be_off(keys, "pre_quant_scale")?;
    let algorithm = keys.text("quant_algo")?;
    let group = group_size(keys, None)?;
    let algorithm = algorithm.map(str::to_ascii_uppercase);
    let converts = algorithm.as_deref() != Some("W4A16_NVFP4");
    let scaled =
        |codes, strategy, names| Ok(Quantised::Scaled { codes, strategy, names, converts });
    match algorithm.as_deref() {
        Some("FP8") => scaled(WeightType::E4m3, Strategy::Tensor, Names::Plain),
        Some("FP8_PER_CHANNEL_PER_TOKEN") => {
            scaled(WeightType::E4m3, Strategy::Channel, Names::Plain)
        }
        Some("MXFP8") => {
            scaled(WeightType::E4m3, Strategy::Group(group.unwrap_or(32)), Names::Plain)
        }
        Some("NVFP4" | "W4A16_NVFP4") => {
            scaled(WeightType::E2m1, even(group.unwrap_or(16))?, Names::ModelOptNvfp4)
        }
        Some(_) | None => Err(unknown(format!(
            "its `quant_algo` is `{}`",
            shown(algorithm.as_deref().unwrap_or("none"))
        ))),
    }
}

/// Groups of codes that stand two in a byte.
fn even(group: usize) -> Result<Strategy, Fault> {
    match group.is_multiple_of(2) {
        true => Ok(Strategy::Group(group)),
        false => {
            Err(unknown(format!("its `group_size` is {group}, and codes stand two in a byte")))
        }
    }
}

fn block(list: &[Value], key: &str) -> Result<[usize; 2], Fault> {
    let side = |value: &Value| {
        value.as_u64().filter(|side| (1..=1 << 20).contains(side)).map(|side| side as usize)
    };
    match list {
        [rows, values] => side(rows).zip(side(values)).map(|(rows, values)| [rows, values]),
        _ => None,
    }
    .ok_or_else(|| {
        let list = shown(&serde_json::json!(list).to_string());
        Fault::malformed(format!("its `{key}` is {list}, no two sides of a block"), FETCH_AGAIN)
    })
}

fn compressed_tensors(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    // Scales of a cache belong to no weight.
    pass_over(
        keys,
        &[
            "ignore",
            "global_compression_ratio",
            "version",
            "quantization_status",
            "kv_cache_scheme",
        ],
    );
    let format = keys.text("format")?.unwrap_or("float-quantized");
    for key in ["sparsity_config", "transform_config"] {
        let dense = |value: &Value| value.get("format").is_some_and(|format| format == "dense");
        if !keys.get(key).is_some_and(dense) {
            must_be_off(keys, key)?;
        }
    }
    let groups = keys.object("config_groups")?;
    let groups = groups.ok_or_else(|| unknown("it has no `config_groups`".to_owned()))?;
    let mut found: Option<Quantised> = None;
    for name in groups.names() {
        let Some(group) = groups.object(name)? else { continue };
        pass_over(&group, &["targets", "input_activations"]);
        if group.get("output_activations").is_some() {
            return Err(unknown("it quantises output activations".to_owned()));
        }
        let format = group.text("format")?.unwrap_or(format);
        let weights = group.object("weights")?;
        let weights = weights.ok_or_else(|| unknown(format!("its `{name}` has no `weights`")))?;
        let converts = group.get("input_activations").is_some_and(Value::is_object);
        let of_group = group_of(&weights, format, converts)?;
        group.refuse_unread()?;
        if found.is_some_and(|found| found != of_group) {
            return Err(unknown("its groups quantise weights in several ways".to_owned()));
        }
        found = Some(of_group);
    }
    groups.refuse_unread()?;
    found.ok_or_else(|| unknown("its `config_groups` are empty".to_owned()))
}

fn group_of(weights: &Keys<'_>, format: &str, converts: bool) -> Result<Quantised, Fault> {
    pass_over(weights, &["observer", "observer_kwargs", "scale_dtype", "zp_dtype", "symmetric"]);
    let bits = weights.required("num_bits")?;
    let kind = weights.text("type")?.unwrap_or("int");
    if weights.flag("dynamic")? == Some(true) {
        return Err(unknown("its weights are quantised dynamically".to_owned()));
    }
    let ordered = match weights.get("actorder") {
        None | Some(Value::Bool(false)) => false,
        Some(Value::Bool(true)) => true,
        Some(Value::String(order)) if ["group", "dynamic"].contains(&order.as_str()) => true,
        Some(Value::String(order)) if ["weight", "static"].contains(&order.as_str()) => false,
        Some(order) => {
            return Err(unknown(format!("its `actorder` is {}", shown(&order.to_string()))));
        }
    };
    let whole_row = weights.get("group_size").is_some_and(|size| size.as_i64() == Some(-1));
    let group = group_size(weights, None)?;
    let usual = match group {
        Some(_) => "group",
        None if whole_row => "channel",
        None => "tensor",
    };
    let structure = weights.get("block_structure");
    let strategy = match weights.text("strategy")?.unwrap_or(usual) {
        "tensor" => Strategy::Tensor,
        "channel" => Strategy::Channel,
        "group" | "tensor_group" => match group {
            Some(size) => Strategy::Group(size),
            None => return Err(unknown("its `strategy` is `group`, without a size".to_owned())),
        },
        "block" => match structure {
            Some(Value::Array(list)) => Strategy::Block(block(list, "block_structure")?),
            Some(Value::String(text)) => {
                let sides = text.split('x').map(|side| side.parse::<u64>().ok());
                let sides: Vec<Value> = sides.map(|s| serde_json::json!(s)).collect();
                Strategy::Block(block(&sides, "block_structure")?)
            }
            _ => return Err(unknown("its `strategy` is `block`, without sides".to_owned())),
        },
        other => return Err(unknown(format!("its `strategy` is `{}`", shown(other)))),
    };
    weights.refuse_unread()?;
    let scaled = |codes, names| Ok(Quantised::Scaled { codes, strategy, names, converts });
    match (format, kind, bits) {
        ("float-quantized" | "naive-quantized" | "mxfp8-quantized", "float", 8) => {
            scaled(WeightType::E4m3, Names::Plain)
        }
        ("int-quantized" | "naive-quantized", "int", 8) if !ordered => {
            scaled(WeightType::I8, Names::Plain)
        }
        ("nvfp4-pack-quantized", "float", 4) => {
            let (codes, names) = (WeightType::E2m1, Names::PackedNvfp4);
            Ok(Quantised::Scaled { codes, strategy: even(group.unwrap_or(16))?, names, converts })
        }
        ("mxfp4-pack-quantized", "float", 4) => {
            let (codes, names) = (WeightType::E2m1, Names::PackedMxfp4);
            Ok(Quantised::Scaled { codes, strategy: even(group.unwrap_or(32))?, names, converts })
        }
        ("pack-quantized", "int", 1..=8) => {
            let (group, one_scale) = match strategy {
                Strategy::Tensor => (None, true),
                Strategy::Channel => (None, false),
                Strategy::Group(size) => (Some(size), false),
                Strategy::Block(_) => {
                    return Err(unknown("its packed weights have scales of blocks".to_owned()));
                }
            };
            let of = PackedBy::CompressedTensors { one_scale, ordered };
            Ok(Quantised::Packed { bits: bits as usize, group, of })
        }
        ("int-quantized" | "naive-quantized", "int", 8) => {
            Err(unknown("its codes of 8 bits are reordered".to_owned()))
        }
        (format, kind, bits) => Err(unknown(format!(
            "its weights are {bits} bits of `{}` in the format `{}`",
            shown(kind),
            shown(format)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: serde_json::Value) -> Result<Quantised, Fault> {
        let serde_json::Value::Object(map) = json else { panic!("an object") };
        read(&Keys::new(&map, "quantization_config.".to_owned()))
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let said = |json| format!("{:?}", of(json).expect_err("refused"));
        let group = |weights: serde_json::Value| {
            serde_json::json!({ "quant_method": "compressed-tensors",
                "config_groups": { "group_0": { "targets": ["Linear"], "weights": weights } } })
        };
        for (json, word) in [
            (serde_json::json!({ "quant_method": "hqq", "bits": 4 }), "hqq"),
            (serde_json::json!({ "quant_method": "awq", "bits": 3 }), "3 bits"),
            (serde_json::json!({ "quant_method": "awq", "bits": 4, "version": "gemv" }), "gemv"),
            (serde_json::json!({ "quant_method": "gptq", "bits": 5 }), "5 bits"),
            (serde_json::json!({ "quant_method": "gptq", "bits": 4, "group_size": 0 }), "is 0"),
            (
                serde_json::json!({ "quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin" }),
                "marlin",
            ),
            (
                serde_json::json!({ "quant_method": "gptq", "bits": 4,
                    "checkpoint_format": "gptq_v2", "format": "gptq" }),
                "`gptq_v2` and its `format` is `gptq`",
            ),
            (
                serde_json::json!({ "quant_method": "gptq", "bits": 4,
                    "dynamic": { "+:.*down.*": { "bits": 8 } } }),
                "dynamic",
            ),
            (
                serde_json::json!({ "quant_method": "modelopt", "quant_algo": "W4A8_AWQ" }),
                "W4A8_AWQ",
            ),
            (serde_json::json!({ "load_in_4bit": true, "load_in_8bit": true }), "load_in_8bit"),
            (serde_json::json!({ "quant_method": "fp8", "fmt": "e3m4" }), "e3m4"),
            (serde_json::json!({ "quant_method": "fp8", "magic": 3 }), "magic"),
            (serde_json::json!({ "quant_method": "fp8", "weight_block_size": [128] }), "[128]"),
            (serde_json::json!({ "quant_method": "fp8", "weight_block_size": [0, 4] }), "[0,4]"),
            (group(serde_json::json!({ "num_bits": 4, "type": "int" })), "4 bits"),
            (group(serde_json::json!({ "num_bits": 8, "strategy": "token" })), "token"),
            (group(serde_json::json!({ "num_bits": 8, "strategy": "group" })), "without a size"),
            (group(serde_json::json!({ "num_bits": 8, "wild": 1 })), "wild"),
        ] {
            let said = said(json);
            assert!(said.contains(word), "{word}: {said}");
        }
    }

    #[test]
    fn what_files_of_today_say_is_read() {
        let deepseek = serde_json::json!({ "activation_scheme": "dynamic", "fmt": "e4m3",
            "quant_method": "fp8", "weight_block_size": [128, 128] });
        let scaled =
            |codes, strategy, names| Quantised::Scaled { codes, strategy, names, converts: true };
        let block = Strategy::Block([128, 128]);
        let wanted = scaled(WeightType::E4m3, block, Names::Inverse);
        assert_eq!(of(deepseek).expect("read"), wanted);
        let neural_magic = serde_json::json!({ "quant_method": "compressed-tensors",
            "format": "float-quantized", "global_compression_ratio": 1.5, "ignore": ["lm_head"],
            "kv_cache_scheme": null, "quantization_status": "compressed", "version": "0.9",
            "config_groups": { "group_0": { "input_activations": { "dynamic": true, "num_bits": 8 },
                "output_activations": null, "targets": ["Linear"], "weights": { "actorder": null,
                "block_structure": null, "dynamic": false, "group_size": null, "num_bits": 8,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "channel",
                "symmetric": true, "type": "float" } } } });
        let wanted = scaled(WeightType::E4m3, Strategy::Channel, Names::Plain);
        assert_eq!(of(neural_magic).expect("read"), wanted);
    }
}
