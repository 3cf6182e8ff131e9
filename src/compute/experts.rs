//! Mixtures of experts: which experts a row goes to, their products, and their sum.
//!
//! A router's weights are a dense matrix, `[tokens, experts]`, zero where a token does not go.
//! What several experts make of a token stands side by side in one row, the expert with the
//! smallest number first. Every arm takes its rows and experts from here; how it multiplies is
//! its own.

use super::{ComputeError, check_matmul};
use crate::model::{RouterScores, Routing, Weight};
use crate::tensor::Tensor;

/// The experts that each row goes to, in ascending order: those with the `used` largest weights,
/// of equal ones the first. Row-major, `[rows, used]`.
pub fn taken(routes: &Tensor, used: usize) -> Vec<usize> {
    let mut all = Vec::with_capacity(routes.rows() * used);
    for row in 0..routes.rows() {
        let mut experts = largest(routes.row(row), used, |_| true);
        experts.sort_unstable();
        all.extend(experts);
    }
    all
}

/// The places of the `count` largest values that `may` be taken, the largest first; of equal ones
/// the first place. NaN is below all.
fn largest<T: PartialOrd + Copy>(
    values: &[T],
    count: usize,
    may: impl Fn(usize) -> bool,
) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).filter(|&place| may(place)).collect();
    let order = |a: &usize, b: &usize| match values[*b].partial_cmp(&values[*a]) {
        Some(order) => order.then(a.cmp(b)),
        None => {
            let number = |place: usize| values[place].partial_cmp(&values[place]).is_some();
            number(*b).cmp(&number(*a)).then(a.cmp(b))
        }
    };
    places.sort_by(order);
    places.truncate(count);
    places
}

/// The experts that a row goes to by what they are chosen by, in ascending order.
///
/// Of several groups, those are used whose two best sum to the most.
pub fn chosen<T: PartialOrd + Copy + std::ops::Add<Output = T>>(
    by: &[T],
    routing: &Routing,
) -> Vec<usize> {
    let size = (by.len() / routing.groups.max(1)).max(1);
    let mut groups = vec![0];
    if routing.groups > 1 {
        let best: Vec<T> = by
            .chunks_exact(size)
            .filter_map(|group| {
                let best = largest(group, 2, |_| true);
                Some(group[*best.first()?] + group[*best.get(1)?])
            })
            .collect();
        groups = largest(&best, routing.used_groups, |_| true);
    }
    let may = |place: usize| routing.groups <= 1 || groups.contains(&(place / size));
    let mut experts = largest(by, routing.used, may);
    experts.sort_unstable();
    experts
}

/// Whether experts are chosen by the sigmoid of their scores, else by the scores themselves.
pub fn by_sigmoid(routing: &Routing) -> bool {
    matches!(routing.scores, RouterScores::Sigmoid | RouterScores::SigmoidNormalised)
}

/// Refuses scores that are not one for each expert, or a bias that is not.
///
/// # Errors
/// With both shapes.
pub fn check_route(
    scores: &Tensor,
    bias: Option<&Weight<'_>>,
    routing: &Routing,
) -> Result<(), ComputeError> {
    let experts = scores.width();
    let per_group = experts / routing.groups.max(1);
    let enough = routing.used <= routing.used_groups * per_group;
    if !experts.is_multiple_of(routing.groups.max(1)) || !enough {
        return Err(ComputeError::Shape {
            what: "a router".to_owned(),
            left: format!("scores [{}, {experts}]", scores.rows()),
            right: format!(
                "{} experts out of {} of {} groups",
                routing.used, routing.used_groups, routing.groups
            ),
        });
    }
    match bias {
        Some(bias) if bias.width() != experts => Err(ComputeError::Shape {
            what: format!("the bias `{}` of a router", bias.name()),
            left: format!("bias [{}]", bias.width()),
            right: format!("scores [{}, {experts}]", scores.rows()),
        }),
        _ => Ok(()),
    }
}

/// The products of rows with the experts that they go to.
#[derive(Clone, Copy)]
pub struct Products<'a> {
    /// `[tokens, K]`, or `[tokens, used * K]` where each expert has a part of its own.
    pub x: &'a Tensor,
    /// Each expert's weight, `[M, K]`.
    pub weights: &'a [Weight<'a>],
    /// Their biases, where they have them.
    pub biases: Option<&'a [Weight<'a>]>,
    /// The router's weights, `[tokens, experts]`.
    pub routes: &'a Tensor,
    /// Experts that each token goes to.
    pub used: usize,
}

impl Products<'_> {
    /// Rows and width of the result.
    pub fn shape(&self) -> [usize; 2] {
        let outputs = self.weights.first().map_or(1, Weight::rows);
        [self.x.rows(), self.used * outputs]
    }

    /// Multiplies each expert's rows, and puts what several things that `multiply` returns are in
    /// their places: each `[rows, M]` of its expert, all together `[tokens, used * M]`.
    ///
    /// # Errors
    /// If shapes do not fit, and as `multiply`.
    pub fn by_expert<const N: usize>(
        &self,
        mut multiply: impl FnMut(
            &Tensor,
            Weight<'_>,
            Option<Weight<'_>>,
        ) -> Result<[Tensor; N], ComputeError>,
    ) -> Result<[Tensor; N], ComputeError> {
        let Products { x, weights, biases, routes, used } = *self;
        let inner = weights.first().map_or(0, Weight::width);
        let shared = x.width() == inner;
        let whole = shared || x.width() == used * inner;
        if !whole || routes.rows() != x.rows() || routes.width() != weights.len() || used == 0 {
            return Err(ComputeError::Shape {
                what: "the products of a mixture of experts".to_owned(),
                left: format!("input [{}, {}]", x.rows(), x.width()),
                right: format!(
                    "{used} of {} experts of {inner} inputs by weights [{}, {}]",
                    weights.len(),
                    routes.rows(),
                    routes.width()
                ),
            });
        }
        let [rows, width] = self.shape();
        let outputs = width / used;
        let mut results: [Tensor; N] = std::array::from_fn(|_| Tensor::zeros(rows, width));
        let taken = taken(routes, used);
        for (expert, weight) in weights.iter().enumerate() {
            let places: Vec<usize> =
                taken.iter().enumerate().filter(|(_, e)| **e == expert).map(|(at, _)| at).collect();
            if places.is_empty() {
                continue;
            }
            let mut data = Vec::with_capacity(places.len() * inner);
            for place in &places {
                let row = x.row(place / used);
                let first = if shared { 0 } else { place % used * inner };
                data.extend_from_slice(&row[first..first + inner]);
            }
            let bias = biases.and_then(|biases| biases.get(expert)).copied();
            let rows = Tensor::new(inner, data);
            check_matmul(&rows, weight, bias.as_ref())?;
            if weight.rows() != outputs {
                return Err(ComputeError::Shape {
                    what: format!("the expert `{}`", weight.name()),
                    left: format!("weight [{}, {inner}]", weight.rows()),
                    right: format!("{outputs} outputs of the others"),
                });
            }
            let made = multiply(&rows, *weight, bias)?;
            for (made, result) in made.iter().zip(&mut results) {
                for (row, place) in places.iter().enumerate() {
                    let first = place % used * outputs;
                    let target = &mut result.row_mut(place / used)[first..first + outputs];
                    target.copy_from_slice(made.row(row));
                }
            }
        }
        Ok(results)
    }
}

/// Refuses what is no row of `used` experts' outputs for each row of weights.
///
/// # Errors
/// With both shapes.
pub fn check_mix(x: &Tensor, routes: &Tensor, used: usize) -> Result<(), ComputeError> {
    if used > 0 && x.width().is_multiple_of(used) && x.rows() == routes.rows() {
        return Ok(());
    }
    Err(ComputeError::Shape {
        what: "the sum of a mixture of experts".to_owned(),
        left: format!("outputs [{}, {}] of {used} experts", x.rows(), x.width()),
        right: format!("weights [{}, {}]", routes.rows(), routes.width()),
    })
}

/// Refuses gates that are not one for each row, or for each value.
///
/// # Errors
/// With both shapes.
pub fn check_gate(x: &Tensor, gate: &Tensor) -> Result<(), ComputeError> {
    if gate.rows() == x.rows() && (gate.width() == 1 || gate.width() == x.width()) {
        return Ok(());
    }
    Err(ComputeError::Shape {
        what: "a sigmoid's gate".to_owned(),
        left: format!("gate [{}, {}]", gate.rows(), gate.width()),
        right: format!("input [{}, {}]", x.rows(), x.width()),
    })
}

/// Each row's weighted sum of its experts' outputs, `[tokens, M]`; `add` takes the sum so far, a
/// weight and an output, and `end` makes the value of the sum.
pub fn mixed<T: Copy + Default>(
    x: &Tensor,
    routes: &Tensor,
    used: usize,
    add: impl Fn(T, f32, f32) -> T,
    end: impl Fn(T) -> f32,
) -> Result<Tensor, ComputeError> {
    check_mix(x, routes, used)?;
    let outputs = x.width() / used;
    let taken = taken(routes, used);
    let mut y = Tensor::zeros(x.rows(), outputs);
    let mut sums = vec![T::default(); outputs];
    for row in 0..x.rows() {
        sums.fill(T::default());
        let experts = taken[row * used..(row + 1) * used].iter();
        for (expert, values) in experts.zip(x.row(row).chunks_exact(outputs)) {
            let weight = routes.row(row)[*expert];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum = add(*sum, weight, *value);
            }
        }
        for (y, sum) in y.row_mut(row).iter_mut().zip(&sums) {
            *y = end(*sum);
        }
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::WeightType;

    fn routing(used: usize, groups: usize, used_groups: usize) -> Routing {
        Routing { used, scores: RouterScores::Softmax, factor: 1.0, groups, used_groups }
    }

    #[test]
    fn of_equal_scores_the_first_expert_is_taken() {
        assert_eq!(chosen(&[1.0, 2.0, 2.0, 2.0], &routing(2, 1, 1)), [1, 2]);
        assert_eq!(chosen(&[f32::NAN, 0.0, -1.0], &routing(2, 1, 1)), [1, 2]);
        let routes = Tensor::new(4, vec![0.0, 0.7, 0.0, 0.3, 0.0, 1.0, 0.0, 0.0]);
        assert_eq!(taken(&routes, 2), [1, 3, 0, 1]);
    }

    #[test]
    fn scores_far_below_zero_leave_weights_that_are_numbers() {
        use crate::compute::Ops;
        use crate::compute::call::Call;
        use crate::compute::emulated::arm::Emulated;
        use crate::compute::reference::Reference;
        let scores = Tensor::new(3, vec![-280.0, -61.25, -231.0]);
        let routing = Routing { scores: RouterScores::SigmoidNormalised, ..routing(2, 1, 1) };
        let call = Call::Route { scores: &scores, bias: None, routing: &routing };
        let arm = Emulated::new(&crate::op::Recipe::default()).expect("a recipe");
        let [truth, made] =
            [&Reference as &dyn Ops, &arm].map(|arm| call.on(arm).expect("weights"));
        for (truth, made) in truth.data().iter().zip(made.data()) {
            let off = (truth - made).abs();
            assert!(made.is_finite() && off <= 1e-5 * truth.abs() + 1e-30, "{made} for {truth}");
        }
    }

    #[test]
    fn a_group_counts_by_its_two_best() {
        // The best expert of all stands in a group whose second is poor.
        let by = [9.0, 0.0, 5.0, 6.0, 1.0, 1.0];
        assert_eq!(chosen(&by, &routing(2, 3, 1)), [2, 3]);
        assert_eq!(chosen(&by, &routing(3, 3, 2)), [0, 2, 3]);
    }

    #[test]
    fn each_row_meets_the_experts_that_it_goes_to() {
        let bytes = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        let data: Vec<Vec<u8>> = [1.0, 10.0, 100.0].map(|w| bytes(&[w])).to_vec();
        let weight = |bytes| Weight::new("w", WeightType::F32, 1, 1, bytes).expect("a weight");
        let weights: Vec<Weight<'_>> = data.iter().map(|bytes| weight(bytes)).collect();
        let x = Tensor::new(1, vec![2.0, 3.0]);
        let routes = Tensor::new(3, vec![0.5, 0.0, 0.5, 0.0, 0.25, 0.75]);
        let products =
            Products { x: &x, weights: &weights, biases: None, routes: &routes, used: 2 };
        let multiply = |x: &Tensor, w: Weight<'_>, _: Option<Weight<'_>>| {
            let w = w.to_vec()?[0];
            Ok([Tensor::new(1, x.data().iter().map(|x| x * w).collect())])
        };
        let [y] = products.by_expert(multiply).expect("products");
        assert_eq!(y.data(), [2.0, 200.0, 30.0, 300.0]);
        // Each part by the expert that made it.
        let again = Products { x: &y, ..products };
        let [z] = again.by_expert(multiply).expect("products");
        assert_eq!(z.data(), [2.0, 20_000.0, 300.0, 30_000.0]);
        let sum = mixed(&y, &routes, 2, |sum: f32, w, x| sum + w * x, |sum| sum).expect("a sum");
        assert_eq!(sum.data(), [101.0, 232.5]);
    }
}
