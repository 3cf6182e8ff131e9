//! A host tensor: row-major f32, `[rows, width]`.
//!
//! It knows nothing of files, models or arms. Every value that travels between
//! ops is such a tensor, because a site is defined as f32 `[tokens, width]`.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Row-major f32 values, `[rows, width]`. A clone shares them until one of both is written.
#[derive(Clone)]
pub struct Tensor {
    rows: usize,
    width: usize,
    data: Data,
}

/// Where values lie.
#[derive(Clone)]
enum Data {
    Own(Arc<Vec<f32>>),
    /// Somewhere else, such as in a file.
    Lent(Arc<dyn Lent>),
}

/// Values that lie outside of the heap and stay as they are.
pub trait Lent: Send + Sync {
    /// The values, row by row.
    fn values(&self) -> &[f32];
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tensor { rows, width, .. } = self;
        let mut text = f.debug_struct("Tensor");
        text.field("rows", rows).field("width", width).field("data", &self.data()).finish()
    }
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        (self.rows, self.width) == (other.rows, other.width) && self.data() == other.data()
    }
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
        Tensor { rows: data.len() / width, width, data: Data::Own(Arc::new(data)) }
    }

    /// The same tensor with its values elsewhere.
    ///
    /// # Panics
    /// If those are not as many: a bug of ours.
    pub fn lent(width: usize, values: Arc<dyn Lent>) -> Tensor {
        let count = values.values().len();
        assert!(
            width > 0 && count.is_multiple_of(width),
            "{count} values do not fill rows of {width}"
        );
        Tensor { rows: count / width, width, data: Data::Lent(values) }
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
        &self.data()[row * self.width..(row + 1) * self.width]
    }

    /// One row, to be written.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let width = self.width;
        &mut self.data_mut()[row * width..(row + 1) * width]
    }

    /// Some rows.
    ///
    /// # Panics
    /// If they are not all there, as slicing does.
    pub fn some_rows(&self, rows: Range<usize>) -> Tensor {
        let values = &self.data()[rows.start * self.width..rows.end * self.width];
        Tensor::new(self.width, values.to_vec())
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
        match &self.data {
            Data::Own(values) => values,
            Data::Lent(values) => values.values(),
        }
    }

    /// All values, row by row, to be written.
    pub fn data_mut(&mut self) -> &mut [f32] {
        if let Data::Lent(values) = &self.data {
            self.data = Data::Own(Arc::new(values.values().to_vec()));
        }
        match &mut self.data {
            Data::Own(values) => Arc::make_mut(values).as_mut_slice(),
            Data::Lent(_) => unreachable!("they were copied"),
        }
    }

    /// Gives up the values, row by row.
    pub fn into_data(self) -> Vec<f32> {
        match self.data {
            Data::Own(values) => Arc::unwrap_or_clone(values),
            Data::Lent(values) => values.values().to_vec(),
        }
    }

    /// The values as little-endian bytes, the way safetensors keeps them.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        self.data().iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Elsewhere(Vec<f32>);

    impl Lent for Elsewhere {
        fn values(&self) -> &[f32] {
            &self.0
        }
    }

    #[test]
    fn what_is_written_is_not_what_others_share() {
        let own = Tensor::new(2, vec![1.0, 2.0, 3.0, 4.0]);
        let lent = Tensor::lent(2, Arc::new(Elsewhere(own.data().to_vec())));
        assert_eq!(own, lent);
        for first in [own, lent] {
            let mut second = first.clone();
            second.row_mut(1)[0] = 9.0;
            assert_eq!(first.data(), [1.0, 2.0, 3.0, 4.0]);
            assert_eq!(second.into_data(), [1.0, 2.0, 9.0, 4.0]);
            assert_eq!(first.into_data(), [1.0, 2.0, 3.0, 4.0]);
        }
    }
}
