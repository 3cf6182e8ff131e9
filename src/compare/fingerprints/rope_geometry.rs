//! RoPE with another layout, base, direction, position or width.

use super::planted::{Bug, Ground, Made, ROPES, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::emulated::arm::Emulated;
use crate::model::{Rope, RopeLayout, Scaling};
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "RoPE has another layout, base, direction, position or width",
    causes: &[
        "rope-layout",
        "rope-base",
        "rope-direction",
        "rope-position",
        "rope-missing",
        "rope-factors",
        "rope-width",
    ],
    bugs: BUGS,
    test,
};

/// Bases that models use.
const BASES: [f64; 8] = [1e4, 1e5, 2.5e5, 5e5, 1e6, 2e6, 5e6, 1e7];
/// Positions by which a row may be off.
const MOST_OFFSET: usize = 4;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Rope { x, rope, head_dim, first_position } = *case.call else {
        return Ok(Vec::new());
    };
    let mut fits = Vec::new();
    fits.extend(case.fit_if_any("rope-missing", "nothing is rotated".to_owned(), 0, x));
    let mut attempt = |cause: &str, detail: String, rope: &Rope, first_position: usize| {
        let call = Call::Rope { x, rope, head_dim, first_position };
        fits.extend(case.fit_call(cause, detail, &call)?);
        Ok::<(), ComputeError>(())
    };
    let (layout, words) = match rope.layout {
        RopeLayout::Halves => (RopeLayout::Interleaved, "interleaved pairs instead of halves"),
        RopeLayout::Interleaved => (RopeLayout::Halves, "halves instead of interleaved pairs"),
    };
    attempt("rope-layout", words.to_owned(), &Rope { layout, ..rope.clone() }, first_position)?;
    for theta in BASES.into_iter().filter(|theta| *theta != rope.theta) {
        let detail = format!("the base is {theta} instead of {}", rope.theta);
        attempt("rope-base", detail, &Rope { theta, ..rope.clone() }, first_position)?;
    }
    if rope.factors.is_some() {
        let without = Rope { factors: None, scaling: None, ..rope.clone() };
        attempt(
            "rope-factors",
            "the frequency factors are ignored".to_owned(),
            &without,
            first_position,
        )?;
    }
    if rope.dimensions < head_dim && rope.factors.is_none() {
        let (dimensions, part) = (head_dim, rope.dimensions);
        let detail = format!("whole heads of {head_dim} values turn instead of {part} of them");
        attempt("rope-width", detail, &Rope { dimensions, ..rope.clone() }, first_position)?;
    }
    if rope.linear_scale != 1.0 {
        let plain = Rope { linear_scale: 1.0, scaling: None, ..rope.clone() };
        let detail = format!("positions are not divided by {}", rope.linear_scale);
        attempt("rope-factors", detail, &plain, first_position)?;
    }
    if rope.magnitude != 1.0 {
        let plain = Rope { magnitude: 1.0, ..rope.clone() };
        let detail = format!("sine and cosine are not multiplied by {}", rope.magnitude);
        attempt("rope-factors", detail, &plain, first_position)?;
    }
    for factor in [2.0, 4.0, 8.0] {
        let linear_scale = rope.linear_scale * factor;
        // What an engine reads.
        let scaling = match rope.scaling {
            None | Some(Scaling::Linear(_)) => Some(Scaling::Linear(linear_scale)),
            other => other,
        };
        let stretched = Rope { linear_scale, scaling, ..rope.clone() };
        attempt(
            "rope-factors",
            format!("positions are divided by {factor}"),
            &stretched,
            first_position,
        )?;
    }
    for offset in 1..=MOST_OFFSET {
        let detail = format!("every row stands {offset} positions later than it must");
        attempt("rope-position", detail, rope, first_position + offset)?;
    }
    let rows = |position: &dyn Fn(usize) -> usize| {
        let mut data = Vec::with_capacity(x.data().len());
        for row in 0..x.rows() {
            let one = Tensor::new(x.width(), x.row(row).to_vec());
            data.extend(case.arm.rope(&one, rope, head_dim, position(row))?.into_data());
        }
        Ok::<Tensor, ComputeError>(Tensor::new(x.width(), data))
    };
    let all = rows(&|_| first_position)?;
    fits.extend(case.fit_if_any(
        "rope-position",
        "every row stands at the first one's position".to_owned(),
        0,
        &all,
    ));
    let earlier = rows(&|row| (first_position + row).saturating_sub(1))?;
    fits.extend(case.fit_if_any(
        "rope-position",
        "every row stands one position earlier".to_owned(),
        0,
        &earlier,
    ));
    // Turning back is turning the first of each pair's signs.
    let turned = turned_back(case.arm, x, rope, head_dim, first_position)?;
    fits.extend(case.fit_if_any(
        "rope-direction",
        "pairs turn the other way".to_owned(),
        0,
        &turned,
    ));
    Ok(fits)
}

/// The rotation by the negative angles: `R(-a) x = S R(a) S x` with S negating second values.
fn turned_back(
    arm: &Emulated,
    x: &Tensor,
    rope: &Rope,
    head_dim: usize,
    first_position: usize,
) -> Result<Tensor, ComputeError> {
    let negated = |x: &Tensor| {
        let mut y = x.clone();
        for head in y.data_mut().chunks_exact_mut(head_dim) {
            for pair in 0..rope.dimensions / 2 {
                let (_, second) = crate::compute::rope::pair(rope, head_dim, pair);
                head[second] = -head[second];
            }
        }
        y
    };
    Ok(negated(&arm.rope(&negated(x), rope, head_dim, first_position)?))
}

const BUGS: &[Bug] = &[
    bug("RoPE in the other layout", &["rope-layout"], ROPES, &other_layout),
    bug("RoPE base 10000", &["rope-base"], ROPES, &base_10000),
    bug("RoPE turns the other way", &["rope-direction"], ROPES, &other_way),
    bug("RoPE one position late", &["rope-position"], ROPES, &one_late),
    bug(
        "RoPE at the first position only",
        &["rope-position", "rope-missing"],
        &["q_rope"],
        &first_only,
    ),
    bug("RoPE left out", &["rope-missing", "stale-output"], ROPES, &left_out),
    bug("RoPE factors ignored", &["rope-factors"], ROPES, &factors_ignored),
    bug("whole heads turned for a part", &["rope-width"], ROPES, &whole_heads),
];

fn other_layout(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Rope { rope, .. } = *call else { return Ok(None) };
    let layout = match rope.layout {
        RopeLayout::Halves => RopeLayout::Interleaved,
        RopeLayout::Interleaved => RopeLayout::Halves,
    };
    with_geometry(call, ground, &Rope { layout, ..rope.clone() })
}

fn base_10000(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Rope { rope, .. } = *call else { return Ok(None) };
    let theta = 1e4;
    if theta == rope.theta {
        return Ok(None);
    }
    with_geometry(call, ground, &Rope { theta, ..rope.clone() })
}

fn factors_ignored(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::Rope { rope, .. } if rope.factors.is_some() => {
            let plain = Rope { factors: None, scaling: None, ..rope.clone() };
            with_geometry(call, ground, &plain)
        }
        _ => Ok(None),
    }
}

fn whole_heads(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::Rope { rope, head_dim, .. }
            if rope.dimensions < head_dim && rope.factors.is_none() =>
        {
            with_geometry(call, ground, &Rope { dimensions: head_dim, ..rope.clone() })
        }
        _ => Ok(None),
    }
}

fn with_geometry(call: &Call<'_>, ground: &Ground<'_>, other: &Rope) -> Made {
    let Call::Rope { x, head_dim, first_position, .. } = *call else { return Ok(None) };
    Ok(Some(ground.arm.rope(x, other, head_dim, first_position)?))
}

fn one_late(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Rope { x, rope, head_dim, first_position } = *call else { return Ok(None) };
    Ok(Some(ground.arm.rope(x, rope, head_dim, first_position + 1)?))
}

fn first_only(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Rope { x, rope, head_dim, first_position } = *call else { return Ok(None) };
    if x.rows() < 2 {
        return Ok(None);
    }
    let mut data = Vec::with_capacity(x.data().len());
    for row in 0..x.rows() {
        let one = Tensor::new(x.width(), x.row(row).to_vec());
        data.extend(ground.arm.rope(&one, rope, head_dim, first_position)?.into_data());
    }
    Ok(Some(Tensor::new(x.width(), data)))
}

fn left_out(call: &Call<'_>, _: &Ground<'_>) -> Made {
    let Call::Rope { x, .. } = *call else { return Ok(None) };
    Ok(Some(x.clone()))
}

fn other_way(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Rope { x, rope, head_dim, first_position } = *call else { return Ok(None) };
    turned_back(ground.arm, x, rope, head_dim, first_position).map(Some)
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn each_departure_of_the_geometry_is_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(5, 256, 1);
        let rope = bench.model.config().rope.clone();
        let call = Call::Rope { x: &x, rope: &rope, head_dim: 64, first_position: 0 };
        let other = |rope: &Rope, first_position| {
            bench.clean(&Call::Rope { x: &x, rope, head_dim: 64, first_position })
        };
        let layout = Rope { layout: RopeLayout::Interleaved, ..rope.clone() };
        bench.expect("rope-layout", &call, &other(&layout, 0));
        bench.expect("rope-base", &call, &other(&Rope { theta: 1e4, ..rope.clone() }, 0));
        bench.expect("rope-position", &call, &other(&rope, 1));
        bench.expect("rope-missing", &call, &x);
        let back = turned_back(&bench.arm, &x, &rope, 64, 0).expect("a rotation");
        bench.expect("rope-direction", &call, &back);
    }

    #[test]
    fn whole_heads_turned_for_a_part_and_forgotten_scales_are_recognised() {
        let bench = Bench::default();
        let x = bench.tensor(5, 256, 1);
        let rope = bench.model.config().rope.clone();
        let call = |rope| Call::Rope { x: &x, rope, head_dim: 64, first_position: 3 };
        let whole = bench.clean(&call(&rope));
        let part = Rope { dimensions: 32, ..rope.clone() };
        bench.expect("rope-width", &call(&part), &whole);
        let stretched = Rope { linear_scale: 8.0, ..rope.clone() };
        bench.expect("rope-factors", &call(&stretched), &whole);
        let louder = Rope { magnitude: 1.19, ..rope.clone() };
        bench.expect("rope-factors", &call(&louder), &whole);
    }
}
