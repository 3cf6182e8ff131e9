//! Models: a file or folder of weights becomes checked hyperparameters and named tensors.
//!
//! A model is mapped, not read: opening it costs its header, and a tensor is
//! decoded when somebody asks for its rows. Whatever the forward pass needs is
//! checked on opening, so that it cannot fail later for want of a tensor or a
//! shape. It knows nothing of arms, recipes or stages.

mod architecture;
mod blocks;
mod chat;
mod chat_python;
mod config;
mod error;
mod gathered;
mod gguf;
mod gguf_fused;
mod gguf_parts;
mod gguf_writer;
mod hf_config;
mod json;
#[cfg(test)]
mod known_keys;
mod mixture;
mod other_files;
mod quantised;
mod safetensors;
pub mod synthetic;
mod tokenizer;
mod tokenizer_class;
mod tokenizer_config;
mod tokenizer_parts;
mod weights;

use std::collections::btree_map::Entry as MapEntry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::files::{self, Mapped};
use crate::text::Shown;
pub use architecture::{Activation, Architecture, Biases, Presence, RopeLayout};
pub use chat::Chat;
use chat::ChatTemplate;
pub use config::{
    Caps, Config, DeltaNet, Experts, Factors, Latent, Rope, RouterScores, Routing, Scaling, Sliding,
};
pub use error::ModelError;
use error::{FETCH_AGAIN, Fault, OTHER_MODEL};
use gathered::{Gathered, Gathering};
use quantised::{Activations, Assembled, Coded, Coding, Part, Piece, Pieces, Quantised};
pub(crate) use quantised::{HeldBlocks, HeldCodes};
use safetensors::Held;
use tokenizer::{Tokenizer, TokenizerFault};
use tokenizer_config::TokenizerConfig;
use weights::Steps;
pub use weights::{Weight, WeightType};

/// GGUF's name for the divisors of RoPE's frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";
/// And for those of LongRoPE: within the original context, and beyond it.
const LONG_ROPE_FACTORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];
/// `config.json` and the like are far smaller.
const LARGEST_SMALL_FILE: u64 = 64 << 20;

/// An opened model.
pub struct Model {
    path: PathBuf,
    config: Config,
    /// Tensors name theirs by index.
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Place>,
    /// What a folder's files call the tensors, by their canonical names.
    called: BTreeMap<String, String>,
    vocabulary: Vocabulary,
    tokenizer: OnceLock<Result<Tokenizer, TokenizerFault>>,
}

/// A file of weights.
struct MappedFile {
    path: PathBuf,
    map: Mapped,
    /// None for bytes in memory.
    opened: Option<OpenedFile>,
}

/// A file as it was when it was opened.
pub(crate) struct OpenedFile {
    file: File,
    facts: Metadata,
}

/// Where a tensor's bytes come from.
pub struct Origin<'a> {
    /// The file.
    pub path: &'a Path,
    /// What the file system said of the file when it was opened.
    pub facts: &'a Metadata,
    /// The first byte in the file.
    pub offset: usize,
}

/// Where a tensor stands; checked to lie inside its file and to fit its shape.
#[derive(Clone, Debug)]
struct Place {
    file: usize,
    bytes: Range<usize>,
    kind: WeightType,
    rows: usize,
    width: usize,
    /// Whether the file holds the values less one.
    less_one: bool,
    /// What makes values of codes, where they are codes.
    coded: Option<Box<Coded>>,
    /// How values lie among the bytes, where rows do not follow one another.
    steps: Option<Steps>,
    /// Whether the highest byte of a number comes first.
    big_endian: bool,
    /// What the values of the blocks are multiplied by.
    second_scale: Option<f32>,
    /// The tensors that its rows stand in, where these are two.
    gathered: Option<Box<Gathered>>,
}

/// Where the tokenizer comes from when it is first needed.
enum Vocabulary {
    Gguf(gguf::Header),
    Folder,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Model({})", self.path.shown())
    }
}

impl Model {
    /// Opens a GGUF file, told by its content, or a folder with `config.json` and
    /// safetensors.
    ///
    /// The files are mapped. Somebody who changes one while it is open changes the
    /// tensors under the program, and one who truncates it ends the program, which names it.
    pub fn open(path: &Path) -> Result<Model, ModelError> {
        let metadata = std::fs::metadata(path).map_err(|source| io("open", path, source))?;
        if metadata.is_dir() {
            Model::open_folder(path)
        } else {
            let (map, opened) = map(path)?;
            let first = MappedFile { path: path.to_owned(), map, opened: Some(opened) };
            let others = gguf_parts::others(path, &first.map)?;
            Model::open_gguf(first, others)
        }
    }

    /// Opens a GGUF file that is already in memory; `path` is its name in errors.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Model, ModelError> {
        // In a map, so that the tensors are aligned as in a file.
        let map = Mapped::copy(bytes).map_err(|source| io("copy", path, source))?;
        Model::open_gguf(MappedFile { path: path.to_owned(), map, opened: None }, Vec::new())
    }

    /// A GGUF file, and the other parts of it where it is split.
    fn open_gguf(first: MappedFile, others: Vec<MappedFile>) -> Result<Model, ModelError> {
        let path = first.path.clone();
        let path = path.as_path();
        if !gguf::is_gguf(&first.map) {
            other_files::refuse_unfetched(&first.map).map_err(|fault| fault.at(path))?;
            return Err(Fault::malformed(
                "it does not begin with the bytes `GGUF`",
                "give a GGUF file or a folder with config.json and safetensors",
            )
            .at(path));
        }
        let mut header = gguf::Header::parse(&first.map).map_err(|fault| fault.at(path))?;
        let mut files = vec![first];
        files.extend(others);
        let held = gguf_parts::tensors(&mut header, &files)?;
        let names = held.iter().map(|(_, info)| info.name.as_str());
        other_files::refuse(&header, &files[0].map, names)
            .and_then(|()| config::architecture_of(&header, &files[0].map).map(drop))
            .map_err(|fault| fault.at(path))?;
        let mut tensors = BTreeMap::new();
        for (file, info) in &held {
            let gguf::TensorInfo { name, kind, rows, width, bytes, .. } = info;
            let (file, kind, rows, width, bytes) = (*file, *kind, *rows, *width, bytes.clone());
            let big_endian = info.order == gguf::ByteOrder::Big;
            let (less_one, coded, steps) = (false, None, None);
            tensors.insert(
                name.clone(),
                Place {
                    file,
                    bytes,
                    kind,
                    rows,
                    width,
                    less_one,
                    coded,
                    steps,
                    big_endian,
                    second_scale: None,
                    gathered: None,
                },
            );
        }
        let embedding = tensors.get("token_embd.weight").map_or(0, |place| place.rows);
        if embedding == 0 {
            return Err(missing_tensor("token_embd.weight").at(path));
        }
        let tied = !tensors.contains_key("output.weight");
        let queries = tensors.get(config::FIRST_QUERIES).map(|place| [place.rows, place.width]);
        let config = config::from_gguf(&header, &files[0].map, embedding, tied, queries);
        let config = config.map_err(|fault| fault.at(path))?;
        gguf_fused::rename(&mut tensors, config.architecture).map_err(|fault| fault.at(path))?;
        let infos = held.iter().map(|(_, info)| info);
        gguf_fused::cut(&mut tensors, infos, &config).map_err(|fault| fault.at(path))?;
        let infos = held.iter().map(|(_, info)| info);
        gathered::gather(&mut tensors, infos, &config).map_err(|fault| fault.at(path))?;
        let mut model = Model {
            path: path.to_owned(),
            config,
            files,
            tensors,
            called: BTreeMap::new(),
            vocabulary: Vocabulary::Gguf(header),
            tokenizer: OnceLock::new(),
        };
        model.take_rope_factors()?;
        model.take_second_scales()?;
        model.check_tensors().map_err(|fault| fault.at(path))?;
        Ok(model)
    }

    fn open_folder(folder: &Path) -> Result<Model, ModelError> {
        other_files::refuse_folder(folder)?;
        let json = read_small(&folder.join("config.json"))?;
        let beside = folder.join(hf_config::SIDECAR);
        let beside = beside.exists().then(|| read_small(&beside)).transpose()?;
        let (config, quantised) =
            hf_config::from_hf(&json, beside.as_deref()).map_err(|fault| fault.at(folder))?;
        let mut files = Vec::new();
        let mut tensors: BTreeMap<String, Place> = BTreeMap::new();
        let mut called: BTreeMap<String, String> = BTreeMap::new();
        // What makes weights of codes; a piece may stand in another file than the rest.
        let mut coded: BTreeMap<Vec<(String, usize)>, Pieces> = BTreeMap::new();
        for safetensors::Shard { path, promised } in safetensors::files(folder)? {
            let (map, opened) = map(&path)?;
            let file = files.len();
            let contents = safetensors::parse(&map, &config, quantised.as_ref());
            let contents = contents.map_err(|fault| fault.at(&path))?;
            check_promise(&contents.names, promised, &config, quantised.is_some())
                .map_err(|fault| fault.at(&path))?;
            called.extend(contents.called);
            let twice = |name: &str| {
                let fault = Fault::malformed("two files hold it", FETCH_AGAIN).in_tensor(name);
                fault.called(|name| called.get(name).cloned()).at(&path)
            };
            for held in contents.held {
                let tensor = match held {
                    Held::Tensor(tensor) => tensor,
                    Held::Piece { weights, part, piece } => {
                        let name = weights.first().map_or_else(String::new, |(n, _)| n.clone());
                        let pieces = coded.entry(weights).or_default();
                        if pieces.insert(part, Piece { file, ..piece }).is_some() {
                            return Err(twice(&name));
                        }
                        continue;
                    }
                };
                let safetensors::TensorInfo { name, kind, rows, width, bytes, steps } = tensor;
                // The norm within a delta net holds its gain itself.
                let less_one = config.architecture.gains_less_one()
                    && name.ends_with("norm.weight")
                    && !name.ends_with("ssm_norm.weight");
                match tensors.entry(name) {
                    MapEntry::Vacant(entry) => {
                        entry.insert(Place {
                            file,
                            bytes,
                            kind,
                            rows,
                            width,
                            less_one,
                            coded: None,
                            steps,
                            big_endian: false,
                            second_scale: None,
                            gathered: None,
                        });
                    }
                    MapEntry::Occupied(entry) => return Err(twice(entry.key())),
                }
            }
            files.push(MappedFile { path, map, opened: Some(opened) });
        }
        let mut model = Model {
            path: folder.to_owned(),
            config,
            files,
            tensors,
            called,
            vocabulary: Vocabulary::Folder,
            tokenizer: OnceLock::new(),
        };
        if quantised.is_some_and(|quantised| quantised.reads_input_scales()) {
            let checked = model.check_input_scales(&coded, quantised::activations(&json));
            checked.map_err(|fault| fault.at(folder))?;
        }
        let put = model.put_together(coded, quantised.as_ref());
        put.map_err(|fault| model.told(fault))?;
        if quantised.is_some_and(|quantised| quantised.has_idle_biases()) {
            model.drop_idle_biases();
        }
        let dropped = model.drop_tied_copy();
        dropped.map_err(|fault| model.told(fault))?;
        let stacked = gathered::stack_head_norms(&mut model.tensors, &model.config);
        stacked.map_err(|fault| model.told(fault))?;
        model.check_tensors().map_err(|fault| model.told(fault))?;
        Ok(model)
    }

    /// What a folder's files call the tensor of this canonical name, or would; none of a GGUF file.
    pub(crate) fn name_in_file(&self, canonical: &str) -> Option<String> {
        if !matches!(self.vocabulary, Vocabulary::Folder) {
            return None;
        }
        let own = self.called.get(canonical).cloned();
        own.or_else(|| safetensors::usual_name(canonical, &self.config))
    }

    /// A fault of the folder, with the name that its files give the tensor.
    fn told(&self, fault: Fault) -> ModelError {
        fault.called(|name| self.name_in_file(name)).at(&self.path)
    }

    /// Refuses weights with a scale of activations beside weights without one, where the config
    /// says that all have it, that none has it, or nothing.
    fn check_input_scales(
        &self,
        coded: &BTreeMap<Vec<(String, usize)>, Pieces>,
        activations: Activations,
    ) -> Result<(), Fault> {
        let of_codes = coded.iter().filter(|(_, pieces)| pieces.contains_key(&Part::Codes));
        let (with, without): (Vec<_>, Vec<_>) =
            of_codes.partition(|(_, pieces)| pieces.contains_key(&Part::InputScale));
        let scales = |held: &[(&Vec<(String, usize)>, &Pieces)]| -> Vec<String> {
            let weights = held.iter().filter_map(|(weights, _)| weights.first());
            let names = weights.map(|(weight, _)| {
                let name = self.name_in_file(weight).unwrap_or_else(|| weight.clone());
                let layer = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
                format!("{layer}.input_scale")
            });
            names.collect()
        };
        let (with, without) = (scales(&with), scales(&without));
        let count = |names: &[String], [one, many]: [&str; 2]| match names {
            [] => format!("no weight {one} one"),
            [name] => format!("one weight {one} one (`{name}`)"),
            [first, ..] => format!("{} weights {many} one, as `{first}`", names.len()),
        };
        let [has, lacks] = [["has", "have"], ["lacks", "lack"]];
        match (activations, with.first(), without.first()) {
            (Activations::Static(words), _, Some(lacking)) => Err(Fault::malformed(
                format!(
                    "it is missing, and {words} in `quantization_config`, which says that the file \
                     holds a scale for the activations of every weight in codes; {}, and {}",
                    count(&with, has),
                    count(&without, lacks),
                ),
                "fetch all files of the model again, or correct the config if activations are \
                 scaled as they come",
            )
            .in_tensor(lacking)),
            (Activations::Dynamic(words), Some(odd), _) => Err(Fault::malformed(
                format!(
                    "it is a static scale of activations, and {words} in `quantization_config`, \
                     which says that activations are scaled as they come; {}",
                    count(&with, has),
                ),
                "correct the config if the scales are meant, or remove these tensors",
            )
            .in_tensor(odd)),
            (Activations::Unsaid, Some(_), Some(lacking)) => Err(Fault::malformed(
                format!(
                    "it is missing, and `quantization_config` does not say whether the scales of \
                     activations are static; {}, and {}",
                    count(&with, has),
                    count(&without, lacks),
                ),
                "fetch all files of the model again, or write in the config which is meant",
            )
            .in_tensor(lacking)),
            _ => Ok(()),
        }
    }

    /// Makes weights of their codes and what belongs to them.
    fn put_together(
        &mut self,
        coded: BTreeMap<Vec<(String, usize)>, Pieces>,
        quantised: Option<&Quantised>,
    ) -> Result<(), Fault> {
        if quantised.is_some() && coded.is_empty() {
            return Err(Fault::malformed(
                "`quantization_config` says that weights are codes, and none is",
                "remove `quantization_config` if the weights are plain, or fetch the file again",
            ));
        }
        for (weights, pieces) in coded {
            let Some(quantised) = quantised else { continue };
            let names = weights.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
            let own = names.first().and_then(|name| self.name_in_file(name));
            let names = own.unwrap_or_else(|| names.join(" and "));
            let broken =
                |problem: String| Fault::malformed(problem, FETCH_AGAIN).in_tensor(names.clone());
            let plain = weights.iter().find_map(|(name, _)| self.tensors.get(name));
            // Of a layer that was not quantised, after all.
            if plain.is_some() && pieces.keys().all(|part| *part == Part::InputScale) {
                continue;
            }
            if let Some(Place { kind, .. }) = plain {
                return Err(broken(format!("there are scales of it, and it is {kind}, no codes")));
            }
            let whole = quantised.assemble(pieces, &self.files);
            let Assembled { kind, rows, width, coded } =
                whole.map_err(|fault| fault.in_tensor(names.clone()))?;
            let parts: Vec<(String, usize)> = match <[_; 1]>::try_from(weights) {
                Ok([(name, _)]) => vec![(name, rows)],
                Err(parts) => parts,
            };
            let held: usize = parts.iter().map(|(_, rows)| rows).sum();
            if held != rows {
                return Err(broken(format!(
                    "it has {rows} rows, and what it holds by the config has {held}"
                )));
            }
            let mut first = 0;
            for (name, rows) in parts {
                let (file, bytes) = coded.place();
                let place = Place {
                    file,
                    bytes,
                    kind,
                    rows,
                    width,
                    less_one: false,
                    coded: Some(Box::new(coded.from(first))),
                    steps: None,
                    big_endian: false,
                    second_scale: None,
                    gathered: None,
                };
                self.tensors.insert(name, place);
                first += rows;
            }
        }
        Ok(())
    }

    /// Drops biases of zeros that the architecture has no use for.
    fn drop_idle_biases(&mut self) {
        let blocks = (0..self.config.layers).flat_map(|layer| self.config.expected_in_block(layer));
        let used: BTreeSet<String> = blocks.map(|expected| expected.name).collect();
        let files = &self.files;
        self.tensors.retain(|name, place| {
            let idle = name.ends_with(".bias") && !used.contains(name);
            let zero = || files[place.file].map[place.bytes.clone()].iter().all(|&byte| byte == 0);
            !(idle && zero())
        });
    }

    /// Drops a saved copy of a tied embedding, which transformers overwrites with the embedding.
    fn drop_tied_copy(&mut self) -> Result<(), Fault> {
        let (name, embedding) = ("output.weight", self.tensors.get("token_embd.weight"));
        let (Some(copy), true) = (self.tensors.get(name), self.config.tied_embeddings) else {
            return Ok(());
        };
        let bytes = |place: &Place| &self.files[place.file].map[place.bytes.clone()];
        let same = |place: &Place| match (&place.coded, &copy.coded) {
            (Some(one), Some(other)) => one.is_same(other, &self.files),
            (None, None) => place.kind == copy.kind && bytes(place) == bytes(copy),
            _ => false,
        };
        if !embedding.is_some_and(|place| same(place) || self.has_equal_values(place, copy)) {
            return Err(Fault::malformed(
                "`tie_word_embeddings` is true in config.json, or by default, and says that it is \
                 `model.embed_tokens.weight`; it is another matrix",
                "set `tie_word_embeddings` to false if both are meant, or remove the tensor",
            )
            .in_tensor("lm_head.weight"));
        }
        self.tensors.remove(name);
        Ok(())
    }

    /// Whether two tensors have the same values, be they of other types or signs of zero.
    fn has_equal_values(&self, one: &Place, other: &Place) -> bool {
        let shape = |place: &Place| (place.rows, place.width);
        let weights = [one, other].map(|place| weight_at("", place, &self.files));
        let [Ok(one_weight), Ok(other_weight)] = weights else { return false };
        let mut values = [vec![0.0; one.width], vec![0.0; one.width]];
        shape(one) == shape(other)
            && (0..one.rows).all(|row| {
                let [a, b] = &mut values;
                let read = [
                    one_weight.decode_rows(row..row + 1, a),
                    other_weight.decode_rows(row..row + 1, b),
                ];
                read.iter().all(Result::is_ok) && a == b
            })
    }

    /// Moves the tensor of RoPE's factors into the config, where every reader looks.
    fn take_rope_factors(&mut self) -> Result<(), ModelError> {
        match self.config.architecture {
            Architecture::Llama if self.has(ROPE_FACTORS) => {
                self.config.rope.factors = Some(self.rope_factors(ROPE_FACTORS)?);
            }
            Architecture::Phi3 if LONG_ROPE_FACTORS.iter().any(|name| self.has(name)) => {
                if let Some(name) = LONG_ROPE_FACTORS.iter().find(|name| !self.has(name)) {
                    return Err(missing_tensor(name).at(&self.path));
                }
                let [short, long] = LONG_ROPE_FACTORS.map(|name| self.rope_factors(name));
                let (short, long) = (short?, long?);
                // A pass beyond the original context turns all its keys by the other factors.
                if short != long {
                    let original = self.original_context()?;
                    self.config.context_length = self.config.context_length.min(original);
                }
                self.config.rope.factors = Some(short);
                self.config.rope.scaling = Some(Scaling::Long);
            }
            _ => return Ok(()),
        }
        for name in LONG_ROPE_FACTORS.iter().chain([&ROPE_FACTORS]) {
            self.tensors.remove(*name);
        }
        Ok(())
    }

    /// The context before LongRoPE's other factors hold: all of it where nothing is said.
    fn original_context(&self) -> Result<usize, ModelError> {
        let Vocabulary::Gguf(header) = &self.vocabulary else { return Ok(usize::MAX) };
        let key = "phi3.rope.scaling.original_context_length";
        let said = header.unsigned(key).map_err(|fault| fault.at(&self.path))?;
        match said.map(|positions| usize::try_from(positions).unwrap_or(usize::MAX)) {
            Some(0) => Err(Fault::malformed(format!("`{key}` is 0"), FETCH_AGAIN).at(&self.path)),
            positions => Ok(positions.unwrap_or(usize::MAX)),
        }
    }

    /// A tensor of divisors of RoPE's frequencies.
    fn rope_factors(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name)?;
        let pairs = self.config.rope.dimensions / 2;
        if (tensor.rows(), tensor.width()) != (1, pairs) || tensor.kind() != WeightType::F32 {
            return Err(Fault::malformed(
                format!(
                    "it is {} [{}, {}], not F32 [1, {pairs}]",
                    tensor.kind(),
                    tensor.rows(),
                    tensor.width()
                ),
                FETCH_AGAIN,
            )
            .in_tensor(name)
            .at(&self.path));
        }
        let factors = tensor.to_vec()?;
        let rope = Rope { factors: Some(factors.clone()), ..self.config.rope.clone() };
        rope.check_factors().map_err(|fault| fault.in_tensor(name).at(&self.path))?;
        Ok(factors)
    }

    /// Moves the scales that stand beside NVFP4 weights into these: one for a tensor, or one for
    /// each expert. llama.cpp multiplies the product by them, which is the product with the
    /// multiplied weight. Scales of activations are dropped: no weight depends on them.
    fn take_second_scales(&mut self) -> Result<(), ModelError> {
        let is_scale = |name: &&String| name.ends_with(".scale") || name.ends_with(".input_scale");
        let names: Vec<String> = self.tensors.keys().filter(is_scale).cloned().collect();
        for name in names {
            let (stem, ending) = name.rsplit_once('.').unwrap_or((&name, ""));
            let whole = format!("{stem}.weight");
            let fused = crate::op::in_layer(&whole).and_then(|(layer, inner)| {
                let fused = gguf_fused::parts(inner, &self.config)?;
                let part = |(part, _): (String, usize)| format!("blk.{layer}.{part}");
                Some(fused.parts.into_iter().map(part).collect())
            });
            let of_experts = whole.contains("_exps.");
            let weights: Vec<String> = fused.unwrap_or_else(|| vec![whole]);
            let each = if of_experts { weights.len() } else { 1 };
            let is_nvfp4 = |name: &String| {
                self.tensors.get(name).is_some_and(|place| place.kind == WeightType::Nvfp4)
            };
            // Of others it is a tensor that nothing has a use for.
            if !weights.iter().all(is_nvfp4) {
                continue;
            }
            let bad = |problem: String| {
                Fault::malformed(problem, FETCH_AGAIN).in_tensor(name.clone()).at(&self.path)
            };
            let tensor = self.tensor(&name)?;
            let fits = tensor.rows() == 1 && [1, each].contains(&tensor.width());
            if tensor.kind() != WeightType::F32 || !fits {
                return Err(bad(format!(
                    "it is {} [{}, {}], no scale in F32 of all or of each of {each}",
                    tensor.kind(),
                    tensor.rows(),
                    tensor.width(),
                )));
            }
            let values = tensor.to_vec()?;
            if let Some(value) = values.iter().find(|value| !value.is_normal() || **value < 0.0) {
                return Err(bad(format!("it is a scale of {value}")));
            }
            if ending == "scale" {
                for (place, weight) in weights.iter().enumerate() {
                    let scale = values.get(place).or(values.first()).copied();
                    if let Some(weight) = self.tensors.get_mut(weight) {
                        weight.second_scale = scale;
                    }
                }
            }
            self.tensors.remove(&name);
        }
        Ok(())
    }

    /// Whether the tensors are exactly those that the architecture computes with.
    fn check_tensors(&self) -> Result<(), Fault> {
        let mut used = BTreeSet::new();
        let blocks = (0..self.config.layers).flat_map(|layer| self.config.expected_in_block(layer));
        // Lazily: a header that claims a million blocks fails at the first that is missing.
        for expected in self.config.expected_globals().into_iter().chain(blocks) {
            let config::Expected { name, rows, width, required } = expected;
            match self.tensors.get(&name) {
                None if required && name == "output.weight" && self.is_folder() => {
                    return Err(Fault::malformed(
                        "it is missing, and `tie_word_embeddings` is false in config.json, or by \
                         default, so that `model.embed_tokens.weight` does not stand for it",
                        "fetch all files of the model, or set `tie_word_embeddings` to true if the \
                         embedding is the output matrix",
                    )
                    .in_tensor("lm_head.weight"));
                }
                None if required => return Err(missing_tensor(&name)),
                None => continue,
                Some(place) if (place.rows, place.width) != (rows, width) => {
                    return Err(Fault::malformed(
                        format!(
                            "it is [{}, {}], but the hyperparameters make it [{rows}, {width}]",
                            place.rows, place.width
                        ),
                        FETCH_AGAIN,
                    )
                    .in_tensor(name));
                }
                // llama.cpp reads it, and computes nothing with it.
                Some(_) if self.is_bias_of_none(&name) => continue,
                Some(_) => used.insert(name),
            };
        }
        // A cache's scales are of an arm that keeps keys and values in FP8, and may be one or many.
        let of_cache = |name: &str| name.ends_with("_cache.scale");
        let unused = || self.tensors.keys().filter(|&name| !used.contains(name) && !of_cache(name));
        let owned = |name: &'_ String| Some((name.clone(), other_files::owner_of(name)?));
        if let Some((name, (what, remedy))) = unused().find_map(owned) {
            return Err(Fault::unsupported(what, remedy).in_tensor(name));
        }
        match unused().next() {
            Some(name) => Err(Fault::unsupported(
                format!(
                    "the forward pass of {} with {} blocks has no use for it",
                    self.config.architecture.name(),
                    self.config.layers
                ),
                OTHER_MODEL,
            )
            .in_tensor(name)),
            None => Ok(()),
        }
    }

    /// Whether it is the bias of a norm that is not there.
    fn is_bias_of_none(&self, name: &str) -> bool {
        let gain = name.strip_suffix("norm.bias").map(|stem| format!("{stem}norm.weight"));
        gain.is_some_and(|gain| !self.tensors.contains_key(&gain))
    }

    fn is_folder(&self) -> bool {
        matches!(self.vocabulary, Vocabulary::Folder)
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the weights.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether the model has a tensor of this canonical name, such as
    /// `blk.0.attn_q.bias`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of this canonical name.
    pub fn tensor(&self, name: &str) -> Result<Weight<'_>, ModelError> {
        let Some((name, place)) = self.tensors.get_key_value(name) else {
            return Err(ModelError::NoTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
                nearest: self.nearest(name),
            });
        };
        Ok(weight_at(name, place, &self.files)?.of(self))
    }

    /// Refuses a tensor with a value that is NaN or infinite in one of these rows; those that it has
    /// not are passed over.
    ///
    /// # Errors
    /// With the first such value's row, block and place.
    pub fn check_finite(&self, name: &str, rows: &[usize]) -> Result<(), ModelError> {
        let weight = self.tensor(name)?;
        let Some((row, column, value)) = weight.first_not_finite(rows)? else { return Ok(()) };
        let kind = weight.kind();
        let block = match kind.block_width() {
            1 => String::new(),
            width => format!(", in block {} of {kind}", column / width),
        };
        let path = self.origin(name).map_or(self.path.as_path(), |origin| origin.path);
        Err(Fault::malformed(
            format!(
                "value {column} of row {row} is {value}{block}, and what is computed with it is NaN \
                 or infinite on every arm"
            ),
            FETCH_AGAIN,
        )
        .in_tensor(name)
        .at(path))
    }

    /// The opened files of the weights, with what the file system said of them then.
    pub fn opened_files(&self) -> impl Iterator<Item = (&Path, &File, &Metadata)> {
        let opened = self.files.iter().filter_map(|file| Some((&file.path, file.opened.as_ref()?)));
        opened.map(|(path, OpenedFile { file, facts })| (path.as_path(), file, facts))
    }

    /// Where the tensor of this canonical name comes from, if it comes from a file.
    pub fn origin(&self, name: &str) -> Option<Origin<'_>> {
        let place = self.tensors.get(name)?;
        let file = self.files.get(place.file)?;
        let facts = &file.opened.as_ref()?.facts;
        Some(Origin { path: &file.path, facts, offset: place.bytes.start })
    }

    /// The canonical names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn nearest(&self, name: &str) -> Vec<String> {
        let mut names: Vec<&str> = self.names().collect();
        names.sort_by_cached_key(|candidate| strsim::levenshtein(candidate, name));
        names.into_iter().take(3).map(str::to_owned).collect()
    }

    /// The tokens of a text, with a begin-of-sequence token only if the model's own
    /// tokenizer adds one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let tokens = self.tokenizer()?.encode(text).map_err(|fault| fault.at(&self.path))?;
        self.checked(tokens)
    }

    /// The tokens of a message that the model's own chat template lays, up to where the model is to
    /// answer; what transformers' `apply_chat_template` gives with `add_generation_prompt`.
    pub fn encode_chat(&self, chat: &Chat<'_>) -> Result<Vec<u32>, ModelError> {
        let text = self.lay_chat(chat)?;
        let tokens = self.tokenizer()?.encode_laid(&text).map_err(|fault| fault.at(&self.path))?;
        self.checked(tokens)
    }

    /// The text that the model's own chat template makes of a message.
    pub fn lay_chat(&self, chat: &Chat<'_>) -> Result<String, ModelError> {
        let template = self.chat_template().map_err(|fault| fault.at(&self.path))?;
        let text = tokenizer::lay(&template, chat).map_err(|fault| fault.at(&self.path))?;
        if text.is_empty() {
            return Err(TokenizerFault::of_chat(format!(
                "its chat template ({}) rendered nothing of this conversation",
                template.place
            ))
            .at(&self.path));
        }
        Ok(text)
    }

    /// Whether the model has a chat template that can be read.
    pub fn has_chat_template(&self) -> bool {
        self.chat_template().is_ok()
    }

    fn chat_template(&self) -> Result<ChatTemplate, TokenizerFault> {
        match &self.vocabulary {
            Vocabulary::Gguf(header) => tokenizer::template_of_gguf(header, &self.files[0].map),
            Vocabulary::Folder => TokenizerConfig::of_folder(&self.path, self.config.architecture)
                .and_then(|config| config.chat_template())
                .map_err(TokenizerFault::of_chat),
        }
    }

    /// The tokens, all of which the embedding has.
    fn checked(&self, tokens: Vec<u32>) -> Result<Vec<u32>, ModelError> {
        match tokens.iter().find(|&&token| token as usize >= self.config.vocabulary) {
            None => Ok(tokens),
            Some(token) => Err(TokenizerFault::new(format!(
                "it gives token {token}, but the embedding has {} rows",
                self.config.vocabulary
            ))
            .at(&self.path)),
        }
    }

    /// The text of the tokens, special tokens spelled out.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.tokenizer()?.decode(tokens).map_err(|fault| fault.at(&self.path))
    }

    fn tokenizer(&self) -> Result<&Tokenizer, ModelError> {
        let built = self.tokenizer.get_or_init(|| match &self.vocabulary {
            Vocabulary::Gguf(header) => tokenizer::from_gguf(header, &self.files[0].map),
            Vocabulary::Folder => tokenizer::from_folder(&self.path, self.config.architecture),
        });
        built.as_ref().map_err(|fault| fault.clone().at(&self.path))
    }
}

/// The tensor that stands there.
fn weight_at<'a>(
    name: &'a str,
    place: &'a Place,
    files: &'a [MappedFile],
) -> Result<Weight<'a>, ModelError> {
    let (kind, rows, width) = (place.kind, place.rows, place.width);
    if let Some(coded) = &place.coded {
        return Ok(Weight::coded(name, kind, [rows, width], Coding::new(coded, files)));
    }
    let bytes = &files[place.file].map[place.bytes.clone()];
    if let Some(gathered) = &place.gathered {
        let gathering = Gathering::new(gathered, files);
        return Ok(Weight::gathered(name, kind, [rows, width], bytes, gathering));
    }
    let weight = match place.steps {
        None => Weight::new(name, kind, rows, width, bytes)?,
        Some(steps) => Weight::stepped(name, kind, [rows, width], bytes, steps)?,
    };
    let weight = if place.big_endian { weight.big_endian() } else { weight };
    let weight = match place.second_scale {
        Some(scale) => weight.scaled(scale),
        None => weight,
    };
    Ok(if place.less_one { weight.plus_one() } else { weight })
}

fn missing_tensor(name: &str) -> Fault {
    Fault::malformed("it is missing", "fetch all files of the model, or convert it anew")
        .in_tensor(name)
}

/// Whether a shard holds what the index says, no more and no less.
fn check_promise(
    held: &BTreeSet<String>,
    promised: Option<BTreeSet<String>>,
    config: &Config,
    quantised: bool,
) -> Result<(), Fault> {
    let Some(mut promised) = promised else { return Ok(()) };
    promised.retain(|name| safetensors::counts(name, config, quantised));
    match promised.symmetric_difference(held).next() {
        None => Ok(()),
        Some(name) => {
            let problem = if held.contains(name) {
                "the index does not place it in this file"
            } else {
                "the index places it in this file, which does not hold it"
            };
            Err(Fault::malformed(problem, FETCH_AGAIN).in_tensor(name))
        }
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> ModelError {
    ModelError::Io { action, path: path.to_owned(), source }
}

/// Reads a file that must be small.
fn read_small(path: &Path) -> Result<Vec<u8>, ModelError> {
    files::read_whole(path, LARGEST_SMALL_FILE).map_err(|source| {
        if source.kind() == std::io::ErrorKind::FileTooLarge {
            return Fault::malformed("it is larger than 64 MiB", FETCH_AGAIN).at(path);
        }
        unopened(path, source)
    })
}

/// A file that is not opened, since the system refuses or it is no file.
fn unopened(path: &Path, source: std::io::Error) -> ModelError {
    if source.kind() != std::io::ErrorKind::InvalidInput {
        return io("open", path, source);
    }
    Fault::malformed(
        "it is not a regular file",
        "give a GGUF file or a folder with config.json and safetensors",
    )
    .at(path)
}

/// Name, type, `[rows, width]` and place of a GGUF file's tensor.
pub(crate) type GgufTensor = (String, WeightType, [usize; 2], Range<usize>);

/// The tensors of any GGUF file, whatever model it holds: name, type, `[rows,
/// width]` and place.
///
/// # Errors
/// If the file is no sound GGUF file, or a big-endian one.
pub(crate) fn gguf_tensors(path: &Path, file: &[u8]) -> Result<Vec<GgufTensor>, ModelError> {
    let header = gguf::Header::parse(file).map_err(|fault| fault.at(path))?;
    if header.order == gguf::ByteOrder::Big {
        return Err(Fault::unsupported(
            "the file is big-endian, which is read as a model alone",
            "give the little-endian file",
        )
        .at(path));
    }
    let tensor =
        |info: gguf::TensorInfo| (info.name, info.kind, [info.rows, info.width], info.bytes);
    Ok(header.tensors.into_iter().map(tensor).collect())
}

/// Maps a regular file.
///
/// # Errors
/// If it cannot be opened or is no file.
pub(crate) fn map(path: &Path) -> Result<(Mapped, OpenedFile), ModelError> {
    let file = files::open(path).map_err(|source| unopened(path, source))?;
    let (map, facts) = Mapped::of(&file, path).map_err(|source| io("map", path, source))?;
    Ok((map, OpenedFile { file, facts }))
}
