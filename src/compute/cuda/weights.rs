//! Weights on a GPU: uploaded and converted once, found again by content.
//!
//! An entry's name is the digest of the tensor's bytes with the form that it was
//! brought into, never an address or a name, so that another model's tensor of
//! the same name is another entry. When the budget is full, the entries that were
//! not used for longest make room: a model that does not fit streams through.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream};

use super::gpu::DeviceError;
use super::kernels::{Granularity, Kernels, Scales};
use super::staging::Staging;
use crate::dtype::Format;
use crate::model::{Weight, WeightType};

/// Rows and inner width of an operand are padded to multiples of this, as FP8 asks for.
pub const ALIGNMENT: usize = 16;
/// Values that are decoded at a time.
pub const CHUNK: usize = 64 << 20;

/// What a tensor becomes on the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Its bytes, as they stand in the file.
    Table,
    /// Its values as f32.
    Values,
    /// Codes of a GEMM's operand.
    Operand(Format, Granularity),
    /// Codes of a GEMM's operand with their scales, as the checkpoint holds them.
    Held(Format, Granularity),
    /// The values of some rows as f32, decoded by the CPU as the reference decodes them.
    Decoded {
        /// The first row.
        first: usize,
        /// How many.
        rows: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    digest: [u8; 32],
    kind: WeightType,
    shape: (usize, usize),
    form: Form,
}

/// A tensor on the GPU.
pub enum Entry {
    /// [`Form::Table`].
    Table(CudaSlice<u8>),
    /// [`Form::Values`] and [`Form::Decoded`].
    Values(CudaSlice<f32>),
    /// [`Form::Operand`].
    Operand(Operand),
}

/// A GEMM's operand: codes `[padded rows, padded width]` and what they are multiplied with.
pub struct Operand {
    /// The codes.
    pub codes: CudaSlice<u8>,
    /// The scales.
    pub scales: CudaSlice<f32>,
    /// Who shares one.
    pub granularity: Granularity,
    /// Rows, with those that only pad.
    pub padded_rows: usize,
    /// Codes of a row, with those that only pad.
    pub padded_width: usize,
}

impl Operand {
    /// The scales, as kernels take them.
    pub fn scales(&self) -> Scales<'_> {
        Scales { values: &self.scales, granularity: self.granularity }
    }
}

struct Kept {
    entry: Arc<Entry>,
    bytes: usize,
    used: u64,
}

/// The digest of each tensor that an arm met, by name: an arm lives as long as one model.
#[derive(Default)]
pub struct Digests(Mutex<BTreeMap<String, blake3::Hash>>);

impl Digests {
    /// A tensor's digest, computed once.
    pub fn of(&self, weight: Weight<'_>) -> blake3::Hash {
        let mut digests = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *digests.entry(weight.name().to_owned()).or_insert_with(|| weight.digest())
    }
}

/// The tensors that a GPU keeps.
pub struct Weights {
    kept: HashMap<Key, Kept>,
    budget: usize,
    bytes: usize,
    clock: u64,
    /// Where decoded values are on their way, once there were any.
    staging: Option<Staging>,
}

impl Weights {
    /// None yet; together they will take at most `budget` bytes.
    pub fn new(budget: usize) -> Weights {
        Weights { kept: HashMap::new(), budget, bytes: 0, clock: 0, staging: None }
    }

    /// Gives up all entries; says how many there were.
    pub fn clear(&mut self) -> usize {
        self.bytes = 0;
        let count = self.kept.len();
        self.kept.clear();
        count
    }

    /// A tensor in a form, made if it is not there.
    ///
    /// # Errors
    /// If the driver refuses, or if the tensor holds NaN or infinity.
    pub fn get(
        &mut self,
        stream: &Arc<CudaStream>,
        kernels: &Kernels,
        weight: Weight<'_>,
        digest: &blake3::Hash,
        form: Form,
    ) -> Result<Arc<Entry>, DeviceError> {
        let shape = (weight.rows(), weight.width());
        let key = Key { digest: *digest.as_bytes(), kind: weight.kind(), shape, form };
        self.clock += 1;
        if let Some(kept) = self.kept.get_mut(&key) {
            kept.used = self.clock;
            return Ok(Arc::clone(&kept.entry));
        }
        let bytes = bytes_of(weight, form);
        self.make_room(bytes);
        let entry = Arc::new(match form {
            Form::Decoded { first, rows } => {
                let staging = match &mut self.staging {
                    Some(staging) => staging,
                    none => none.insert(Staging::new(stream)?),
                };
                Entry::Values(staging.upload(stream, weight, first, rows)?)
            }
            form => make(stream, kernels, weight, form)?,
        });
        let kept = Kept { entry: Arc::clone(&entry), bytes, used: self.clock };
        self.kept.insert(key, kept);
        self.bytes += bytes;
        Ok(entry)
    }

    fn make_room(&mut self, bytes: usize) {
        while self.bytes + bytes > self.budget {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(key, _)| *key);
            // One tensor alone may exceed the budget: then the driver has the last word.
            let Some(oldest) = oldest else { return };
            if let Some(kept) = self.kept.remove(&oldest) {
                self.bytes -= kept.bytes;
            }
        }
    }
}

fn bytes_of(weight: Weight<'_>, form: Form) -> usize {
    match form {
        Form::Table if !weight.is_plain() => weight.rows() * weight.width() * 4,
        Form::Table => weight.bytes().len(),
        Form::Values => weight.rows() * weight.width() * 4,
        Form::Decoded { rows, .. } => rows * weight.width() * 4,
        Form::Operand(format, _) | Form::Held(format, _) => {
            let rows = weight.rows().next_multiple_of(ALIGNMENT);
            rows * weight.width().next_multiple_of(ALIGNMENT) * format.bytes()
        }
    }
}

/// How a table holds a tensor's values: codes whose scales stand elsewhere are decoded before.
pub fn held_as(weight: Weight<'_>) -> WeightType {
    if weight.is_plain() { weight.kind() } else { WeightType::F32 }
}

fn make(
    stream: &Arc<CudaStream>,
    kernels: &Kernels,
    weight: Weight<'_>,
    form: Form,
) -> Result<Entry, DeviceError> {
    if let Form::Held(format, granularity) = form {
        return held(stream, weight, format, granularity).map(Entry::Operand);
    }
    let kind = held_as(weight);
    let table = match weight.is_plain() {
        true => stream.clone_htod(weight.bytes())?,
        // Codes are decoded here: the kernels know blocks that bring their scales along.
        false => {
            let values = weight.to_vec()?;
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            stream.clone_htod(&bytes)?
        }
    };
    let (rows, width) = (weight.rows() as u64, weight.width() as u64);
    match form {
        Form::Table => Ok(Entry::Table(table)),
        Form::Values => {
            let mut values = stream.alloc_zeros::<f32>((rows * width) as usize)?;
            let table = table.as_view();
            kernels.dequantise(stream, kind, &table, None, rows, width, &mut values)?;
            if weight.is_less_one() {
                let mut held = stream.clone_dtoh(&values)?;
                held.iter_mut().for_each(|value| *value += 1.0);
                stream.memcpy_htod(&held, &mut values)?;
            }
            Ok(Entry::Values(values))
        }
        Form::Operand(format, granularity) => {
            let converter = Converter { stream, kernels, weight, kind, table, format, granularity };
            converter.convert().map(Entry::Operand)
        }
        Form::Held(..) | Form::Decoded { .. } => unreachable!("made elsewhere"),
    }
}

/// An operand of codes and scales as the checkpoint holds them.
fn held(
    stream: &Arc<CudaStream>,
    weight: Weight<'_>,
    format: Format,
    granularity: Granularity,
) -> Result<Operand, DeviceError> {
    let codes = match format {
        Format::E5m2 => WeightType::E5m2,
        Format::Int8 => WeightType::I8,
        _ => WeightType::E4m3,
    };
    let held = weight.held_codes(codes).ok_or_else(|| {
        DeviceError::Refused(format!("the weight {} holds no {format} codes", weight.in_words()))
    })?;
    let (rows, width) = (weight.rows(), weight.width());
    let (padded_rows, padded_width) =
        (rows.next_multiple_of(ALIGNMENT), width.next_multiple_of(ALIGNMENT));
    let mut padded = vec![0u8; padded_rows * padded_width];
    let lines = held.codes(0..rows).chunks_exact(width);
    for (padded, codes) in padded.chunks_exact_mut(padded_width).zip(lines) {
        padded[..width].copy_from_slice(codes);
    }
    let scales: Vec<f32> = match granularity {
        Granularity::Tensor => vec![held.scale(0, 0)],
        Granularity::Row => (0..rows).map(|row| held.scale(row, 0)).collect(),
        Granularity::Block(tall) => (0..rows)
            .step_by(tall as usize)
            .flat_map(|row| (0..width).step_by(128).map(move |value| held.scale(row, value)))
            .collect(),
    };
    let (codes, scales) = (stream.clone_htod(&padded)?, stream.clone_htod(&scales)?);
    Ok(Operand { codes, scales, granularity, padded_rows, padded_width })
}

/// Turns a table of blocks into an operand, a chunk of rows at a time.
struct Converter<'a> {
    stream: &'a Arc<CudaStream>,
    kernels: &'a Kernels,
    weight: Weight<'a>,
    /// How the table holds the values.
    kind: WeightType,
    table: CudaSlice<u8>,
    format: Format,
    granularity: Granularity,
}

impl Converter<'_> {
    fn convert(&self) -> Result<Operand, DeviceError> {
        let Converter { stream, kernels, weight, format, granularity, .. } = self;
        let (rows, width) = (weight.rows(), weight.width());
        let (padded_rows, padded_width) =
            (rows.next_multiple_of(ALIGNMENT), width.next_multiple_of(ALIGNMENT));
        // Whole blocks of 128 rows, so that no block's scale is cut in two.
        let chunk = (CHUNK / width).next_multiple_of(128).min(rows);
        let mut values = stream.alloc_zeros::<f32>(chunk * width)?;

        let mut most = stream.alloc_zeros::<u32>(1)?;
        for first in (0..rows).step_by(chunk) {
            let here = chunk.min(rows - first);
            self.decode(first, here, &mut values)?;
            kernels.absmax_all(stream, &values, (here * width) as u64, &mut most)?;
        }
        let largest = f32::from_bits(stream.clone_dtoh(&most)?.first().copied().unwrap_or(0));
        if !largest.is_finite() {
            return Err(DeviceError::Refused(format!(
                "the weight {} holds NaN or infinity; take another copy of the model",
                weight.in_words()
            )));
        }

        let row_bytes = padded_width * format.bytes();
        let mut codes = stream.alloc_zeros::<u8>(padded_rows * row_bytes)?;
        let mut scales = stream.alloc_zeros::<f32>(scales_of(*granularity, rows, width))?;
        if *granularity == Granularity::Tensor {
            self.fill_scales(&most, &mut scales)?;
        }
        for first in (0..rows).step_by(chunk) {
            let here = chunk.min(rows - first);
            self.decode(first, here, &mut values)?;
            let shape = (here as u64, width as u64, padded_width as u64);
            let target = first * row_bytes..(first + here) * row_bytes;
            if *granularity == Granularity::Tensor {
                let scales = Scales { values: &scales, granularity: *granularity };
                let mut target = codes.slice_mut(target);
                kernels.convert(stream, *format, &values, shape, scales, &mut target)?;
                continue;
            }
            let group = group_of(*granularity, width);
            let count = scales_of(*granularity, here, width);
            let mut most = stream.alloc_zeros::<u32>(count)?;
            kernels.absmax_groups(stream, &values, (shape.0, shape.1), group, &mut most)?;
            let mut local = stream.alloc_zeros::<f32>(count)?;
            self.fill_scales(&most, &mut local)?;
            let place = scales_of(*granularity, first, width);
            stream.memcpy_dtod(&local, &mut scales.slice_mut(place..place + count))?;
            let local = Scales { values: &local, granularity: *granularity };
            let mut target = codes.slice_mut(target);
            kernels.convert(stream, *format, &values, shape, local, &mut target)?;
        }
        Ok(Operand { codes, scales, granularity: *granularity, padded_rows, padded_width })
    }

    fn decode(
        &self,
        first: usize,
        rows: usize,
        values: &mut CudaSlice<f32>,
    ) -> Result<(), DeviceError> {
        let Converter { stream, kernels, weight, kind, table, .. } = self;
        let row_bytes = kind.row_bytes(weight.width());
        let part = table.slice(first * row_bytes..(first + rows) * row_bytes);
        let (rows, width) = (rows as u64, weight.width() as u64);
        Ok(kernels.dequantise(stream, *kind, &part, None, rows, width, values)?)
    }

    fn fill_scales(
        &self,
        most: &CudaSlice<u32>,
        scales: &mut CudaSlice<f32>,
    ) -> Result<(), DeviceError> {
        fill_scales(self.stream, self.kernels, self.format, most, scales)
    }
}

/// Scales of absmaxes: FP8 and int8 are scaled, every other format by 1.
pub fn fill_scales(
    stream: &Arc<CudaStream>,
    kernels: &Kernels,
    format: Format,
    most: &CudaSlice<u32>,
    scales: &mut CudaSlice<f32>,
) -> Result<(), DeviceError> {
    if format.is_scaled() {
        return Ok(kernels.scales(stream, most, format, scales)?);
    }
    let ones = vec![1.0f32; scales.len()];
    Ok(stream.memcpy_htod(&ones, scales)?)
}

/// Rows and columns that share a scale.
pub fn group_of(granularity: Granularity, width: usize) -> (u64, u64) {
    match granularity {
        Granularity::Tensor | Granularity::Row => (1, width as u64),
        Granularity::Block(rows) => (rows, 128),
    }
}

/// Scales of a matrix.
pub fn scales_of(granularity: Granularity, rows: usize, width: usize) -> usize {
    match granularity {
        Granularity::Tensor => 1,
        Granularity::Row => rows,
        Granularity::Block(group) => rows.div_ceil(group as usize) * width.div_ceil(128),
    }
}
