//! Finds cycles among names that need each other.
//!
//! It knows names and edges only.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};

/// One shortest cycle of every knot of names that need each other, each from
/// its smallest name on, in the order of these names. A name that needs itself
/// is a cycle of one.
pub(crate) fn cycles<'a>(needs: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> Vec<Vec<&'a str>> {
    let mut graph: DiGraph<&str, ()> = DiGraph::new();
    let nodes: BTreeMap<&str, NodeIndex> =
        needs.keys().map(|name| (*name, graph.add_node(name))).collect();
    for (name, needed) in needs {
        for other in needed.iter().filter_map(|other| nodes.get(other)) {
            graph.add_edge(nodes[name], *other, ());
        }
    }
    let mut found: Vec<Vec<&str>> = tarjan_scc(&graph)
        .into_iter()
        .filter(|knot| knot.len() > 1 || graph.contains_edge(knot[0], knot[0]))
        .filter_map(|knot| {
            let knot: BTreeSet<&str> = knot.into_iter().map(|node| graph[node]).collect();
            shortest_from(knot.first()?, needs, &knot)
        })
        .collect();
    found.sort();
    found
}

/// The shortest way from a name back to itself, within its knot.
fn shortest_from<'a>(
    start: &'a str,
    needs: &BTreeMap<&'a str, BTreeSet<&'a str>>,
    knot: &BTreeSet<&'a str>,
) -> Option<Vec<&'a str>> {
    let mut came_from: BTreeMap<&str, &str> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(name) = queue.pop_front() {
        for next in needs.get(name)?.intersection(knot) {
            if *next == start {
                let mut way = vec![name];
                while let Some(previous) = way.last().and_then(|last| came_from.get(last)) {
                    way.push(previous);
                }
                way.reverse();
                return Some(way);
            }
            if !came_from.contains_key(next) {
                came_from.insert(next, name);
                queue.push_back(next);
            }
        }
    }
    None
}

/// `a -> b -> a`
pub(crate) fn text(cycle: &[&str]) -> String {
    let mut names: Vec<String> = cycle.iter().map(|name| format!("`{name}`")).collect();
    names.extend(names.first().cloned());
    names.join(" -> ")
}
