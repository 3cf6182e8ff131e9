//! The right operands, added in another order: identified to the bit.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::Steps;
use crate::compute::emulated::schedule::{Epilogue, Schedule};

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "the products are accumulated by another schedule",
    causes: &["other-schedule"],
    bugs: &[],
    test,
};

/// The largest split-K that is tried.
const MOST_PARTS: u32 = 16;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm() else { return Ok(Vec::new()) };
    let prescribed = Schedule::of(case.recipe);
    let (fp8, scaled) = (case.recipe.gemm.is_fp8(), case.recipe.gemm.is_scaled());
    // Sums of integers are the same in any order.
    let most_parts = if scaled && !fp8 { 1 } else { MOST_PARTS };
    let bases: &[Schedule] =
        if fp8 { &[Schedule::FAST, Schedule::PROMOTED] } else { &[Schedule::FAST] };
    let mut seen = vec![(prescribed.epilogue, prescribed.steps(gemm.x.width(), case.recipe.gemm))];
    let mut schedules = Vec::new();
    let epilogues: &[Epilogue] = if scaled {
        &[Epilogue::ScalesFirst, Epilogue::ActivationThenWeight, Epilogue::WeightThenActivation]
    } else {
        &[Epilogue::ScalesFirst]
    };
    for &epilogue in epilogues {
        for parts in 1..=most_parts {
            for base in bases {
                let schedule = Schedule { epilogue, ..base.with_split_k(parts) };
                let order = (epilogue, schedule.steps(gemm.x.width(), case.recipe.gemm));
                if !seen.contains(&order) {
                    seen.push(order);
                    schedules.push(schedule);
                }
            }
        }
    }
    let mut fits = Vec::new();
    for schedule in schedules {
        let detail = format!("accumulated {schedule} instead of {prescribed}");
        let steps = Steps { schedule, ..Steps::of(case.recipe) };
        fits.extend(case.fit_gemm("other-schedule", detail, gemm, &steps)?);
    }
    // Orders of addition differ in the last bits only: near is nothing.
    fits.retain(Fit::is_exact);
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn fast_accumulation_and_split_k_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 768, 1);
        let weight = bench.weight("blk.1.ffn_down.weight");
        let call = Call::Matmul { x: &x, weight, bias: None };
        for schedule in [Schedule::FAST, Schedule::FAST.with_split_k(3)] {
            let steps = Steps { schedule, ..Steps::of(&bench.recipe) };
            bench.expect("other-schedule", &call, &bench.matmul(&x, weight, &steps));
        }
    }
}
