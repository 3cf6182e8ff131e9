//! The site records as CSV: a row per stage, pair of streams and site, a column
//! per metric. A metric that would mean nothing is empty.

use super::rows::{AFTER, BEFORE, rows};
use crate::metric::Metric;
use crate::record::RunRecord;

/// Every measure of a run.
///
/// # Errors
/// None that memory allows.
pub fn csv(run: &RunRecord) -> Result<Vec<u8>, ::csv::Error> {
    let mut table = ::csv::Writer::from_writer(Vec::new());
    let mut head = BEFORE.to_vec();
    head.extend(Metric::ALL.iter().map(|metric| metric.name()));
    head.extend(AFTER);
    table.write_record(&head)?;
    for row in rows(run) {
        let measure = row.measure;
        let mut fields = vec![
            run.id.clone(),
            row.stage.id.0.clone(),
            row.stage.op.name().to_owned(),
            measure.subject.to_string(),
            measure.judge.to_string(),
            row.layer.map_or(String::new(), |layer| layer.to_string()),
            row.site.to_owned(),
            measure.shape[0].to_string(),
            measure.shape[1].to_string(),
        ];
        fields.extend(Metric::ALL.iter().map(|metric| {
            measure.metrics.get(metric).map_or(String::new(), |value| format!("{value:?}"))
        }));
        fields.push(measure.unmeasured.clone().unwrap_or_default());
        fields.extend(match &measure.worst {
            None => [const { String::new() }; 4],
            Some(worst) => [
                worst.row.to_string(),
                worst.column.to_string(),
                worst.subject.clone(),
                worst.judge.clone(),
            ],
        });
        table.write_record(&fields)?;
    }
    table.into_inner().map_err(|error| error.into_error().into())
}
