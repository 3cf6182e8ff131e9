//! What the door answers where the runner was built with CUDA.
//!
//! Questions about this machine are answered from what is remembered of it, where that
//! still holds; the device arm asks the driver before it computes. The GPUs are opened once, when the
//! first arm computes; arms take the one with the fewest users, so that several GPUs work
//! side by side. `kept` is the folder where compiled kernels and what this machine has are
//! kept.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once, OnceLock};

use cudarc::driver::{result, sys};

use super::arm::Device;
use super::emulated::EmulatedOnGpu;
use super::emulation::Emulation;
use super::gpu::Gpu;
use super::reference::ReferenceOnGpu;
use super::remembered::{self, Machine};
use super::{GpuFacts, Piece, Survey, nccl, program};
use crate::compute::emulated::arm::Emulated;
use crate::compute::emulated::chip::{Unit, chip};
use crate::compute::emulated::schedule::Schedule;
use crate::compute::{ComputeError, Pass, parallel};
use crate::dtype::Format;
use crate::op::{ChipName, Recipe};

/// Why no device arm can compute a recipe here.
pub fn why_unavailable(recipe: &Recipe, kept: Option<&Path>) -> Option<String> {
    missing(known(kept), recipe)
}

/// What a recipe lacks on a machine.
fn missing(survey: &Survey, recipe: &Recipe) -> Option<String> {
    if let Some(why) = nothing_to_compute_on(survey) {
        return Some(why);
    }
    let gpu = survey.gpus.first()?;
    let able = survey.gpus.iter().filter(|gpu| may_compute(gpu, recipe).is_ok()).count();
    if able == 0 {
        return may_compute(gpu, recipe).err();
    }
    let ranks = recipe.ranks();
    if able < ranks {
        let seen = match survey.gpus.len() {
            1 => "one GPU is seen".to_owned(),
            seen => format!("of {seen} GPUs that are seen {able} can compute it"),
        };
        return Some(format!(
            "`tensor_parallel = {ranks}` takes {ranks} GPUs of this machine, and {seen}"
        ));
    }
    if ranks > 1
        && let Err(why) = nccl::version()
    {
        return Some(format!(
            "`tensor_parallel = {ranks}` adds what GPUs made through NCCL: {why}"
        ));
    }
    None
}

/// Why no GPU of a machine can compute anything.
fn nothing_to_compute_on(survey: &Survey) -> Option<String> {
    if let Some((piece, why)) = survey.pieces.iter().find_map(|piece| {
        let why = piece.state.as_ref().err()?;
        Some((piece.name.as_str(), why))
    }) {
        let missing = if piece == "driver" { String::new() } else { format!("{piece}: ") };
        return Some(format!("no CUDA device: {missing}{why}"));
    }
    if survey.gpus.is_empty() {
        return Some("no CUDA device: the driver sees none".to_owned());
    }
    None
}

/// Why the reference's products cannot be computed on a GPU here.
pub fn why_no_reference(kept: Option<&Path>) -> Option<String> {
    no_reference_on(known(kept))
}

fn no_reference_on(survey: &Survey) -> Option<String> {
    nothing_to_compute_on(survey).or_else(|| {
        let gpu =
            survey.gpus.first().filter(|_| survey.gpus.iter().all(|gpu| gpu.chip.is_none()))?;
        let (name, (major, minor)) = (&gpu.name, gpu.capability);
        Some(format!("{name}: compute capability {major}.{minor} is not known yet"))
    })
}

/// The GPU with the fewest users, for products of an arm that is not the device's.
fn freest(kept: Option<&Path>) -> Result<&'static Arc<Gpu>, ComputeError> {
    // What was remembered of the machine may no longer hold: the driver has the last word.
    if let Some(why) = no_reference_on(survey()) {
        return Err(ComputeError::Recipe(why));
    }
    let gpus = gpus(kept).map_err(|problem| ComputeError::Recipe(problem.clone()))?;
    let gpu = gpus.iter().min_by_key(|gpu| gpu.leases.load(Ordering::Relaxed));
    gpu.ok_or_else(|| ComputeError::Recipe("no CUDA device".to_owned()))
}

/// The reference with its products on the GPU with the fewest users, and its arithmetic in words.
///
/// # Errors
/// If no GPU can be opened.
pub fn reference_ops(kept: Option<&Path>) -> Result<(Box<dyn Pass>, String), ComputeError> {
    let gpu = freest(kept)?;
    let arithmetic = format!(
        "f64 over the dequantised weights; products on {}, GPU {}, sampled outputs of each held to \
         the CPU's bits",
        gpu.facts.name, gpu.facts.ordinal
    );
    Ok((Box::new(ReferenceOnGpu::new(gpu.lease())), arithmetic))
}

/// The emulated arm with its products on the GPU with the fewest users, and its arithmetic in words:
/// the chip that is emulated need not be that GPU's.
///
/// # Errors
/// If no GPU can be opened.
pub fn emulated_ops(
    arm: Emulated,
    kept: Option<&Path>,
) -> Result<(Box<dyn Pass>, String), ComputeError> {
    let gpu = freest(kept)?;
    let arithmetic = format!(
        "{}; products on {}, GPU {}, sampled outputs of each held to the CPU's bits",
        arm.describe(),
        gpu.facts.name,
        gpu.facts.ordinal
    );
    let emulation = Emulation::open(gpu, kept)?;
    Ok((Box::new(EmulatedOnGpu::new(arm, emulation, gpu.lease())), arithmetic))
}

/// Whether a GPU has the recipe's arithmetic, and why not.
fn may_compute(gpu: &GpuFacts, recipe: &Recipe) -> Result<(), String> {
    let name = &gpu.name;
    let (major, minor) = gpu.capability;
    let here = gpu.chip.ok_or_else(|| {
        format!("{name}: the arithmetic of compute capability {major}.{minor} is not known yet")
    })?;
    if recipe.chip != ChipName::Auto && recipe.chip != here {
        return Err(format!(
            "{name} is `{here}`, the recipe asks for `{}`; write `chip = \"auto\"`",
            recipe.chip
        ));
    }
    if let Some(format) = recipe.blocks() {
        return Err(format!(
            "{name}: the device arm does not multiply {format} operands yet; the emulated arm does"
        ));
    }
    if chip(here).unit(recipe.gemm, recipe.gemm).is_none() {
        return Err(format!("{name} has no {} tensor core; choose another `gemm`", recipe.gemm));
    }
    if recipe.gemm == Format::E5m2 {
        return Err(format!(
            "{name}: cuBLASLt multiplies e5m2 by e4m3 only, never by e5m2; choose `gemm = \"e4m3\"`"
        ));
    }
    Ok(())
}

/// What multiplies two operands of a format on a GPU.
pub(super) fn unit_here(gpu: &GpuFacts, format: Format) -> Option<Unit> {
    chip(gpu.chip?).unit(format, format).copied()
}

/// The chip of this machine's first GPU.
pub fn chip_here(kept: Option<&Path>) -> Option<ChipName> {
    known(kept).gpus.iter().find_map(|gpu| gpu.chip)
}

/// The device arm of a recipe, and its arithmetic in words.
///
/// # Errors
/// If the recipe cannot be computed here, or no GPU can be opened.
pub fn ops(recipe: &Recipe, kept: Option<&Path>) -> Result<(Box<dyn Pass>, String), ComputeError> {
    static FORGET: Once = Once::new();
    if known(kept) != survey()
        && let Some(folder) = kept
    {
        FORGET.call_once(|| remembered::forget(folder));
    }
    may_begin(known(kept), survey(), recipe)?;
    let able = |gpu: &&Arc<Gpu>| may_compute(&gpu.facts, recipe).is_ok();
    let gpus = gpus(kept).map_err(|problem| ComputeError::Recipe(problem.clone()))?;
    let mut able: Vec<&Arc<Gpu>> = gpus.iter().filter(able).collect();
    able.sort_by_key(|gpu| gpu.leases.load(Ordering::Relaxed));
    able.truncate(recipe.ranks());
    // Whoever takes several takes them in one order.
    able.sort_by_key(|gpu| gpu.facts.ordinal);
    let (Some((gpu, others)), true) = (able.split_first(), able.len() == recipe.ranks()) else {
        return Err(ComputeError::Recipe("too few GPUs have the arithmetic".to_owned()));
    };
    let beside: String = others.iter().map(|gpu| format!(" and {}", gpu.facts.ordinal)).collect();
    let mut arithmetic = format!(
        "{} {}, {}{}; {}, GPU {}{beside}, cuBLASLt {}",
        gpu.facts.chip.unwrap_or(ChipName::Auto),
        recipe.gemm,
        Schedule::of(recipe),
        parallel::in_words(recipe),
        gpu.facts.name,
        gpu.facts.ordinal,
        library_version(gpu.library_version())
    );
    if !others.is_empty() {
        arithmetic += &format!(", NCCL {}", nccl::version().unwrap_or_default());
    }
    let others = others.iter().map(|gpu| gpu.lease()).collect();
    Ok((Box::new(Device::new(gpu.lease(), others, recipe)), arithmetic))
}

/// Whether an arm may compute on what the driver sees now, its key being made of what was
/// known of it: a result under other facts would be somebody else's.
fn may_begin(known: &Survey, seen: &Survey, recipe: &Recipe) -> Result<(), ComputeError> {
    if let Some(why) = missing(seen, recipe) {
        return Err(ComputeError::Unavailable(why));
    }
    if known == seen {
        return Ok(());
    }
    Err(ComputeError::Recipe(
        "the driver sees another machine than when it was last asked, though none of its files \
         has changed; run once more: it is asked anew then"
            .to_owned(),
    ))
}

/// The GPUs, opened at the first call.
pub(super) fn gpus(kept: Option<&Path>) -> Result<&'static [Arc<Gpu>], &'static String> {
    static GPUS: OnceLock<Result<Vec<Arc<Gpu>>, String>> = OnceLock::new();
    let opened = GPUS.get_or_init(|| {
        let known = survey().gpus.iter().filter(|gpu| gpu.chip.is_some());
        known.map(|gpu| Gpu::open(gpu.clone(), kept).map(Arc::new)).collect()
    });
    opened.as_deref()
}

/// What the device arm's results depend on.
pub fn facts(recipe: &Recipe, kept: Option<&Path>) -> Vec<(String, String)> {
    let survey = known(kept);
    let gpus = survey.gpus.iter().map(|gpu| gpu.name.as_str()).collect::<Vec<_>>();
    let which = survey.gpus.iter().map(|gpu| gpu.uuid.as_str()).collect::<Vec<_>>();
    // Equal cards answer equally until one of them is broken, and that is to be seen.
    let mut facts =
        vec![("gpu".to_owned(), gpus.join(", ")), ("which gpu".to_owned(), which.join(", "))];
    for piece in &survey.pieces {
        if let Ok(state) = &piece.state {
            let version = state.split(',').next().unwrap_or(state);
            facts.push((piece.name.clone(), version.to_owned()));
        }
    }
    if let (true, Ok(version)) = (recipe.ranks() > 1, nccl::version()) {
        facts.push(("NCCL".to_owned(), version));
    }
    facts
}

/// What this machine has: as remembered, where that still holds. A process has one answer,
/// so that all of its keys agree: that of the folder of the first who asks.
fn known(kept: Option<&Path>) -> &'static Survey {
    static KNOWN: OnceLock<Survey> = OnceLock::new();
    KNOWN.get_or_init(|| {
        let Some(folder) = kept else { return survey().clone() };
        let here = Machine::here();
        let look = || (survey().clone(), remembered::loaded_libraries());
        here.remembered(folder).unwrap_or_else(|| here.look_and_remember(folder, look))
    })
}

/// What this machine has: the driver is asked, once.
pub fn survey() -> &'static Survey {
    static SURVEY: OnceLock<Survey> = OnceLock::new();
    SURVEY.get_or_init(|| {
        let driver = driver();
        let gpus = if driver.is_ok() { see_gpus() } else { Ok(Vec::new()) };
        let driver = driver.and_then(|release| match &gpus {
            Ok(_) => Ok(release),
            Err(problem) => Err(problem.clone()),
        });
        let pieces = [("driver", driver), ("NVRTC", nvrtc()), ("cuBLASLt", cublaslt())];
        let piece = |(name, state): (&str, _)| Piece { name: name.to_owned(), state };
        Survey { pieces: pieces.into_iter().map(piece).collect(), gpus: gpus.unwrap_or_default() }
    })
}

fn driver() -> Result<String, String> {
    // cudarc panics on a missing library unless it is asked first.
    // SAFETY: it opens the driver library by its well-known name and calls nothing in it.
    if !unsafe { sys::is_culib_present() } {
        return Err("the driver library libcuda is not installed".to_owned());
    }
    // Starting it takes as long when it is told to show nothing.
    if std::env::var_os("CUDA_VISIBLE_DEVICES").is_some_and(|value| value.is_empty()) {
        return Err("CUDA_VISIBLE_DEVICES is empty, so no GPU is visible".to_owned());
    }
    result::init().map_err(|error| format!("the driver does not start ({error})"))?;
    let mut version = 0;
    // SAFETY: the driver is initialised, and the pointer is to a live integer.
    let status = unsafe { sys::cuDriverGetVersion(&mut version) };
    let cuda = match status {
        sys::CUresult::CUDA_SUCCESS => format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
        _ => "CUDA version unknown".to_owned(),
    };
    let release = std::fs::read_to_string("/sys/module/nvidia/version").or_else(|_| {
        std::fs::read_to_string("/proc/driver/nvidia/version").map(|text| {
            let mut words = text.split_whitespace();
            words.find(|word| word.contains('.')).unwrap_or("unknown").to_owned()
        })
    });
    let release = release.map_or("unknown".to_owned(), |text| text.trim().to_owned());
    Ok(format!("{release} ({cuda}), {}", file_of("libcuda.so")))
}

fn nvrtc() -> Result<String, String> {
    program::version()
        .map(|(major, minor)| format!("{major}.{minor}, {}", file_of("libnvrtc.so")))
        .ok_or_else(|| {
            "libnvrtc is not found; it comes with the CUDA toolkit and with the Python package \
             nvidia-cuda-nvrtc: put its folder on LD_LIBRARY_PATH"
                .to_owned()
        })
}

fn cublaslt() -> Result<String, String> {
    use cudarc::cublaslt::sys;
    // SAFETY: it opens the library by its well-known names and calls nothing in it.
    if !unsafe { sys::is_culib_present() } {
        return Err("libcublasLt is not found; it comes with the CUDA toolkit and with the \
                    Python package nvidia-cublas: put its folder on LD_LIBRARY_PATH"
            .to_owned());
    }
    // SAFETY: the library is present, and the call reads nothing.
    let version = unsafe { sys::cublasLtGetVersion() };
    Ok(format!("{}, {}", library_version(version), file_of("libcublasLt.so")))
}

/// cuBLASLt's own count in words: 130100 is 13.1.0.
pub(super) fn library_version(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// The file that a loaded library came from.
fn file_of(library: &str) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let found = path.into_iter().find(|path| path.contains(library));
    found.map_or_else(|| "loaded".to_owned(), str::to_owned)
}

fn see_gpus() -> Result<Vec<GpuFacts>, String> {
    let count = result::device::get_count()
        .map_err(|error| format!("the driver cannot count its devices ({error})"))?;
    (0..count).map(|ordinal| see_gpu(ordinal).map_err(|error| error.to_string())).collect()
}

fn see_gpu(ordinal: i32) -> Result<GpuFacts, cudarc::driver::DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal)?;
    // SAFETY: the device handle was just given by the driver.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device)? };
    let name = result::device::get_name(device)?;
    Ok(GpuFacts {
        ordinal: ordinal as usize,
        name,
        capability: (major, minor),
        chip: crate::chip::of_capability((major, minor)),
        memory,
        uuid: in_words(&result::device::get_uuid(device)?.bytes),
    })
}

/// A UUID as `nvidia-smi -L` prints it.
fn in_words(bytes: &[std::ffi::c_char; 16]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &digits[part]);
    format!("GPU-{}", parts.join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn survey(driver: Result<&str, &str>) -> Survey {
        let state = driver.map(str::to_owned).map_err(str::to_owned);
        let gpu = GpuFacts {
            ordinal: 0,
            name: "a GPU".to_owned(),
            capability: (9, 0),
            chip: Some(ChipName::Hopper),
            memory: 1,
            uuid: "GPU-1".to_owned(),
        };
        Survey { pieces: vec![Piece { name: "driver".to_owned(), state }], gpus: vec![gpu] }
    }

    #[test]
    fn what_several_gpus_lack_to_compute_together_is_said() {
        let tensor_parallel = std::num::NonZeroU32::new(2);
        let recipe = Recipe { tensor_parallel, ..Recipe::default() };
        let mut survey = survey(Ok("580.65"));
        let why = missing(&survey, &recipe).expect("a reason");
        assert!(why.contains("takes 2 GPUs of this machine, and one GPU is seen"), "{why}");
        let unknown = GpuFacts { chip: None, ordinal: 1, ..survey.gpus[0].clone() };
        survey.gpus.push(unknown);
        let why = missing(&survey, &recipe).expect("a reason");
        assert!(why.contains("of 2 GPUs that are seen 1 can compute it"), "{why}");
        survey.gpus[1].chip = survey.gpus[0].chip;
        match (missing(&survey, &recipe), nccl::version()) {
            (None, Ok(_)) => {}
            (Some(why), Err(lacks)) => assert!(why.ends_with(&lacks), "{why}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_is_computed_under_facts_that_hold_no_more() {
        let (known, recipe) = (survey(Ok("580.65")), Recipe::default());
        assert!(may_begin(&known, &known, &recipe).is_ok());
        let other = may_begin(&known, &survey(Ok("585.10")), &recipe);
        assert!(matches!(other, Err(ComputeError::Recipe(_))), "{other:?}");
        let gone = may_begin(&known, &survey(Err("it does not start")), &recipe);
        assert!(matches!(gone, Err(ComputeError::Unavailable(_))), "{gone:?}");
    }
}
