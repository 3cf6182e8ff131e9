//! `runner receipt`: what a run on a GPU showed, small enough to be kept for ever.
//!
//! A receipt is a run.json without the measures that only a CPU took part in, and
//! with nothing of the others but the count of differing bits. The digests of the
//! device's tensors stay in it, so that a machine without a GPU can be held to them.

use std::path::Path;

use super::{print, record_of};
use crate::metric::Metric;
use crate::op::{Arm, Stream};
use crate::text::Shown;

pub(super) fn receipt(run: &str, out: &Path, runs: &Path) -> Result<u8, String> {
    let (_, mut record) = record_of(run, runs)?;
    let id = record.id.clone();
    let mut compared = 0;
    for stage in &mut record.stages {
        stage.measures.retain(|measure| measure.subject == Stream::Arm(Arm::Device));
        for measure in &mut stage.measures {
            measure.metrics.retain(|metric, _| *metric == Metric::BitMismatches);
            measure.worst = None;
            measure.z_histogram = None;
        }
        stage.measures.retain(|measure| {
            !measure.metrics.is_empty() && matches!(measure.judge, Stream::Arm(Arm::Emulated))
        });
        for (arm, record) in &mut stage.arms {
            if *arm != Arm::Device {
                record.sites.clear();
            }
        }
        compared += stage.measures.len();
    }
    if compared == 0 {
        return Err(format!(
            "run `{id}` compared no device with the emulated arm, so there is nothing to keep; a \
             receipt is made where a GPU is"
        ));
    }
    let json = serde_json::to_string(&record)
        .map_err(|error| format!("the receipt cannot be encoded: {error}"))?;
    crate::cache::write_whole(out, (json + "\n").as_bytes()).map_err(|error| error.to_string())?;
    print(&format!("{compared} sites of run {id} in {}\n", out.shown()))
}
