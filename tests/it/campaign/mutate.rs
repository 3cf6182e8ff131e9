//! Mutants of files: half of them by what the format means (counts, types, shapes, offsets,
//! names, values at a path), the rest by bytes.
//!
//! The same random numbers make the same mutant of the same file, everywhere.

use std::io::{Cursor, Read, Write};

use runner::cache::{sealed, unsealed};
use runner::random::Random;
use serde_json::Value;

use super::gguf::Gguf;

/// What the bytes of a file mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Gguf,
    Json,
    /// JSON with a check at its end.
    SealedJson,
    Toml,
    Safetensors,
    Npy,
    Npz,
    /// A zip archive of a pickle and storages.
    Torch,
    /// A format and two sizes before plain values.
    Raw,
    /// Lines, each with a check at its end.
    SealedLines,
    /// Lines of JSON.
    Events,
}

/// Integers at which widths, signs and products turn over.
const INTEGERS: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    16,
    64,
    127,
    128,
    255,
    256,
    32_767,
    65_535,
    65_536,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0001,
    1 << 40,
    (1 << 53) + 1,
    u64::MAX / 8,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Words that somebody may write in place of any other.
const WORDS: [&str; 32] = [
    "0",
    "-0",
    "-1",
    "00",
    "1e400",
    "-1e308",
    "1e-320",
    "0.1",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "18446744073709551616",
    "4294967296",
    "nan",
    "inf",
    "-inf",
    "true",
    "false",
    "null",
    "\"\"",
    "[]",
    "{}",
    "[[[[]]]]",
    "\"..\"",
    "\"../../../../etc/passwd\"",
    "\"/dev/zero\"",
    "\"\\u0000\"",
    "\"\\u202e::error::\"",
    "1979-05-27T07:32:00Z",
    "\"a/b\"",
    "\"*\"",
    "'''\n'''",
];

fn pick<'a, T>(random: &mut Random, from: &'a [T]) -> &'a T {
    &from[random.below(from.len())]
}

/// A place within so many, the end included.
fn place(random: &mut Random, length: usize) -> usize {
    random.below(length + 1)
}

/// One to four changes of a file.
pub fn mutant(kind: Kind, file: &[u8], random: &mut Random) -> Vec<u8> {
    let by_meaning = random.below(2) == 0;
    let mut bytes = file.to_vec();
    for _ in 0..=random.below(4).min(random.below(4)) {
        let changed = if by_meaning { meant(kind, &bytes, random) } else { None };
        bytes = changed.unwrap_or_else(|| plain(&bytes, random));
    }
    bytes
}

/// A change of bytes, whatever they mean.
fn plain(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if bytes.is_empty() {
        return vec![random.bits() as u8; random.below(9)];
    }
    // Most of what matters stands at the beginning.
    let near = if random.below(2) == 0 { bytes.len() } else { bytes.len().min(256) };
    let at = random.below(near);
    let most = 2 << random.below(7);
    let size = 1 + random.below(most);
    let end = (at + size).min(bytes.len());
    match random.below(9) {
        0 | 1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at..end].fill(*pick(random, &[0, 0xff])),
        3 => bytes.truncate(at),
        4 => drop(bytes.drain(at..end)),
        5 => {
            let times = 1 + random.below(8);
            let again = bytes[at..end].repeat(times);
            bytes.splice(at..at, again);
        }
        6 => {
            let drawn: Vec<u8> = (0..size).map(|_| random.bits() as u8).collect();
            bytes.splice(at..at, drawn);
        }
        7 => {
            let word = pick(random, &INTEGERS).to_le_bytes();
            let width = 1 << random.below(4);
            let end = (at + width).min(bytes.len());
            bytes[at..end].copy_from_slice(&word[..end - at]);
        }
        _ => {
            let from = random.below(bytes.len());
            let taken = bytes[from..(from + size).min(bytes.len())].to_vec();
            let end = (at + taken.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&taken[..end - at]);
        }
    }
    bytes
}

/// A change of what the format says; none where the bytes are no such file any more.
fn meant(kind: Kind, bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    match kind {
        Kind::Gguf => Gguf::read(bytes).map(|file| file.changed(random).write()),
        Kind::Json => json(bytes, random),
        Kind::SealedJson => Some(sealed(json(unsealed(bytes)?, random)?)),
        Kind::Toml => tokens(bytes, random),
        Kind::Safetensors => in_safetensors(bytes, random),
        Kind::Npy => in_npy(bytes, random),
        Kind::Npz => in_archive(bytes, random, in_npy),
        Kind::Torch => in_archive(bytes, random, |bytes, random| Some(plain(bytes, random))),
        Kind::Raw => in_raw(bytes, random),
        Kind::SealedLines => lines(bytes, random, |line, random| {
            let (text, _) = line.rsplit_once(' ')?;
            let text = String::from_utf8(tokens(text.as_bytes(), random)?).ok()?;
            let text = text.replace('\n', " ");
            Some(format!("{text} {}", &blake3::hash(text.as_bytes()).to_hex()[..16]))
        }),
        Kind::Events => lines(bytes, random, |line, random| {
            String::from_utf8(json(line.as_bytes(), random)?).ok()
        }),
    }
}

/// A name that nobody expects, or one of these.
pub fn name(random: &mut Random, others: &[String]) -> String {
    match random.below(9) {
        0 => String::new(),
        1 => "\u{0}".to_owned(),
        2 => "../../x".to_owned(),
        3 => "a\u{1b}[31m\u{202e}\n::error::x".to_owned(),
        4 => "x".repeat(1 << (4 + random.below(9))),
        5 => "blk.18446744073709551616.attn_q.weight".to_owned(),
        6 if !others.is_empty() => format!("{}\u{301}", pick(random, others)),
        _ if !others.is_empty() => pick(random, others).clone(),
        _ => "weight".to_owned(),
    }
}

/// One of the integers at which something turns over, or a small one.
pub fn integer(random: &mut Random) -> u64 {
    if random.below(4) == 0 { random.below(70) as u64 } else { *pick(random, &INTEGERS) }
}

fn extreme(random: &mut Random, others: &[String]) -> Value {
    match random.below(12) {
        0 => Value::Null,
        1 => Value::Bool(random.below(2) == 0),
        2 | 3 => integer(random).into(),
        4 => (integer(random) as i64).wrapping_neg().into(),
        5 => (*pick(random, &[1e308, -1e308, 5e-324, 0.5, -0.0, 1e-30])).into(),
        6 | 7 => name(random, others).into(),
        8 => Value::Array(vec![]),
        9 => Value::Object(Default::default()),
        10 => vec![integer(random); random.below(6)].into(),
        _ => (0..1 << random.below(10)).fold(Value::Null, |value, _| Value::Array(vec![value])),
    }
}

/// The places of all values, as JSON pointers.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| pointers(item, &format!("{at}/{i}"), all))
        }
        Value::Object(map) => map.iter().for_each(|(key, item)| {
            let key = key.replace('~', "~0").replace('/', "~1");
            pointers(item, &format!("{at}/{key}"), all);
        }),
        _ => {}
    }
}

fn json(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    if random.below(4) == 0 {
        return tokens(bytes, random);
    }
    let mut value: Value = serde_json::from_slice(bytes).ok()?;
    let mut all = Vec::new();
    pointers(&value, "", &mut all);
    let names: Vec<String> =
        all.iter().filter_map(|path| Some(path.rsplit_once('/')?.1.to_owned())).collect();
    let path = pick(random, &all).clone();
    let other = value.pointer(&all[random.below(all.len())]).cloned().unwrap_or_default();
    match random.below(6) {
        // The place of a name, which is removed, renamed, or there twice.
        change @ 0..=2 => {
            let (parent, key) = path.rsplit_once('/')?;
            let key = key.replace("~1", "/").replace("~0", "~");
            match value.pointer_mut(parent)? {
                Value::Object(map) => {
                    let was = map.remove(&key)?;
                    match change {
                        0 => {}
                        1 => drop(map.insert(name(random, &names), was)),
                        _ => {
                            let twice = format!("{}:{other},", Value::from(key.clone()));
                            map.insert(key, was);
                            let text = value.to_string();
                            let all: Vec<usize> =
                                text.match_indices('{').map(|(at, _)| at + 1).collect();
                            let at = *pick(random, &all);
                            return Some([&text[..at], &twice, &text[at..]].concat().into_bytes());
                        }
                    }
                }
                Value::Array(items) => {
                    let at: usize = key.parse().ok()?;
                    let was = items.remove(at);
                    if change > 0 {
                        let times = if change == 1 { 2 } else { 1 << random.below(11) };
                        items.splice(at..at, vec![was; times]);
                    }
                }
                _ => return None,
            }
        }
        3 => *value.pointer_mut(&path)? = other,
        _ => *value.pointer_mut(&path)? = extreme(random, &names),
    }
    Some(value.to_string().into_bytes())
}

/// Words, numbers, texts and signs, each by itself.
fn cut(text: &str) -> Vec<&str> {
    let mut cut = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let word = |c: char| c.is_alphanumeric() || "_-.+".contains(c);
        let length = if first == '"' {
            rest[1..].find('"').map_or(rest.len(), |end| end + 2)
        } else if word(first) {
            rest.find(|c| !word(c)).unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        cut.push(&rest[..length]);
        rest = &rest[length..];
    }
    cut
}

/// Tokens are exchanged, doubled, left out or replaced; so are lines.
fn tokens(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let whole = random.below(4) == 0;
    let mut parts: Vec<&str> = if whole { text.split_inclusive('\n').collect() } else { cut(text) };
    let weighty: Vec<usize> = (0..parts.len()).filter(|&at| !parts[at].trim().is_empty()).collect();
    if weighty.is_empty() {
        return None;
    }
    let (at, other) = (*pick(random, &weighty), *pick(random, &weighty));
    match random.below(6) {
        0 => parts.swap(at, other),
        1 => parts.insert(at, parts[at]),
        2 => drop(parts.remove(at)),
        3 => parts.insert(at, parts[other]),
        4 => parts[at] = parts[other],
        _ => parts[at] = WORDS[random.below(WORDS.len())],
    }
    Some(parts.concat().into_bytes())
}

fn lines(
    bytes: &[u8],
    random: &mut Random,
    change: impl Fn(&str, &mut Random) -> Option<String>,
) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        return None;
    }
    let at = random.below(lines.len());
    match random.below(6) {
        0 => lines.insert(at, lines[at].clone()),
        1 => drop(lines.remove(at)),
        2 => {
            let other = random.below(lines.len());
            lines.swap(at, other);
        }
        _ => lines[at] = change(&lines[at], random)?,
    }
    Some((lines.join("\n") + "\n").into_bytes())
}

/// The length of a header that stands before it, right or not.
fn length(random: &mut Random, right: usize) -> u64 {
    if random.below(8) == 0 { integer(random) } else { right as u64 }
}

fn in_safetensors(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let size = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let end = usize::try_from(size).ok()?.checked_add(8).filter(|end| *end <= bytes.len())?;
    let header = json(&bytes[8..end], random)?;
    let size = length(random, header.len()).to_le_bytes();
    Some([&size, header.as_slice(), &bytes[end..]].concat())
}

fn in_npy(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let size = usize::from(u16::from_le_bytes(bytes.get(8..10)?.try_into().ok()?));
    if bytes[6] != 1 {
        return None;
    }
    let header = tokens(bytes.get(10..10 + size)?, random)?;
    let version = if random.below(8) == 0 { random.bits() as u8 } else { 1 };
    let size = length(random, header.len()) as u16;
    let start = [b"\x93NUMPY", [version, 0].as_slice(), &size.to_le_bytes()].concat();
    Some([&start, header.as_slice(), &bytes[10 + size as usize % 128..]].concat())
}

fn in_archive(
    bytes: &[u8],
    random: &mut Random,
    change: fn(&[u8], &mut Random) -> Option<Vec<u8>>,
) -> Option<Vec<u8>> {
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).ok()?;
    let mut members = Vec::new();
    for index in 0..archive.len().min(64) {
        let mut member = archive.by_index(index).ok()?;
        let mut data = Vec::new();
        let name = member.name().ok()?.into_owned();
        member.by_ref().take(1 << 20).read_to_end(&mut data).ok()?;
        members.push((name, data));
    }
    if members.is_empty() {
        return None;
    }
    let at = random.below(members.len());
    match random.below(5) {
        0 => {
            let names: Vec<String> = members.iter().map(|(name, _)| name.clone()).collect();
            members[at].0 = name(random, &names) + ["", ".npy"][random.below(2)];
        }
        1 => drop(members.remove(at)),
        2 => members[at].1 = plain(&members[at].1, random),
        _ => members[at].1 = change(&members[at].1, random)?,
    }
    let mut out = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let method = *pick(random, &[zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated]);
    for (name, data) in members {
        let options = zip::write::SimpleFileOptions::default().compression_method(method);
        out.start_file(name, options).ok()?;
        out.write_all(&data).ok()?;
    }
    Some(out.finish().ok()?.into_inner())
}

fn in_raw(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let head = bytes.get_mut(..17)?;
    match random.below(5) {
        0 => head[0] = random.bits() as u8,
        1 => head[1..9].copy_from_slice(&integer(random).to_le_bytes()),
        2 => head[9..17].copy_from_slice(&integer(random).to_le_bytes()),
        3 => {
            let (rows, width) = (1 + random.below(12) as u64, 1 + random.below(40) as u64);
            head[1..9].copy_from_slice(&rows.to_le_bytes());
            head[9..17].copy_from_slice(&width.to_le_bytes());
        }
        _ => {
            let end = 17 + place(random, bytes.len() - 17);
            bytes.truncate(end);
        }
    }
    Some(bytes)
}
