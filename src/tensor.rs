//! A host tensor: row-major f32, `[rows, width]`.
//!
//! It knows nothing of files, models or arms. Every value that travels between
//! ops is such a tensor, because a site is defined as f32 `[tokens, width]`.

use std::ops::Range;

/// Row-major f32 values, `[rows, width]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    rows: usize,
    width: usize,
    data: Vec<f32>,
}

impl Tensor {
    /// Wraps `data` as `[data.len() / width, width]`.
    ///
    /// # Panics
    /// If `width` is zero or does not divide the number of values: shapes are
    /// checked where data enters the program, so this is a bug of ours.
    pub fn new(width: usize, data: Vec<f32>) -> Tensor {
        assert!(
            width > 0 && data.len().is_multiple_of(width),
            "{} values do not fill rows of {width}",
            data.len()
        );
        Tensor { rows: data.len() / width, width, data }
    }

    /// A tensor of zeros, `[rows, width]`.
    pub fn zeros(rows: usize, width: usize) -> Tensor {
        Tensor::new(width, vec![0.0; rows * width])
    }

    /// Number of rows; for a site, the number of tokens.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of values in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.width..(row + 1) * self.width]
    }

    /// One row, to be written.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.width..(row + 1) * self.width]
    }

    /// Some rows.
    ///
    /// # Panics
    /// If they are not all there, as slicing does.
    pub fn some_rows(&self, rows: Range<usize>) -> Tensor {
        Tensor::new(self.width, self.data[rows.start * self.width..rows.end * self.width].to_vec())
    }

    /// Some columns of every row.
    ///
    /// # Panics
    /// If the rows are not so wide, as slicing does.
    pub fn columns(&self, columns: Range<usize>) -> Tensor {
        let rows = (0..self.rows()).flat_map(|row| &self.row(row)[columns.clone()]);
        Tensor::new(columns.len(), rows.copied().collect())
    }

    /// Replaces the columns from `first` on by those of a tensor with as many rows.
    pub fn set_columns(&mut self, first: usize, columns: &Tensor) {
        for row in 0..self.rows {
            self.row_mut(row)[first..first + columns.width].copy_from_slice(columns.row(row));
        }
    }

    /// Adds the same values to each row, as a bias is added.
    pub fn add_to_rows(&mut self, values: &[f32]) {
        for row in 0..self.rows {
            self.row_mut(row).iter_mut().zip(values).for_each(|(own, value)| *own += value);
        }
    }

    /// All values, row by row.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All values, row by row, to be written.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Gives up the values, row by row.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// The values as little-endian bytes, the way safetensors keeps them.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        self.data.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}
