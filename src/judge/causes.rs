//! The fingerprints' answer to a product's dump.
//!
//! They are made for one op with its operands as f32; a dump becomes such a call here,
//! or, where it is large, a window of it around what is wrong. What the hypotheses are
//! is `compare/fingerprints`.

use super::exam::Exam;
use super::product::Product;
use super::{Cause, Place};
use crate::compare::fingerprints::{Case, Fit, Null, rank};
use crate::compute::ComputeError;
use crate::compute::call::{Call, MadeWeight};
use crate::compute::emulated::arm::Emulated;
use crate::dtype::Format;
use crate::op::{Accumulate, ActivationScale, ChipName, Pin, Recipe, Scale, Site, WeightScale};
use crate::tensor::Tensor;
use crate::tensor_file::CodedTensor;

/// Products above which a window is looked at instead of the whole.
const LARGEST: usize = 1 << 28;
/// Rows and columns of a window.
const WINDOW: usize = 128;
/// Rows and columns of a window before the first wrong one: what was there before may
/// be what stands there now.
const BEFORE: usize = 16;

/// The share of the difference from which a cause is mentioned.
const LEAST: f64 = 0.05;
/// Causes that say where and not what.
const PLACES: [&str; 2] = ["one-tile", "tile-periodic"];
/// Causes that are mentioned.
const SHOWN: usize = 3;

/// Tests the fingerprints on a product.
pub(super) fn of_product(
    product: &Product<'_>,
    exam: &Exam,
    place: &Place,
) -> Result<Vec<Cause>, ComputeError> {
    let (rows, width) = (exam.y.rows(), exam.y.width());
    let whole = rows * width * product.x.width <= LARGEST;
    let window = |[first, _]: [usize; 2], count: usize| {
        let first = first.saturating_sub(BEFORE).min(count.saturating_sub(WINDOW));
        first..(first + WINDOW).min(count)
    };
    let (in_rows, in_columns) = match whole {
        true => (0..rows, 0..width),
        false => (window(place.row_span, rows), window(place.column_span, width)),
    };
    let (some_rows, some_columns): (Vec<usize>, Vec<usize>) =
        (in_rows.clone().collect(), in_columns.clone().collect());
    let x = product.x.select_rows(&some_rows).values();
    let mut w = product.w.select_rows(&some_columns).values();
    let alpha = product.epilogue.alpha;
    if alpha != 1.0 {
        w.data_mut().iter_mut().for_each(|w| *w *= alpha);
    }
    let bias: Option<Vec<f32>> = product
        .epilogue
        .bias
        .as_ref()
        .map(|bias| some_columns.iter().map(|&column| bias[column]).collect());
    let of_window = |index: (usize, usize)| index.0 * width + index.1;
    let all = || some_rows.iter().flat_map(|&r| some_columns.iter().map(move |&c| (r, c)));
    let y = Tensor::new(some_columns.len(), all().map(|at| exam.y.data()[of_window(at)]).collect());
    let truth =
        Tensor::new(some_columns.len(), all().map(|at| exam.truth[of_window(at)] as f32).collect());
    let plain = product.x.scales.is_none() && product.w.scales.is_none() && alpha == 1.0;
    let same = product.x.format == product.w.format;
    // Codes with scales, or of two formats, are multiplied as the values that they stand for.
    let gemm = match product.x.format {
        format if plain && same && !format.is_scaled() => format,
        _ => Format::F32,
    };
    let chip = match product.chips {
        [only] => *only,
        _ => ChipName::Auto,
    };
    let recipe = Recipe {
        gemm,
        scale: Scale { weight: WeightScale::Tensor, activation: ActivationScale::Tensor },
        accumulate: Accumulate::Fast,
        output: exam.output,
        chip,
        stream: None,
        engine: None,
        emulate: None,
        codes: crate::op::Codes::Made,
        pin: Pin::NONE,
        kv_cache: None,
        tensor_parallel: None,
    };
    let arm = Emulated::new(&recipe)?;
    let made = MadeWeight::new("w".to_owned(), some_columns.len(), w.data());
    let made_bias = bias.map(|bias| MadeWeight::new("bias".to_owned(), 1, &bias));
    let bias = made_bias.as_ref().map(MadeWeight::weight).transpose()?;
    let call = Call::Matmul { x: &x, weight: made.weight()?, bias };
    let clean = call.on(&arm)?;
    let site = Site("y".to_owned());
    let null = Null::of(&call, &clean, &arm, &recipe)?;
    let case = Case {
        site: &site,
        call: &call,
        subject: &y,
        clean: &clean,
        truth: &truth,
        arm: &arm,
        recipe: &recipe,
        null: &null,
        model: None,
        recorded: &[],
    };
    let from = (!whole).then(|| {
        format!(
            "; seen in rows {} to {} and columns {} to {}, and counted from there",
            in_rows.start,
            in_rows.end - 1,
            in_columns.start,
            in_columns.end - 1
        )
    });
    let mut fits = rank(&case)?;
    if gemm == Format::F32 {
        let operands = [("x", product.x, &x), ("w", product.w, &w)];
        fits.iter_mut().for_each(|fit| of_operands(fit, &operands));
    }
    Ok(told(fits, from.as_deref().unwrap_or_default()))
}

/// Operands that are multiplied as the values that they stand for were rounded, if another
/// format was computed: which ones, and from what.
fn of_operands(fit: &mut Fit, operands: &[(&str, &CodedTensor, &Tensor)]) {
    let formats = Format::ALL.into_iter();
    let is_told = |format: &Format| fit.detail.starts_with(&format!("{format} was computed "));
    let Some(format) = formats.filter(|_| fit.cause == "other-format").find(is_told) else {
        return;
    };
    let changed = operands.iter().filter(|(.., values)| {
        values.data().iter().any(|&v| v.is_finite() && format.round(v) != v)
    });
    let changed: Vec<String> = changed
        .map(|(name, codes, _)| match codes.scales {
            Some(_) => format!("{name} ({} times its scale)", codes.format),
            None => format!("{name} ({})", codes.format),
        })
        .collect();
    if !changed.is_empty() {
        fit.detail = format!("{} rounded to {format} before the product", changed.join(" and "));
    }
}

/// What is worth telling of the fits, the best first.
fn told(fits: Vec<Fit>, from: &str) -> Vec<Cause> {
    let cause = |fit: Fit| Cause {
        named: fit.names_the_bug(),
        detail: fit.detail + from,
        cause: fit.cause,
        explained: fit.explained,
    };
    let worth = |cause: &Cause| cause.named || cause.explained >= LEAST;
    let (mut first, where_only): (Vec<Cause>, Vec<Cause>) = fits
        .into_iter()
        .map(cause)
        .filter(worth)
        .partition(|cause| !PLACES.contains(&cause.cause.as_str()));
    // Where it is wrong is told anyway: what names the bug stands before that.
    let named = first.iter().take_while(|cause| cause.named).count();
    let rest = first.split_off(named);
    first.extend(where_only);
    first.extend(rest);
    first.truncate(SHOWN);
    first
}

/// Tests the fingerprints on another op.
pub(super) fn of_call(
    call: &Call<'_>,
    exam: &Exam,
    recipe: &Recipe,
) -> Result<Vec<Cause>, ComputeError> {
    let arm = Emulated::new(recipe)?;
    let clean = call.on(&arm)?;
    let rounded = clean.data().iter().map(|&value| exam.output.round(value)).collect();
    let clean = Tensor::new(clean.width(), rounded);
    let truth = exam.truth.iter().map(|&value| value as f32).collect();
    let truth = Tensor::new(clean.width(), truth);
    let site = Site("y".to_owned());
    let null = Null::of(call, &clean, &arm, recipe)?;
    let case = Case {
        site: &site,
        call,
        subject: &exam.y,
        clean: &clean,
        truth: &truth,
        arm: &arm,
        recipe,
        null: &null,
        model: None,
        recorded: &[],
    };
    Ok(told(rank(&case)?, ""))
}
