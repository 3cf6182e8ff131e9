//! A mixture of experts: other weights of experts, other experts, and what is wrong within one.

use super::planted::{Bug, Ground, Made, bug, chosen};
use super::{Case, Fingerprint, Fit, Null, rank};
use crate::compute::ComputeError;
use crate::compute::call::Call;
use crate::compute::experts::{self, Products};
use crate::compute::forward::top_1;
use crate::compute::reference::routed;
use crate::model::{RouterScores, Routing, Weight};
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "a token goes to other experts, with other weights, or meets another expert's matrix",
    causes: &[
        "routing-normalisation",
        "routing-factor",
        "routing-bias",
        "expert-choice",
        "expert-swapped",
    ],
    bugs: BUGS,
    test,
};

/// Experts whose products are looked at one by one.
const MOST_EXPERTS: usize = 8;
/// Other experts' matrices that are tried in the place of one.
const MOST_TRIED: usize = 64;

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    match *case.call {
        Call::Route { scores, bias, routing } => of_router(case, scores, bias, routing),
        Call::Experts(products) => of_experts(case, &products),
        _ => Ok(Vec::new()),
    }
}

fn of_router(
    case: &Case<'_>,
    scores: &Tensor,
    weight: Option<Weight<'_>>,
    routing: &Routing,
) -> Result<Vec<Fit>, ComputeError> {
    let mut fits = Vec::new();
    let values = weight.map(|bias| bias.to_vec()).transpose()?;
    let bias = values.as_deref();
    let by = |cause: &str, detail: String, bias: Option<Weight<'_>>, routing: Routing| {
        case.fit_call(cause, detail, &Call::Route { scores, bias, routing: &routing })
    };
    let kinds = [
        (RouterScores::Softmax, "shares of all experts are taken as they are"),
        (RouterScores::SoftmaxOfTaken, "shares are divided by the sum of those that are taken"),
        (RouterScores::Sigmoid, "sigmoids are taken as they are"),
        (
            RouterScores::SigmoidNormalised,
            "sigmoids are divided by the sum of those that are taken",
        ),
    ];
    for (kind, words) in kinds.into_iter().filter(|(kind, _)| *kind != routing.scores) {
        let detail = format!("{words} ({} asked for)", routing.scores.name());
        let other = Routing { scores: kind, ..*routing };
        fits.extend(by("routing-normalisation", detail, weight, other)?);
    }
    if routing.factor != 1.0 {
        for (detail, factor) in [
            (format!("the factor {} is left out", routing.factor), 1.0),
            (format!("the factor {} is applied twice", routing.factor), routing.factor.powi(2)),
        ] {
            fits.extend(by("routing-factor", detail, weight, Routing { factor, ..*routing })?);
        }
    }
    if let Some(bias) = bias {
        let detail = "experts are chosen without the bias".to_owned();
        fits.extend(by("routing-bias", detail, None, *routing)?);
        let added: Vec<f32> = (0..scores.rows())
            .flat_map(|row| {
                let (taken, _) = routed(scores.row(row), Some(bias), routing);
                let mut moved = vec![0.0f64; scores.width()];
                for &expert in &taken {
                    let sigmoid = 1.0 / (1.0 + libm::exp(-f64::from(scores.row(row)[expert])));
                    moved[expert] = sigmoid + f64::from(bias[expert]);
                }
                let total: f64 = match routing.scores {
                    RouterScores::SigmoidNormalised => moved.iter().sum(),
                    _ => 1.0,
                };
                moved.into_iter().map(move |weight| (weight / total * routing.factor) as f32)
            })
            .collect();
        let detail = "the bias of the choice is part of the weights".to_owned();
        let added = Tensor::new(scores.width(), added);
        fits.extend(case.fit_if_any("routing-bias", detail, 0, &added));
    }
    if routing.groups > 1 {
        let detail = format!("the {} groups of experts are ignored", routing.groups);
        let all = Routing { groups: 1, used_groups: 1, ..*routing };
        fits.extend(by("expert-choice", detail, weight, all)?);
    }
    fits.extend(other_choice(case, scores, bias, routing));
    Ok(fits)
}

/// The weights that the scores give to the experts which the subject took.
fn other_choice(
    case: &Case<'_>,
    scores: &Tensor,
    bias: Option<&[f32]>,
    routing: &Routing,
) -> Option<Fit> {
    let used = routing.used;
    let seen = experts::taken(case.subject, used);
    let mut first = None;
    let mut rows = 0;
    for row in 0..scores.rows() {
        let taken = &seen[row * used..(row + 1) * used];
        let (asked, _) = routed(scores.row(row), bias, routing);
        if asked == taken {
            continue;
        }
        rows += 1;
        first.get_or_insert_with(|| {
            let named = |experts: &[usize]| {
                let names: Vec<String> = experts.iter().map(usize::to_string).collect();
                names.join(", ")
            };
            format!(
                "token {row} goes to the experts {}, and its scores ask for {}",
                named(taken),
                named(&asked)
            )
        });
    }
    let detail = first?;
    let detail = if rows > 1 { format!("{detail}; {rows} tokens do so") } else { detail };
    let predicted = case.arm.route_to(scores, routing, &seen);
    case.fit_if_any("expert-choice", detail, rows, &predicted)
}

/// One expert's rows and what the subject made of them.
struct Part {
    expert: usize,
    /// Places among all rows and all experts that they go to.
    places: Vec<usize>,
    x: Tensor,
    subject: Tensor,
    clean: Tensor,
    truth: Tensor,
    /// The energy of what is unexplained.
    energy: f64,
}

fn of_experts(case: &Case<'_>, products: &Products<'_>) -> Result<Vec<Fit>, ComputeError> {
    let used = products.used;
    let outputs = case.clean.width() / used.max(1);
    if !super::same_shape(case.subject, case.clean) || outputs == 0 {
        return Ok(Vec::new());
    }
    let mut parts = parts_of(case, products, outputs);
    let whole: f64 = parts.iter().map(|part| part.energy).sum();
    parts.sort_by(|a, b| b.energy.total_cmp(&a.energy));
    let off: usize = parts.iter().filter(|part| part.energy > 0.0).count();
    let mut fits: Vec<Fit> = Vec::new();
    let mut swapped = case.clean.clone();
    let mut exchanged = Vec::new();
    for part in parts.iter().take(MOST_EXPERTS).filter(|part| part.energy > 0.0) {
        if let Some((other, y)) = by_other_expert(case, products, part)? {
            exchanged.push((part.expert, other));
            put(&mut swapped, &y, &part.places, used);
        }
        let weight = products.weights[part.expert];
        let bias = products.biases.and_then(|biases| biases.get(part.expert)).copied();
        let call = Call::Matmul { x: &part.x, weight, bias };
        let of_weight = case.arm.of_weight(&weight)?;
        let (arm, recipe) = match &of_weight {
            Some(arm) => (arm, arm.recipe()),
            None => (case.arm, case.recipe),
        };
        let within = Case {
            arm,
            recipe,
            call: &call,
            subject: &part.subject,
            clean: &part.clean,
            truth: &part.truth,
            null: &Null::of(&call, &part.clean, case.arm, case.recipe)?,
            recorded: &[],
            ..*case
        };
        let Some(best) = rank(&within)?.into_iter().next() else { continue };
        let share = part.energy / whole;
        match fits.iter_mut().find(|fit| fit.cause == best.cause) {
            Some(fit) => {
                fit.explained += share * best.explained;
                fit.mismatches += best.mismatches;
                fit.elements += best.elements;
                fit.parameters += best.parameters;
                fit.significant |= best.significant;
            }
            None => {
                let detail = format!("expert {}: {}", part.expert, best.detail);
                fits.push(Fit { explained: share * best.explained, detail, ..best });
            }
        }
    }
    // Experts that were not looked at are unexplained, and so are values of theirs.
    for fit in &mut fits {
        let rest = case.subject.data().len() - fit.elements;
        fit.mismatches += if off > MOST_EXPERTS { rest } else { 0 };
        fit.elements = case.subject.data().len();
    }
    if let Some((expert, other)) = exchanged.first() {
        let more = match exchanged.len() {
            1 => String::new(),
            count => format!("; {count} experts are exchanged so"),
        };
        let detail =
            format!("the tokens of expert {expert} meet the matrix of expert {other}{more}");
        let parameters = exchanged.len();
        fits.extend(case.fit_if_any("expert-swapped", detail, parameters, &swapped));
    }
    Ok(fits)
}

fn parts_of(case: &Case<'_>, products: &Products<'_>, outputs: usize) -> Vec<Part> {
    let used = products.used;
    let taken = experts::taken(products.routes, used);
    let inner = products.weights.first().map_or(1, |weight| weight.width());
    let shared = products.x.width() == inner;
    let gathered = |tensor: &Tensor, places: &[usize], width: usize, shared: bool| {
        let rows = places.iter().flat_map(|place| {
            let first = if shared { 0 } else { place % used * width };
            tensor.row(place / used)[first..first + width].iter().copied()
        });
        Tensor::new(width, rows.collect())
    };
    let of = |expert: usize| {
        let places = taken.iter().enumerate().filter(|(_, e)| **e == expert).map(|(at, _)| at);
        let places: Vec<usize> = places.collect();
        let part = |tensor: &Tensor| gathered(tensor, &places, outputs, false);
        let (subject, clean, truth) = (part(case.subject), part(case.clean), part(case.truth));
        let pairs = subject.data().iter().zip(clean.data());
        let energy = pairs.map(|(&s, &c)| match s.is_finite() {
            true => super::square_of_difference(s, c),
            // What is no number is off by more than can be said.
            false => f64::from(f32::MAX),
        });
        let energy = energy.sum();
        let x = gathered(products.x, &places, inner, shared);
        Part { expert, places, x, subject, clean, truth, energy }
    };
    let mut met: Vec<usize> = taken.clone();
    met.sort_unstable();
    met.dedup();
    met.into_iter().map(of).collect()
}

/// The expert whose matrix gives what the subject has in the place of an expert's products.
fn by_other_expert(
    case: &Case<'_>,
    products: &Products<'_>,
    part: &Part,
) -> Result<Option<(usize, Tensor)>, ComputeError> {
    let count = products.weights.len();
    let one = Tensor::new(part.x.width(), part.x.row(0).to_vec());
    let mut best: Option<(usize, f64)> = None;
    // Neighbours first.
    let others = (1..count).map(|step| (part.expert + step) % count);
    for other in others.take(MOST_TRIED) {
        let y = multiplied(case, products, other, &one)?;
        let pairs = part.subject.row(0).iter().zip(y.data());
        let rest: f64 = pairs.map(|(&s, &p)| super::square_of_difference(s, p)).sum();
        if best.is_none_or(|(_, least)| rest < least) {
            best = Some((other, rest));
        }
    }
    let Some((other, _)) = best else { return Ok(None) };
    let y = multiplied(case, products, other, &part.x)?;
    let pairs = part.subject.data().iter().zip(y.data());
    let rest: f64 = pairs.map(|(&s, &p)| super::square_of_difference(s, p)).sum();
    Ok((rest < 0.5 * part.energy).then_some((other, y)))
}

fn multiplied(
    case: &Case<'_>,
    products: &Products<'_>,
    expert: usize,
    x: &Tensor,
) -> Result<Tensor, ComputeError> {
    let bias = products.biases.and_then(|biases| biases.get(expert)).copied();
    case.arm.matmul(x, products.weights[expert], bias)
}

/// Puts an expert's rows into their places.
fn put(all: &mut Tensor, rows: &Tensor, places: &[usize], used: usize) {
    let width = rows.width();
    for (row, place) in places.iter().enumerate() {
        let first = place % used * width;
        all.row_mut(place / used)[first..first + width].copy_from_slice(rows.row(row));
    }
}

const BUGS: &[Bug] = &[
    bug("a token's best expert passed over", &["expert-choice"], &["ffn_route"], &passed_over),
    bug(
        "weights of experts (not) divided by their sum",
        &["routing-normalisation"],
        &["ffn_route"],
        &other_scores,
    ),
    bug("factor of routing left out", &["routing-factor"], &["ffn_route"], &factor_left_out),
    bug(
        "experts chosen without the bias",
        &["routing-bias", "expert-choice"],
        &["ffn_route"],
        &bias_left_out,
    ),
    bug(
        "an expert's matrix for another's",
        &["expert-swapped", "swapped-weight"],
        &["ffn_gate", "ffn_down"],
        &other_matrix,
    ),
];

/// The best expert of one token is passed over, and the best of the others takes its place.
fn passed_over(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Route { scores, bias, routing } = *call else { return Ok(None) };
    let used = routing.used;
    if scores.width() <= used {
        return Ok(None);
    }
    let clean = ground.arm.route(scores, bias, routing)?;
    let mut taken = experts::taken(&clean, used);
    let row = chosen(ground.seed, scores.rows());
    let best = top_1(clean.row(row)).0 as usize;
    let own = &mut taken[row * used..(row + 1) * used];
    let mut rest: Vec<f32> = scores.row(row).to_vec();
    own.iter().for_each(|&expert| rest[expert] = f32::NEG_INFINITY);
    let next = top_1(&rest).0 as usize;
    own.iter_mut().filter(|expert| **expert == best).for_each(|expert| *expert = next);
    own.sort_unstable();
    Ok(Some(ground.arm.route_to(scores, routing, &taken)))
}

fn other_scores(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Route { scores, bias, routing } = *call else { return Ok(None) };
    let other = match routing.scores {
        RouterScores::Softmax => RouterScores::SoftmaxOfTaken,
        RouterScores::SoftmaxOfTaken => RouterScores::Softmax,
        RouterScores::Sigmoid => RouterScores::SigmoidNormalised,
        RouterScores::SigmoidNormalised => RouterScores::Sigmoid,
    };
    Ok(Some(ground.arm.route(scores, bias, &Routing { scores: other, ..*routing })?))
}

fn factor_left_out(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::Route { scores, bias, routing } if routing.factor != 1.0 => {
            Ok(Some(ground.arm.route(scores, bias, &Routing { factor: 1.0, ..*routing })?))
        }
        _ => Ok(None),
    }
}

fn bias_left_out(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    match *call {
        Call::Route { scores, bias: Some(_), routing } => {
            Ok(Some(ground.arm.route(scores, None, routing)?))
        }
        _ => Ok(None),
    }
}

fn other_matrix(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Experts(products) = *call else { return Ok(None) };
    let count = products.weights.len();
    let taken = experts::taken(products.routes, products.used);
    let Some(&first) = taken.get(chosen(ground.seed, taken.len())) else { return Ok(None) };
    if count < 2 {
        return Ok(None);
    }
    let mut weights = products.weights.to_vec();
    weights[first] = products.weights[(first + 1) % count];
    Ok(Some(ground.arm.experts(&Products { weights: &weights, ..products })?))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;
    use crate::compute::call::MadeWeight;

    const ROUTING: Routing = Routing {
        used: 2,
        scores: RouterScores::SigmoidNormalised,
        factor: 2.5,
        groups: 2,
        used_groups: 1,
    };

    #[test]
    fn other_weights_and_other_choices_are_told_apart() {
        let bench = Bench::default();
        let scores = bench.tensor(24, 8, 1);
        let bias: Vec<f32> = (0..8).map(|expert| 0.4 * (expert % 3) as f32).collect();
        let bias = MadeWeight::new("blk.1.exp_probs_b.bias".to_owned(), 1, &bias);
        let bias = Some(bias.weight().expect("a bias"));
        let wrong = |routing: Routing| {
            bench.clean(&Call::Route { scores: &scores, bias, routing: &routing })
        };
        let call = Call::Route { scores: &scores, bias, routing: &ROUTING };
        let plain = Routing { scores: RouterScores::Sigmoid, ..ROUTING };
        bench.expect("routing-normalisation", &call, &wrong(plain));
        bench.expect("routing-factor", &call, &wrong(Routing { factor: 1.0, ..ROUTING }));
        let all = Routing { groups: 1, ..ROUTING };
        bench.expect("expert-choice", &call, &wrong(all));
        let unbiased = bench.clean(&Call::Route { scores: &scores, bias: None, routing: &ROUTING });
        bench.expect("routing-bias", &call, &unbiased);
        // One token that goes elsewhere, with the weights that its scores give it there.
        let softmax = Routing { scores: RouterScores::SoftmaxOfTaken, factor: 1.0, ..ROUTING };
        let softmax = Routing { groups: 1, ..softmax };
        let call = Call::Route { scores: &scores, bias: None, routing: &softmax };
        let mut taken = experts::taken(&bench.clean(&call), 2);
        // The best expert of a token that is not among its own.
        let others: Vec<usize> = (0..8).filter(|expert| !taken[10..12].contains(expert)).collect();
        let score = |expert: &usize| scores.row(5)[*expert];
        let best = others.iter().max_by(|a, b| score(a).total_cmp(&score(b))).expect("others");
        taken[10] = *best;
        taken[10..12].sort_unstable();
        let one = bench.arm.route_to(&scores, &softmax, &taken);
        bench.expect("expert-choice", &call, &one);
    }

    #[test]
    fn what_is_wrong_within_an_expert_and_an_exchanged_one_are_named() {
        let bench = Bench::default();
        let made: Vec<MadeWeight> = (0..4)
            .map(|expert| {
                let values = bench.tensor(64, 256, 10 + expert);
                MadeWeight::new(format!("blk.1.ffn_up_exps.{expert}.weight"), 64, values.data())
            })
            .collect();
        let weights: Vec<Weight<'_>> =
            made.iter().map(|made| made.weight().expect("a weight")).collect();
        let x = bench.tensor(12, 256, 3);
        let softmax = Routing {
            used: 2,
            scores: RouterScores::SoftmaxOfTaken,
            factor: 1.0,
            groups: 1,
            used_groups: 1,
        };
        let scores = bench.tensor(12, 4, 5);
        let routes = bench.clean(&Call::Route { scores: &scores, bias: None, routing: &softmax });
        let products =
            Products { x: &x, weights: &weights, biases: None, routes: &routes, used: 2 };
        let call = Call::Experts(products);
        let mut exchanged = weights.clone();
        exchanged[1] = weights[3];
        let wrong = bench.clean(&Call::Experts(Products { weights: &exchanged, ..products }));
        bench.expect("expert-swapped", &call, &wrong);
        // Half of one expert's inner width left out.
        let mut data = weights[2].to_vec().expect("values");
        for row in data.chunks_exact_mut(256) {
            row[128..].fill(0.0);
        }
        let cut = MadeWeight::new("blk.1.ffn_up_exps.2.cut".to_owned(), 64, &data);
        let mut spoilt = weights.clone();
        spoilt[2] = cut.weight().expect("a weight");
        let wrong = bench.clean(&Call::Experts(Products { weights: &spoilt, ..products }));
        let fits = bench.fits(&call, &wrong);
        let best = fits.first().expect("a fit");
        assert!(best.detail.starts_with("expert 2: "), "{fits:#?}");
        assert!(best.names_the_bug() && best.cause != "expert-swapped", "{fits:#?}");
    }
}
