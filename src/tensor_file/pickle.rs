//! The part of Python's pickles in which tensors are saved, read without executing anything.
//!
//! A pickle is a program that builds values and may call any function by its name. Here the
//! functions that rebuild tensors are known, and what they would make is noted down; every
//! other name is refused. It knows values, not the bytes of a tensor's storage.
//!
//! Format: the comments of Python's `pickletools`; torch writes protocol 2.

use std::collections::{BTreeMap, BTreeSet};

/// The longest pickle that is read; the tensors' bytes lie beside it.
pub(super) const LARGEST: usize = 32 << 20;
/// Dicts and lists within one another.
const DEEPEST: usize = 32;
/// Values within dicts and lists, shared ones counted each time.
const MOST_VALUES: usize = 1 << 20;

/// A tensor as a pickle describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Saved {
    /// Which member of the archive holds its storage.
    pub storage: String,
    /// The name of its type in torch: `bfloat16`.
    pub kind: String,
    /// Its first element's place in the storage.
    pub offset: usize,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// By how many elements each dimension goes on.
    pub strides: Vec<usize>,
}

/// What was found in a value.
struct Found {
    tensors: Vec<(String, Saved)>,
    visits: usize,
}

/// A value's place among those that were made.
type Id = usize;

#[derive(Clone, Debug)]
enum Value {
    /// A number or a text that is no name, or nothing: it is not looked at.
    Plain,
    Number(i64),
    Text(String),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// One of the names that are known.
    Global(String),
    /// The member of an archive, and its elements' type where it has one.
    Storage(String, Option<String>),
    Tensor(Saved),
}

/// The tensors of a pickle, each by the keys that lead to it, with dots between; one that is
/// the whole value has no name.
pub(super) fn tensors(pickle: &[u8]) -> Result<Vec<(String, Saved)>, String> {
    if pickle.len() > LARGEST {
        return Err(format!("its pickle has {} bytes, and {LARGEST} are read", pickle.len()));
    }
    let mut machine = Machine { pickle, ..Machine::default() };
    let whole = machine.run()?;
    let mut found = Found { tensors: Vec::new(), visits: 0 };
    machine.collect(whole, String::new(), 0, &mut found)?;
    let found = found.tensors;
    let mut names = BTreeSet::new();
    match found.iter().find(|(name, _)| !names.insert(name.as_str())) {
        Some((name, _)) => Err(format!("two of its tensors are called `{name}`")),
        None => Ok(found),
    }
}

#[derive(Default)]
struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: BTreeMap<u32, Id>,
}

impl Machine<'_> {
    /// The value that the pickle makes.
    fn run(&mut self) -> Result<Id, String> {
        loop {
            match self.byte()? {
                b'.' => return self.pop(),
                // The protocol and the length of a frame change nothing.
                0x80 => drop(self.byte()?),
                0x95 => drop(self.take(8)?),
                b'N' | 0x88 | 0x89 => self.push(Value::Plain),
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Plain);
                }
                b'J' => {
                    let word = self.word()?;
                    self.push(Value::Number(i64::from(word.cast_signed())));
                }
                b'K' => {
                    let number = self.byte()?;
                    self.push(Value::Number(number.into()));
                }
                b'M' => {
                    let bytes = self.take(2)?;
                    let number = u16::from_le_bytes([bytes[0], bytes[1]]);
                    self.push(Value::Number(number.into()));
                }
                0x8a => self.long()?,
                b'X' => {
                    let length = self.word()?;
                    self.text(length as usize)?;
                }
                0x8c => {
                    let length = self.byte()?;
                    self.text(length.into())?;
                }
                b'U' | b'C' => {
                    let length = self.byte()?;
                    self.take(length.into())?;
                    self.push(Value::Plain);
                }
                b'T' | b'B' => {
                    let length = self.word()?;
                    self.take(length as usize)?;
                    self.push(Value::Plain);
                }
                b'(' => self.marks.push(self.stack.len()),
                b')' | b']' | 0x8f => self.push(Value::List(Vec::new())),
                b'}' => self.push(Value::Dict(Vec::new())),
                b't' | b'l' | 0x91 => {
                    let items = self.since_mark()?;
                    self.push(Value::List(items));
                }
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' | 0x90 => {
                    let items = self.since_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(&[key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.set(&items)?;
                }
                b'0' => drop(self.pop()?),
                b'q' => {
                    let key = self.byte()?;
                    self.remember(key.into())?;
                }
                b'r' => {
                    let key = self.word()?;
                    self.remember(key)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let key = self.byte()?;
                    self.recall(key.into())?;
                }
                b'j' => {
                    let key = self.word()?;
                    self.recall(key)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(&module, &name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (module, name) = (self.text_of(module)?, self.text_of(name)?);
                    self.global(&module, &name)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                // The attributes of a parameter or of an ordered dict are no tensors of ours.
                b'b' => drop(self.pop()?),
                other => {
                    return Err(format!(
                        "its pickle makes an object by opcode {other:#04x} at byte {}, which is \
                         more than tensors, dicts and lists need; save a dict of tensors alone, \
                         as `torch.save({{name: tensor}}, file)`",
                        self.at - 1
                    ));
                }
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(count);
        let bytes = end.and_then(|end| self.pickle.get(self.at..end));
        let bytes = bytes.ok_or("its pickle ends within a value")?;
        self.at += count;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn word(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A whole number of up to eight bytes; a longer one is no size of a tensor.
    fn long(&mut self) -> Result<(), String> {
        let length = usize::from(self.byte()?);
        let bytes = self.take(length)?;
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut word = [if negative { 0xff } else { 0 }; 8];
        let value = match word.get_mut(..length) {
            None => Value::Plain,
            Some(low) => {
                low.copy_from_slice(bytes);
                Value::Number(i64::from_le_bytes(word))
            }
        };
        self.push(value);
        Ok(())
    }

    fn text(&mut self, length: usize) -> Result<(), String> {
        let text = std::str::from_utf8(self.take(length)?);
        let text = text.map_err(|_| "its pickle holds a text that is not UTF-8")?.to_owned();
        self.push(Value::Text(text));
        Ok(())
    }

    /// A text that ends with its line.
    fn line(&mut self) -> Result<String, String> {
        let rest = self.pickle.get(self.at..).unwrap_or_default();
        let length = rest.iter().position(|byte| *byte == b'\n');
        let length = length.ok_or("its pickle ends within a name")?;
        let text = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.at += length + 1;
        Ok(text)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<Id, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let empty = || "its pickle takes a value that it has not made".to_owned();
        if self.stack.len() <= floor {
            return Err(empty());
        }
        self.stack.pop().ok_or_else(empty)
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("its pickle ends a list that it has not begun")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, count: usize) -> Result<(), String> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::List(items));
        Ok(())
    }

    fn append(&mut self, more: Vec<Id>) -> Result<(), String> {
        match self.stack.last().and_then(|top| self.values.get_mut(*top)) {
            Some(Value::List(items)) => {
                items.extend(more);
                Ok(())
            }
            _ => Err("its pickle appends to what is no list".to_owned()),
        }
    }

    fn set(&mut self, items: &[Id]) -> Result<(), String> {
        match self.stack.last().and_then(|top| self.values.get_mut(*top)) {
            Some(Value::Dict(pairs)) if items.len().is_multiple_of(2) => {
                pairs.extend(items.as_chunks().0.iter().map(|[key, value]| (*key, *value)));
                Ok(())
            }
            _ => Err("its pickle sets keys of what is no dict".to_owned()),
        }
    }

    fn remember(&mut self, key: u32) -> Result<(), String> {
        let top = self.stack.last().ok_or("its pickle remembers a value that it has not made")?;
        self.memo.insert(key, *top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), String> {
        let value = self.memo.get(&key).ok_or("its pickle recalls what it has not remembered")?;
        self.stack.push(*value);
        Ok(())
    }

    fn text_of(&self, id: Id) -> Result<String, String> {
        match &self.values[id] {
            Value::Text(text) => Ok(text.clone()),
            _ => Err("its pickle has something else where a name must stand".to_owned()),
        }
    }

    fn list_of(&self, id: Id) -> Result<&[Id], String> {
        match &self.values[id] {
            Value::List(items) => Ok(items),
            _ => Err("its pickle has something else where a tuple must stand".to_owned()),
        }
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>, String> {
        self.list_of(id)?.iter().map(|id| self.size(*id)).collect()
    }

    fn size(&self, id: Id) -> Result<usize, String> {
        match self.values[id] {
            Value::Number(number) => usize::try_from(number)
                .map_err(|_| format!("a tensor of it has {number} as a size or a place")),
            _ => Err("its pickle has something else where a size must stand".to_owned()),
        }
    }

    /// A name, if it is one of those that tensors need.
    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        let full = format!("{module}.{name}");
        let known = match module {
            "torch" => kind_of_storage(name).is_some() || is_kind(name) || name == "Size",
            _ => KNOWN.contains(&full.as_str()),
        };
        if !known {
            let full: String = full.chars().take(120).collect();
            return Err(format!(
                "it holds a `{full}`, which is no plain tensor, and nothing in a file is executed; \
                 save a dict of tensors alone, as `torch.save({{name: tensor}}, file)`"
            ));
        }
        self.push(Value::Global(full));
        Ok(())
    }

    /// `('storage', type, member, device, elements)` becomes the storage.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let [_, kind, member, ..] = *self.list_of(id)? else {
            return Err("its pickle names a storage in another way than torch".to_owned());
        };
        let kind = match &self.values[kind] {
            Value::Global(name) if name == UNTYPED => None,
            Value::Global(name) => name
                .strip_prefix("torch.")
                .and_then(kind_of_storage)
                .map(|kind| Some(kind.to_owned()))
                .ok_or_else(|| format!("`{name}` is no type of a storage"))?,
            _ => return Err("its pickle has something else where a type must stand".to_owned()),
        };
        let member = self.text_of(member)?;
        self.push(Value::Storage(member, kind));
        Ok(())
    }

    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = self.values[function].clone() else {
            return Err("its pickle calls what is no function".to_owned());
        };
        let arguments = self.list_of(arguments)?.to_vec();
        let value = match (function.as_str(), arguments.as_slice()) {
            ("torch._utils._rebuild_tensor", [storage, offset, shape, strides])
            | ("torch._utils._rebuild_tensor_v2", [storage, offset, shape, strides, ..]) => {
                self.tensor(*storage, *offset, *shape, *strides, None)?
            }
            (
                "torch._utils._rebuild_tensor_v3",
                [storage, offset, shape, strides, _, _, kind, ..],
            ) => self.tensor(*storage, *offset, *shape, *strides, Some(*kind))?,
            ("torch._utils._rebuild_parameter", [tensor, ..]) => self.values[*tensor].clone(),
            ("torch.Size", [sizes]) => Value::List(self.list_of(*sizes)?.to_vec()),
            ("collections.OrderedDict", _) => Value::Dict(Vec::new()),
            ("torch.device" | "_codecs.encode", _) => Value::Plain,
            (function, _) => {
                return Err(format!("its pickle calls `{function}` otherwise than torch does"));
            }
        };
        self.push(value);
        Ok(())
    }

    fn tensor(
        &self,
        storage: Id,
        offset: Id,
        shape: Id,
        strides: Id,
        kind: Option<Id>,
    ) -> Result<Value, String> {
        let Value::Storage(storage, typed) = &self.values[storage] else {
            return Err("its pickle makes a tensor of what is no storage".to_owned());
        };
        let kind = match (kind.map(|id| &self.values[id]), typed) {
            (Some(Value::Global(name)), _) => name.strip_prefix("torch.").map(str::to_owned),
            (None, typed) => typed.clone(),
            _ => None,
        };
        let kind = kind.ok_or("its pickle makes a tensor without a type")?;
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of it has the shape {shape:?} and strides {strides:?}"));
        }
        let (storage, offset) = (storage.clone(), self.size(offset)?);
        Ok(Value::Tensor(Saved { storage, kind, offset, shape, strides }))
    }

    /// The tensors within a value.
    fn collect(&self, id: Id, name: String, depth: usize, found: &mut Found) -> Result<(), String> {
        if depth > DEEPEST {
            return Err(format!("its dicts and lists lie more than {DEEPEST} deep"));
        }
        found.visits += 1;
        if found.visits > MOST_VALUES {
            return Err(format!("its dicts and lists hold more than {MOST_VALUES} values"));
        }
        let within = |key: &str| match name.as_str() {
            "" => key.to_owned(),
            name => format!("{name}.{key}"),
        };
        match &self.values[id] {
            Value::Tensor(saved) => found.tensors.push((name, saved.clone())),
            Value::List(items) => {
                for (place, item) in items.iter().enumerate() {
                    self.collect(*item, within(&place.to_string()), depth + 1, found)?;
                }
            }
            Value::Dict(pairs) => {
                for (key, value) in pairs {
                    let key = match &self.values[*key] {
                        Value::Text(text) => within(text),
                        Value::Number(number) => within(&number.to_string()),
                        _ => continue,
                    };
                    self.collect(*value, key, depth + 1, found)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A storage of bytes, whose tensors say their type themselves.
const UNTYPED: &str = "torch.storage.UntypedStorage";

/// What a pickle of tensors may name beside torch's types.
const KNOWN: [&str; 8] = [
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch.device",
    "collections.OrderedDict",
    "_codecs.encode",
    UNTYPED,
];

/// The type of a storage's elements.
fn kind_of_storage(class: &str) -> Option<&'static str> {
    Some(match class {
        "FloatStorage" => "float32",
        "DoubleStorage" => "float64",
        "HalfStorage" => "float16",
        "BFloat16Storage" => "bfloat16",
        "ByteStorage" => "uint8",
        "CharStorage" => "int8",
        "ShortStorage" => "int16",
        "IntStorage" => "int32",
        "LongStorage" => "int64",
        "BoolStorage" => "bool",
        "ComplexFloatStorage" => "complex64",
        "ComplexDoubleStorage" => "complex128",
        _ => return None,
    })
}

/// Whether a name of torch's is one of its types.
fn is_kind(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let counted = ["float", "bfloat", "int", "uint", "complex"];
    let counted = counted.iter().any(|kind| name.strip_prefix(kind).is_some_and(digits));
    counted || name == "bool" || name.starts_with("float8_") || name.starts_with("float4_")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `('storage', torch.FloatStorage, '0', 'cpu', 4)` as a storage, up to the call's end.
    fn tensor(offset: u8, side: u8, stride: u8) -> Vec<u8> {
        let start = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ";
        [start.as_slice(), &[b'K', offset, b'K', side, 0x85, b'K', stride, 0x85, 0x89], b"NtR"]
            .concat()
    }

    #[test]
    fn a_tensor_is_what_torch_would_rebuild() {
        let whole = [b"\x80\x02".as_slice(), &tensor(1, 3, 1), b"."].concat();
        let saved = Saved {
            storage: "0".to_owned(),
            kind: "float32".to_owned(),
            offset: 1,
            shape: vec![3],
            strides: vec![1],
        };
        assert_eq!(tensors(&whole).expect("a tensor"), [(String::new(), saved)]);
    }

    #[test]
    fn a_function_that_no_tensor_needs_is_refused_and_not_called() {
        for name in ["posix\nsystem", "builtins\neval", "torch\nload", "torch._utils\n_rebuild"] {
            let pickle = format!("\u{0}c{name}\nX\u{4}\u{0}\u{0}\u{0}true\u{0}");
            let pickle = [b"\x80\x02", &pickle.as_bytes()[1..], b"\x85R."].concat();
            let error = tensors(&pickle).expect_err(name);
            let called = name.replace('\n', ".");
            assert!(error.contains(&format!("it holds a `{called}`")), "{error}");
        }
        let error = tensors(b"\x80\x02}\x81.").expect_err("an object");
        assert!(error.contains("opcode 0x81 at byte 3"), "{error}");
    }

    #[test]
    fn lists_that_hold_one_another_end_in_words() {
        // A list within itself.
        let error = tensors(b"\x80\x02]q\x00h\x00a.").expect_err("endless");
        assert!(error.contains("more than 32 deep"), "{error}");
        // Each of 30 lists holds the one before it twice.
        let mut pickle = b"\x80\x02]q\x00".to_vec();
        for level in 0..30u8 {
            pickle.extend([b']', b'q', level + 1, b'h', level, b'a', b'h', level, b'a']);
        }
        pickle.push(b'.');
        let error = tensors(&pickle).expect_err("too many");
        assert!(error.contains("hold more than 1048576 values"), "{error}");
    }

    #[test]
    fn two_tensors_of_one_name_are_refused() {
        let mut pickle = b"\x80\x02}(X\x03\x00\x00\x00a.bX\x01\x00\x00\x00a".to_vec();
        pickle.splice(12..12, tensor(0, 1, 1));
        pickle.extend(b"}X\x01\x00\x00\x00b");
        pickle.extend(tensor(0, 1, 1));
        pickle.extend(b"su.");
        let error = tensors(&pickle).expect_err("twice");
        assert!(error.contains("called `a.b`"), "{error}");
    }
}
