//! `runner doctor`: what this machine has, and what each missing piece switches off.

use super::run::cpu_name;
use super::{PASS, print};
use crate::compute::cuda::{GpuFacts, survey, why_unavailable};
use crate::compute::emulated::simd::Kernel;
use crate::op::Recipe;

/// Prints the survey. A missing GPU is no failure: the CPU's arms need none.
pub(super) fn examine() -> Result<u8, String> {
    let survey = survey();
    let mut lines = Vec::new();
    lines.push(format!("CPU       {}", cpu_name().unwrap_or("unknown".to_owned())));
    lines.push(format!(
        "          {} threads; emulated GEMMs on {}",
        rayon::current_num_threads(),
        Kernel::best().name()
    ));
    for piece in &survey.pieces {
        let (mark, text) = match &piece.state {
            Ok(text) => ("", text.as_str()),
            Err(text) => ("missing: ", text.as_str()),
        };
        lines.push(format!("{:9} {mark}{text}", piece.name));
    }
    if survey.gpus.is_empty() {
        lines.push("GPU       none".to_owned());
    }
    lines.extend(survey.gpus.iter().map(gpu));
    lines.push(String::new());
    lines.push("reference ready".to_owned());
    lines.push("emulated  ready: every chip of `runner chip list`".to_owned());
    lines.push(match why_unavailable(&Recipe::default(), None) {
        None => "device    ready".to_owned(),
        Some(why) => format!("device    off, so its falsifiers are unmeasured: {why}"),
    });
    print(&(lines.join("\n") + "\n"))?;
    Ok(PASS)
}

fn gpu(gpu: &GpuFacts) -> String {
    let (major, minor) = gpu.capability;
    let gib = gpu.memory as f64 / f64::from(1 << 30);
    let chip = gpu.chip.map_or("its arithmetic is not known: no device arm".to_owned(), |chip| {
        format!("arithmetic of `{chip}`")
    });
    format!(
        "GPU {}     {}, {gib:.0} GiB, compute capability {major}.{minor}; {chip}",
        gpu.ordinal, gpu.name
    )
}
