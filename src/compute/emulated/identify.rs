//! Which schedule made these outputs: a small family is tried on a sample, and
//! the member that fits to the bit is confirmed on every element.
//!
//! It knows operands and outputs only: not which library or kernel ran.

use super::chip::Unit;
use super::gemm::{GemmError, Operand, Scales, gemm, gemm_prepared, prepare};
use super::quantize::Codes;
use super::schedule::{Epilogue, Schedule, Step};
use crate::dtype::Format;
use crate::tensor::Tensor;
use crate::text::grouped;

/// The member of the family that fits best, and how well.
#[derive(Clone, Debug, PartialEq)]
pub struct Identification {
    /// Format of x.
    pub x: Format,
    /// Format of w.
    pub w: Format,
    /// The schedule.
    pub schedule: Schedule,
    /// Outputs whose bits differ, over all of them.
    pub mismatches: usize,
    /// All outputs.
    pub elements: usize,
    /// Schedules that were tried on the sample; those with equal steps count once.
    pub tried: usize,
    /// Other schedules that fit every output as well: the data cannot tell them apart.
    pub also: Vec<Schedule>,
}

/// The largest split-K that is tried.
pub const MAX_SPLIT_K: u32 = 32;

/// Rows of x and of w in the sample.
const SAMPLE: (usize, usize) = (4, 16);

impl Identification {
    /// Whether the schedule explains every output to the bit.
    pub fn is_exact(&self) -> bool {
        self.mismatches == 0
    }
}

impl std::fmt::Display for Identification {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (differ, all) = (grouped(self.mismatches), grouped(self.elements));
        if !self.is_exact() {
            write!(f, "no schedule of {} fits; nearest: ", self.tried)?;
        }
        write!(f, "{}", self.x)?;
        if self.x != self.w {
            write!(f, " x {}", self.w)?;
        }
        write!(f, ", {}: {differ} of {all} outputs differ", self.schedule)
    }
}

/// The schedules that are tried, the plainest first: fast, promoted (FP8 only),
/// split-K up to [`MAX_SPLIT_K`], and the three orders of applying scales where
/// there are scales. Those that add in the same order are listed once.
pub fn family(x: &Operand, w: &Operand) -> Vec<Schedule> {
    let inner = x.codes.width();
    let format = x.codes.format();
    let of_blocks = matches!(x.scales, Scales::Blocks(_));
    let bases: &[Schedule] = match format.is_fp8() && !of_blocks {
        true => &[Schedule::FAST, Schedule::PROMOTED],
        false => &[Schedule::FAST],
    };
    // Sums of integers are the same in any order.
    let most_parts = if format == Format::Int8 { 1 } else { MAX_SPLIT_K };
    let unscaled = |scales: &Scales| match scales {
        Scales::Tensor(scale) => *scale == 1.0,
        Scales::Blocks(scales) => scales.whole == 1.0,
        Scales::Row(_) | Scales::Block128 { .. } => false,
    };
    let epilogues: &[Epilogue] = if unscaled(&x.scales) || unscaled(&w.scales) {
        &[Epilogue::ScalesFirst]
    } else {
        &[Epilogue::ScalesFirst, Epilogue::ActivationThenWeight, Epilogue::WeightThenActivation]
    };
    let mut seen: Vec<(Epilogue, Vec<Step>)> = Vec::new();
    let mut family = Vec::new();
    for &epilogue in epilogues {
        for split_k in 1..=most_parts {
            for &base in bases {
                let schedule = Schedule { epilogue, ..base }.with_split_k(split_k);
                let signature = (epilogue, schedule.steps(inner, format));
                if !seen.contains(&signature) {
                    seen.push(signature);
                    family.push(schedule);
                }
            }
        }
    }
    family
}

/// Finds the schedule with which `unit` makes `observed[N, M]` from
/// `x[N, K]` and `w[M, K]`. If none fits, the nearest one is returned; see
/// [`Identification::is_exact`].
///
/// # Errors
/// If shapes, formats or scales do not fit.
pub fn identify(
    unit: &Unit,
    x: &Operand,
    w: &Operand,
    output: Format,
    observed: &Tensor,
) -> Result<Identification, GemmError> {
    if (observed.rows(), observed.width()) != (x.codes.rows(), w.codes.rows()) {
        return Err(GemmError::Observed {
            rows: observed.rows(),
            width: observed.width(),
            n: x.codes.rows(),
            m: w.codes.rows(),
        });
    }
    let result = |schedule: Schedule, mismatches, tried, also| Identification {
        x: x.codes.format(),
        w: w.codes.format(),
        schedule,
        mismatches,
        elements: observed.data().len(),
        tried,
        also,
    };
    let by_block = |operand: &Operand| matches!(operand.scales, Scales::Block128 { .. });
    if by_block(x) || by_block(w) {
        // Block scales fix the order of additions.
        let y = gemm(unit, &Schedule::PROMOTED, x, w, output)?;
        return Ok(result(Schedule::PROMOTED, mismatches(&y, observed), 1, Vec::new()));
    }

    let x_rows = spread(x.codes.rows(), SAMPLE.0);
    let w_rows = spread(w.codes.rows(), SAMPLE.1);
    let (x_codes, w_codes) = (x.codes.select_rows(&x_rows), w.codes.select_rows(&w_rows));
    let x_sample = Operand { codes: &x_codes, scales: select(&x.scales, &x_rows) };
    let w_sample = Operand { codes: &w_codes, scales: select(&w.scales, &w_rows) };
    let sample = Tensor::new(
        w_rows.len(),
        x_rows
            .iter()
            .flat_map(|&row| w_rows.iter().map(move |&column| observed.row(row)[column]))
            .collect(),
    );

    let family = family(x, w);
    let prepared_sample = prepare(unit, &x_sample)?;
    let mut ranked = Vec::with_capacity(family.len());
    for &schedule in &family {
        let y = gemm_prepared(&schedule, &prepared_sample, &w_sample, output)?;
        ranked.push((mismatches(&y, &sample), schedule));
    }
    ranked.sort_by_key(|&(mismatches, _)| mismatches);
    let fewest = ranked.first().map_or(0, |&(mismatches, _)| mismatches);
    let candidates = ranked.iter().take_while(|&&(mismatches, _)| mismatches == fewest);

    let prepared = prepare(unit, x)?;
    let mut best: Option<(usize, Schedule)> = None;
    let mut also = Vec::new();
    for &(_, schedule) in candidates {
        let y = gemm_prepared(&schedule, &prepared, w, output)?;
        let count = mismatches(&y, observed);
        match best {
            Some((least, _)) if count == least && count == 0 => also.push(schedule),
            Some((least, _)) if count >= least => {}
            _ => best = Some((count, schedule)),
        }
    }
    let (count, schedule) = best.unwrap_or((observed.data().len(), Schedule::FAST));
    Ok(result(schedule, count, family.len(), also))
}

/// Values whose bits differ; two NaNs are equal whatever their payload, because
/// conversions between formats do not keep it.
pub fn mismatches(a: &Tensor, b: &Tensor) -> usize {
    let equal = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    a.data().iter().zip(b.data()).filter(|&(&a, &b)| !equal(a, b)).count()
}

/// Up to `count` indices below `rows`, evenly spread.
pub fn spread(rows: usize, count: usize) -> Vec<usize> {
    let count = count.min(rows);
    (0..count).map(|index| index * rows / count).collect()
}

fn select(scales: &Scales, rows: &[usize]) -> Scales {
    match scales {
        Scales::Row(scales) => {
            Scales::Row(rows.iter().filter_map(|&row| scales.get(row).copied()).collect())
        }
        Scales::Blocks(scales) => Scales::Blocks(scales.select_rows(rows)),
        other => other.clone(),
    }
}

impl Codes {
    /// The given rows, in the given order.
    pub fn select_rows(&self, rows: &[usize]) -> Codes {
        let mut selected = Codes::zeros(self.format(), rows.len(), self.width());
        for (target, &source) in rows.iter().enumerate() {
            selected.row_mut(target).copy_from(self.row(source));
        }
        selected
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::emulated::chip::chip;
    use crate::op::ChipName;

    fn codes(format: Format, rows: usize, width: usize, seed: u32) -> Codes {
        let mut state = seed;
        let values: Vec<f32> = (0..rows * width)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        Codes::quantize(format, width, &values, 1.0 / 64.0).expect("whole rows")
    }

    #[test]
    fn a_known_schedule_is_found_again() {
        let (x, w) = (codes(Format::E4m3, 5, 1024, 1), codes(Format::E5m2, 20, 1024, 2));
        let x = Operand { codes: &x, scales: Scales::Tensor(0.013) };
        let w = Operand { codes: &w, scales: Scales::Tensor(0.37) };
        let unit = chip(ChipName::Hopper).unit(Format::E4m3, Format::E5m2).expect("hopper fp8");
        for wanted in [
            Schedule::FAST,
            Schedule::PROMOTED.with_split_k(3),
            Schedule { epilogue: Epilogue::WeightThenActivation, ..Schedule::FAST.with_split_k(4) },
        ] {
            let y = gemm(unit, &wanted, &x, &w, Format::F32).expect("a product");
            let found = identify(unit, &x, &w, Format::F32, &y).expect("a product");
            assert!(found.is_exact(), "{wanted}: {found}");
            // A few promoted partials add up without rounding: then every split is the same.
            assert!(found.schedule == wanted || found.also.contains(&wanted), "{found:?}");
        }
    }

    #[test]
    fn foreign_outputs_fit_no_schedule() {
        let (x, w) = (codes(Format::Bf16, 2, 64, 1), codes(Format::Bf16, 4, 64, 2));
        let x = Operand { codes: &x, scales: Scales::Tensor(1.0) };
        let w = Operand { codes: &w, scales: Scales::Tensor(1.0) };
        let unit = chip(ChipName::Hopper).unit(Format::Bf16, Format::Bf16).expect("hopper bf16");
        let foreign = Tensor::new(4, vec![0.1; 8]);
        let found = identify(unit, &x, &w, Format::F32, &foreign).expect("a product");
        assert!(!found.is_exact());
        assert!(found.to_string().starts_with("no schedule of 1 fits"), "{found}");
        assert!(identify(unit, &x, &w, Format::F32, &Tensor::new(2, vec![0.1; 8])).is_err());
    }

    #[test]
    fn reports_read_like_sentences() {
        let found = Identification {
            x: Format::E4m3,
            w: Format::E4m3,
            schedule: Schedule::FAST.with_split_k(7),
            mismatches: 0,
            elements: 24_576,
            tried: 64,
            also: Vec::new(),
        };
        assert_eq!(found.to_string(), "e4m3, fast, split-K 7: 0 of 24,576 outputs differ");
    }
}
