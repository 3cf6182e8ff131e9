//! `runner plan`: what a run would do, and why; nothing is computed.

use clap::Args;

use super::{Selection, make_plan, print, selected, shipped, stamps_of, store_of};

#[derive(Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    selection: Selection,
}

pub(super) fn plan_stages(PlanArgs { selection }: &PlanArgs) -> Result<u8, String> {
    let (pipeline, graph, stages) = selected(selection)?;
    let store = store_of(&selection.runs);
    let plan = make_plan(&pipeline, &graph, &stages, &store)?;
    let lines = plan.preview(&store, &stamps_of(&selection.runs, false), &shipped(&selection.runs));
    let width = lines.iter().map(|line| line.stage.0.len()).max().unwrap_or(0);
    let rows = lines.iter().map(|line| {
        format!(
            "{:width$}  {:9}  {:10}  {}\n",
            line.stage.0,
            line.arm.name(),
            line.action,
            line.why
        )
    });
    print(&rows.collect::<String>())
}
