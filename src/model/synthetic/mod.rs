//! Synthetic models: real GGUF files with real shapes and seeded values, made
//! where no weights are at hand; Hugging Face folders of some kinds.
//!
//! It decides shapes and statistics; `blocks` turns them into bytes. The same
//! preset and seed give the same bytes on every machine: random numbers come from
//! a counter, and values from IEEE operations alone, never from a platform's
//! mathematics library.
//!
//! The statistics are those that make low precision hard in real models: a few
//! channels of the residual stream carry values some 25 times larger than the
//! rest, the same channels in every layer, and the weights of a row differ in
//! size from block to block.

mod blocks;
mod folder;
mod presets;
mod random;
mod table;
mod vocabulary;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::architecture::Architecture;
use super::gguf_writer::{ALIGNMENT, HeaderWriter};
use super::weights::WeightType;
use super::{ModelError, io as io_error};
use crate::text::Shown;
use blocks::{Columns, RowWriter, stream};
use presets::Setting;
pub use presets::{LARGEST_SCALE, Preset, Scaled};

/// Part of the file's name. It grows when the same preset and seed give other bytes.
///
/// 1: the first.
const GENERATOR_VERSION: u32 = 1;
/// Bytes generated at once.
const CHUNK: usize = 8 << 20;

/// How the name of a file begins that is being made here.
pub const DRAFT: &str = ".synthetic-";
/// What the name of the note beside a model ends with: the digest that it was made with.
pub const NOTE: &str = "blake3";

/// The file or folder of a preset in `cache_dir`, made if it is not there as it was made.
pub fn ensure(
    model: impl Into<Scaled>,
    seed: u64,
    cache_dir: &Path,
) -> Result<PathBuf, ModelError> {
    ensure_by(model.into(), seed, cache_dir, &|path| {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(crate::files::open(path)?)?;
        Ok(hasher.finalize())
    })
}

/// As [`ensure`], with digests of files from somebody who may know them already.
pub fn ensure_by(
    model: Scaled,
    seed: u64,
    cache_dir: &Path,
    digest: &dyn Fn(&Path) -> io::Result<blake3::Hash>,
) -> Result<PathBuf, ModelError> {
    let name = format!("{model}-seed{seed}-v{GENERATOR_VERSION}");
    let shape = model.shape(seed);
    if !shape.is_folder() {
        let path = cache_dir.join(format!("{name}.gguf"));
        ensure_weights(model, seed, &path, digest)?;
        return Ok(path);
    }
    let folder = cache_dir.join(name);
    ensure_weights(model, seed, &folder.join(folder::WEIGHTS), digest)?;
    for (name, bytes) in folder::beside(&shape) {
        let path = folder.join(name);
        let is_there = || crate::files::read_whole(&path, bytes.len() as u64).ok();
        if is_there().is_none_or(|there| there != bytes) {
            put(&path, &bytes)
                .map_err(|error| io_error("make the synthetic model", &path, error))?;
        }
    }
    Ok(folder)
}

/// Writes a small file under its name at once.
fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = temporary_file(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(bytes)?;
    file.as_file().sync_data()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Makes the file of the weights, if it is not there as it was made.
fn ensure_weights(
    model: Scaled,
    seed: u64,
    path: &Path,
    digest: &dyn Fn(&Path) -> io::Result<blake3::Hash>,
) -> Result<(), ModelError> {
    if is_as_made(model, seed, path, digest) {
        return Ok(());
    }
    if path.is_file() {
        tracing::warn!("`{}` is not what it was when it was made; it is made again", path.shown());
    }
    let failed = |error| io_error("make the synthetic model", path, error);
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(failed)?;
    let (file, made) = draft(model, seed, folder).map_err(failed)?;
    write_note(path, made).map_err(failed)?;
    // Another runner may have made it meanwhile, and read it already.
    if let Err(unmoved) = file.persist_noclobber(path)
        && !is_as_made(model, seed, path, digest)
    {
        unmoved.file.persist(path).map_err(|error| failed(error.error))?;
    }
    Ok(())
}

/// Whether a model has the digest that its note says. Where there is no sound note, as runners
/// left none before, the model is made once more for its digest alone.
fn is_as_made(
    model: Scaled,
    seed: u64,
    path: &Path,
    digest: &dyn Fn(&Path) -> io::Result<blake3::Hash>,
) -> bool {
    if !path.is_file() {
        return false;
    }
    let noted = noted(path);
    if noted == Noted::Damaged {
        let note = path.with_extension(NOTE);
        tracing::warn!("`{}` is damaged and is not believed; it is written again", note.shown());
    }
    let made = match noted {
        Noted::Digest(made) => Some(made),
        Noted::Nothing | Noted::Damaged => {
            let mut hasher = blake3::Hasher::new();
            write(model, seed, &mut hasher).ok().map(|()| {
                let made = hasher.finalize();
                // A folder that cannot be written is as good to read from.
                let _ = write_note(path, made);
                made
            })
        }
    };
    made.is_some() && digest(path).ok() == made
}

/// What the note beside a model says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// There is none.
    Nothing,
    /// It says something else than what was written.
    Damaged,
    /// The digest that the model was made with.
    Digest(blake3::Hash),
}

/// What the note beside a model says, which is the digest and a check of its text. Earlier
/// runners wrote no check.
pub fn noted(model: &Path) -> Noted {
    const LARGEST: u64 = 1 << 10;
    let bytes = match crate::files::read_whole(&model.with_extension(NOTE), LARGEST) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => return Noted::Damaged,
        Err(_) => return Noted::Nothing,
    };
    let text = std::str::from_utf8(&bytes).ok().and_then(|text| text.strip_suffix('\n'));
    let digest = text.and_then(|text| match text.split_once(' ') {
        Some((digest, check)) => (check == check_of(digest)).then_some(digest),
        None => Some(text),
    });
    let digest = digest.and_then(|digest| blake3::Hash::from_hex(digest).ok());
    digest.map_or(Noted::Damaged, Noted::Digest)
}

fn check_of(digest: &str) -> String {
    blake3::hash(digest.as_bytes()).to_hex()[..16].to_owned()
}

fn write_note(model: &Path, made: blake3::Hash) -> io::Result<()> {
    let mut file = temporary_file(model.parent().unwrap_or(Path::new(".")))?;
    let digest = made.to_hex();
    writeln!(file, "{digest} {}", check_of(&digest))?;
    file.as_file().sync_data()?;
    file.persist(model.with_extension(NOTE)).map_err(|error| error.error)?;
    Ok(())
}

/// The model in a file that has no name yet, with its digest. It is flushed to disk: a name
/// that leads to half of it would outlive a power cut.
fn draft(
    model: Scaled,
    seed: u64,
    folder: &Path,
) -> io::Result<(tempfile::NamedTempFile, blake3::Hash)> {
    let mut file = temporary_file(folder)?;
    let mut out = Hashing { out: file.as_file_mut(), hasher: blake3::Hasher::new() };
    write(model, seed, &mut out)?;
    let made = out.hasher.finalize();
    file.as_file().sync_data()?;
    Ok((file, made))
}

/// Hashes what it writes.
struct Hashing<'a> {
    out: &'a mut std::fs::File,
    hasher: blake3::Hasher,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A file that others may read once it is published, unlike `tempfile`'s own default.
fn temporary_file(folder: &Path) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.prefix(DRAFT).tempfile_in(folder)
}

/// Writes the preset's GGUF file, or the file of its folder's weights, a few megabytes at a time.
pub fn write(model: impl Into<Scaled>, seed: u64, out: &mut (dyn Write + Send)) -> io::Result<()> {
    let model = model.into();
    let shape = model.shape(seed);
    let tensors = shape.tensors();
    let header = match shape.is_folder() {
        true => folder::header(&tensors),
        false => shape.header(&model.to_string(), seed, &tensors),
    };
    out.write_all(&header)?;
    let outliers = shape.outliers(seed);
    // The next chunk is generated while the last one is written.
    let mut ready = Vec::new();
    for tensor in &tensors {
        let row_bytes = tensor.kind.row_bytes(tensor.width);
        let chunk_rows = (CHUNK / row_bytes).max(1);
        for first in (0..tensor.rows).step_by(chunk_rows) {
            let rows = chunk_rows.min(tensor.rows - first);
            // Safetensors stand one after the other.
            let last = first + rows == tensor.rows && !shape.is_folder();
            let (written, next) = rayon::join(
                || out.write_all(&ready),
                || tensor.generate(seed, &outliers, first, rows, last),
            );
            written?;
            ready = next;
        }
    }
    out.write_all(&ready)?;
    out.flush()
}

/// Hyperparameters of a preset.
#[derive(Clone)]
struct Shape {
    architecture: Architecture,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Values of a head that RoPE turns.
    turned: usize,
    ffn: usize,
    vocabulary: usize,
    rms_norm_eps: f32,
    theta: f32,
    tied: bool,
    /// Whether the biases of Q, K and V are not zero, where it has them.
    biases: bool,
    /// What widths are multiples of the preset's own by.
    scale: usize,
    /// What its metadata say besides.
    settings: &'static [(&'static str, Setting)],
    /// Tensors of a block that it has, though its architecture does not demand them.
    besides: &'static [&'static str],
    /// Channels of the residual stream that carry large values.
    outliers: usize,
    /// Size of the weights of Q and K in `1 / sqrt(hidden)`: scores grow with its square.
    sharpness: f32,
    /// The type of every matrix, if it is not that of `Q4_K_M`.
    plain: Option<WeightType>,
}

/// A tensor to be made.
struct Planned {
    name: String,
    kind: WeightType,
    /// Matrices that lie one below the other.
    depth: usize,
    /// Rows of all of them.
    rows: usize,
    width: usize,
    values: Values,
    /// Whether the file holds them less one.
    less_one: bool,
}

/// What a tensor's values look like.
#[derive(Clone, Copy)]
enum Values {
    /// Gains around `mean`, within 40 %; those of outlier channels are `outlier` times that.
    Gain { mean: f32, outlier: f32, signed: bool },
    /// Small offsets with a few large ones.
    Bias { size: f32, spike: f32 },
    /// Llama 3's frequency divisors in shape: 1, a ramp, then 32.
    RopeFactors,
    /// A weight with this standard deviation.
    Matrix { deviation: f32, columns: Columns, rows: Rows },
}

/// Which rows of a matrix are larger than the others.
#[derive(Clone, Copy)]
enum Rows {
    /// None.
    Even,
    /// Those that write an outlier channel of the residual stream.
    Outliers,
    /// Those that read one, in a matrix that is transposed: they are small.
    Damped,
    /// One in 64: feed-forward neurons that fire hard.
    Neurons,
}

/// Standard deviation of the embedding. Its mean square, 4e-4, leaves an RMS norm's
/// epsilon of 1e-5 visible, as it is in the first layers of real models.
const EMBEDDING: f32 = 0.02;
/// What each block adds to the residual stream: it grows mildly with depth.
const ADDED: f32 = 0.5 * EMBEDDING;
/// Standard deviation of the logits.
const LOGITS: f32 = 2.5;

impl Shape {
    /// Channels of the residual stream that carry large values, ascending.
    fn outliers(&self, seed: u64) -> Vec<usize> {
        let share = self.hidden / self.outliers.max(1);
        let mut random = stream(seed, "outlier channels", 0);
        (0..self.outliers).map(|n| n * share + random.below(share)).collect()
    }

    /// The type that `Q4_K_M` gives a matrix: K-quants where rows fill their blocks
    /// of 256, else the blocks of 32 that llama.cpp falls back to; f32 where rows
    /// fill neither.
    fn kind(&self, width: usize, more_bits: bool) -> WeightType {
        match (self.plain, more_bits) {
            (Some(kind), _) => kind,
            _ if !width.is_multiple_of(32) => WeightType::F32,
            (None, false) if width.is_multiple_of(256) => WeightType::Q4K,
            (None, true) if width.is_multiple_of(256) => WeightType::Q6K,
            (None, false) => WeightType::Q5_0,
            (None, true) => WeightType::Q8_0,
        }
    }

    /// Whether some matrices of a block get more bits: llama.cpp's `use_more_bits`.
    fn more_bits(&self, layer: usize) -> bool {
        let eighth = self.layers / 8;
        layer < eighth || layer >= 7 * self.layers / 8 || (layer - eighth) % 3 == 2
    }

    /// The hyperparameters, as the reader of its form finds them.
    #[cfg(test)]
    fn config(&self) -> super::Config {
        if self.is_folder() { folder::config(self) } else { table::config(self) }
    }

    /// Whether it is made as a Hugging Face folder.
    fn is_folder(&self) -> bool {
        matches!(
            self.architecture,
            Architecture::Mistral
                | Architecture::Phi3
                | Architecture::GptOss
                | Architecture::DeepSeekV3
                | Architecture::Qwen3Next
        )
    }

    fn tensors(&self) -> Vec<Planned> {
        match self.architecture {
            Architecture::Qwen2 | Architecture::Llama | Architecture::Qwen3 => self.first_kinds(),
            _ if self.is_folder() => folder::tensors(self),
            _ => table::tensors(self),
        }
    }

    /// The tensors of the first three kinds. They stand in another order than those of the table,
    /// which their files are held to.
    fn first_kinds(&self) -> Vec<Planned> {
        let embedding =
            Values::Matrix { deviation: EMBEDDING, columns: Columns::Amplified, rows: Rows::Even };
        let kind = self.kind(self.hidden, self.tied);
        let mut tensors =
            vec![planned("token_embd.weight", kind, self.vocabulary, self.hidden, embedding)];
        if self.architecture == Architecture::Llama {
            let width = self.head_dim / 2;
            let factors = Values::RopeFactors;
            tensors.push(planned("rope_freqs.weight", WeightType::F32, 1, width, factors));
        }
        for layer in 0..self.layers {
            self.block(layer, &mut tensors);
        }
        let root = (self.hidden as f32).sqrt();
        // A random tied model would only echo its input: the residual stream still
        // holds the token's embedding. Gains of both signs turn it away from itself.
        let gain = if self.tied {
            Values::Gain { mean: LOGITS / (EMBEDDING * root), outlier: 1.0 / 16.0, signed: true }
        } else {
            Values::Gain { mean: 1.0, outlier: 0.25, signed: false }
        };
        tensors.push(planned("output_norm.weight", WeightType::F32, 1, self.hidden, gain));
        if !self.tied {
            let kind = self.kind(self.hidden, true);
            let output = reader(LOGITS / root, Rows::Even);
            tensors.push(planned("output.weight", kind, self.vocabulary, self.hidden, output));
        }
        tensors
    }

    fn block(&self, layer: usize, tensors: &mut Vec<Planned>) {
        let Shape { hidden, ffn, head_dim, .. } = *self;
        let (queries, keys) = (self.heads * head_dim, self.kv_heads * head_dim);
        let more = self.more_bits(layer);
        let unit = 1.0 / (hidden as f32).sqrt();
        let mut add = |name: &str, kind, rows, width, values| {
            tensors.push(planned(&format!("blk.{layer}.{name}"), kind, rows, width, values));
        };
        let (low, high) = (self.kind(hidden, false), self.kind(hidden, more));
        let norm = Values::Gain { mean: 1.0, outlier: 4.0, signed: false };
        add("attn_norm.weight", WeightType::F32, 1, hidden, norm);
        add("attn_q.weight", low, queries, hidden, reader(self.sharpness * unit, Rows::Even));
        add("attn_k.weight", low, keys, hidden, reader(self.sharpness * unit, Rows::Even));
        add("attn_v.weight", high, keys, hidden, reader(unit, Rows::Even));
        match self.architecture {
            Architecture::Qwen2 => {
                let on = if self.biases { 1.0f32 } else { 0.0 };
                let bias =
                    |size: f32, spike: f32| Values::Bias { size: on * size, spike: on * spike };
                add("attn_q.bias", WeightType::F32, 1, queries, bias(0.3, 0.0));
                add("attn_k.bias", WeightType::F32, 1, keys, bias(0.3, 3.0));
                add("attn_v.bias", WeightType::F32, 1, keys, bias(0.05, 0.0));
            }
            Architecture::Qwen3 => {
                let gain = Values::Gain { mean: 1.1, outlier: 1.0, signed: false };
                add("attn_q_norm.weight", WeightType::F32, 1, head_dim, gain);
                add("attn_k_norm.weight", WeightType::F32, 1, head_dim, gain);
            }
            // Llama has neither, and the others come of the table.
            _ => {}
        }
        // Attention averages values down to a root mean square of 0.7; SwiGLU's hard
        // neurons raise it to 1.5.
        let writer = |width: usize, input: f32| Values::Matrix {
            deviation: ADDED / (input * (width as f32).sqrt()),
            columns: Columns::Even,
            rows: Rows::Outliers,
        };
        let kind = self.kind(queries, false);
        add("attn_output.weight", kind, hidden, queries, writer(queries, 0.7));
        add("ffn_norm.weight", WeightType::F32, 1, hidden, norm);
        add("ffn_gate.weight", low, ffn, hidden, reader(1.5 * unit, Rows::Neurons));
        add("ffn_up.weight", low, ffn, hidden, reader(unit, Rows::Neurons));
        add("ffn_down.weight", self.kind(ffn, more), hidden, ffn, writer(ffn, 1.5));
    }

    fn header(&self, name: &str, seed: u64, tensors: &[Planned]) -> Vec<u8> {
        let mut header = HeaderWriter::default();
        header.text("general.architecture", self.architecture.gguf_name());
        header.text("general.type", "model");
        header.text("general.name", &format!("synthetic {name}, seed {seed}"));
        header.unsigned("general.quantization_version", 2);
        self.hyperparameters(&mut header);
        let cut = if self.architecture == Architecture::Llama { "smollm" } else { "qwen2" };
        vocabulary::write(&mut header, self.vocabulary, cut);
        for Planned { name, kind, depth, rows, width, .. } in tensors {
            header.tensor(name, *kind, [*depth, *rows, *width]);
        }
        header.finish()
    }

    /// What the metadata say of the architecture.
    fn hyperparameters(&self, header: &mut HeaderWriter) {
        let architecture = self.architecture.gguf_name();
        let sizes = [
            ("block_count", self.layers),
            ("context_length", 32_768),
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.ffn),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.turned),
            ("vocab_size", self.vocabulary),
        ];
        for (key, value) in sizes {
            header.unsigned(&format!("{architecture}.{key}"), value as u32);
        }
        header.float(&format!("{architecture}.rope.freq_base"), self.theta);
        let epsilon = match self.architecture.takes_means_off() {
            true => "layer_norm_epsilon",
            false => "layer_norm_rms_epsilon",
        };
        header.float(&format!("{architecture}.attention.{epsilon}"), self.rms_norm_eps);
        for (key, setting) in self.settings {
            let key = format!("{architecture}.{key}");
            match *setting {
                Setting::Count(value) | Setting::Width(value) => {
                    let scale = if matches!(setting, Setting::Width(_)) { self.scale } else { 1 };
                    header.unsigned(&key, (value * scale) as u32);
                }
                Setting::Number(value) => header.float(&key, value),
                Setting::Flag(value) => header.bool(&key, value),
            }
        }
    }
}

/// A matrix that reads the residual stream: what it does with outlier channels is
/// small, else they would be all that it sees.
fn reader(deviation: f32, rows: Rows) -> Values {
    Values::Matrix { deviation, columns: Columns::Damped, rows }
}

fn planned(name: &str, kind: WeightType, rows: usize, width: usize, values: Values) -> Planned {
    let less_one = false;
    Planned { name: name.to_owned(), kind, depth: 1, rows, width, values, less_one }
}

impl Planned {
    /// The bytes of some rows, and the padding behind the last one.
    fn generate(
        &self,
        seed: u64,
        outliers: &[usize],
        first: usize,
        rows: usize,
        last: bool,
    ) -> Vec<u8> {
        let row_bytes = self.kind.row_bytes(self.width);
        let mut bytes = vec![0; rows * row_bytes];
        match self.values {
            Values::Matrix { deviation, columns, rows } => {
                let writer = RowWriter::new(self.kind, columns, outliers);
                bytes.par_chunks_mut(row_bytes).enumerate().for_each(|(n, bytes)| {
                    let row = first + n;
                    let random = stream(seed, &self.name, row as u64);
                    let size = rows.scale(row % (self.rows / self.depth), outliers);
                    writer.write(random, deviation * size, bytes);
                });
            }
            _ => {
                let one = if self.less_one { 1.0 } else { 0.0 };
                let values = self.vector(seed, outliers).into_iter().map(|value| value - one);
                for (bytes, value) in bytes.chunks_exact_mut(self.kind.block_bytes()).zip(values) {
                    match self.kind {
                        WeightType::BF16 => {
                            bytes.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
                        }
                        _ => bytes.copy_from_slice(&value.to_le_bytes()),
                    }
                }
            }
        }
        if last {
            let all = self.rows * row_bytes;
            bytes.resize(bytes.len() + all.next_multiple_of(ALIGNMENT) - all, 0);
        }
        bytes
    }

    fn vector(&self, seed: u64, outliers: &[usize]) -> Vec<f32> {
        let mut random = stream(seed, &self.name, 0);
        let value = |index: usize| match self.values {
            Values::Gain { mean, outlier, signed } => {
                let size = if outliers.contains(&index) { outlier } else { 1.0 };
                let gain = mean * size * (1.0 + 0.4 * random.symmetric());
                if signed && random.below(2) == 1 { -gain } else { gain }
            }
            Values::Bias { size, spike } => {
                let spikes = spike != 0.0 && random.below(16) == 0;
                random.symmetric() * if spikes { spike } else { 1.7 * size }
            }
            Values::RopeFactors => {
                // In quarters: fast waves are kept, slow ones stretched 32 times.
                let place = 4.0 * index as f32 / self.width as f32;
                1.0 + 31.0 * (place - 2.0).clamp(0.0, 1.0)
            }
            Values::Matrix { .. } => unreachable!("matrices are written row by row"),
        };
        (0..self.width).map(value).collect()
    }
}

impl Rows {
    fn scale(self, row: usize, outliers: &[usize]) -> f32 {
        match self {
            Rows::Even => 1.0,
            Rows::Outliers if outliers.contains(&row) => 6.0,
            Rows::Damped if outliers.contains(&row) => 1.0 / 16.0,
            Rows::Outliers | Rows::Damped => 1.0,
            Rows::Neurons if row % 64 == 17 => 3.0,
            Rows::Neurons => 1.0,
        }
    }
}
