//! `runner plan`: what a run would do, and why; nothing is computed.

use clap::Args;

use super::{
    PlaceArgs, Selection, keep, make_plan, print, selected, shipped_on, stamps_of, store_of,
};
use crate::cache::Store;
use crate::compute::arms::Workshop;
use crate::plan::{Field, Plan, PlanLine};
use crate::text::one_line;

#[derive(Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    places: PlaceArgs,
    /// Print every field of every key, and which of them changed.
    #[arg(long)]
    explain: bool,
}

pub(super) fn plan_stages(args: &PlanArgs) -> Result<u8, String> {
    let PlanArgs { selection, places, explain } = args;
    places.check(&selection.runs)?;
    let (pipeline, graph, stages) = selected(selection)?;
    let store = store_of(&selection.runs);
    let stamps = stamps_of(&selection.runs, selection.rehash);
    let mut plan = make_plan(&pipeline, &graph, &stages, &store, &stamps)?;
    plan.force = selection.force;
    places.check_place(&plan)?;
    let text = lines(&plan, &store, &shipped_on(&selection.runs, places), *explain);
    keep(&stamps);
    print(&text)
}

/// A line for every (stage, arm): what a run would do with it, and why.
/// With `explain` also what its key is made of.
pub(super) fn lines(
    plan: &Plan<'_>,
    store: &Store,
    workshop: &dyn Workshop,
    explain: bool,
) -> String {
    let lines = plan.preview(store, workshop);
    let width = lines.iter().map(|line| line.stage.0.len()).max().unwrap_or(0);
    let mut text = String::new();
    for PlanLine { stage, arm, action, why, fields } in &lines {
        text += &format!("{:width$}  {:9}  {action:10}  {}\n", stage.0, arm.name(), one_line(why));
        for Field { name, value, before } in fields.iter().filter(|_| explain) {
            let line = match before {
                Some(before) => format!("    * {name}: {before} -> {value}"),
                None => format!("      {name}: {value}"),
            };
            text += &(one_line(&line) + "\n");
        }
    }
    text
}
