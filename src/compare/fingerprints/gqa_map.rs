//! Query heads that read another key and value head than their group's.

use super::planted::{Bug, Ground, Made, bug};
use super::{Case, Fingerprint, Fit};
use crate::compute::call::Call;
use crate::compute::{AttentionShape, ComputeError};
use crate::tensor::Tensor;

pub(super) const FINGERPRINT: Fingerprint = Fingerprint {
    what: "query heads are mapped to the wrong key and value heads",
    causes: &["gqa-head-map"],
    bugs: BUGS,
    test,
};

fn test(case: &Case<'_>) -> Result<Vec<Fit>, ComputeError> {
    let Call::Attention { q, k, v, shape } = *case.call else { return Ok(Vec::new()) };
    let AttentionShape { heads, kv_heads, head_dim, value_dim, .. } = shape;
    let group = heads / kv_heads;
    let right: Vec<usize> = (0..heads).map(|head| head / group).collect();
    let maps: [(&str, Vec<usize>); 4] = [
        ("head h reads h mod kv_heads", (0..heads).map(|head| head % kv_heads).collect()),
        ("every head reads the first one", vec![0; heads]),
        ("each group reads the next one", right.iter().map(|kv| (kv + 1) % kv_heads).collect()),
        ("the groups are reversed", right.iter().map(|kv| kv_heads - 1 - kv).collect()),
    ];
    let mut fits = Vec::new();
    for (detail, map) in maps.into_iter().filter(|(_, map)| *map != right) {
        let (k, v) = (expanded(k, &map, head_dim), expanded(v, &map, value_dim));
        let call =
            Call::Attention { q, k: &k, v: &v, shape: AttentionShape { kv_heads: heads, ..shape } };
        fits.extend(case.fit_call("gqa-head-map", detail.to_owned(), &call)?);
    }
    Ok(fits)
}

/// One key or value head for each query head.
fn expanded(x: &Tensor, map: &[usize], head_dim: usize) -> Tensor {
    let rows = (0..x.rows()).flat_map(|row| {
        let row = x.row(row);
        map.iter().flat_map(move |kv| row[kv * head_dim..(kv + 1) * head_dim].iter().copied())
    });
    Tensor::new(map.len() * head_dim, rows.collect())
}

const BUGS: &[Bug] = &[
    bug("GQA heads taken modulo", &["gqa-head-map"], &["attn"], &modulo),
    bug("GQA: every head reads the first", &["gqa-head-map"], &["attn"], &first),
];

fn modulo(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Attention { shape, .. } = *call else { return Ok(None) };
    let applies = shape.kv_heads > 1 && shape.kv_heads < shape.heads;
    if applies { by_map(call, ground, &|head| head % shape.kv_heads) } else { Ok(None) }
}

fn first(call: &Call<'_>, ground: &Ground<'_>) -> Made {
    let Call::Attention { shape, .. } = *call else { return Ok(None) };
    if shape.kv_heads > 1 { by_map(call, ground, &|_| 0) } else { Ok(None) }
}

/// Attention in which each head of queries reads that head of keys and values.
fn by_map(call: &Call<'_>, ground: &Ground<'_>, kv_of: &dyn Fn(usize) -> usize) -> Made {
    let Call::Attention { q, k, v, shape } = *call else { return Ok(None) };
    let wide = |x: &Tensor, width: usize| {
        let rows = (0..x.rows()).flat_map(|row| {
            let row = x.row(row);
            (0..shape.heads).flat_map(move |head| {
                let kv = kv_of(head);
                row[kv * width..(kv + 1) * width].iter().copied()
            })
        });
        Tensor::new(shape.heads * width, rows.collect())
    };
    let every = AttentionShape { kv_heads: shape.heads, ..shape };
    let (k, v) = (wide(k, shape.head_dim), wide(v, shape.value_dim));
    Ok(Some(ground.arm.attention(q, &k, &v, every)?))
}

#[cfg(test)]
mod tests {
    use super::super::bench::Bench;
    use super::*;

    #[test]
    fn heads_taken_modulo_are_recognised() {
        let bench = Bench::default();
        let (q, k, v) = (bench.tensor(5, 256, 1), bench.tensor(5, 128, 2), bench.tensor(5, 128, 3));
        let shape = AttentionShape::causal(4, 2, 64, 0);
        let map = [0, 1, 0, 1];
        let (wide_k, wide_v) = (expanded(&k, &map, 64), expanded(&v, &map, 64));
        let every = AttentionShape { kv_heads: 4, ..shape };
        let wrong = bench.clean(&Call::Attention { q: &q, k: &wide_k, v: &wide_v, shape: every });
        bench.expect("gqa-head-map", &Call::Attention { q: &q, k: &k, v: &v, shape }, &wrong);
    }
}
