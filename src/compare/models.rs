//! Two forms of a model, such as a GGUF file and the folder that it was made of: whether they are
//! the same function, and which setting, tensor, text or chat differs.
//!
//! Rows of queries and keys stand in the order in which a file's RoPE turns them, so those of one form
//! are put into the other's before they are compared; rates of decay are made of their logarithms where
//! one form holds these. Where the forms store values in other types, what
//! rounding to these leaves is no difference. Scales of activations are compared where both hold codes:
//! values alone have none. Of chat templates is compared what they make of some conversations.
//! It computes no pass.

use std::collections::BTreeSet;
use std::fmt;

use jiff::civil::date;
use serde_json::Value;

use crate::model::{Chat, Model, ModelError, RopeLayout, Weight, WeightType};

/// What two forms of a model differ in; of each pair the first is the first model's.
#[derive(Debug, Default)]
pub struct Models {
    /// Settings, by their names, and what they are.
    pub settings: Vec<(String, [Value; 2])>,
    /// Tensors that both have.
    pub tensors: Vec<Pair>,
    /// Tensors that one of them has alone.
    pub alone: [Vec<String>; 2],
    /// Texts that give other tokens, and from which token on.
    pub texts: Vec<(String, usize)>,
    /// Why texts were not compared, where they were not.
    pub no_texts: Option<String>,
    /// Weights that both hold as codes and that have another scale of activations, or one of them none.
    pub input_scales: Vec<(String, [Option<f32>; 2])>,
    /// Weights of which one form has a scale of activations, and the other holds values.
    pub input_scales_of_one: usize,
    /// Conversations of which the chat templates make other texts or tokens, and what differs.
    pub chats: Vec<(String, String)>,
    /// Why chat templates were not compared, where they were not.
    pub no_chats: Option<String>,
}

/// A tensor in both forms.
#[derive(Debug)]
pub struct Pair {
    /// Its canonical name.
    pub name: String,
    /// How its values are stored.
    pub kinds: [WeightType; 2],
    /// What differs.
    pub found: Found,
}

/// What two tensors differ in.
#[derive(Debug, PartialEq)]
pub enum Found {
    /// Nothing: the same values.
    Same,
    /// What rounding to the types in which they are stored leaves: the mean squared difference,
    /// relative to the mean square.
    Rounded(f64),
    /// More.
    Differs(Difference),
}

/// More than rounding.
#[derive(Debug, PartialEq)]
pub enum Difference {
    /// Rows and width.
    Shape([[usize; 2]; 2]),
    /// Its rows are put in the order of so many heads, and it has another number.
    Heads {
        /// How many they were put in order for.
        taken: usize,
        /// How many there are.
        has: usize,
    },
    /// Its rows are in the order of the other form's RoPE.
    Order,
    /// All values are multiplied by this.
    Factor(f64),
    /// One is added to all values, or was left out.
    One,
    /// So many values differ, most of all this one, by its row and its place in it.
    Values {
        /// How many differ.
        count: usize,
        /// The largest difference.
        most: f64,
        /// The row, and the place in it.
        at: [usize; 2],
    },
}

impl Models {
    /// Whether the two are the same function, but for rounding.
    pub fn are_same(&self) -> bool {
        let differs = |pair: &Pair| matches!(pair.found, Found::Differs(_));
        self.settings.is_empty()
            && self.input_scales.is_empty()
            && self.chats.is_empty()
            && self.alone.iter().all(Vec::is_empty)
            && self.texts.is_empty()
            && !self.tensors.iter().any(differs)
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::Shape([[a, b], [c, d]]) => {
                write!(f, "it is [{a}, {b}] in one and [{c}, {d}] in the other")
            }
            Difference::Heads { taken, has } => {
                write!(f, "its rows were put in order as those of {taken} heads, and it has {has}")
            }
            Difference::Order => {
                write!(f, "its rows are in the order of the other form: they were not put in order")
            }
            Difference::Factor(factor) => {
                write!(f, "all values of the second are {factor:.6} times the first's")
            }
            Difference::One => write!(f, "the values differ by 1: gains are kept less one, or not"),
            Difference::Values { count, most, at: [row, value] } => {
                write!(
                    f,
                    "{count} values differ, most of all row {row}, value {value}: by {most:.3e}"
                )
            }
        }
    }
}

/// Texts whose tokens are compared.
const TEXTS: [&str; 6] = [
    "The quick brown fox jumps over the lazy dog.",
    " Hello,\n\n  world!\tIt's 1234567 o'clock",
    "\u{e9}t\u{e9} \u{4f60}\u{597d} \u{1f642}\u{1f469}\u{200d}\u{1f4bb}",
    "def f(x):\n    return {'a': x ** 2}",
    "<s>[INST] hi [/INST]</s><|im_start|>user<|im_end|>",
    "",
];

/// Compares two forms of a model.
///
/// # Errors
/// If a tensor cannot be read.
pub fn compare(first: &Model, second: &Model) -> Result<Models, ModelError> {
    let mut found = Models { settings: settings(first, second), ..Models::default() };
    // Rates and their logarithms are one tensor.
    let [a, b] = [first, second].map(|model| model.config().delta.as_ref());
    let mixed = a.zip(b).is_some_and(|(a, b)| a.rates_are_logs != b.rates_are_logs);
    let known = |name: &str| match name.strip_suffix(LOGARITHMS).filter(|_| mixed) {
        Some(block) => format!("{block}{RATES}"),
        None => name.to_owned(),
    };
    let of = |model: &Model| model.names().map(known).collect::<BTreeSet<String>>();
    let [a, b] = [of(first), of(second)];
    for name in a.union(&b) {
        let tensors = [first, second].map(|model| tensor(model, name));
        let [Some(one), Some(other)] = tensors else {
            found.alone[usize::from(tensors[0].is_none())].push(name.clone());
            continue;
        };
        let (one, other) = (one?, other?);
        let kinds = [one.kind(), other.kind()];
        let scales = [one.input_scale(), other.input_scale()];
        if one.is_scaled() && other.is_scaled() {
            if scales[0].map(f32::to_bits) != scales[1].map(f32::to_bits) {
                found.input_scales.push((name.clone(), scales));
            }
        } else {
            found.input_scales_of_one += usize::from(scales.iter().any(Option::is_some));
        }
        let found_here = differences([first, second], name, [one, other])?;
        found.tensors.push(Pair { name: name.clone(), kinds, found: found_here });
    }
    compare_chats([first, second], &mut found);
    for text in TEXTS {
        match (first.encode(text), second.encode(text)) {
            (Ok(a), Ok(b)) if a == b => {}
            (Ok(a), Ok(b)) => {
                let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
                found.texts.push((text.to_owned(), same));
            }
            (Err(error), _) | (_, Err(error)) => {
                found.no_texts = Some(error.to_string());
                break;
            }
        }
    }
    Ok(found)
}

/// Conversations that are laid: what they are called, the system's message and the user's.
const CHATS: [(&str, Option<&str>, &str); 3] = [
    ("a message", None, "Hello, who are you?"),
    ("a message after a system's", Some("Be brief."), "Hello, who are you?"),
    ("a message with spaces around it", None, " 1 + 1\n"),
];

/// What the chat templates make of some conversations.
fn compare_chats(models: [&Model; 2], found: &mut Models) {
    match models.map(Model::has_chat_template) {
        [true, true] => {}
        // Of forms that have none nothing can differ.
        [false, false] => return,
        [first, _] => {
            let lacking = if first { "second" } else { "first" };
            found.no_chats = Some(format!("the {lacking} has none that can be read"));
            return;
        }
    }
    for (name, system, user) in CHATS {
        let chat = Chat { user, system, now: date(2026, 7, 4).at(9, 5, 0, 0) };
        let what = match models.map(|model| model.lay_chat(&chat)) {
            [Ok(one), Ok(other)] if one == other => {
                let [one, other] = models.map(|model| model.encode_chat(&chat));
                // Where a text has no tokens, that is said of texts.
                match (one, other) {
                    (Ok(one), Ok(other)) if one != other => {
                        let same = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
                        format!("the same text, and other tokens, from token {same} on")
                    }
                    _ => continue,
                }
            }
            [Ok(one), Ok(other)] => {
                let same = one.chars().zip(other.chars()).take_while(|(a, b)| a == b).count();
                format!("other text, from character {same} on")
            }
            [Err(_), Err(_)] => continue,
            [Err(error), Ok(_)] => format!("the first lays no text: {error}"),
            [Ok(_), Err(error)] => format!("the second lays no text: {error}"),
        };
        found.chats.push((name.to_owned(), what));
    }
}

/// What names of rates of decay end in, and of their logarithms.
const RATES: &str = ".ssm_a";
const LOGARITHMS: &str = ".ssm_a_log.weight";
/// The square of what is left of a rate that was made of its logarithm, relative to its square.
const RATE_ROUNDED: f64 = 1e-12;

/// Rates of decay, of which one form holds the logarithms.
fn rates(weights: [Weight<'_>; 2]) -> Result<Found, ModelError> {
    let of = |weight: Weight<'_>| -> Result<Vec<f32>, ModelError> {
        let values = weight.to_vec()?;
        Ok(match weight.name().ends_with(LOGARITHMS) {
            true => values.into_iter().map(|log| -libm::exp(f64::from(log)) as f32).collect(),
            false => values,
        })
    };
    let [one, other] = weights;
    let mut sums = Sums::new(RATE_ROUNDED);
    sums.add(&of(one)?, &of(other)?, 0, one.width());
    Ok(sums.found(one.width()))
}

/// The tensor of that name; where a form ties the output matrix, the embedding is that.
fn tensor<'m>(model: &'m Model, name: &str) -> Option<Result<Weight<'m>, ModelError>> {
    let logarithms = name.strip_suffix(RATES).map(|block| format!("{block}{LOGARITHMS}"));
    let name = match &logarithms {
        Some(logarithms) if !model.has(name) => logarithms,
        _ => name,
    };
    let tied = name == "output.weight" && !model.has(name) && model.config().tied_embeddings;
    let name = if tied { "token_embd.weight" } else { name };
    model.has(name).then(|| model.tensor(name))
}

/// Settings that a pass depends on and that differ; the order of RoPE's values, and whether rates are
/// logarithms, is the file's.
fn settings(first: &Model, second: &Model) -> Vec<(String, [Value; 2])> {
    let mut found = Vec::new();
    let of = |model: &Model| {
        let config = model.config();
        let mut all = config.parameters();
        if let Some(all) = all.as_object_mut() {
            for (name, size) in [
                ("layers", config.layers),
                ("hidden", config.hidden),
                ("ffn", config.ffn),
                ("vocabulary", config.vocabulary),
            ] {
                all.insert(name.to_owned(), Value::from(size));
            }
        }
        all
    };
    walk("", &of(first), &of(second), &mut found);
    found
}

fn walk(name: &str, a: &Value, b: &Value, found: &mut Vec<(String, [Value; 2])>) {
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * a.abs().max(b.abs());
    let numbers = |a: &Value, b: &Value| a.as_f64().zip(b.as_f64());
    match (a, b) {
        (Value::Object(one), Value::Object(other)) => {
            let keys: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            let of_file = |key: &&String| ["layout", "rates_are_logs"].contains(&key.as_str());
            for key in keys.into_iter().filter(|key| !of_file(key)) {
                let inner = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                let of = |map: &serde_json::Map<String, Value>| {
                    map.get(key).cloned().unwrap_or(Value::Null)
                };
                walk(&inner, &of(one), &of(other), found);
            }
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            let same =
                |(a, b): (&Value, &Value)| a == b || numbers(a, b).is_some_and(|(a, b)| near(a, b));
            if !one.iter().zip(other).all(same) {
                found.push((name.to_owned(), [a.clone(), b.clone()]));
            }
        }
        _ if a == b || numbers(a, b).is_some_and(|(a, b)| near(a, b)) => {}
        _ => found.push((name.to_owned(), [a.clone(), b.clone()])),
    }
}

/// Values that are compared at a time.
const CHUNK: usize = 1 << 20;

fn differences(
    models: [&Model; 2],
    name: &str,
    weights: [Weight<'_>; 2],
) -> Result<Found, ModelError> {
    let [one, other] = weights;
    let shapes = [one, other].map(|weight| [weight.rows(), weight.width()]);
    if shapes[0] != shapes[1] {
        return Ok(Found::Differs(Difference::Shape(shapes)));
    }
    if one.name().ends_with(LOGARITHMS) != other.name().ends_with(LOGARITHMS) {
        return rates(weights);
    }
    let bound = bound(one.kind()) + bound(other.kind());
    if let Some(heads) = turned(models, name) {
        return turned_rows(models, heads, weights, bound);
    }
    let (rows, width) = (one.rows(), one.width());
    let chunk = (CHUNK / width).max(1);
    let mut sums = Sums::new(bound);
    for first in (0..rows).step_by(chunk) {
        let rows = first..rows.min(first + chunk);
        let mut values = [(); 2].map(|()| vec![0.0; rows.len() * width]);
        for (weight, values) in weights.iter().zip(&mut values) {
            weight.decode_rows(rows.clone(), values)?;
        }
        sums.add(&values[0], &values[1], first, width);
    }
    Ok(sums.found(width))
}

/// Query and key projections whose rows the forms keep in different orders: how many heads.
fn turned(models: [&Model; 2], name: &str) -> Option<usize> {
    let [a, b] = models.map(Model::config);
    let (_, part) = crate::op::in_layer(name)?;
    let heads = match part {
        "attn_q.weight" | "attn_q.bias" => a.heads,
        "attn_k.weight" | "attn_k.bias" => a.kv_heads,
        _ => return None,
    };
    let fits = (a.heads, a.kv_heads, a.head_dim) == (b.heads, b.kv_heads, b.head_dim);
    (fits && a.rope.layout != b.rope.layout && a.latent.is_none()).then_some(heads)
}

/// Where the rows of so many heads go from one order of RoPE's values to the other: row `n` of the
/// result is row `order[n]`.
fn order(model: &Model, rows: usize, heads: usize) -> Vec<usize> {
    let rope = &model.config().rope;
    let head_dim = rows / heads;
    let half = rope.dimensions.min(head_dim) / 2;
    let start = if rope.at_end { head_dim - 2 * half } else { 0 };
    let of_head = |place: usize| match (place.checked_sub(start), rope.layout) {
        (Some(turned), _) if turned >= 2 * half => place,
        (None, _) => place,
        // From halves to neighbours, or back.
        (Some(turned), RopeLayout::Interleaved) => start + turned % 2 * half + turned / 2,
        (Some(turned), RopeLayout::Halves) => start + turned % half * 2 + turned / half,
    };
    (0..rows).map(|row| row / head_dim * head_dim + of_head(row % head_dim)).collect()
}

fn turned_rows(
    [first, _]: [&Model; 2],
    heads: usize,
    [one, other]: [Weight<'_>; 2],
    bound: f64,
) -> Result<Found, ModelError> {
    let (own, theirs) = (one.to_vec()?, other.to_vec()?);
    // A bias is one row of as many values.
    let (rows, width) = match one.rows() {
        1 => (one.width(), 1),
        rows => (rows, one.width()),
    };
    let put = |order: Option<&[usize]>| {
        let Some(order) = order else { return theirs.clone() };
        order.iter().flat_map(|&row| theirs[row * width..(row + 1) * width].to_vec()).collect()
    };
    let fits = |order: Option<&[usize]>| {
        let mut sums = Sums::new(bound);
        sums.add(&own, &put(order), 0, width);
        sums.found(width)
    };
    let found = fits(Some(&order(first, rows, heads)));
    if !matches!(found, Found::Differs(_)) {
        return Ok(found);
    }
    // What converters are known to do wrong.
    let counts = [first.config().heads, first.config().kv_heads];
    let is_good = |found: &Found| !matches!(found, Found::Differs(_));
    for taken in counts.into_iter().filter(|&taken| taken != heads && rows.is_multiple_of(taken)) {
        // What the second form's converter did to so many heads, undone.
        let tried = order(first, rows, taken);
        if (rows / taken).is_multiple_of(2) && is_good(&fits(Some(&tried))) {
            return Ok(Found::Differs(Difference::Heads { taken, has: heads }));
        }
    }
    if is_good(&fits(None)) {
        return Ok(Found::Differs(Difference::Order));
    }
    Ok(found)
}

/// What rounding to a type leaves of values as weights have them, at most: the squared error, relative
/// to the square of a value, or of the largest of those that share a scale; and the mean squared error,
/// relative to the mean square.
fn bound(kind: WeightType) -> f64 {
    match kind {
        WeightType::F64 | WeightType::F32 => 0.0,
        WeightType::F16 => 1e-6,
        WeightType::BF16 => 1.6e-5,
        WeightType::Q8_0 | WeightType::Q8K | WeightType::I8 => 3e-4,
        WeightType::Q6K => 2e-3,
        WeightType::E4m3 => 4e-3,
        WeightType::Q5_0 | WeightType::Q5_1 | WeightType::Q5K => 8e-3,
        WeightType::E5m2 => 1.6e-2,
        // Powers of two as scales: the largest value may be cut by a quarter.
        WeightType::E2m1 | WeightType::Mxfp4 | WeightType::Nvfp4 => 0.07,
        WeightType::Packed(bits) => (4.0 * 0.25f64.powi(bits.into())).max(3e-4),
        WeightType::Q3K | WeightType::Iq3Xxs | WeightType::Iq3S => 0.1,
        WeightType::Q2K | WeightType::Iq2Xxs | WeightType::Iq2Xs | WeightType::Iq2S => 0.35,
        WeightType::Iq1S | WeightType::Iq1M | WeightType::Tq1_0 | WeightType::Tq2_0 => 0.8,
        _ => 0.03,
    }
}

/// Values that share scales, at most.
const BLOCK: usize = 256;

/// Sums over pairs of values.
#[derive(Default)]
struct Sums {
    /// What rounding leaves, see [`bound`].
    bound: f64,
    /// Values that differ by more than rounding to a grid over their block can make.
    beyond: usize,
    count: usize,
    differing: usize,
    /// The largest difference, and where.
    most: (f64, usize),
    aa: f64,
    fourth: f64,
    ab: f64,
    dd: f64,
    d: f64,
}

impl Sums {
    fn new(bound: f64) -> Sums {
        Sums { bound, ..Sums::default() }
    }

    /// Adds whole rows, of which the first has this number.
    fn add(&mut self, a: &[f32], b: &[f32], first: usize, width: usize) {
        let rows = a.chunks(width).zip(b.chunks(width)).enumerate();
        for (row, (a, b)) in rows {
            for (block, (a, b)) in a.chunks(BLOCK).zip(b.chunks(BLOCK)).enumerate() {
                self.add_block(a, b, (first + row) * width + block * BLOCK);
            }
        }
    }

    fn add_block(&mut self, a: &[f32], b: &[f32], first: usize) {
        let most = a.iter().chain(b).fold(0.0f32, |most, value| most.max(value.abs()));
        let step = self.bound.sqrt() * f64::from(most);
        for (place, (&a, &b)) in a.iter().zip(b).enumerate() {
            let (a, b) = (f64::from(a), f64::from(b));
            // A NaN in both is the same weight.
            let off = if a.is_nan() && b.is_nan() { 0.0 } else { b - a };
            self.beyond += usize::from(off.is_nan() || off.abs() > step);
            self.count += 1;
            if a.is_nan() && b.is_nan() {
                continue;
            }
            self.aa += a * a;
            self.fourth += a.powi(4);
            self.ab += a * b;
            // NaN differs from all that is a number.
            if a != b {
                self.differing += 1;
                self.d += off;
                self.dd += off * off;
                if off.is_nan() || off.abs() > self.most.0 {
                    self.most = (off.abs(), first + place);
                }
            }
        }
    }

    fn found(&self, width: usize) -> Found {
        let bound = self.bound;
        if self.differing == 0 {
            return Found::Same;
        }
        let (off, slope) = (self.dd / self.aa, self.ab / self.aa);
        // A factor that rounding to the type does not leave, nor chance where few values, or few
        // large ones, make the sums.
        let chance = 4.0 * (bound * self.fourth).sqrt() / self.aa;
        let tilt = 2e-4 + 0.3 * bound + chance;
        if self.beyond == 0 && off <= bound && (slope - 1.0).abs() <= tilt {
            return Found::Rounded(off);
        }
        let count = self.count as f64;
        let mean = self.d / count;
        let spread = (self.dd / count - mean * mean).max(0.0);
        if (mean.abs() - 1.0).abs() < 0.02 && spread <= 1e-3 {
            return Found::Differs(Difference::One);
        }
        // What is left once the factor is taken out.
        let left = (self.dd - (slope - 1.0).powi(2) * self.aa).max(0.0) / self.aa;
        if left <= bound.max(1e-12) * slope * slope && self.differing * 2 > self.count {
            return Found::Differs(Difference::Factor(slope));
        }
        let at = [self.most.1 / width, self.most.1 % width];
        let (count, most) = (self.differing, self.most.0);
        Found::Differs(Difference::Values { count, most, at })
    }
}
