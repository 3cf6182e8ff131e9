//! `runner identify`: the engine's file that a recording shows, from the kernels that a
//! stage found.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use super::{print, record_of};
use crate::compare::SiteKernel;
use crate::dtype::Format;
use crate::engine::{MOST_PRODUCTS, Order, Product, ProductOf};
use crate::record::StageRecord;

/// The ops of an engine's file: the key, and how the kernels found are called.
const OPS: [(&str, &str); 6] = [
    ("linear", "product "),
    ("output", "output "),
    ("rms_norm", "norm "),
    ("rope", "rope "),
    ("attention", "attention "),
    ("swiglu", "swiglu "),
];

pub(super) fn identify(stage: &str, run: &str, runs: &Path) -> Result<u8, String> {
    let (_, record) = record_of(run, runs)?;
    let found = record.stages.iter().find(|record| record.id.0 == stage).ok_or_else(|| {
        let known: Vec<&str> = record.stages.iter().map(|stage| stage.id.0.as_str()).collect();
        format!("run `{}` has no stage `{stage}`; it has: {}", record.id, known.join(", "))
    })?;
    if found.kernels.is_empty() {
        return Err(format!(
            "stage `{stage}` was held to no engine; write `recipe = {{ engine = \"transformers\" }}` \
             and a recording (`[recorded]`), and run it again"
        ));
    }
    print(&file(found))
}

/// The engine's file: kernels that give every site of their op to the bit, and the shapes of
/// products that are added in an order of their own. Where no kernel does, the nearest ones
/// stand, and of an op that was not recorded the recipe's: a comment says so, and the file is
/// whole.
fn file(stage: &StageRecord) -> String {
    let mut text = String::new();
    let stream = stage.recipe.stream.unwrap_or(Format::Bf16);
    let exact = stage.kernels.iter().filter(|kernel| kernel.mismatches == 0).count();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "# Identified from stage {}: {exact} of {} sites to the bit.",
        stage.id,
        stage.kernels.len()
    );
    let _ = writeln!(text, "name   = \"identified\"\nstream = \"{stream}\"\n\n[kernels]");
    let of_recipe = stage.recipe.engine.and_then(|engine| serde_json::to_value(engine).ok());
    let kernels: Vec<SiteKernel> = stage.kernels.iter().map(as_in_file).collect();
    for (key, prefix) in OPS {
        let nearest = || -> Vec<String> {
            let mut names: Vec<String> = Vec::new();
            let found = kernels.iter().filter_map(|k| k.kernel.strip_prefix(prefix));
            found.for_each(|name| {
                if !names.iter().any(|known| known == name) {
                    names.push(name.to_owned());
                }
            });
            names
        };
        let (names, remark) = match (kernels_of(&kernels, prefix), nearest()) {
            (exact, _) if !exact.is_empty() => (exact, ""),
            (_, near) if !near.is_empty() => (near, "  # nearest; to the bit at no site"),
            _ => {
                let listed = of_recipe.as_ref().and_then(|of_recipe| of_recipe[key].as_array());
                let names = listed.into_iter().flatten().filter_map(|name| name.as_str());
                (names.map(str::to_owned).collect(), "  # not recorded; as the recipe has it")
            }
        };
        if names.is_empty() {
            continue;
        }
        let listed: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
        let _ = writeln!(text, "{key:9} = [{}]{remark}", listed.join(", "));
    }
    let mut orders: BTreeMap<(ProductOf, [usize; 3]), Vec<Order>> = BTreeMap::new();
    let exact = stage.kernels.iter().filter(|kernel| kernel.mismatches == 0);
    for product in exact.flat_map(|kernel| kernel.products.iter()) {
        let known = orders.entry((product.of, product.shape())).or_default();
        if !known.contains(&product.order()) {
            known.push(product.order());
        }
    }
    // A file says one order for a shape, and lists so many shapes.
    let (mut listed, mut left_out) = (Vec::new(), Vec::new());
    for ((of, shape), orders) in orders {
        match orders.as_slice() {
            [Order::CHAIN] => {}
            [order] if listed.len() < MOST_PRODUCTS => {
                listed.push(format!("    {},", inline(&Product::new(of, shape, *order))));
            }
            [order] => left_out.push(format!(
                "# left out, a file lists {MOST_PRODUCTS}: {}",
                inline(&Product::new(of, shape, *order))
            )),
            orders => {
                let orders: Vec<String> =
                    orders.iter().map(|order| inline(&Product::new(of, shape, *order))).collect();
                left_out.push(format!("# open, one of: {}", orders.join(", ")));
            }
        }
    }
    if !listed.is_empty() {
        let _ = writeln!(text, "products = [\n{}\n]", listed.join("\n"));
    }
    for line in left_out {
        let _ = writeln!(text, "{line}");
    }
    for kernel in stage.kernels.iter().filter(|kernel| kernel.mismatches > 0) {
        let _ = writeln!(
            text,
            "# open: {}, {} of {} values differ from the nearest, {}",
            kernel.site, kernel.mismatches, kernel.values, kernel.kernel
        );
    }
    text
}

/// A product as an engine's file lists it.
fn inline(product: &Product) -> String {
    const KEYS: [&str; 9] =
        ["of", "tokens", "outputs", "inner", "parts", "tile", "rounded", "instruction", "rest"];
    let table = toml::Table::try_from(product).unwrap_or_default();
    let fields = KEYS.iter().filter_map(|key| Some(format!("{key} = {}", table.get(*key)?)));
    format!("{{ {} }}", fields.collect::<Vec<String>>().join(", "))
}

/// A site's kernels under the names of an engine's file: orders of cuBLAS are one kernel, those
/// of eager attention another, and the product that makes the logits is an op of its own.
fn as_in_file(found: &SiteKernel) -> SiteKernel {
    let renamed = |name: &String| {
        let product = match name.split_once(", ") {
            _ if name.starts_with("cuBLAS") => "product cublas",
            Some((kernel, _)) => kernel,
            None => name,
        };
        match product.strip_prefix("product ") {
            Some(kernel) if found.site.0 == "logits" => format!("output {kernel}"),
            _ => product.to_owned(),
        }
    };
    let also = found.also.iter().map(renamed).collect();
    SiteKernel { kernel: renamed(&found.kernel), also, ..found.clone() }
}

/// The kernels that give every exact site of an op; where none gives all, those that give
/// some, in the order of the flow.
fn kernels_of(kernels: &[SiteKernel], prefix: &str) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    let mut all: Option<BTreeSet<String>> = None;
    for kernel in kernels.iter().filter(|kernel| kernel.mismatches == 0) {
        let Some(first) = kernel.kernel.strip_prefix(prefix) else { continue };
        let also = kernel.also.iter().filter_map(|name| name.strip_prefix(prefix));
        let fitting: BTreeSet<String> =
            [first].into_iter().chain(also).map(str::to_owned).collect();
        if !seen.contains(&first.to_owned()) {
            seen.push(first.to_owned());
        }
        all = Some(match all {
            None => fitting,
            Some(all) => all.intersection(&fitting).cloned().collect(),
        });
    }
    match all {
        Some(all) if !all.is_empty() => {
            let mut listed: Vec<String> =
                seen.iter().filter(|n| all.contains(*n)).cloned().collect();
            listed.extend(all.into_iter().filter(|name| !seen.contains(name)));
            listed
        }
        _ => seen,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Products;

    #[test]
    fn a_product_is_listed_as_an_engines_file_reads_it() {
        let cut = Order { parts: 5, tile: 8, rounded: true, instruction: 8, rest: None };
        for (of, order, written) in [
            (
                ProductOf::Weight,
                Order { parts: 3, ..Order::CHAIN },
                "{ tokens = 4, outputs = 8, inner = 95, parts = 3 }",
            ),
            (
                ProductOf::Values,
                cut,
                "{ of = \"values\", tokens = 4, outputs = 8, inner = 95, parts = 5, tile = 8, \
                 rounded = true, instruction = 8 }",
            ),
            (
                ProductOf::Weight,
                Order { rest: Some(32), ..Order::CHAIN },
                "{ tokens = 4, outputs = 8, inner = 95, parts = 1, rest = 32 }",
            ),
        ] {
            let product = Product::new(of, [4, 8, 95], order);
            assert_eq!(inline(&product), written);
            let read: toml::Table = format!("products = [{written}]").parse().expect("TOML");
            let products: Products = read["products"].clone().try_into().expect("a list");
            assert_eq!(Vec::from(products), [product]);
        }
    }

    #[test]
    fn orders_of_cublas_and_of_eager_attention_are_no_kernels_of_their_own() {
        let named = |site: &str, kernel: &str| {
            let found = SiteKernel {
                subject: crate::op::Stream::Arm(crate::op::Arm::Recorded),
                site: crate::op::Site(site.to_owned()),
                kernel: kernel.to_owned(),
                mismatches: 0,
                values: 1,
                also: Vec::new(),
                products: Vec::new(),
            };
            as_in_file(&found).kernel
        };
        assert_eq!(named("logits", "cuBLAS in 5 parts of K rounded to bf16"), "output cublas");
        assert_eq!(
            named("blk.0.q", "cuBLAS in one chain, decoded cuBLAS in 2 parts of K"),
            "product cublas"
        );
        let eager = "attention eager, scores in one chain of 8 products at a time";
        assert_eq!(named("blk.0.attn", eager), "attention eager");
        assert_eq!(named("blk.0.attn", "attention flash-2"), "attention flash-2");
    }
}
