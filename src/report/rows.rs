//! The measures of a run as rows of a table, for the formats that are tables.
//!
//! A row per stage, pair of streams and site; it knows names and places, not how a
//! format writes them.

use crate::compare::Measure;
use crate::op::in_layer;
use crate::record::{RunRecord, StageRecord};

/// The columns before the metrics.
pub(super) const BEFORE: [&str; 9] =
    ["run", "stage", "op", "subject", "judge", "layer", "site", "rows", "width"];
/// The columns after the metrics.
pub(super) const AFTER: [&str; 5] =
    ["unmeasured", "worst_row", "worst_column", "worst_subject", "worst_judge"];

/// One measure with its place.
pub(super) struct Row<'a> {
    /// The stage.
    pub stage: &'a StageRecord,
    /// The measure.
    pub measure: &'a Measure,
    /// The layer, where the site lies in one.
    pub layer: Option<u32>,
    /// The site's name, within the layer if there is one.
    pub site: &'a str,
}

/// All measures, in the order of run.json.
pub(super) fn rows(run: &RunRecord) -> impl Iterator<Item = Row<'_>> {
    run.stages.iter().flat_map(|stage| {
        stage.measures.iter().map(move |measure| {
            let (layer, site) = match in_layer(&measure.site.0) {
                Some((layer, inner)) => (Some(layer), inner),
                None => (None, measure.site.0.as_str()),
            };
            Row { stage, measure, layer, site }
        })
    })
}
