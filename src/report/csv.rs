//! The site records as CSV: a row per stage, pair of streams and site, a column
//! per metric. A metric that would mean nothing is empty.

use crate::metric::Metric;
use crate::op::in_layer;
use crate::record::RunRecord;

/// Every measure of a run.
///
/// # Errors
/// None that memory allows.
pub fn csv(run: &RunRecord) -> Result<Vec<u8>, ::csv::Error> {
    let mut table = ::csv::Writer::from_writer(Vec::new());
    let mut head = vec!["run", "stage", "op", "subject", "judge", "layer", "site", "rows", "width"];
    head.extend(Metric::ALL.iter().map(|metric| metric.name()));
    head.extend(["unmeasured", "worst_row", "worst_column", "worst_subject", "worst_judge"]);
    table.write_record(&head)?;
    for stage in &run.stages {
        for measure in &stage.measures {
            let (layer, site) = match in_layer(&measure.site.0) {
                Some((layer, inner)) => (layer.to_string(), inner.to_owned()),
                None => (String::new(), measure.site.0.clone()),
            };
            let mut row = vec![
                run.id.clone(),
                stage.id.0.clone(),
                stage.op.name().to_owned(),
                measure.subject.to_string(),
                measure.judge.to_string(),
                layer,
                site,
                measure.shape[0].to_string(),
                measure.shape[1].to_string(),
            ];
            row.extend(Metric::ALL.iter().map(|metric| {
                measure.metrics.get(metric).map_or(String::new(), |value| format!("{value:?}"))
            }));
            row.push(measure.unmeasured.clone().unwrap_or_default());
            row.extend(match &measure.worst {
                None => [const { String::new() }; 4],
                Some(worst) => [
                    worst.row.to_string(),
                    worst.column.to_string(),
                    worst.subject.clone(),
                    worst.judge.clone(),
                ],
            });
            table.write_record(&row)?;
        }
    }
    table.into_inner().map_err(|error| error.into_error().into())
}
