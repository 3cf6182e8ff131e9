//! Quantised checkpoints of Hugging Face: codes in one tensor, their scales in another.
//!
//! It reads `quantization_config`, says how the scales of a weight must look, and decodes.
//! Formats: `fp8` of transformers (`weight_scale_inv`, one scale for a block or a tensor), and
//! compressed-tensors with 8 bits (`weight_scale`, one for a tensor, a row, a block or a group;
//! floats or integers, symmetric). A weight is its code times its scale, rounded once to f32.

use std::ops::Range;
use std::sync::OnceLock;

use super::error::{FETCH_AGAIN, Fault, OTHER_MODEL, shown};
use super::hf_config::Keys;
use super::weights::WeightType;
use crate::dtype::Format;

/// How a checkpoint's weights are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quantised {
    /// The codes.
    pub codes: WeightType,
    /// What has one scale.
    pub strategy: Strategy,
    /// How the tensor of scales is called: `weight_scale` or `weight_scale_inv`.
    pub scale: &'static str,
}

/// What of a weight has one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strategy {
    /// All of it.
    Tensor,
    /// A row.
    Channel,
    /// So many values of a row.
    Group(usize),
    /// So many rows of so many values.
    Block([usize; 2]),
}

impl Strategy {
    /// Rows and values of a block.
    fn block(self, rows: usize, width: usize) -> [usize; 2] {
        match self {
            Strategy::Tensor => [rows, width],
            Strategy::Channel => [1, width],
            Strategy::Group(values) => [1, values],
            Strategy::Block(block) => block,
        }
    }
}

/// The scales of a weight in their file: row-major, a scale for each block; blocks at the edges
/// may be cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scales<'a> {
    pub kind: WeightType,
    pub bytes: &'a [u8],
    /// Rows and values of a block.
    pub block: [usize; 2],
    /// Bytes from one row of scales to the next, where these do not follow one another.
    pub step: Option<usize>,
}

impl Scales<'_> {
    /// The scale of a block by its row and column, of so many columns.
    fn at(&self, row: usize, column: usize, columns: usize) -> f32 {
        let bytes = |size: usize| {
            let row = row * self.step.unwrap_or(columns * size);
            &self.bytes[row + column * size..][..size]
        };
        match self.kind {
            WeightType::F16 => half::f16::from_le_bytes([bytes(2)[0], bytes(2)[1]]).to_f32(),
            WeightType::BF16 => half::bf16::from_le_bytes([bytes(2)[0], bytes(2)[1]]).to_f32(),
            WeightType::E8m0 => power_of_two(bytes(1)[0]),
            _ => f32::from_le_bytes([bytes(4)[0], bytes(4)[1], bytes(4)[2], bytes(4)[3]]),
        }
    }

    /// Decodes rows of codes, which are `width` wide; 4-bit codes stand two in a byte, the lower
    /// half first.
    pub fn decode(
        &self,
        codes: WeightType,
        bytes: &[u8],
        rows: Range<usize>,
        width: usize,
        out: &mut [f32],
    ) {
        let [tall, wide] = self.block;
        let per_row = width.div_ceil(wide);
        let table = values_of(codes);
        if codes == WeightType::E2m1 {
            let lines = out.chunks_exact_mut(width).zip(bytes.chunks_exact(width / 2));
            for (row, (out, codes)) in rows.zip(lines) {
                let parts = out.chunks_mut(wide).zip(codes.chunks(wide / 2));
                for (column, (out, codes)) in parts.enumerate() {
                    let scale = self.at(row / tall, column, per_row);
                    for (pair, code) in out.chunks_exact_mut(2).zip(codes) {
                        pair[0] = table[usize::from(code & 15)] * scale;
                        pair[1] = table[usize::from(code >> 4)] * scale;
                    }
                }
            }
            return;
        }
        let lines = out.chunks_exact_mut(width).zip(bytes.chunks_exact(width));
        for (row, (out, codes)) in rows.zip(lines) {
            let parts = out.chunks_mut(wide).zip(codes.chunks(wide));
            for (column, (out, codes)) in parts.enumerate() {
                let scale = self.at(row / tall, column, per_row);
                for (value, code) in out.iter_mut().zip(codes) {
                    *value = table[usize::from(*code)] * scale;
                }
            }
        }
    }

    /// The first scale that is no positive finite number: the first row and value of its block.
    fn first_bad(&self, rows: usize, width: usize) -> Option<(usize, usize, f32)> {
        let [tall, wide] = self.block;
        let per_row = width.div_ceil(wide);
        let places = 0..rows.div_ceil(tall) * per_row;
        let bad = |scale: &f32| !(scale.is_finite() && *scale > 0.0);
        let scales =
            places.map(|place| (place, self.at(place / per_row, place % per_row, per_row)));
        let (place, scale) = scales.into_iter().find(|(_, scale)| bad(scale))?;
        Some((place / per_row * tall, place % per_row * wide, scale))
    }
}

/// The value of each code.
fn values_of(codes: WeightType) -> &'static [f32; 256] {
    static TABLES: OnceLock<[[f32; 256]; 4]> = OnceLock::new();
    let tables = TABLES.get_or_init(|| {
        let all = |value: fn(u8) -> f32| std::array::from_fn(|code| value(code as u8));
        [
            all(|code| Format::E4m3.decode(code.into())),
            all(|code| Format::E5m2.decode(code.into())),
            all(|code| f32::from(code as i8)),
            all(|code| E2M1[usize::from(code & 15)]),
        ]
    });
    match codes {
        WeightType::E5m2 => &tables[1],
        WeightType::I8 => &tables[2],
        WeightType::E2m1 => &tables[3],
        _ => &tables[0],
    }
}

/// The values of E2M1, a float of 4 bits (OCP Microscaling Formats 1.0).
const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The value of an E8M0 code: 2^(code - 127), and NaN for 255 (OCP Microscaling Formats 1.0).
fn power_of_two(code: u8) -> f32 {
    match code {
        255 => f32::NAN,
        0 => f32::from_bits(1 << 22),
        code => f32::from_bits(u32::from(code) << 23),
    }
}

impl Quantised {
    /// The scales of a weight of that shape, which were checked before.
    pub fn of<'a>(
        &self,
        [rows, width]: [usize; 2],
        kind: WeightType,
        step: Option<usize>,
        bytes: &'a [u8],
    ) -> Scales<'a> {
        Scales { kind, bytes, block: self.strategy.block(rows, width), step }
    }

    /// How the scales of a weight of that shape stand in their tensor.
    ///
    /// # Errors
    /// If the tensor's shape is not what the strategy asks for, or a scale is no positive number.
    pub fn scales<'a>(
        &self,
        [rows, width]: [usize; 2],
        kind: WeightType,
        (shape, step): ([usize; 2], Option<usize>),
        bytes: &'a [u8],
    ) -> Result<Scales<'a>, Fault> {
        let block = self.strategy.block(rows, width);
        let [tall, wide] = block;
        let wanted = [rows.div_ceil(tall), width.div_ceil(wide)];
        if shape != wanted {
            return Err(Fault::malformed(
                format!(
                    "its scales are [{}, {}], and `quantization_config` asks for [{}, {}]: one for \
                     each {tall} rows of {wide} values",
                    shape[0], shape[1], wanted[0], wanted[1]
                ),
                FETCH_AGAIN,
            ));
        }
        if let Strategy::Group(values) = self.strategy
            && !width.is_multiple_of(values)
        {
            return Err(Fault::malformed(
                format!("its rows of {width} values are no whole groups of {values}"),
                FETCH_AGAIN,
            ));
        }
        let scales = self.of([rows, width], kind, step, bytes);
        match scales.first_bad(rows, width) {
            None => Ok(scales),
            Some((row, column, scale)) => Err(Fault::malformed(
                format!(
                    "the scale of its block at row {row}, value {column} is {scale}, no positive \
                     number"
                ),
                FETCH_AGAIN,
            )),
        }
    }
}

/// How `quantization_config` says that the weights are quantised.
///
/// # Errors
/// If it names a method, a format or a key that is not known, with its value.
pub(super) fn read(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    let read = match keys.text("quant_method")? {
        Some("fp8") => fp8(keys),
        Some("compressed-tensors") => compressed_tensors(keys),
        Some("mxfp4") => mxfp4(keys),
        Some(other) => Err(unknown(format!("its weights are quantised by `{}`", shown(other)))),
        None => Err(unknown("its `quantization_config` names no `quant_method`".to_owned())),
    }?;
    keys.refuse_unread()?;
    Ok(read)
}

fn unknown(problem: String) -> Fault {
    Fault::unsupported(
        format!("{problem}; `fp8`, `mxfp4` and 8 bits of `compressed-tensors` are read"),
        OTHER_MODEL,
    )
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
        // What transformers takes where nothing is written; null is one scale for all.
        None if !keys.names().any(|key| key == "weight_block_size") => Strategy::Block([128, 128]),
        None => Strategy::Tensor,
        Some(list) => Strategy::Block(block(list, "weight_block_size")?),
    };
    Ok(Quantised { codes, strategy, scale: "weight_scale_inv" })
}

/// gpt-oss: the experts' matrices alone. Which layers are not converted their tensors say.
fn mxfp4(keys: &Keys<'_>) -> Result<Quantised, Fault> {
    keys.get("modules_to_not_convert");
    if keys.flag("dequantize")? == Some(true) {
        return Err(unknown("its `dequantize` is true".to_owned()));
    }
    Ok(Quantised { codes: WeightType::E2m1, strategy: Strategy::Group(32), scale: "_scales" })
}

fn block(list: &[serde_json::Value], key: &str) -> Result<[usize; 2], Fault> {
    let side = |value: &serde_json::Value| {
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
    for key in ["ignore", "global_compression_ratio", "version", "quantization_status"] {
        keys.get(key);
    }
    let format = keys.text("format")?.unwrap_or("float-quantized");
    if !matches!(format, "float-quantized" | "int-quantized" | "naive-quantized") {
        return Err(unknown(format!("its `format` is `{}`", shown(format))));
    }
    for key in ["kv_cache_scheme", "sparsity_config", "transform_config"] {
        let off = |value: &serde_json::Value| {
            let dense = value.get("format").is_some_and(|format| format == "dense");
            dense || value.as_object().is_some_and(serde_json::Map::is_empty)
        };
        let given = keys.get(key).filter(|value| !off(value));
        if given.is_some() {
            return Err(unknown(format!("it has a `{key}`")));
        }
    }
    let groups = keys.object("config_groups")?;
    let groups = groups.ok_or_else(|| unknown("it has no `config_groups`".to_owned()))?;
    let mut found: Option<Quantised> = None;
    for name in groups.names() {
        let Some(group) = groups.object(name)? else { continue };
        for key in ["targets", "input_activations", "format"] {
            group.get(key);
        }
        if group.get("output_activations").is_some() {
            return Err(unknown("it quantises output activations".to_owned()));
        }
        let weights = group.object("weights")?;
        let weights = weights.ok_or_else(|| unknown(format!("its `{name}` has no `weights`")))?;
        let of_group = group_of(&weights)?;
        group.refuse_unread()?;
        if found.is_some_and(|found| found != of_group) {
            return Err(unknown("its groups quantise weights in several ways".to_owned()));
        }
        found = Some(of_group);
    }
    groups.refuse_unread()?;
    found.ok_or_else(|| unknown("its `config_groups` are empty".to_owned()))
}

fn group_of(weights: &Keys<'_>) -> Result<Quantised, Fault> {
    for key in ["observer", "observer_kwargs", "scale_dtype", "zp_dtype"] {
        weights.get(key);
    }
    let bits = weights.required("num_bits")?;
    let kind = weights.text("type")?.unwrap_or("int");
    let codes = match (bits, kind) {
        (8, "float") => WeightType::E4m3,
        (8, "int") => WeightType::I8,
        (bits, kind) => {
            return Err(unknown(format!("its weights are {bits} bits of `{}`", shown(kind))));
        }
    };
    if weights.flag("symmetric")? == Some(false) {
        return Err(unknown("its weights have zero points".to_owned()));
    }
    if weights.flag("dynamic")? == Some(true) || weights.get("actorder").is_some() {
        return Err(unknown("its weights are quantised dynamically, or reordered".to_owned()));
    }
    // -1 is a whole row.
    let group = weights.number("group_size")?;
    let structure = weights.get("block_structure");
    let strategy = match weights.text("strategy")?.unwrap_or("tensor") {
        "tensor" => Strategy::Tensor,
        "channel" => Strategy::Channel,
        "group" => match group.filter(|size| (1.0..=1048576.0).contains(size)) {
            Some(size) if size.fract() == 0.0 => Strategy::Group(size as usize),
            Some(size) => return Err(unknown(format!("its `group_size` is {size}"))),
            None => return Err(unknown("its `strategy` is `group`, without a size".to_owned())),
        },
        "block" => match structure {
            Some(serde_json::Value::Array(list)) => {
                Strategy::Block(block(list, "block_structure")?)
            }
            Some(serde_json::Value::String(text)) => {
                let sides = text.split('x').map(|side| side.parse::<u64>().ok());
                let sides: Vec<serde_json::Value> = sides.map(|s| serde_json::json!(s)).collect();
                Strategy::Block(block(&sides, "block_structure")?)
            }
            _ => return Err(unknown("its `strategy` is `block`, without sides".to_owned())),
        },
        other => return Err(unknown(format!("its `strategy` is `{}`", shown(other)))),
    };
    weights.refuse_unread()?;
    Ok(Quantised { codes, strategy, scale: "weight_scale" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: serde_json::Value) -> Result<Quantised, Fault> {
        let serde_json::Value::Object(map) = json else { panic!("an object") };
        read(&Keys::new(&map, "quantization_config.".to_owned()))
    }

    #[test]
    fn a_power_of_two_is_what_its_code_says() {
        assert_eq!(power_of_two(127), 1.0);
        assert_eq!(power_of_two(130), 8.0);
        assert_eq!(f64::from(power_of_two(0)), 2f64.powi(-127));
        assert_eq!(f64::from(power_of_two(254)), 2f64.powi(127));
        assert!(power_of_two(255).is_nan());
    }

    #[test]
    fn each_block_has_its_scale_and_blocks_at_the_edges_are_cut() {
        let scales: Vec<u8> = [1f32, 2.0, 4.0, 8.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        let block = [2, 2];
        let scales = Scales { kind: WeightType::F32, bytes: &scales, block, step: None };
        // 1.0 in E4M3.
        let codes = [0x38; 9];
        let mut out = [0.0; 9];
        scales.decode(WeightType::E4m3, &codes, 0..3, 3, &mut out);
        assert_eq!(out, [1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 4.0, 4.0, 8.0]);
        let mut last = [0.0; 3];
        scales.decode(WeightType::E4m3, &codes[..3], 2..3, 3, &mut last);
        assert_eq!(last, [4.0, 4.0, 8.0]);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let said = |json| format!("{:?}", of(json).expect_err("refused"));
        let group = |weights: serde_json::Value| {
            serde_json::json!({ "quant_method": "compressed-tensors",
                "config_groups": { "group_0": { "targets": ["Linear"], "weights": weights } } })
        };
        for (json, word) in [
            (serde_json::json!({ "quant_method": "awq", "bits": 4 }), "awq"),
            (serde_json::json!({ "quant_method": "fp8", "fmt": "e3m4" }), "e3m4"),
            (serde_json::json!({ "quant_method": "fp8", "magic": 3 }), "magic"),
            (serde_json::json!({ "quant_method": "fp8", "weight_block_size": [128] }), "[128]"),
            (serde_json::json!({ "quant_method": "fp8", "weight_block_size": [0, 4] }), "[0,4]"),
            (group(serde_json::json!({ "num_bits": 4, "type": "int" })), "4 bits"),
            (group(serde_json::json!({ "num_bits": 8, "symmetric": false })), "zero points"),
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
        let read = of(deepseek).expect("read");
        assert_eq!((read.strategy, read.scale), (Strategy::Block([128, 128]), "weight_scale_inv"));
        let neural_magic = serde_json::json!({ "quant_method": "compressed-tensors",
            "format": "float-quantized", "global_compression_ratio": 1.5, "ignore": ["lm_head"],
            "kv_cache_scheme": null, "quantization_status": "compressed", "version": "0.9",
            "config_groups": { "group_0": { "input_activations": { "dynamic": true, "num_bits": 8 },
                "output_activations": null, "targets": ["Linear"], "weights": { "actorder": null,
                "block_structure": null, "dynamic": false, "group_size": null, "num_bits": 8,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "channel",
                "symmetric": true, "type": "float" } } } });
        let read = of(neural_magic).expect("read");
        assert_eq!((read.codes, read.strategy), (WeightType::E4m3, Strategy::Channel));
    }
}
