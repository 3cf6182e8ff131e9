//! The header of a GGUF file, written.
//!
//! It lays tensors out and knows the container, but no values: the caller streams
//! them after the header, each padded to the alignment, so that a file of many
//! gigabytes never stands in memory (candle's writer wants all tensors at once).

use super::weights::WeightType;

/// Alignment of tensors, GGUF's default.
pub(super) const ALIGNMENT: usize = 32;

/// A header in the making.
#[derive(Default)]
pub(super) struct HeaderWriter {
    metadata: Vec<u8>,
    metadata_count: u64,
    table: Vec<u8>,
    tensor_count: u64,
    data: u64,
}

impl HeaderWriter {
    fn key(&mut self, key: &str, element: u32) {
        push_text(&mut self.metadata, key);
        self.metadata.extend(element.to_le_bytes());
        self.metadata_count += 1;
    }

    fn list(&mut self, key: &str, element: u32, count: usize) {
        self.key(key, 9);
        self.metadata.extend(element.to_le_bytes());
        self.metadata.extend((count as u64).to_le_bytes());
    }

    pub fn unsigned(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
    }

    pub fn float(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.metadata.extend(value.to_le_bytes());
    }

    pub fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.metadata.push(value.into());
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        push_text(&mut self.metadata, value);
    }

    pub fn texts(&mut self, key: &str, values: &[String]) {
        self.list(key, 8, values.len());
        for value in values {
            push_text(&mut self.metadata, value);
        }
    }

    pub fn integers(&mut self, key: &str, values: &[i32]) {
        self.list(key, 5, values.len());
        self.metadata.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// Appends a tensor `[rows, width]`, which may be `depth` matrices one below the other; a
    /// vector has one row and one dimension.
    pub fn tensor(&mut self, name: &str, kind: WeightType, [depth, rows, width]: [usize; 3]) {
        push_text(&mut self.table, name);
        let dimensions = match (depth, rows) {
            (1, 1) => &[width][..],
            (1, _) => &[width, rows],
            _ => &[width, rows / depth, depth],
        };
        self.table.extend((dimensions.len() as u32).to_le_bytes());
        for &dimension in dimensions {
            self.table.extend((dimension as u64).to_le_bytes());
        }
        self.table.extend(kind.ggml().to_le_bytes());
        self.table.extend(self.data.to_le_bytes());
        self.tensor_count += 1;
        self.data += (kind.row_bytes(width) * rows).next_multiple_of(ALIGNMENT) as u64;
    }

    /// The header's bytes, padded to where the data begins.
    pub fn finish(self) -> Vec<u8> {
        let mut header = b"GGUF".to_vec();
        header.extend(3_u32.to_le_bytes());
        header.extend(self.tensor_count.to_le_bytes());
        header.extend(self.metadata_count.to_le_bytes());
        header.extend(self.metadata);
        header.extend(self.table);
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        header
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
