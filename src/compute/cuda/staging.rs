//! Decoded weights on their way to a GPU: the CPU decodes into page-locked memory, and while one
//! piece travels the next is decoded.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, PinnedHostSlice};
use rayon::prelude::*;

use super::gpu::DeviceError;
use crate::model::{ModelError, Weight};

/// Values of a piece: large enough that a copy is not all overhead, small enough for the caches.
const PIECE: usize = 2 << 20;
/// Pieces that are decoded ahead of the copies.
const PIECES: usize = 4;
/// Values that one core decodes at a time.
const DECODED: usize = 128 << 10;

/// Page-locked memory of one GPU's context.
pub struct Staging {
    pieces: Vec<PinnedHostSlice<f32>>,
    next: usize,
}

impl Staging {
    /// Memory for the copies of one stream.
    ///
    /// # Errors
    /// If the system locks no more pages.
    pub fn new(stream: &CudaStream) -> Result<Staging, DeviceError> {
        let piece = || {
            // SAFETY: the memory is written below before anything reads it. Without flags it is
            // ordinary memory for the CPU.
            let mut piece = unsafe { stream.context().alloc_pinned_with_flags::<f32>(PIECE, 0)? };
            piece.as_mut_slice()?.fill(0.0);
            Ok(piece)
        };
        let pieces = (0..PIECES).map(|_| piece()).collect::<Result<_, DeviceError>>()?;
        Ok(Staging { pieces, next: 0 })
    }

    /// Rows of a weight as f32, decoded as the reference decodes them, on the GPU.
    ///
    /// # Errors
    /// If the driver refuses, or if the weight cannot be decoded.
    pub fn upload(
        &mut self,
        stream: &Arc<CudaStream>,
        weight: Weight<'_>,
        first: usize,
        rows: usize,
    ) -> Result<CudaSlice<f32>, DeviceError> {
        let width = weight.width();
        let mut values = stream.alloc_zeros::<f32>(rows * width)?;
        let step = PIECE / width;
        let mut done = 0;
        // A piece is copied whole; what follows its rows is overwritten by the next copy.
        while step > 0 && (rows - done) * width >= PIECE {
            let piece = &mut self.pieces[self.next];
            self.next = (self.next + 1) % PIECES;
            // This waits until the piece's last copy has ended.
            decode(weight, first + done, &mut piece.as_mut_slice()?[..step * width])?;
            let mut target = values.slice_mut(done * width..done * width + PIECE);
            stream.memcpy_htod(piece, &mut target)?;
            done += step;
        }
        if done < rows {
            let mut rest = vec![0.0f32; (rows - done) * width];
            decode(weight, first + done, &mut rest)?;
            stream.memcpy_htod(&rest, &mut values.slice_mut(done * width..))?;
        }
        Ok(values)
    }
}

/// Decodes as many rows as `out` holds, with all cores.
fn decode(weight: Weight<'_>, first: usize, out: &mut [f32]) -> Result<(), ModelError> {
    let width = weight.width();
    let step = (DECODED / width).max(1);
    let parts = out.par_chunks_mut(step * width).enumerate();
    parts.try_for_each(|(at, out)| {
        let start = first + at * step;
        weight.decode_rows(start..start + out.len() / width, out)
    })
}
