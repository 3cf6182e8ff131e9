//! FP8 codes that are read as the other FP8 format.

use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::departure::{Converted, Edit, Steps, keep, read_as};
use crate::dtype::Format;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "FP8 codes are read as the other FP8 format",
    causes: &["wrong-fp8-format"],
    bugs: &[],
    test,
};

fn as_e4m3(operand: Converted<'_>) -> Converted<'_> {
    read_as(operand, Format::E4m3)
}

fn as_e5m2(operand: Converted<'_>) -> Converted<'_> {
    read_as(operand, Format::E5m2)
}

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Some(gemm) = case.gemm().filter(|_| case.multiplies_fp8()) else { return Ok(Vec::new()) };
    let (other, swap): (Format, &Edit<'static>) = match case.recipe.gemm {
        Format::E4m3 => (Format::E5m2, &as_e5m2),
        Format::E5m2 => (Format::E4m3, &as_e4m3),
        _ => return Ok(Vec::new()),
    };
    let mut fits = Vec::new();
    for (whose, x, w) in [
        ("activation's", swap, &keep as &Edit),
        ("weight's", &keep, swap),
        ("operands'", swap, swap),
    ] {
        let steps = Steps { x, w, ..Steps::of(case.recipe) };
        let detail = format!("the {whose} {} codes are read as {other}", case.recipe.gemm);
        fits.extend(case.fit_gemm("wrong-fp8-format", detail, gemm, &steps)?);
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::Call;

    #[test]
    fn weights_read_as_e5m2_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(4, 256, 1);
        let weight = bench.weight("blk.1.ffn_up.weight");
        let steps = Steps { w: &as_e5m2, ..Steps::of(&bench.recipe) };
        let call = Call::Matmul { x: &x, weight, bias: None };
        bench.expect("wrong-fp8-format", &call, &bench.matmul(&x, weight, &steps));
    }
}
