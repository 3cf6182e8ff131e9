//! NaN or infinity, and where it comes from.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::text::values_are;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "NaN or infinity appears where finite operands came in",
    causes: &["non-finite-weight", "non-finite-output"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let bad = case.subject.data().iter().position(|value| !value.is_finite());
    let Some(index) = bad else { return Ok(Vec::new()) };
    if !case.clean.data()[index].is_finite() {
        let weight = match *case.call {
            Call::Matmul { weight, .. } | Call::Embed { weight, .. } => Some(weight),
            Call::RmsNorm { gain, .. } | Call::LayerNorm { gain, .. } => Some(gain),
            _ => None,
        };
        let Some(weight) = weight else { return Ok(Vec::new()) };
        let values = weight.to_vec()?;
        let Some(at) = values.iter().position(|value| !value.is_finite()) else {
            return Ok(Vec::new());
        };
        let (row, column) = (at / weight.width(), at % weight.width());
        let detail = format!("`{}` holds {} at [{row}, {column}]", weight.name(), values[at]);
        let fit = case.fit("non-finite-weight", detail, 0, case.clean);
        return Ok(vec![Fit { significant: true, ..fit }]);
    }
    let count = case.subject.data().iter().filter(|value| !value.is_finite()).count();
    let (row, column) = (index / case.subject.width(), index % case.subject.width());
    // All of the rest is as it must be: the bad values are the whole difference.
    let rest = case.subject.data().iter().zip(case.clean.data()).enumerate();
    let off = |(index, (s, c)): &(usize, (&f32, &f32))| {
        s.is_finite() && case.null.beyond(*index, f64::from(**s) - f64::from(**c))
    };
    let rest = rest.filter(off).count();
    let detail = format!(
        "{} not finite, the first at [{row}, {column}]; every operand was finite",
        values_are(count)
    );
    let fit = case.fit("non-finite-output", detail, 0, case.clean);
    // What is seen is no fit: the values are not finite.
    let explained = if rest == 0 { 1.0 } else { 0.0 };
    Ok(vec![Fit { explained, significant: true, ..fit }])
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn a_nan_out_of_nowhere_is_recognised() {
        let bench = Bench::default();
        let (gate, up) = (bench.tensor(4, 256, 1), bench.tensor(4, 256, 2));
        let activation = crate::model::Activation::Silu;
        let call = Call::Gated { gate: &gate, up: &up, activation };
        let mut wrong = bench.clean(&call);
        wrong.row_mut(2)[17] = f32::NAN;
        bench.expect("non-finite-output", &call, &wrong);
    }
}
