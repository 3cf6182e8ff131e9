//! JSON in which no key occurs twice: of two, every reader would keep another one in silence.
//!
//! It knows no files.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::text::shown;

/// Reads JSON.
///
/// # Errors
/// With the line and the column, also where a key occurs twice in an object.
pub(super) fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    let words = |error: serde_json::Error| error.to_string();
    serde_json::from_slice::<Unique>(json).map_err(words)?;
    serde_json::from_slice(json).map_err(words)
}

/// A value, of which nothing is kept.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unique, D::Error> {
        deserializer.deserialize_any(Keys)
    }
}

struct Keys;

impl<'de> Visitor<'de> for Keys {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_unit<E: Error>(self) -> Result<Unique, E> {
        Ok(Unique)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Unique, A::Error> {
        while let Some(Unique) = list.next_element()? {}
        Ok(Unique)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
        let mut keys = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if keys.contains(&key) {
                return Err(Error::custom(format!("the key `{}` occurs twice", shown(&key))));
            }
            keys.insert(key);
            let Unique = map.next_value()?;
        }
        Ok(Unique)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_key_that_occurs_twice_is_named_with_its_place() {
        let read = |json: &str| super::read::<serde_json::Value>(json.as_bytes());
        read(r#"{ "a": { "x": 1 }, "b": [{ "x": null }, { "x": -1.5 }], "c": "x" }"#)
            .expect("JSON");
        let said = read(r#"{ "x": 1, "x": 1 }"#).expect_err("twice");
        assert!(said.starts_with("the key `x` occurs twice at line 1"), "{said}");
        let nested = read(r#"{ "a": [{ "b": { "x": 1, "x": 2 } }] }"#).expect_err("twice");
        assert!(nested.starts_with("the key `x` occurs twice at line 1 column"), "{nested}");
    }
}
