//! The site records as an Arrow IPC file (Feather, version 2): the columns of the
//! CSV, with their types. What is not there is null, which NaN is not.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt32Array, UInt64Array};
use arrow_ipc::writer::FileWriter;
use arrow_schema::ArrowError;

use super::rows::{AFTER, BEFORE, Row, rows};
use crate::compare::Element;
use crate::metric::Metric;
use crate::record::RunRecord;

/// Every measure of a run.
///
/// # Errors
/// None that memory allows.
pub fn arrow(run: &RunRecord) -> Result<Vec<u8>, ArrowError> {
    let rows: Vec<Row<'_>> = rows(run).collect();
    let before: [ArrayRef; 9] = [
        texts(&rows, &|_| Some(run.id.clone())),
        texts(&rows, &|row| Some(row.stage.id.0.clone())),
        texts(&rows, &|row| Some(row.stage.op.name().to_owned())),
        texts(&rows, &|row| Some(row.measure.subject.to_string())),
        texts(&rows, &|row| Some(row.measure.judge.to_string())),
        Arc::new(rows.iter().map(|row| row.layer).collect::<UInt32Array>()),
        texts(&rows, &|row| Some(row.site.to_owned())),
        counts(&rows, &|row| Some(row.measure.shape[0])),
        counts(&rows, &|row| Some(row.measure.shape[1])),
    ];
    let metrics = Metric::ALL.iter().map(|metric| {
        let values = rows.iter().map(|row| row.measure.metrics.get(metric).copied());
        (metric.name(), Arc::new(values.collect::<Float64Array>()) as ArrayRef)
    });
    let after: [ArrayRef; 5] = [
        texts(&rows, &|row| row.measure.unmeasured.clone()),
        counts(&rows, &|row| worst(row).map(|worst| worst.row)),
        counts(&rows, &|row| worst(row).map(|worst| worst.column)),
        texts(&rows, &|row| worst(row).map(|worst| worst.subject.clone())),
        texts(&rows, &|row| worst(row).map(|worst| worst.judge.clone())),
    ];
    let columns = BEFORE.into_iter().zip(before).chain(metrics).chain(AFTER.into_iter().zip(after));
    // Every column may be null, so that a run without a row has the same types.
    let batch = RecordBatch::try_from_iter_with_nullable(columns.map(|(name, c)| (name, c, true)))?;
    let mut file = FileWriter::try_new(Vec::new(), &batch.schema())?;
    file.write(&batch)?;
    file.into_inner()
}

fn worst<'a>(row: &Row<'a>) -> Option<&'a Element> {
    row.measure.worst.as_ref()
}

fn texts(rows: &[Row<'_>], read: &dyn Fn(&Row<'_>) -> Option<String>) -> ArrayRef {
    Arc::new(rows.iter().map(read).collect::<StringArray>())
}

fn counts(rows: &[Row<'_>], read: &dyn Fn(&Row<'_>) -> Option<usize>) -> ArrayRef {
    Arc::new(rows.iter().map(|row| read(row).map(|count| count as u64)).collect::<UInt64Array>())
}
