//! `x^y` in f32 as PyTorch computes it on the CPU: SLEEF's `powf` with an error below one
//! last place.
//!
//! It knows two numbers: not what they are for. transformers makes the inverse frequencies of
//! rotary embedding on the CPU, and of the powers that it takes there some are not the nearest
//! f32: of 1,680 (bases 10,000, 500,000 and 1,000,000, heads of 32 to 256) 12 are its neighbour.
//!
//! `exp(y log x)`, in pairs of f32 whose sum is the value. The logarithm is
//! `2 atanh((m - 1) / (m + 1)) + e log 2` for `x = m 2^e`, the exponential a polynomial on
//! either side of zero. Source of the constants and of the order of operations: SLEEF
//! (`logkf`, `expkf`), Shibata and Petrogalli, IEEE TPDS 31 (2020). Evidence: the one power of
//! heads of 96 and base 10,000 that is not the nearest shows in two transformers passes on an
//! H100 (6 of 1,305,600 values), and none differs with it.

/// A value as the sum of two f32, the second far smaller.
#[derive(Clone, Copy)]
struct Pair {
    high: f32,
    low: f32,
}

impl Pair {
    const fn new(high: f32, low: f32) -> Pair {
        Pair { high, low }
    }

    /// `a + b`, exactly.
    fn sum(a: f32, b: f32) -> Pair {
        let high = a + b;
        let part = high - a;
        Pair::new(high, (a - (high - part)) + (b - part))
    }

    /// `a b`, exactly.
    fn product(a: f32, b: f32) -> Pair {
        let high = a * b;
        Pair::new(high, a.mul_add(b, -high))
    }

    fn plus(self, other: Pair) -> Pair {
        let Pair { high, low } = Pair::sum(self.high, other.high);
        Pair::new(high, low + (self.low + other.low))
    }

    fn plus_small(self, other: f32) -> Pair {
        let Pair { high, low } = Pair::sum(self.high, other);
        Pair::new(high, low + self.low)
    }

    /// The sum where the first one is the larger.
    fn then(self, smaller: Pair) -> Pair {
        let high = self.high + smaller.high;
        Pair::new(high, self.high - high + smaller.high + self.low + smaller.low)
    }

    fn scaled(self, factor: f32) -> Pair {
        let Pair { high, low } = Pair::product(self.high, factor);
        Pair::new(high, self.low.mul_add(factor, low))
    }

    fn times(self, other: Pair) -> Pair {
        let Pair { high, low } = Pair::product(self.high, other.high);
        Pair::new(high, self.high.mul_add(other.low, self.low.mul_add(other.high, low)))
    }

    fn squared(self) -> Pair {
        let Pair { high, low } = Pair::product(self.high, self.high);
        Pair::new(high, (self.high + self.high).mul_add(self.low, low))
    }

    fn over(self, other: Pair) -> Pair {
        let inverse = 1.0 / other.high;
        let high = self.high * inverse;
        let left = inverse.mul_add(self.high, -high);
        let error = (-other.low).mul_add(inverse, (-other.high).mul_add(inverse, 1.0));
        Pair::new(high, high.mul_add(error, self.low.mul_add(inverse, left)))
    }
}

/// `base^exponent`, where the result is a normal number. A base that is no positive normal number
/// is raised by libm: what SLEEF makes of those was not looked at.
pub fn pow(base: f32, exponent: f32) -> f32 {
    if !base.is_normal() || base < 0.0 {
        return libm::powf(base, exponent);
    }
    exp(log(base).scaled(exponent))
}

fn log(x: f32) -> Pair {
    const LN_2: Pair = Pair::new(std::f32::consts::LN_2, -1.904_654_3e-9);
    const THIRD: Pair = Pair::new(0.666_666_6, 3.691_838_6e-9);
    let exponent = ((x * (1.0 / 0.75)).to_bits() >> 23) as i32 - 127;
    let mantissa = x * 2f32.powi(-exponent);
    let ratio = Pair::sum(-1.0, mantissa).over(Pair::sum(1.0, mantissa));
    let square = ratio.squared();
    let mut series = 0.240_320_35f32;
    for coefficient in [0.285_112_68, 0.400_008] {
        series = series.mul_add(square.high, coefficient);
    }
    let doubled = Pair::new(ratio.high * 2.0, ratio.low * 2.0);
    let cubic = square.times(ratio).times(square.scaled(series).plus(THIRD));
    LN_2.scaled(exponent as f32).then(doubled).then(cubic)
}

fn exp(x: Pair) -> f32 {
    const LN_2: [f32; 2] = [0.693_145_75, 1.428_606_8e-6];
    let power = ((x.high + x.low) * std::f32::consts::LOG2_E).round_ties_even();
    let rest = x.plus_small(power * -LN_2[0]).plus_small(power * -LN_2[1]);
    let high = rest.high + rest.low;
    let rest = Pair::new(high, (rest.high - high) + rest.low);
    let mut series = 0.001_363_246_5f32;
    for coefficient in [0.008_365_969, 0.041_671_082, 0.166_665_52, 0.499_999_85] {
        series = series.mul_add(rest.high, coefficient);
    }
    let sum = Pair::new(1.0, 0.0).then(rest.then(rest.squared().scaled(series)));
    (sum.high + sum.low) * 2f32.powi(power as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exponents of a head's pairs.
    fn exponents(width: usize) -> impl Iterator<Item = f32> {
        (0..width / 2).map(move |pair| (2 * pair) as f32 / width as f32)
    }

    #[test]
    fn powers_of_rotary_bases_are_the_nearest_f32_or_its_neighbour() {
        let mut neighbours = 0;
        for base in [1e4f32, 5e5, 1e6] {
            for width in [32, 64, 80, 96, 112, 128, 160, 192, 256] {
                for exponent in exponents(width) {
                    let nearest = libm::pow(f64::from(base), f64::from(exponent)) as f32;
                    let off = pow(base, exponent).to_bits().abs_diff(nearest.to_bits());
                    assert!(off <= 1, "{base}^{exponent}");
                    neighbours += off;
                }
            }
        }
        assert_eq!(neighbours, 12);
    }

    #[test]
    fn the_power_that_a_recording_shows_is_not_the_nearest() {
        // Pair 20 of heads of 96: see the test of rotary embedding beside the recording.
        let exponent = 40.0f32 / 96.0;
        let nearest = libm::pow(1e4, f64::from(exponent)) as f32;
        assert_ne!(pow(1e4, exponent), nearest);
        assert_eq!(pow(1e4, 0.0), 1.0);
        assert_eq!(pow(f32::INFINITY, 0.0), 1.0);
        assert_eq!(pow(f32::INFINITY, 0.5), f32::INFINITY);
    }
}
