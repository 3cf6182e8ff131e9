//! An action's key, described once: one walk, two sinks.
//!
//! [`KeyWalk::field`] feeds a hash and a text at the same time, so what explains
//! a rerun cannot differ from what caused it. Fields are framed by their
//! lengths: `ab, c` and `a, bc` are two keys.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Bumped when the meaning of a key or a record changes.
/// 1: the first format.
/// 2: records end with a check.
const FORMAT: &str = "2";

/// The name of an action: the blake3 hash of its fields.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Key(pub String);

/// The fields of a key, while they are being named.
#[derive(Clone, Debug)]
pub struct KeyWalk {
    hasher: blake3::Hasher,
    fields: Vec<(String, String)>,
}

impl KeyWalk {
    /// A walk over the fields of an action of some kind.
    pub fn new(kind: &str) -> KeyWalk {
        let mut walk = KeyWalk::again(&[]);
        walk.field("format", FORMAT);
        walk.field("kind", kind);
        walk
    }

    /// The walk that named these fields, in this order.
    pub fn again(fields: &[(String, String)]) -> KeyWalk {
        let mut walk = KeyWalk {
            hasher: blake3::Hasher::new_derive_key("runner 2026 action key"),
            fields: Vec::new(),
        };
        fields.iter().for_each(|(name, value)| walk.field(name, value));
        walk
    }

    /// One thing that the result depends on.
    pub fn field(&mut self, name: &str, value: impl std::fmt::Display) {
        let value = value.to_string();
        for text in [name, &value] {
            self.hasher.update(&(text.len() as u64).to_le_bytes());
            self.hasher.update(text.as_bytes());
        }
        self.fields.push((name.to_owned(), value));
    }

    /// The key of the fields named so far.
    pub fn key(&self) -> Key {
        Key(self.hasher.finalize().to_hex().to_string())
    }

    /// The fields, in order: name and value.
    pub fn fields(&self) -> &[(String, String)] {
        &self.fields
    }

    /// The first field that differs from an earlier walk's, in words, and how many others do.
    pub fn difference(&self, earlier: &[(String, String)]) -> Option<String> {
        let before: BTreeMap<&str, &str> = pairs(earlier).collect();
        let now: BTreeMap<&str, &str> = pairs(&self.fields).collect();
        let changed = pairs(&self.fields).filter_map(|(name, value)| match before.get(name) {
            None => Some(format!("{name} is new: {}", shown(value))),
            Some(old) if *old != value => {
                Some(format!("{name}: {} -> {}", shown(old), shown(value)))
            }
            Some(_) => None,
        });
        let gone = pairs(earlier).filter(|(name, _)| !now.contains_key(name));
        let gone = gone.map(|(name, value)| format!("{name} is gone: {}", shown(value)));
        let mut differences = changed.chain(gone);
        let first = differences.next()?;
        Some(match differences.count() {
            0 => first,
            1 => format!("{first}, and another field"),
            more => format!("{first}, and {more} other fields"),
        })
    }
}

fn pairs(fields: &[(String, String)]) -> impl Iterator<Item = (&str, &str)> {
    fields.iter().map(|(name, value)| (name.as_str(), value.as_str()))
}

/// A value short enough for one line.
fn shown(value: &str) -> String {
    const MOST: usize = 60;
    if value.chars().count() <= MOST {
        return value.to_owned();
    }
    let start: String = value.chars().take(MOST).collect();
    format!("{start}...")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key_of(fields: &[(String, String)]) -> Key {
        let mut walk = KeyWalk::new("test");
        for (name, value) in fields {
            walk.field(name, value);
        }
        walk.key()
    }

    #[test]
    fn fields_are_framed() {
        let of = |a: &str, b: &str| key_of(&[("n".into(), a.into()), ("m".into(), b.into())]);
        assert_ne!(of("ab", "c"), of("a", "bc"));
        assert_ne!(of("", "x"), of("x", ""));
    }

    #[test]
    fn a_difference_names_the_field_with_both_values() {
        let mut old = KeyWalk::new("arm");
        old.field("recipe", "e4m3");
        let mut new = KeyWalk::new("arm");
        new.field("recipe", "bf16");
        assert_eq!(new.difference(old.fields()).as_deref(), Some("recipe: e4m3 -> bf16"));
        assert_eq!(old.difference(old.fields()), None);
        new.field("tokens", 1);
        new.field("eps", 2);
        let words = "recipe: e4m3 -> bf16, and 2 other fields";
        assert_eq!(new.difference(old.fields()).as_deref(), Some(words));
        let words = "recipe: bf16 -> e4m3, and 2 other fields";
        assert_eq!(old.difference(new.fields()).as_deref(), Some(words), "two are gone");
    }

    proptest! {
        #[test]
        fn equal_fields_give_equal_keys_and_other_fields_other_keys(
            a in prop::collection::vec((".{0,8}", ".{0,8}"), 0..5),
            b in prop::collection::vec((".{0,8}", ".{0,8}"), 0..5),
        ) {
            prop_assert_eq!(a == b, key_of(&a) == key_of(&b));
        }
    }
}
