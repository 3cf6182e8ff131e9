//! One site's error beside its floor, and the shares of its causes.

use serde::{Deserialize, Serialize};

use crate::compute::arms::Local;
use crate::compute::shares::{Energies, Shares};
use crate::op::{Site, Stream};
use crate::tensor::Tensor;

/// Predicted and observed error of one site, relative to the truth's size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// The arm.
    pub subject: Stream,
    /// The site.
    pub site: Site,
    /// The error that rounding predicts, rms.
    pub floor: f64,
    /// The error that was seen, rms.
    pub observed: f64,
    /// Where it comes from, at a GEMM; they add up to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<Shares>,
}

/// The accounts of an arm's sites, and the shares of all GEMMs together.
pub fn accounts<'a>(
    subject: Stream,
    local: &[Local],
    find: impl Fn(&Site) -> Option<&'a Tensor>,
) -> (Vec<Account>, Option<Shares>) {
    let mut all = Vec::new();
    let mut together = Energies::default();
    for Local { site, truth, sigma, energies } in local {
        let (Some(tensor), Some(sigma)) = (find(site), sigma) else { continue };
        if (tensor.rows(), tensor.width()) != (truth.rows(), truth.width()) {
            continue;
        }
        let size = energy(truth.data().iter().map(|&x| f64::from(x)));
        let pairs = tensor.data().iter().zip(truth.data());
        let error = energy(pairs.map(|(&a, &b)| f64::from(a) - f64::from(b)));
        let floor = energy(sigma.each.data().iter().map(|&x| f64::from(x)));
        if let Some(energies) = energies {
            together = together.and(*energies);
        }
        if size > 0.0 && error.is_finite() && floor.is_finite() {
            all.push(Account {
                subject,
                site: site.clone(),
                floor: (floor / size).sqrt(),
                observed: (error / size).sqrt(),
                shares: energies.and_then(Energies::shares),
            });
        }
    }
    (all, together.shares())
}

fn energy(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum()
}
