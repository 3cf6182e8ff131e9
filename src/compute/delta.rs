//! Gated delta nets: what their three ops read, and what they exactly return.
//!
//! Source: Yang et al., Gated Delta Networks (arXiv 2412.06464), as Qwen3-Next has them in
//! transformers 5.17. A pass hands over all positions so far, and gets those from `first` on.

use super::ComputeError;
use super::emulated::kernels::DeltaToken;
use super::reference::activated;
use crate::model::{Activation, DeltaNet, Weight};
use crate::tensor::Tensor;

/// A convolution of each channel over the last positions, and SiLU of it.
#[derive(Clone, Copy)]
pub struct Convolution<'a> {
    /// All positions so far, `[positions, channels]`.
    pub x: &'a Tensor,
    /// The taps of each channel, `[channels, taps]`; the last one is the position's own.
    pub weight: Weight<'a>,
    /// The first position that is asked for.
    pub first: usize,
}

/// How much of a state stays, and how much of it is corrected, for each head of values.
#[derive(Clone, Copy)]
pub struct Gates<'a> {
    /// For each group of heads its corrections and then its decays, before their functions:
    /// `[tokens, 2 * value_heads]`.
    pub x: &'a Tensor,
    /// Each head's rate of decay, as the net's file holds it.
    pub rates: Weight<'a>,
    /// What is added to each head's decay.
    pub shift: Weight<'a>,
    /// The shape.
    pub net: &'a DeltaNet,
}

/// The gated delta rule.
#[derive(Clone, Copy)]
pub struct DeltaRule<'a> {
    /// Queries, keys and values of all positions so far, `[positions, channels]`.
    pub x: &'a Tensor,
    /// Their gates, `[positions, 2 * value_heads]`: what stays, then what is corrected.
    pub gates: &'a Tensor,
    /// The first position that is asked for.
    pub first: usize,
    /// The shape.
    pub net: &'a DeltaNet,
}

fn differ(what: &str, left: String, right: String) -> ComputeError {
    ComputeError::Shape { what: what.to_owned(), left, right }
}

impl Convolution<'_> {
    /// Rows and width of the result.
    pub fn shape(&self) -> [usize; 2] {
        [self.x.rows().saturating_sub(self.first), self.x.width()]
    }

    /// The taps of all channels.
    ///
    /// # Errors
    /// If there are not as many channels, or a weight cannot be read.
    pub fn checked(&self) -> Result<Vec<f32>, ComputeError> {
        let Convolution { x, weight, .. } = self;
        if weight.rows() != x.width() {
            return Err(differ(
                &format!("a convolution with `{}`", weight.name()),
                format!("input [{}, {}]", x.rows(), x.width()),
                format!("weight [{}, {}]", weight.rows(), weight.width()),
            ));
        }
        Ok(weight.to_vec()?)
    }

    /// The exact result.
    ///
    /// # Errors
    /// As [`Convolution::checked`].
    pub fn exact(&self) -> Result<Tensor, ComputeError> {
        let taps = self.checked()?;
        let count = self.weight.width();
        let [rows, channels] = self.shape();
        let mut y = Tensor::zeros(rows, channels);
        for row in 0..rows {
            let position = self.first + row;
            for (channel, y) in y.row_mut(row).iter_mut().enumerate() {
                let mut sum = 0.0f64;
                for (tap, &weight) in taps[channel * count..][..count].iter().enumerate() {
                    if let Some(row) = (position + tap + 1).checked_sub(count) {
                        sum += f64::from(weight) * f64::from(self.x.row(row)[channel]);
                    }
                }
                *y = activated(Activation::Silu, sum) as f32;
            }
        }
        Ok(y)
    }
}

impl Gates<'_> {
    /// Rows and width of the result: what stays of each head's state, then what is corrected.
    pub fn shape(&self) -> [usize; 2] {
        [self.x.rows(), 2 * self.net.value_heads]
    }

    /// The gates, computed in f64 on the host for every arm and rounded once, as RoPE's angles are:
    /// `e^(-e^rate ln(1 + e^(x + shift)))` of a logarithm, else `e^(rate ln(1 + e^(x + shift)))`, and
    /// `1 / (1 + e^-x)`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn made(&self) -> Result<Tensor, ComputeError> {
        let Gates { x, rates, shift, net } = self;
        let heads = net.value_heads;
        if x.width() != 2 * heads || rates.width() != heads || shift.width() != heads {
            return Err(differ(
                "the gates of a delta net",
                format!("input [{}, {}]", x.rows(), x.width()),
                format!("{heads} heads, {} rates and {} shifts", rates.width(), shift.width()),
            ));
        }
        let (rates, shift) = (rates.to_vec()?, shift.to_vec()?);
        let group = heads / net.key_heads;
        let mut y = Tensor::zeros(x.rows(), 2 * heads);
        for row in 0..x.rows() {
            for head in 0..heads {
                let start = head / group * 2 * group + head % group;
                let (correction, decay) = (x.row(row)[start], x.row(row)[start + group]);
                let argument = f64::from(decay) + f64::from(shift[head]);
                // PyTorch's softplus is the identity beyond 20.
                let soft =
                    if argument > 20.0 { argument } else { libm::log1p(libm::exp(argument)) };
                let rate = match net.rates_are_logs {
                    true => -libm::exp(f64::from(rates[head])),
                    false => f64::from(rates[head]),
                };
                let stays = libm::exp(rate * soft);
                let corrected = 1.0 / (1.0 + libm::exp(-f64::from(correction)));
                y.row_mut(row)[head] = stays as f32;
                y.row_mut(row)[heads + head] = corrected as f32;
            }
        }
        Ok(y)
    }
}

/// A head's query or key over its length, and how it is rounded.
struct Unit {
    values: Vec<f64>,
    /// The variance of each value's rounding.
    variances: Vec<f64>,
}

impl DeltaRule<'_> {
    /// Rows and width of the result.
    pub fn shape(&self) -> [usize; 2] {
        let rows = self.x.rows().saturating_sub(self.first);
        [rows, self.net.value_heads * self.net.value_dim]
    }

    /// Refuses operands of other shapes than the net's.
    ///
    /// # Errors
    /// With both shapes.
    pub fn check(&self) -> Result<(), ComputeError> {
        let DeltaRule { x, gates, net, .. } = self;
        let fits = x.width() == net.channels()
            && (gates.rows(), gates.width()) == (x.rows(), 2 * net.value_heads);
        if fits {
            return Ok(());
        }
        Err(differ(
            "a gated delta rule",
            format!("queries, keys and values [{}, {}]", x.rows(), x.width()),
            format!(
                "{} channels, and gates [{}, {}] of {} heads",
                net.channels(),
                gates.rows(),
                gates.width(),
                net.value_heads
            ),
        ))
    }

    /// What a head of values reads at a position.
    pub fn token(&self, position: usize, head: usize) -> DeltaToken<'_> {
        let DeltaNet { key_heads, value_heads, key_dim, value_dim, .. } = *self.net;
        let (row, gates) = (self.x.row(position), self.gates.row(position));
        let keys = key_heads * key_dim;
        let key_head = head / (value_heads / key_heads) * key_dim;
        let value = 2 * keys + head * value_dim;
        DeltaToken {
            query: &row[key_head..key_head + key_dim],
            key: &row[keys + key_head..keys + key_head + key_dim],
            value: &row[value..value + value_dim],
            decay: gates[head],
            beta: gates[value_heads + head],
        }
    }

    /// The exact result, and the deviation that the f32 kernel's roundings give each value: of a
    /// value near 1e-16 an f32 cannot hold the variance.
    ///
    /// Every rounding of the kernel counts as an independent error of variance `(u s)^2 / 3` and is
    /// carried on: a state's variance decays with it, and each token adds its own.
    ///
    /// # Errors
    /// As [`DeltaRule::check`].
    pub fn exact(&self) -> Result<(Tensor, Tensor), ComputeError> {
        self.check()?;
        let [rows, width] = self.shape();
        let (key_dim, value_dim) = (self.net.key_dim, self.net.value_dim);
        let rounded = |value: f64| (value / f64::from(1u32 << 24)).powi(2) / 3.0;
        let (mut y, mut deviations) = (Tensor::zeros(rows, width), Tensor::zeros(rows, width));
        let scale = 1.0 / (key_dim as f64).sqrt();
        let unit = |x: &[f32], scale: f64| {
            let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            let inverse = 1.0 / (square + 1e-6).sqrt();
            let values: Vec<f64> = x.iter().map(|&x| f64::from(x) * inverse * scale).collect();
            // The sum of squares, the root, the quotient, two products.
            let chain = (key_dim as f64 / 32.0).ceil() + 9.0;
            let variances = values.iter().map(|&value| chain * rounded(value)).collect();
            Unit { values, variances }
        };
        for head in 0..self.net.value_heads {
            let mut state = vec![0.0f64; key_dim * value_dim];
            let mut doubt = vec![0.0f64; key_dim * value_dim];
            for position in 0..self.x.rows() {
                let token = self.token(position, head);
                let (query, key) = (unit(token.query, scale), unit(token.key, 1.0));
                let (decay, beta) = (f64::from(token.decay), f64::from(token.beta));
                for column in 0..value_dim {
                    let (mut kept, mut of_kept) = (0.0f64, 0.0f64);
                    for row in 0..key_dim {
                        let at = row * value_dim + column;
                        state[at] *= decay;
                        doubt[at] = doubt[at] * decay * decay + rounded(state[at]);
                        let (k, of_k) = (key.values[row], key.variances[row]);
                        kept += state[at] * k;
                        of_kept += doubt[at] * k * k + state[at] * state[at] * of_k + rounded(kept);
                    }
                    let value = f64::from(token.value[column]);
                    let change = (value - kept) * beta;
                    let of_change =
                        beta * beta * (of_kept + rounded(value - kept)) + rounded(change);
                    let (mut out, mut of_out) = (0.0f64, 0.0f64);
                    for row in 0..key_dim {
                        let at = row * value_dim + column;
                        let (k, of_k) = (key.values[row], key.variances[row]);
                        state[at] += k * change;
                        doubt[at] +=
                            k * k * of_change + change * change * of_k + rounded(state[at]);
                        let (q, of_q) = (query.values[row], query.variances[row]);
                        out += state[at] * q;
                        of_out += doubt[at] * q * q + state[at] * state[at] * of_q + rounded(out);
                    }
                    if let Some(row) = position.checked_sub(self.first) {
                        y.row_mut(row)[head * value_dim + column] = out as f32;
                        deviations.row_mut(row)[head * value_dim + column] = of_out.sqrt() as f32;
                    }
                }
            }
        }
        Ok((y, deviations))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net() -> DeltaNet {
        DeltaNet {
            key_heads: 1,
            value_heads: 2,
            key_dim: 2,
            value_dim: 1,
            taps: 3,
            rates_are_logs: true,
            blocks: vec![true],
        }
    }

    #[test]
    fn a_state_remembers_what_it_was_told_for_a_key() {
        let net = net();
        // Query and key are the same direction at both tokens; the second one's value is another.
        let x = Tensor::new(6, vec![3.0, 0.0, 5.0, 0.0, 1.0, 1.0, 3.0, 0.0, 5.0, 0.0, 4.0, 4.0]);
        // The first head keeps its state and corrects half of it; the second forgets.
        let gates = Tensor::new(4, vec![1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 0.5, 0.5]);
        let rule = DeltaRule { x: &x, gates: &gates, first: 0, net: &net };
        let (y, deviations) = rule.exact().expect("a rule");
        let root = 0.5f64.sqrt();
        let expected = [0.5 * root, 0.5 * root, 2.25 * root, 2.0 * root];
        for (y, expected) in y.data().iter().zip(expected) {
            assert!((f64::from(*y) - expected).abs() < 1e-6, "{y} for {expected}");
        }
        assert!(deviations.data().iter().all(|deviation| *deviation > 0.0));
        let later = DeltaRule { first: 1, ..rule };
        assert_eq!(later.exact().expect("a rule").0.data(), &y.data()[2..]);
    }

    #[test]
    fn a_rate_is_its_own_logarithm_or_the_negative_rate() {
        use crate::model::WeightType;
        let bytes = |values: [f32; 2]| values.map(f32::to_le_bytes).concat();
        let (logs, rates) = (bytes([0.0, 1.5]), bytes([-1.0, -1.5f32.exp()]));
        let shift = bytes([0.25, -0.5]);
        let weight = |bytes| Weight::new("w", WeightType::F32, 1, 2, bytes).expect("a weight");
        let x = Tensor::new(4, vec![0.5, -1.0, 2.0, 0.1]);
        let made = |rates, net: &DeltaNet| {
            let gates = Gates { x: &x, rates: weight(rates), shift: weight(&shift), net };
            gates.made().expect("gates").into_data()
        };
        let of_logs = made(&logs, &net());
        let of_rates = made(&rates, &DeltaNet { rates_are_logs: false, ..net() });
        assert_eq!(of_logs[0], of_rates[0], "a rate of one has no rounding");
        for (one, other) in of_logs.iter().zip(&of_rates) {
            assert!((one - other).abs() < 1e-6, "{one} for {other}");
        }
    }

    #[test]
    fn a_rule_keeps_the_deviation_of_values_whose_variance_no_f32_holds() {
        let net = net();
        let gates = Tensor::new(4, vec![1.0, 0.0, 0.5, 0.5]);
        let deviations = |value: f32| {
            let x = Tensor::new(6, vec![3.0, 1.0, 5.0, 2.0, value, value]);
            let rule = DeltaRule { x: &x, gates: &gates, first: 0, net: &net };
            rule.exact().expect("a rule").1.data().to_vec()
        };
        let size = 2.0f32.powi(-80);
        for (tiny, one) in deviations(size).into_iter().zip(deviations(1.0)) {
            assert!((tiny / size - one).abs() < 1e-6 * one, "{tiny:e} for {one:e}");
        }
    }

    #[test]
    fn a_convolution_reads_the_last_positions_and_none_before_the_first() {
        use crate::model::WeightType;
        let bytes: Vec<u8> =
            [1.0f32, 10.0, 100.0].iter().flat_map(|tap| tap.to_le_bytes()).collect();
        let weight = Weight::new("conv", WeightType::F32, 1, 3, &bytes).expect("taps");
        let x = Tensor::new(1, vec![1.0, 2.0, 3.0]);
        let all = Convolution { x: &x, weight, first: 0 }.exact().expect("a convolution");
        for (y, sum) in all.data().iter().zip([100.0, 210.0, 321.0]) {
            assert!((f64::from(*y) - sum).abs() < 1e-4, "{y} for {sum}");
        }
        let last = Convolution { x: &x, weight, first: 2 }.exact().expect("a convolution");
        assert_eq!(last.data(), &all.data()[2..]);
    }
}
