//! JSON of Polygraphy: what `polygraphy run` leaves with `--save-outputs` and `--save-inputs`.
//!
//! Each array is a whole `.npy` file, or a file of `torch.save`, as base64. It knows where
//! these texts lie; the readers of these formats say what they hold.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Entry, Place, npy, torch};
use crate::files::Mapped;

/// What a NumPy file's header may take, as base64: enough for any array of numbers.
const HEADER: usize = 4096;

/// The tensors, and copies of what was unpacked already; `map` is the number of the file itself.
pub(super) fn entries(file: &[u8], map: usize) -> Result<(Vec<Entry>, Vec<Mapped>), String> {
    let whole: Json<'_> = serde_json::from_slice(file)
        .map_err(|error| format!("it is not the JSON that Polygraphy writes: {error}"))?;
    let mut reading = Reading { file, map, entries: Vec::new(), copies: Vec::new() };
    for (name, text) in arrays(&whole)? {
        reading.array(&name, &text).map_err(|problem| format!("its array `{name}` {problem}"))?;
    }
    if reading.entries.is_empty() {
        return Err("it holds no array as Polygraphy saves them; write it with `polygraphy run \
                    --save-outputs`, or save the tensors as safetensors or `.npy`"
            .to_owned());
    }
    Ok((reading.entries, reading.copies))
}

/// An array's text as it lies in the file.
enum Encoded<'a> {
    Npy(&'a str),
    Torch(&'a str),
}

/// JSON whose texts are where they lie in the file.
enum Json<'a> {
    Text(&'a str),
    /// A text with escapes, which no base64 has.
    Escaped(String),
    List(Vec<Json<'a>>),
    Map(Vec<(String, Json<'a>)>),
    Other,
}

/// Names with their arrays. What all have alike is no part of a name: the only runner and
/// the only iteration.
fn arrays<'a>(whole: &Json<'a>) -> Result<Vec<(String, Encoded<'a>)>, String> {
    let mut named = Vec::new();
    // `RunResults`: pairs of a runner and its iterations.
    if let Some(Json::List(runners)) = whole.get("lst") {
        let pairs: Vec<(String, &[Json<'a>])> =
            runners.iter().map(runner).collect::<Option<_>>().ok_or(
                "its `lst` is no list of runners with their iterations, as Polygraphy saves them",
            )?;
        for (place, (runner, iterations)) in pairs.iter().enumerate() {
            let alike = pairs.iter().filter(|(other, _)| other == runner).count() > 1;
            let runner = match (pairs.len(), alike) {
                (1, _) => String::new(),
                (_, false) => format!("{runner}/"),
                (_, true) => format!("{runner}.{place}/"),
            };
            for (number, iteration) in iterations.iter().enumerate() {
                let outputs = iteration.get("outputs").unwrap_or(iteration);
                named.extend(of_iteration(&runner, number, iterations.len(), outputs)?);
            }
        }
        return Ok(named);
    }
    match whole {
        // Inputs: a dict of arrays for each iteration.
        Json::List(iterations) => {
            for (number, iteration) in iterations.iter().enumerate() {
                named.extend(of_iteration("", number, iterations.len(), iteration)?);
            }
            Ok(named)
        }
        Json::Map(_) => match array(whole)? {
            Some(only) => Ok(vec![(String::new(), only)]),
            None => of_iteration("", 0, 1, whole),
        },
        _ => Ok(named),
    }
}

/// A runner's name up to where its number and its time begin, and its iterations.
fn runner<'j, 'a>(pair: &'j Json<'a>) -> Option<(String, &'j [Json<'a>])> {
    let Json::List(pair) = pair else { return None };
    let [name, Json::List(iterations)] = pair.as_slice() else { return None };
    let name = match name {
        Json::Text(text) => (*text).to_owned(),
        Json::Escaped(text) => text.clone(),
        _ => return None,
    };
    let digit = |text: &str| text.starts_with(|first: char| first.is_ascii_digit());
    let short = name.split_once("-N").filter(|(_, rest)| digit(rest));
    Some((short.map_or(name.clone(), |(short, _)| short.to_owned()), iterations))
}

fn of_iteration<'a>(
    runner: &str,
    number: usize,
    all: usize,
    outputs: &Json<'a>,
) -> Result<Vec<(String, Encoded<'a>)>, String> {
    let Json::Map(outputs) = outputs else { return Ok(Vec::new()) };
    let iteration = if all == 1 { String::new() } else { format!("{number}/") };
    let mut named = Vec::new();
    for (name, value) in outputs {
        let name = format!("{runner}{iteration}{name}");
        let found = array(value).map_err(|problem| format!("its array `{name}` {problem}"))?;
        named.extend(found.map(|found| (name, found)));
    }
    Ok(named)
}

/// `{"array": ...}` or `{"tensor": ...}`, also within `values` of a lazy array.
fn array<'a>(value: &Json<'a>) -> Result<Option<Encoded<'a>>, String> {
    let value = value.get("values").unwrap_or(value);
    match (value.get("array"), value.get("tensor")) {
        (Some(Json::Text(text)), _) => Ok(Some(Encoded::Npy(text))),
        (None, Some(Json::Text(text))) => Ok(Some(Encoded::Torch(text))),
        (Some(Json::Escaped(_)), _) | (None, Some(Json::Escaped(_))) => Err(OLD.to_owned()),
        _ => Ok(None),
    }
}

const OLD: &str = "is no base64, as a Polygraphy of some years ago wrote it; load it with a newer \
                   one (`RunResults.load`) and save it again";

struct Reading<'f> {
    file: &'f [u8],
    map: usize,
    entries: Vec<Entry>,
    copies: Vec<Mapped>,
}

impl Reading<'_> {
    fn array(&mut self, name: &str, encoded: &Encoded<'_>) -> Result<(), String> {
        let name = name.to_owned();
        match encoded {
            Encoded::Npy(text) => {
                // The end of the header's part may lie within four characters.
                let start = &text[..text.len().min(HEADER)];
                let start = decode(start).ok_or(OLD)?;
                let (element, shape, _) = npy::parse(&start)?;
                let at = text.as_ptr() as usize - self.file.as_ptr() as usize;
                let place = Place::Encoded(at..at + text.len());
                self.entries.push(Entry { name, element, shape, place, map: self.map });
            }
            Encoded::Torch(text) => {
                crate::memory::ask(text.len() as u64)?;
                let bytes = decode(text).ok_or(OLD)?;
                let found = torch::entries(&bytes)?;
                let map = self.map + 1 + self.copies.len();
                let copy = Mapped::copy(&bytes);
                self.copies.push(copy.map_err(|error| format!("finds no memory: {error}"))?);
                self.entries.extend(found.into_iter().map(|entry| {
                    let name = match entry.name.as_str() {
                        "" => name.clone(),
                        key => format!("{name}.{key}"),
                    };
                    Entry { name, map, ..entry }
                }));
            }
        }
        Ok(())
    }
}

/// The data of an array whose text lies there.
pub(super) fn unpack(file: &[u8], text: Range<usize>) -> Result<Vec<u8>, String> {
    let text = std::str::from_utf8(&file[text]).map_err(|_| OLD)?;
    crate::memory::ask(text.len() as u64)?;
    let mut bytes = decode(text).ok_or(OLD)?;
    let (_, _, data) = npy::parse(&bytes)?;
    bytes.drain(..data.start);
    Ok(bytes)
}

/// The bytes of a text in base64 (RFC 4648), whose padding may be missing.
fn decode(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    if text.len() - digits.len() > 2 || digits.len() % 4 == 1 {
        return None;
    }
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 3);
    for four in digits.as_bytes().chunks(4) {
        let mut word = 0;
        for place in 0..4 {
            let digit = match four.get(place) {
                None => 0,
                Some(upper @ b'A'..=b'Z') => upper - b'A',
                Some(lower @ b'a'..=b'z') => lower - b'a' + 26,
                Some(digit @ b'0'..=b'9') => digit - b'0' + 52,
                Some(b'+') => 62,
                Some(b'/') => 63,
                Some(_) => return None,
            };
            word = word << 6 | u32::from(digit);
        }
        let [_, three @ ..] = word.to_be_bytes();
        bytes.extend_from_slice(&three[..four.len() - 1]);
    }
    Some(bytes)
}

impl<'a> Json<'a> {
    fn get(&self, key: &str) -> Option<&Json<'a>> {
        let Json::Map(pairs) = self else { return None };
        pairs.iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Json<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Json<'a>, D::Error> {
        deserializer.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Json<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Json<'de>, E> {
        Ok(Json::Text(text))
    }

    fn visit_str<E>(self, text: &str) -> Result<Json<'de>, E> {
        Ok(Json::Escaped(text.to_owned()))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Json<'de>, E> {
        Ok(Json::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Json<'de>, E> {
        Ok(Json::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Json<'de>, E> {
        Ok(Json::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Json<'de>, E> {
        Ok(Json::Other)
    }

    fn visit_unit<E>(self) -> Result<Json<'de>, E> {
        Ok(Json::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json<'de>, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Json::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Json<'de>, A::Error> {
        let mut map = Vec::new();
        while let Some(key) = pairs.next_key::<String>()? {
            // Times and settings of a run lie beside its arrays.
            if key == "runtime" {
                pairs.next_value::<IgnoredAny>()?;
                continue;
            }
            map.push((key, pairs.next_value()?));
        }
        Ok(Json::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

    fn encode(bytes: &[u8]) -> String {
        let mut text = String::new();
        for three in bytes.chunks(3) {
            let mut word = [0; 4];
            word[1..=three.len()].copy_from_slice(three);
            let word = u32::from_be_bytes(word);
            for place in 0..4 {
                let digit = DIGITS[(word >> (18 - 6 * place) & 63) as usize];
                text.push(if place > three.len() { '=' } else { digit as char });
            }
        }
        text
    }

    proptest! {
        #[test]
        fn what_is_written_in_base64_comes_back(bytes: Vec<u8>) {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }
    }

    #[test]
    fn texts_that_are_no_base64_are_refused() {
        assert_eq!(decode("TWFu").as_deref(), Some(b"Man".as_slice()));
        assert_eq!(decode("TWE=").as_deref(), Some(b"Ma".as_slice()));
        for text in ["T", "TWF\u{e9}", "TW u", "TWE===", "T=E="] {
            assert_eq!(decode(text), None, "{text}");
        }
        // As Polygraphy wrote them before it used base64: the bytes as Latin-1.
        for old in [r#""\u0093NUMPY\u0001""#, r#""NUMPY {""#] {
            let json = format!(r#"{{"x": {{"array": {old}}}}}"#);
            let error = entries(json.as_bytes(), 0).map(drop).expect_err("no base64");
            assert!(error.contains("`RunResults.load`"), "{error}");
        }
    }
}
