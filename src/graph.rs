//! The stages as a directed acyclic graph: a stable order, levels, who needs
//! whom, selections and drawings.
//!
//! It knows ids, titles and tags. It does not know what a stage computes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use petgraph::Direction;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::{Dfs, Reversed};

use crate::manifest::problem::{nearest, quoted_list};
use crate::manifest::{Stage, cycle};
use crate::op::StageId;
use crate::text::one_line;

/// Stages and their needs. An edge leads from a stage to one that needs it.
#[derive(Clone, Debug)]
pub struct Graph {
    graph: DiGraph<StageId, ()>,
    nodes: BTreeMap<StageId, NodeIndex>,
}

/// The cycles of stages that need each other, as `` `a` -> `b` -> `a` ``.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stages need each other: {0}; remove one of these needs")]
pub struct CycleText(String);

/// How a graph is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GraphFormat {
    /// Levels with titles, for a terminal.
    #[default]
    Text,
    /// Graphviz.
    Dot,
    /// Mermaid, for Markdown.
    Mermaid,
}

/// Why an expression selects nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// A part of the expression is empty.
    #[error(
        "the selection `{expr}` has an empty part; write `E`, `+E`, `E+`, `tag:NAME` or several joined by `,`"
    )]
    Empty {
        /// The whole expression.
        expr: String,
    },
    /// A part of the expression fits no stage.
    #[error("the selection `{part}` fits no stage; {hint}")]
    NoMatch {
        /// That part.
        part: String,
        /// The nearest name, and what there is.
        hint: String,
    },
}

impl Graph {
    /// The graph of these stages. A need outside them has no edge, so a part of
    /// a pipeline is a graph too.
    ///
    /// # Errors
    /// Where stages need each other, one cycle of every such knot.
    pub fn of(stages: &[Stage]) -> Result<Graph, CycleText> {
        // Inserted by name, whatever order the stages come in.
        let sorted: BTreeMap<&StageId, &Stage> =
            stages.iter().map(|stage| (&stage.id, stage)).collect();
        let mut graph = DiGraph::new();
        let nodes: BTreeMap<StageId, NodeIndex> =
            sorted.keys().map(|id| ((*id).clone(), graph.add_node((*id).clone()))).collect();
        let mut needs: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (id, stage) in &sorted {
            let inputs = stage.op.input_refs();
            let needed: BTreeSet<&StageId> =
                stage.needs.iter().chain(inputs.iter().map(|input| &input.stage)).collect();
            for node in needed.iter().filter_map(|need| nodes.get(*need)) {
                graph.add_edge(*node, nodes[*id], ());
            }
            needs.insert(&id.0, needed.into_iter().map(|need| need.0.as_str()).collect());
        }
        let cycles: Vec<String> =
            cycle::cycles(&needs).iter().map(|cycle| cycle::text(cycle)).collect();
        match cycles.is_empty() {
            true => Ok(Graph { graph, nodes }),
            false => Err(CycleText(cycles.join("; "))),
        }
    }

    /// Every stage after all that it needs; of those that are ready, the one
    /// with the smallest name comes first.
    pub fn order(&self) -> Vec<StageId> {
        let mut waiting: BTreeMap<&StageId, usize> = self
            .nodes
            .iter()
            .map(|(id, node)| {
                (id, self.graph.neighbors_directed(*node, Direction::Incoming).count())
            })
            .collect();
        let mut ready: BTreeSet<&StageId> =
            waiting.iter().filter(|(_, needs)| **needs == 0).map(|(id, _)| *id).collect();
        let mut order = Vec::with_capacity(self.nodes.len());
        while let Some(id) = ready.pop_first() {
            order.push(id.clone());
            for next in self.graph.neighbors(self.nodes[id]) {
                let next = &self.graph[next];
                if let Some(needs) = waiting.get_mut(next) {
                    *needs -= 1;
                    if *needs == 0 {
                        ready.insert(next);
                    }
                }
            }
        }
        order
    }

    /// The stages that this one needs itself.
    pub fn needs(&self, id: &StageId) -> BTreeSet<StageId> {
        self.beside(id, Direction::Incoming)
    }

    /// The stages that need this one themselves.
    pub fn needed_by(&self, id: &StageId) -> BTreeSet<StageId> {
        self.beside(id, Direction::Outgoing)
    }

    /// All that a stage needs, directly or not; without itself.
    pub fn ancestors(&self, id: &StageId) -> BTreeSet<StageId> {
        let Some(start) = self.nodes.get(id) else { return BTreeSet::new() };
        let backwards = Reversed(&self.graph);
        let mut walk = Dfs::new(backwards, *start);
        let mut found = BTreeSet::new();
        while let Some(node) = walk.next(backwards) {
            found.insert(self.graph[node].clone());
        }
        found.remove(id);
        found
    }

    /// All that need a stage, directly or not; without itself.
    pub fn descendants(&self, id: &StageId) -> BTreeSet<StageId> {
        let Some(start) = self.nodes.get(id) else { return BTreeSet::new() };
        let mut walk = Dfs::new(&self.graph, *start);
        let mut found = BTreeSet::new();
        while let Some(node) = walk.next(&self.graph) {
            found.insert(self.graph[node].clone());
        }
        found.remove(id);
        found
    }

    /// The stages by level: those that need nothing, those that need only
    /// these, and so on; sorted by name within a level.
    pub fn levels(&self) -> Vec<Vec<StageId>> {
        let mut level_of: BTreeMap<StageId, usize> = BTreeMap::new();
        let mut levels: Vec<Vec<StageId>> = Vec::new();
        for id in self.order() {
            let level = self
                .needs(&id)
                .iter()
                .filter_map(|need| level_of.get(need))
                .map(|level| level + 1)
                .max()
                .unwrap_or(0);
            if levels.len() <= level {
                levels.resize(level + 1, Vec::new());
            }
            levels[level].push(id.clone());
            level_of.insert(id, level);
        }
        levels.iter_mut().for_each(|level| level.sort());
        levels
    }

    fn beside(&self, id: &StageId, direction: Direction) -> BTreeSet<StageId> {
        let Some(node) = self.nodes.get(id) else { return BTreeSet::new() };
        self.graph
            .neighbors_directed(*node, direction)
            .map(|other| self.graph[other].clone())
            .collect()
    }
}

/// Draws the graph. Titles, ops and contracts come from `stages`.
pub fn render(graph: &Graph, stages: &[Stage], format: GraphFormat) -> String {
    let by_id: BTreeMap<&StageId, &Stage> = stages.iter().map(|stage| (&stage.id, stage)).collect();
    match format {
        GraphFormat::Text => render_text(graph, &by_id),
        GraphFormat::Dot => render_dot(graph, &by_id),
        GraphFormat::Mermaid => render_mermaid(graph, &by_id),
    }
}

fn render_text(graph: &Graph, stages: &BTreeMap<&StageId, &Stage>) -> String {
    let mut text = String::new();
    let width = |cells: &mut dyn Iterator<Item = usize>| cells.max().unwrap_or(0);
    let ids = width(&mut graph.nodes.keys().map(|id| id.0.len()));
    let ops = width(&mut stages.values().map(|stage| stage.op.name().len()));
    let titles = width(&mut stages.values().map(|stage| one_line(&stage.title).chars().count()));
    for (number, level) in graph.levels().iter().enumerate() {
        let heading = if number == 0 { "at once" } else { "then" };
        let _ = writeln!(text, "{heading}");
        for id in level {
            let needs: Vec<String> = graph.needs(id).into_iter().map(|need| need.0).collect();
            let after = match needs.is_empty() {
                true => String::new(),
                false => format!("needs {}", needs.join(", ")),
            };
            let (op, title) = stages
                .get(id)
                .map_or(("", String::new()), |stage| (stage.op.name(), one_line(&stage.title)));
            let line = format!("  {id:<ids$}  {op:<ops$}  {title:<titles$}  {after}", id = id.0);
            let _ = writeln!(text, "{}", line.trim_end());
        }
    }
    text
}

fn render_dot(graph: &Graph, stages: &BTreeMap<&StageId, &Stage>) -> String {
    // Within quotes Graphviz knows `\"`, and reads `\n` and friends otherwise.
    let quoted = |text: &str| one_line(text).replace('\\', "\\\\").replace('"', "\\\"");
    let mut text = String::from(
        "digraph runner {\n  rankdir = LR;\n  node [shape = box, fontname = \"sans-serif\"];\n",
    );
    for id in graph.nodes.keys() {
        let title = stages.get(id).map_or("", |stage| stage.title.as_str());
        let _ = writeln!(text, "  \"{0}\" [label = \"{0}\\n{1}\"];", quoted(&id.0), quoted(title));
    }
    for id in graph.nodes.keys() {
        for next in graph.needed_by(id) {
            let _ = writeln!(text, "  \"{}\" -> \"{}\";", quoted(&id.0), quoted(&next.0));
        }
    }
    text.push_str("}\n");
    text
}

fn render_mermaid(graph: &Graph, stages: &BTreeMap<&StageId, &Stage>) -> String {
    // Mermaid escapes by entity numbers; `#` begins one and comes first.
    let quoted = |text: &str| {
        let mut safe = String::new();
        for c in one_line(text).chars() {
            match c {
                '#' | '"' | '<' | '>' | '&' | '`' | '\\' => {
                    let _ = write!(safe, "#{};", c as u32);
                }
                c => safe.push(c),
            }
        }
        safe
    };
    // Ids such as `end` are words of Mermaid's own, so nodes are numbered.
    let number: BTreeMap<&StageId, usize> =
        graph.nodes.keys().enumerate().map(|(number, id)| (id, number)).collect();
    let mut text = String::from("flowchart LR\n");
    for (id, number) in &number {
        let title = stages.get(*id).map_or("", |stage| stage.title.as_str());
        let _ = writeln!(text, "  s{number}[\"{}<br>{}\"]", quoted(&id.0), quoted(title));
    }
    for (id, from) in &number {
        for next in graph.needed_by(id) {
            let _ = writeln!(text, "  s{from} --> s{}", number[&next]);
        }
    }
    text
}

/// The stages that an expression selects: `E` alone, `+E` with all that it
/// needs, `E+` with all that need it, `+E+` with both; for `E` also `tag:NAME`
/// or a pattern with `*`; several joined by `,`.
///
/// # Errors
/// Every part must select something.
pub fn select(
    graph: &Graph,
    stages: &[Stage],
    expr: &str,
) -> Result<BTreeSet<StageId>, SelectError> {
    let mut selected = BTreeSet::new();
    for part in expr.split(',') {
        let part = part.trim();
        let (up, name) = match part.strip_prefix('+') {
            Some(rest) => (true, rest),
            None => (false, part),
        };
        let (down, name) = match name.strip_suffix('+') {
            Some(rest) => (true, rest),
            None => (false, name),
        };
        if name.is_empty() {
            return Err(SelectError::Empty { expr: expr.into() });
        }
        let found = matching(stages, name);
        if found.is_empty() {
            let hint = hint(stages, name);
            return Err(SelectError::NoMatch { part: part.into(), hint });
        }
        for id in found {
            if up {
                selected.extend(graph.ancestors(id));
            }
            if down {
                selected.extend(graph.descendants(id));
            }
            selected.insert(id.clone());
        }
    }
    Ok(selected)
}

fn matching<'a>(stages: &'a [Stage], name: &str) -> Vec<&'a StageId> {
    let fits = |stage: &&Stage| match name.strip_prefix("tag:") {
        Some(tag) => stage.tags.iter().any(|known| glob(tag, known)),
        // A family's name stands for all its members.
        None => {
            let of_family = stage.family.as_ref().is_some_and(|family| family.0 == name);
            of_family || glob(name, &stage.id.0)
        }
    };
    stages.iter().filter(fits).map(|stage| &stage.id).collect()
}

/// Whether a whole text fits a pattern, where `*` is any run of characters.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(head) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().unwrap_or("");
    // The earliest place for each middle part leaves the most for the others.
    for part in parts {
        match text.find(part) {
            Some(place) => text = &text[place + part.len()..],
            None => return false,
        }
    }
    text.ends_with(tail)
}

fn hint(stages: &[Stage], name: &str) -> String {
    let (noun, prefix, name, known): (_, _, _, BTreeSet<&str>) = match name.strip_prefix("tag:") {
        Some(tag) => {
            let tags = stages.iter().flat_map(|stage| &stage.tags).map(String::as_str);
            ("tags", "tag:", tag, tags.collect())
        }
        None => ("stages", "", name, stages.iter().map(|stage| stage.id.0.as_str()).collect()),
    };
    let list = match known.is_empty() {
        true => format!("there are no {noun}"),
        false => format!("the {noun} are {}", quoted_list(&known)),
    };
    match nearest(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{prefix}{near}`? {list}"),
        None => list,
    }
}
