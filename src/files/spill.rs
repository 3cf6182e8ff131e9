//! Tensors put away in a file, so that memory holds what is worked on and no more.
//!
//! The file has no name, so it is gone with the process, however that ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::Mapped;
use crate::tensor::{Lent, Tensor};

/// Tensors of fewer bytes stay where they are: a map of a file is a page or more.
const LEAST: usize = 64 << 10;
/// Where a map may begin.
const PAGE: u64 = 64 << 10;

/// A file for tensors.
#[derive(Debug)]
pub struct Spill {
    file: File,
    /// Where the next tensor may begin.
    end: Mutex<u64>,
}

/// Values within a mapped file.
struct Within {
    file: Arc<Mapped>,
    from: usize,
    to: usize,
}

impl Lent for Within {
    fn values(&self) -> &[f32] {
        bytemuck::cast_slice(&self.file[self.from..self.to])
    }
}

impl Spill {
    /// A file in a folder, which has to be there.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn new(folder: &Path) -> io::Result<Spill> {
        Ok(Spill { file: tempfile::tempfile_in(folder)?, end: Mutex::new(0) })
    }

    /// The same tensor, its values in the file.
    ///
    /// # Errors
    /// If the file cannot be written: as a rule, if the disk is full.
    pub fn put(&self, tensor: &Tensor) -> io::Result<Tensor> {
        let bytes: &[u8] = bytemuck::cast_slice(tensor.data());
        if bytes.len() < LEAST {
            return Ok(tensor.clone());
        }
        let length = bytes.len() as u64;
        let place = {
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            let place = *end;
            *end = (place + length).next_multiple_of(PAGE);
            place
        };
        self.file.write_all_at(bytes, place)?;
        let file = Arc::new(Mapped::part(&self.file, place, bytes.len())?);
        let values = Within { file, from: 0, to: bytes.len() };
        Ok(Tensor::lent(tensor.width(), Arc::new(values)))
    }
}

/// A matrix of little-endian f32 within a mapped file: the file's own where this machine can read it
/// there, else a copy.
///
/// # Panics
/// If the bytes are no whole rows: the caller has checked them.
pub fn tensor_within(file: &Arc<Mapped>, from: usize, to: usize, width: usize) -> Tensor {
    let fits = bytemuck::try_cast_slice::<u8, f32>(&file[from..to]).is_ok();
    if fits && cfg!(target_endian = "little") {
        return Tensor::lent(width, Arc::new(Within { file: Arc::clone(file), from, to }));
    }
    let values = file[from..to].chunks_exact(4);
    let values = values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Tensor::new(width, values.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_as_they_were_put_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let spill = Spill::new(folder.path()).expect("a file");
        let tensor = |seed: u32, rows: usize| {
            let bits = (0..rows * 96).map(|at| (at as u32).wrapping_mul(2_654_435_761) ^ seed);
            Tensor::new(96, bits.map(|bits| f32::from_bits(bits & 0xbfff_ffff)).collect())
        };
        let all: Vec<Tensor> = (1..6).map(|seed| tensor(seed, 100 * seed as usize)).collect();
        let away: Vec<Tensor> = all.iter().map(|t| spill.put(t).expect("room")).collect();
        assert_eq!(all, away);
        let mut written = away[4].clone();
        written.row_mut(0)[0] = 7.0;
        assert_eq!(all[4], away[4], "what is written is a copy");
        assert_eq!(std::fs::read_dir(folder.path()).expect("the folder").count(), 0);
    }
}
