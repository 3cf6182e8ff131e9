//! A LayerNorm, or a sum instead of a mean, where an RMSNorm belongs.

use super::planted::{Bug, Ground, Made, NORMS, bug};
use super::{Case, Fingerprint, Fit, mapped};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "RMSNorm subtracts the mean, or divides by a sum instead of a mean",
    causes: &["mean-subtracted", "sum-for-mean"],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::RmsNorm { x, gain, eps } = *case.call else { return Ok(Vec::new()) };
    let gain = gain.to_vec()?;
    let count = gain.len() as f64;
    let norm = |centre: bool, divisor: f64| {
        let groups = x.data().chunks_exact(gain.len()).flat_map(|x| {
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
            let mean = if centre { mean } else { 0.0 };
            let square: f64 = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
            let scale = 1.0 / (square / divisor + f64::from(eps)).sqrt();
            let values = x.iter().zip(&gain);
            values.map(move |(&x, &g)| ((f64::from(x) - mean) * scale * f64::from(g)) as f32)
        });
        Tensor::new(x.width(), groups.collect())
    };
    let variants = [
        ("mean-subtracted", "the mean is subtracted: a LayerNorm", norm(true, count)),
        ("sum-for-mean", "the squares' sum stands where their mean belongs", norm(false, 1.0)),
        ("sum-for-mean", "the squares are divided by n - 1", norm(false, count - 1.0)),
    ];
    let fits = variants.iter().filter_map(|(cause, detail, predicted)| {
        case.fit_if_any(cause, (*detail).to_owned(), 0, predicted)
    });
    Ok(fits.collect())
}

const BUGS: &[Bug] = &[
    bug("mean subtracted", &["mean-subtracted"], NORMS, &subtracted),
    bug("sum for mean", &["sum-for-mean", "scale-wrong"], NORMS, &sum_for_mean),
];

fn subtracted(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::RmsNorm { x, gain, eps } = *call else { return Ok(None) };
    let mut centred = x.clone();
    for group in centred.data_mut().chunks_exact_mut(gain.width()) {
        let mean = group.iter().sum::<f32>() / group.len() as f32;
        group.iter_mut().for_each(|x| *x -= mean);
    }
    Ok(Some(ground.arm.rms_norm(&centred, gain, eps)?))
}

fn sum_for_mean(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::RmsNorm { x, gain, eps } = *call else { return Ok(None) };
    let count = gain.width() as f32;
    let root = count.sqrt();
    Ok(Some(mapped(&ground.arm.rms_norm(x, gain, eps / count)?, |y| y / root)))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn a_layer_norm_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let gain = bench.weight("blk.1.attn_norm.weight");
        let call = Call::RmsNorm { x: &x, gain, eps: 1e-6 };
        let mut centred = x.clone();
        for row in 0..4 {
            let mean = x.row(row).iter().sum::<f32>() / 256.0;
            centred.row_mut(row).iter_mut().for_each(|x| *x -= mean);
        }
        let wrong = bench.clean(&Call::RmsNorm { x: &centred, gain, eps: 1e-6 });
        bench.expect("mean-subtracted", &call, &wrong);
    }
}
