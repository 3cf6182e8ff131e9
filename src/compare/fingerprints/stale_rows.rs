//! Some rows hold another tensor's rows: a buffer that was not written whole.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "some rows hold another site's rows: the buffer was not written whole",
    causes: &["stale-rows"],
    bugs: &[],
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let wrong = case.rows_beyond_noise();
    if wrong.is_empty() || wrong.len() == case.subject.rows() {
        return Ok(Vec::new());
    }
    let mut fits = Vec::new();
    for (site, other) in case.recorded.iter().filter(|(site, _)| site != case.site) {
        if other.width() != case.subject.width() || other.rows() != case.subject.rows() {
            continue;
        }
        let mut predicted = case.clean.clone();
        for &row in &wrong {
            predicted.row_mut(row).copy_from_slice(other.row(row));
        }
        let (first, last) = (wrong[0], wrong[wrong.len() - 1]);
        let detail = format!("{} rows from {first} to {last} are those of `{site}`", wrong.len());
        let fit = case.fit("stale-rows", detail, 0, &predicted);
        fits.extend(fit.names_the_bug().then_some(fit));
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use crate::compute::call::Call;
    use crate::op::Site;

    #[test]
    fn rows_of_the_last_call_are_recognised() {
        let mut bench = Bench::default();
        let (x, stale) = (bench.tensor(4, 256, 1), bench.tensor(4, 256, 2));
        bench.recorded = vec![(Site("blk.0.q".to_owned()), stale.clone())];
        let call = Call::Matmul { x: &x, weight: bench.weight("blk.1.attn_q.weight"), bias: None };
        let mut wrong = bench.clean(&call);
        (1..4).for_each(|row| wrong.row_mut(row).copy_from_slice(stale.row(row)));
        bench.expect("stale-rows", &call, &wrong);
    }
}
