//! A GGUF file taken apart and put together again, right or wrong: for mutants alone.

use runner::random::Random;

use super::mutate::{integer, name};

/// The parts of a file; each is written as it stands here, whatever it says.
pub struct Gguf {
    version: u32,
    /// Key, type and the bytes of the value.
    metadata: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<Line>,
    data: Vec<u8>,
    /// More than there are, or fewer.
    counts: Option<[u64; 2]>,
}

#[derive(Clone)]
struct Line {
    name: String,
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn word(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn long(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<String> {
        let size = self.long()?;
        String::from_utf8(self.take(size)?.to_vec()).ok()
    }

    /// Goes past a value of a type.
    fn pass(&mut self, kind: u32) -> Option<()> {
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => self.long()?,
            9 => {
                let (kind, count) = (self.word()?, self.long()?);
                return (0..count).try_for_each(|_| self.pass(kind));
            }
            _ => return None,
        };
        self.take(size).map(drop)
    }
}

impl Gguf {
    /// The parts of a sound file.
    pub fn read(file: &[u8]) -> Option<Gguf> {
        let mut bytes = Bytes(file.strip_prefix(b"GGUF")?);
        let version = bytes.word()?;
        let (tensors, entries) = (bytes.long()?, bytes.long()?);
        let mut metadata = Vec::new();
        for _ in 0..entries {
            let (key, kind) = (bytes.text()?, bytes.word()?);
            let before = bytes.0;
            bytes.pass(kind)?;
            metadata.push((key, kind, before[..before.len() - bytes.0.len()].to_vec()));
        }
        let mut lines = Vec::new();
        for _ in 0..tensors {
            let (name, count) = (bytes.text()?, bytes.word()?);
            let dimensions = (0..count).map(|_| bytes.long()).collect::<Option<Vec<u64>>>()?;
            lines.push(Line { name, dimensions, kind: bytes.word()?, offset: bytes.long()? });
        }
        let start = (file.len() - bytes.0.len()).next_multiple_of(32);
        let data = file.get(start..)?.to_vec();
        Some(Gguf { version, metadata, tensors: lines, data, counts: None })
    }

    /// The file, as it stands here.
    pub fn write(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        let right = [self.tensors.len() as u64, self.metadata.len() as u64];
        self.counts.unwrap_or(right).iter().for_each(|count| file.extend(count.to_le_bytes()));
        let text = |file: &mut Vec<u8>, text: &str| {
            file.extend((text.len() as u64).to_le_bytes());
            file.extend(text.as_bytes());
        };
        for (key, kind, value) in &self.metadata {
            text(&mut file, key);
            file.extend(kind.to_le_bytes());
            file.extend(value);
        }
        for line in &self.tensors {
            text(&mut file, &line.name);
            file.extend((line.dimensions.len() as u32).to_le_bytes());
            line.dimensions.iter().for_each(|size| file.extend(size.to_le_bytes()));
            file.extend(line.kind.to_le_bytes());
            file.extend(line.offset.to_le_bytes());
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(&self.data);
        file
    }

    /// The same with one part changed.
    pub fn changed(mut self, random: &mut Random) -> Gguf {
        let right = [self.tensors.len() as u64, self.metadata.len() as u64];
        if self.metadata.is_empty() || self.tensors.is_empty() {
            self.version = integer(random) as u32;
            return self;
        }
        let (entry, line) = (random.below(self.metadata.len()), random.below(self.tensors.len()));
        let mut names: Vec<String> = self.tensors.iter().map(|line| line.name.clone()).collect();
        names.extend(self.metadata.iter().map(|(key, ..)| key.clone()));
        match random.below(16) {
            0 => self.version = integer(random) as u32,
            1 => self.counts = Some([integer(random), right[1]]),
            2 => self.counts = Some([right[0], integer(random)]),
            3 => self.metadata[entry].0 = name(random, &names),
            4 => self.metadata[entry].1 = random.below(15) as u32,
            5 | 6 => {
                let (_, kind, value) = &mut self.metadata[entry];
                // A number; or the count of a text or a list, and the type in a list.
                let word = integer(random).to_le_bytes();
                let at = if *kind == 9 && random.below(2) == 0 { 4 } else { 0 };
                let end = value.len().min(at + 8);
                value[at.min(end)..end].copy_from_slice(&word[..end - at.min(end)]);
            }
            7 => drop(self.metadata.remove(entry)),
            8 => self.metadata.push(self.metadata[entry].clone()),
            9 => self.tensors[line].name = name(random, &names),
            10 => {
                let dimensions = &mut self.tensors[line].dimensions;
                match random.below(3) {
                    0 => dimensions.push(integer(random)),
                    1 => drop(dimensions.pop()),
                    _ => dimensions.iter_mut().for_each(|size| {
                        if random.below(2) == 0 {
                            *size = integer(random);
                        }
                    }),
                }
            }
            11 => self.tensors[line].kind = random.below(42) as u32,
            12 => {
                let offset = &mut self.tensors[line].offset;
                *offset = match random.below(3) {
                    0 => integer(random),
                    1 => offset.wrapping_add(32),
                    _ => offset.wrapping_sub(32),
                };
            }
            13 => drop(self.tensors.remove(line)),
            14 => self.tensors.push(self.tensors[line].clone()),
            _ => {
                let text =
                    |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
                let alignment = integer(random) as u32;
                let new = match random.below(3) {
                    0 => ("general.alignment", 4, alignment.to_le_bytes().to_vec()),
                    1 => ("split.count", 4, alignment.to_le_bytes().to_vec()),
                    _ => ("tokenizer.ggml.pre", 8, text(&name(random, &names))),
                };
                self.metadata.push((new.0.to_owned(), new.1, new.2));
            }
        }
        self
    }
}
