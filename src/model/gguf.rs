//! The header of a GGUF file: metadata and the table of tensors.
//!
//! It reads bytes and knows the container (versions 2 and 3, of both byte orders) but
//! not what a key or a tensor means. Everything is checked before it is used: a
//! count never becomes an allocation, an offset never leaves the file. Strings
//! and arrays stay where they are, so a vocabulary of 150,000 tokens costs
//! nothing until somebody asks for it. That, duplicate names, a hostile
//! alignment (candle's reader divides by it) and errors that name the tensor
//! are why this is not `candle_core::quantized::gguf_file`; a test holds the
//! two readers against each other.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::BTreeMap;
use std::ops::Range;

use super::blocks;
use super::error::{FETCH_AGAIN, Fault, shown};
use super::weights::WeightType;

const DEFAULT_ALIGNMENT: u64 = 32;
/// Page size is the largest alignment that a memory map can promise.
const LARGEST_ALIGNMENT: u64 = 4096;
/// `GGML_MAX_DIMS`.
const MOST_DIMENSIONS: u32 = 4;

/// Whether these bytes begin like a GGUF file, whatever it is called.
pub(super) fn is_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"GGUF")
}

/// Which byte of a number comes first in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ByteOrder {
    /// The lowest.
    Little,
    /// The highest: files for machines such as IBM Z.
    Big,
}

/// A parsed header. Ranges are byte ranges of the file, checked to lie inside.
#[derive(Debug)]
pub(super) struct Header {
    pub order: ByteOrder,
    metadata: BTreeMap<String, Value>,
    /// The tensors in file order, names unique, ranges disjoint.
    pub tensors: Vec<TensorInfo>,
}

/// One line of the table of tensors.
#[derive(Debug)]
pub(super) struct TensorInfo {
    pub name: String,
    pub kind: WeightType,
    /// Number of rows: all dimensions but the innermost, multiplied.
    pub rows: usize,
    /// The innermost dimension.
    pub width: usize,
    /// The dimensions beyond the second, multiplied: matrices that lie one below the other.
    pub depth: usize,
    pub bytes: Range<usize>,
    /// The order of the bytes of numbers among them.
    pub order: ByteOrder,
}

/// A metadata value; text and lists are ranges of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    List { element: Element, count: usize, bytes: Range<usize> },
}

/// Type of a metadata value, with the ids of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    List,
    U64,
    I64,
    F64,
}

impl Element {
    const BY_ID: [Element; 13] = [
        Element::U8,
        Element::I8,
        Element::U16,
        Element::I16,
        Element::U32,
        Element::I32,
        Element::F32,
        Element::Bool,
        Element::Text,
        Element::List,
        Element::U64,
        Element::I64,
        Element::F64,
    ];

    /// Bytes of one value; `None` where it varies.
    fn size(self) -> Option<usize> {
        match self {
            Element::U8 | Element::I8 | Element::Bool => Some(1),
            Element::U16 | Element::I16 => Some(2),
            Element::U32 | Element::I32 | Element::F32 => Some(4),
            Element::U64 | Element::I64 | Element::F64 => Some(8),
            Element::Text | Element::List => None,
        }
    }
}

impl ByteOrder {
    /// The bytes of one number, the lowest first.
    fn little<const N: usize>(self, mut bytes: [u8; N]) -> [u8; N] {
        if self == ByteOrder::Big {
            bytes.reverse();
        }
        bytes
    }
}

impl Value {
    /// What the value is, for an error that expected something else.
    fn described(&self) -> &'static str {
        match self {
            Value::Unsigned(_) => "an unsigned integer",
            Value::Signed(_) => "a signed integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a bool",
            Value::Text(_) => "a string",
            Value::List { .. } => "an array",
        }
    }
}

impl Header {
    /// Reads and checks the header of the file whose bytes are `file`.
    pub fn parse(file: &[u8]) -> Result<Header, Fault> {
        let mut reader = Reader { file, at: 0, order: ByteOrder::Little };
        reader.expect_magic()?;
        let tensor_count = reader.u64("the number of tensors")?;
        let metadata_count = reader.u64("the number of metadata entries")?;
        let metadata = reader.metadata(metadata_count)?;
        let alignment = alignment(&metadata)?;
        let table = reader.table(tensor_count)?;
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        let order = reader.order;
        let tensors = placed(table, order, data_start, alignment, file.len() as u64)?;
        Ok(Header { order, metadata, tensors })
    }

    /// All metadata keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// The value of `key`, if the file has it.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A non-negative integer.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, Fault> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(Value::Signed(value)) if *value >= 0 => Ok(Some(*value as u64)),
            Some(other) => Err(wrong_type(key, "a non-negative integer", other)),
        }
    }

    /// A float.
    pub fn float(&self, key: &str) -> Result<Option<f64>, Fault> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong_type(key, "a float", other)),
        }
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Fault> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong_type(key, "a bool", other)),
        }
    }

    /// A string; `file` must be the bytes that were parsed.
    pub fn text<'a>(&self, file: &'a [u8], key: &str) -> Result<Option<&'a str>, Fault> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => utf8(&file[range.clone()], key).map(Some),
            Some(other) => Err(wrong_type(key, "a string", other)),
        }
    }

    /// An array of strings.
    pub fn texts<'a>(&self, file: &'a [u8], key: &str) -> Result<Option<Vec<&'a str>>, Fault> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::List { element: Element::Text, count, bytes }) => {
                let mut reader =
                    Reader { file: &file[..bytes.end], at: bytes.start, order: self.order };
                let mut texts = Vec::new();
                for _ in 0..*count {
                    let range = reader.text_range(key)?;
                    texts.push(utf8(&file[range], key)?);
                }
                Ok(Some(texts))
            }
            Some(other) => Err(wrong_type(key, "an array of strings", other)),
        }
    }

    /// An array of integers that fit 32 bits.
    pub fn small_integers(&self, file: &[u8], key: &str) -> Result<Option<Vec<i64>>, Fault> {
        let words = |bytes: &Range<usize>| {
            let (values, _) = file[bytes.clone()].as_chunks::<4>();
            values.iter().map(|value| u32::from_le_bytes(self.order.little(*value)))
        };
        match self.get(key) {
            None => Ok(None),
            Some(Value::List { element: Element::I32, bytes, .. }) => {
                Ok(Some(words(bytes).map(|value| i64::from(value.cast_signed())).collect()))
            }
            Some(Value::List { element: Element::U32, bytes, .. }) => {
                Ok(Some(words(bytes).map(i64::from).collect()))
            }
            Some(other) => Err(wrong_type(key, "an array of 32-bit integers", other)),
        }
    }

    /// An array of 32-bit floats.
    pub fn floats(&self, file: &[u8], key: &str) -> Result<Option<Vec<f32>>, Fault> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::List { element: Element::F32, bytes, .. }) => {
                let (values, _) = file[bytes.clone()].as_chunks::<4>();
                Ok(Some(values.iter().map(|v| f32::from_le_bytes(*v)).collect()))
            }
            Some(other) => Err(wrong_type(key, "an array of 32-bit floats", other)),
        }
    }
}

fn wrong_type(key: &str, wanted: &str, found: &Value) -> Fault {
    Fault::malformed(format!("`{key}` is {}, not {wanted}", found.described()), FETCH_AGAIN)
}

fn utf8<'a>(bytes: &'a [u8], key: &str) -> Result<&'a str, Fault> {
    std::str::from_utf8(bytes).map_err(|_| {
        Fault::malformed(format!("`{}` holds text that is not UTF-8", shown(key)), FETCH_AGAIN)
    })
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, Fault> {
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::Unsigned(value)) => *value,
        Some(other) => return Err(wrong_type("general.alignment", "an unsigned integer", other)),
    };
    if !alignment.is_power_of_two() || !(8..=LARGEST_ALIGNMENT).contains(&alignment) {
        return Err(Fault::malformed(
            format!(
                "`general.alignment` is {alignment}, not a power of two from 8 to {LARGEST_ALIGNMENT}"
            ),
            FETCH_AGAIN,
        ));
    }
    Ok(alignment)
}

/// A line of the table before its place in the file is known to be good.
struct Unplaced {
    name: String,
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// Checks every tensor's type, shape and place, and that no two overlap.
fn placed(
    table: Vec<Unplaced>,
    order: ByteOrder,
    data_start: u64,
    alignment: u64,
    file_size: u64,
) -> Result<Vec<TensorInfo>, Fault> {
    let mut tensors = Vec::new();
    for line in table {
        let info = place(&line, order, data_start, alignment, file_size)
            .map_err(|fault| fault.in_tensor(&line.name))?;
        tensors.push(info);
    }
    let mut by_place: Vec<&TensorInfo> = tensors.iter().collect();
    by_place.sort_by_key(|info| info.bytes.start);
    for pair in by_place.windows(2) {
        if pair[0].bytes.end > pair[1].bytes.start {
            return Err(Fault::malformed(
                format!("it overlaps tensor `{}`", shown(&pair[0].name)),
                FETCH_AGAIN,
            )
            .in_tensor(&pair[1].name));
        }
    }
    let mut by_name: Vec<&str> = tensors.iter().map(|info| info.name.as_str()).collect();
    by_name.sort_unstable();
    if let Some(pair) = by_name.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Fault::malformed("the name occurs twice", FETCH_AGAIN).in_tensor(pair[0]));
    }
    Ok(tensors)
}

fn place(
    line: &Unplaced,
    order: ByteOrder,
    data_start: u64,
    alignment: u64,
    file_size: u64,
) -> Result<TensorInfo, Fault> {
    let bad = |problem: String| Fault::malformed(problem, FETCH_AGAIN);
    let kind = WeightType::from_ggml(line.kind).map_err(|name| {
        Fault::unsupported(
            format!("its type {name} has no decoder here"),
            "quantize the model to a type that `docs/models.md` lists, such as Q8_0 or F16",
        )
    })?;
    if order == ByteOrder::Big && blocks::numbers(kind).is_none() {
        return Err(Fault::unsupported(
            format!(
                "it is {kind} in a big-endian file, and which bytes of such blocks are swapped is \
                 defined nowhere"
            ),
            "give the little-endian file",
        ));
    }
    let (&width, outer) =
        line.dimensions.split_first().ok_or_else(|| bad("it has no dimensions".into()))?;
    let rows = outer.iter().try_fold(1_u64, |rows, &dimension| rows.checked_mul(dimension));
    let rows = rows.ok_or_else(|| bad(format!("its shape {:?} is too large", line.dimensions)))?;
    if rows == 0 || width == 0 {
        return Err(bad(format!("its shape {:?} has a zero", line.dimensions)));
    }
    if !width.is_multiple_of(kind.block_width() as u64) {
        return Err(bad(format!(
            "its rows of {width} do not fill {kind} blocks of {}",
            kind.block_width()
        )));
    }
    let size = (width / kind.block_width() as u64)
        .checked_mul(kind.block_bytes() as u64)
        .and_then(|row| row.checked_mul(rows))
        .ok_or_else(|| bad(format!("its shape {:?} is too large", line.dimensions)))?;
    if !line.offset.is_multiple_of(alignment) {
        return Err(bad(format!("its offset {} is not a multiple of {alignment}", line.offset)));
    }
    let start = data_start.checked_add(line.offset);
    let end = start.and_then(|start| start.checked_add(size)).filter(|&end| end <= file_size);
    let (Some(start), Some(end)) = (start, end) else {
        return Err(bad(format!(
            "its {size} bytes at offset {} of the data end beyond the file's {file_size} bytes: \
             the file is truncated or its header wrong",
            line.offset
        )));
    };
    Ok(TensorInfo {
        name: line.name.clone(),
        kind,
        rows: rows as usize,
        width: width as usize,
        // No more than the rows.
        depth: outer.iter().skip(1).product::<u64>() as usize,
        bytes: start as usize..end as usize,
        order,
    })
}

/// A cursor over the file that never leaves it.
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
    order: ByteOrder,
}

impl<'a> Reader<'a> {
    fn expect_magic(&mut self) -> Result<(), Fault> {
        if self.take(4, "the magic number")? != b"GGUF" {
            return Err(Fault::malformed(
                "it does not begin with the bytes `GGUF`",
                "give a GGUF file or a folder with config.json and safetensors",
            ));
        }
        // A version is a small number: in the other byte order its lower half is zero.
        let mut version = self.u32("the version")?;
        if version & 0xffff == 0 {
            self.order = ByteOrder::Big;
            version = version.swap_bytes();
        }
        match version {
            2 | 3 => Ok(()),
            version => Err(Fault::unsupported(
                format!("GGUF version {version}"),
                "convert the model anew: versions 2 and 3 are read",
            )),
        }
    }

    /// `size` bytes, or an error that says what they were for.
    fn take(&mut self, size: usize, what: &str) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(size).filter(|&end| end <= self.file.len());
        let Some(end) = end else {
            return Err(Fault::malformed(
                format!(
                    "{} needs {size} bytes at byte {}, but {} are left",
                    shown(what),
                    self.at,
                    self.file.len() - self.at
                ),
                FETCH_AGAIN,
            ));
        };
        let bytes = &self.file[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    /// The bytes of one number, the lowest first.
    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        let bytes = self.take(N, what)?;
        Ok(self.order.little(*bytes.first_chunk().expect("take returned N bytes")))
    }

    fn u32(&mut self, what: &str) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// The range of a length-prefixed string.
    fn text_range(&mut self, what: &str) -> Result<Range<usize>, Fault> {
        let length = self.u64(what)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        self.take(length, what)?;
        Ok(self.at - length..self.at)
    }

    /// A key or tensor name.
    fn name(&mut self, what: &str) -> Result<&'a str, Fault> {
        let range = self.text_range(what)?;
        utf8(&self.file[range], what)
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, Value>, Fault> {
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let key = self.name("a metadata key")?;
            let element = self.element(key)?;
            let value = self.value(element, key)?;
            if metadata.insert(key.to_owned(), value).is_some() {
                return Err(Fault::malformed(
                    format!("the key `{}` occurs twice", shown(key)),
                    FETCH_AGAIN,
                ));
            }
        }
        Ok(metadata)
    }

    fn element(&mut self, key: &str) -> Result<Element, Fault> {
        let id = self.u32(key)?;
        Element::BY_ID.get(id as usize).copied().ok_or_else(|| {
            Fault::malformed(
                format!("`{}` has the unknown value type {id}", shown(key)),
                FETCH_AGAIN,
            )
        })
    }

    fn value(&mut self, element: Element, key: &str) -> Result<Value, Fault> {
        Ok(match element {
            Element::U8 => Value::Unsigned(self.array::<1>(key)?[0].into()),
            Element::I8 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            Element::U16 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            Element::I16 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            Element::U32 => Value::Unsigned(self.u32(key)?.into()),
            Element::I32 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            Element::U64 => Value::Unsigned(self.u64(key)?),
            Element::I64 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            Element::F32 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            Element::F64 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            Element::Bool => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => {
                    return Err(Fault::malformed(
                        format!("`{}` is a bool with the value {other}", shown(key)),
                        FETCH_AGAIN,
                    ));
                }
            },
            Element::Text => Value::Text(self.text_range(key)?),
            Element::List => self.list(key)?,
        })
    }

    /// Walks over an array without keeping it.
    fn list(&mut self, key: &str) -> Result<Value, Fault> {
        let element = self.element(key)?;
        let count = usize::try_from(self.u64(key)?).unwrap_or(usize::MAX);
        let start = self.at;
        match element.size() {
            Some(size) => {
                self.take(count.saturating_mul(size), key)?;
            }
            None if element == Element::Text => {
                for _ in 0..count {
                    self.text_range(key)?;
                }
            }
            None => {
                return Err(Fault::unsupported(
                    format!("`{}` is an array of arrays", shown(key)),
                    FETCH_AGAIN,
                ));
            }
        }
        Ok(Value::List { element, count, bytes: start..self.at })
    }

    fn table(&mut self, count: u64) -> Result<Vec<Unplaced>, Fault> {
        let mut table = Vec::new();
        for _ in 0..count {
            let name = self.name("a tensor's name")?.to_owned();
            let rank = self.u32(&name)?;
            if rank > MOST_DIMENSIONS {
                return Err(Fault::malformed(
                    format!("it has {rank} dimensions, more than {MOST_DIMENSIONS}"),
                    FETCH_AGAIN,
                )
                .in_tensor(name));
            }
            let mut dimensions = Vec::new();
            for _ in 0..rank {
                dimensions.push(self.u64(&name)?);
            }
            let kind = self.u32(&name)?;
            let offset = self.u64(&name)?;
            table.push(Unplaced { name, dimensions, kind, offset });
        }
        Ok(table)
    }
}
