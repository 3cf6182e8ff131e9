//! The order in which cuBLAS added a product up, found by what the engine returned.
//!
//! It knows operands and [`Order`]s; what a product is of, and which kernels an engine lists, is
//! `engine.rs`'s.

use std::collections::BTreeSet;

use super::chip::Unit;
use super::quantize::Codes;
use crate::compute::ComputeError;
use crate::compute::engine_kernels::ggml;
use crate::compute::engine_kernels::linear::{Linear, codes, residue_tile};
use crate::dtype::Format;
use crate::engine::Order;
use crate::tensor::Tensor;

/// Rows and columns on which other orders are tried first: those where the usual one fails.
const SAMPLE: (usize, usize) = (8, 64);

/// Multiply-adds that a search for an order may cost: some seconds of one core.
const AFFORDED: usize = 4_000_000_000;

/// How many rows of a sample a search can afford where each costs so many multiply-adds.
pub fn rows_afforded(row_costs: usize) -> usize {
    (AFFORDED / row_costs.max(1)).clamp(1, SAMPLE.0)
}

/// Whether another order that fits a sample is tried on everything, after so many of this cost.
/// Until one is exact some are tried whatever they cost; then others only to name them.
pub fn is_tried(tried: usize, found: bool, multiply_adds: usize) -> bool {
    const AT_LEAST: usize = 12;
    let afforded = AFFORDED / multiply_adds.max(1);
    tried < if found { afforded } else { afforded.max(AT_LEAST) }
}

/// The first names, and how many more there are.
pub fn some_names(mut names: Vec<String>) -> Vec<String> {
    /// As many as a reader takes in.
    const SHOWN: usize = 2;
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    let more = names.len().saturating_sub(SHOWN);
    names.truncate(SHOWN);
    names.extend((more > 0).then(|| format!("one of {more} more orders")));
    names
}

/// Whether two rows have the same bits.
pub fn same_row(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Values whose bits differ; one NaN is as good as another.
pub fn differing(a: &Tensor, b: &Tensor) -> usize {
    let pairs = a.data().iter().zip(b.data());
    pairs.filter(|(a, b)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan())).count()
}

/// The rows at these places.
fn rows_at(x: &Tensor, rows: &[usize]) -> Tensor {
    Tensor::new(x.width(), rows.iter().flat_map(|&row| x.row(row)).copied().collect())
}

/// The sums and a bias in f32.
pub fn with_bias(mut y: Tensor, bias: Option<&[f32]>) -> Tensor {
    if let Some(bias) = bias {
        y.add_to_rows(bias);
    }
    y
}

/// What a product's activation meets, as the engine holds it.
pub struct Operands {
    unit: Unit,
    format: Format,
    held: Held,
    bias: Option<Vec<f32>>,
}

/// Who calls cuBLAS, and how it holds the weight.
enum Held {
    /// PyTorch.
    Codes(Codes),
    /// llama.cpp.
    Ggml(Tensor),
}

impl Operands {
    /// Those of PyTorch, whose values are rounded to that format.
    pub fn torch(unit: Unit, format: Format, w: &Tensor, bias: Option<Vec<f32>>) -> Operands {
        Operands { unit, format, held: Held::Codes(codes(format, w)), bias }
    }

    /// Those that llama.cpp gives to cuBLAS; the weight's values are exactly those of the format.
    pub fn ggml(unit: Unit, format: Format, w: Tensor, bias: Option<Vec<f32>>) -> Operands {
        Operands { unit, format, held: Held::Ggml(w), bias }
    }

    /// The format that parts are rounded to, which orders in words name.
    pub fn format(&self) -> Format {
        match self.held {
            Held::Codes(_) => self.format,
            Held::Ggml(_) => ggml::blas_format(self.format),
        }
    }

    /// The weight's rows.
    fn outputs(&self) -> usize {
        match &self.held {
            Held::Codes(w) => w.rows(),
            Held::Ggml(w) => w.rows(),
        }
    }

    /// The product with `x[N, K]` in that order.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn product(&self, x: &Tensor, order: Order) -> Result<Tensor, ComputeError> {
        match &self.held {
            Held::Codes(w) => {
                let linear = Linear::new(&self.unit, x.width(), self.format).in_order(order);
                Ok(linear.apply(&codes(self.format, x), w, self.bias.as_deref())?)
            }
            Held::Ggml(w) => {
                let y = ggml::by_blas(x, w, self.format, ggml::Part::Weight, order)?;
                Ok(with_bias(y, self.bias.as_deref()))
            }
        }
    }

    /// What the kernel that llama.cpp chooses makes of `x`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn by_ggml(&self, x: &Tensor) -> Result<Tensor, ComputeError> {
        match &self.held {
            Held::Codes(_) => self.product(x, Order::CHAIN),
            Held::Ggml(w) => {
                let y = ggml::product(x, w, self.format, ggml::Part::Weight)?;
                Ok(with_bias(y, self.bias.as_deref()))
            }
        }
    }

    /// The order whose sums are nearest to the engine's, what it gives, and, where that is not
    /// one chain, the other orders that fit as well.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn order_of(
        &self,
        x: &Tensor,
        observed: &Tensor,
        listed: Order,
    ) -> Result<(Order, Tensor, Vec<Order>), ComputeError> {
        let chain = self.product(x, Order::CHAIN)?;
        let mut least = differing(&chain, observed);
        let mut best = (Order::CHAIN, chain);
        let mut also = Vec::new();
        if least > 0 {
            let mut fitting = self.orders_that_fit(x, observed, &best.1)?;
            if listed != Order::CHAIN {
                fitting.retain(|order| *order != listed);
                fitting.insert(0, listed);
            }
            for (tried, order) in fitting.into_iter().enumerate() {
                if !is_tried(tried, least == 0, observed.data().len() * x.width()) {
                    break;
                }
                let y = self.product(x, order)?;
                let mismatches = differing(&y, observed);
                if mismatches < least {
                    (least, best) = (mismatches, (order, y));
                } else if mismatches == 0 {
                    also.push(order);
                }
            }
        }
        Ok((best.0, best.1, also))
    }

    /// The orders whose sums are the engine's on a sample: rows and columns in which those of
    /// one chain are not.
    fn orders_that_fit(
        &self,
        x: &Tensor,
        observed: &Tensor,
        chain: &Tensor,
    ) -> Result<Vec<Order>, ComputeError> {
        if (observed.rows(), observed.width()) != (x.rows(), self.outputs()) {
            return Ok(Vec::new());
        }
        let differs = |row: &usize| !same_row(chain.row(*row), observed.row(*row));
        let rows: Vec<usize> = (0..observed.rows()).filter(differs).take(SAMPLE.0).collect();
        let mut columns = BTreeSet::new();
        for &row in &rows {
            let pairs = chain.row(row).iter().zip(observed.row(row)).enumerate();
            let differing = pairs.filter(|(_, (a, b))| a.to_bits() != b.to_bits());
            columns.extend(differing.map(|(column, _)| column).take(SAMPLE.1 / SAMPLE.0));
        }
        let columns: Vec<usize> = columns.into_iter().collect();
        let sample = Operands {
            unit: self.unit,
            format: self.format,
            held: match &self.held {
                Held::Codes(w) => Held::Codes(w.select_rows(&columns)),
                Held::Ggml(w) => Held::Ggml(rows_at(w, &columns)),
            },
            bias: self.bias.as_ref().map(|bias| columns.iter().map(|&c| bias[c]).collect()),
        };
        let asked = rows_at(x, &rows);
        let values = rows.iter().flat_map(|&row| columns.iter().map(move |&c| (row, c)));
        let values = values.map(|(row, column)| observed.row(row)[column]);
        let expected = Tensor::new(columns.len().max(1), values.collect());
        let mut fitting = Vec::new();
        let rest = match self.held {
            Held::Codes(_) => residue_tile(self.format, x.width()),
            Held::Ggml(_) => None,
        };
        let bytes = self.format().bytes();
        // Sums in f16 are a tensor core's.
        let lanes = !(matches!(self.held, Held::Ggml(_)) && self.format == Format::F16);
        let family = Order::family(self.outputs(), x.width(), rest, 128 / bytes as u32);
        for order in family.into_iter().filter(|order| lanes || !order.is_by_lanes()) {
            if differing(&sample.product(&asked, order)?, &expected) == 0 {
                fitting.push(order);
            }
        }
        Ok(fitting)
    }
}
