//! The kernels' source, and its way through NVRTC.
//!
//! The sources are one program, compiled with fixed options: no contraction, no
//! fast math, subnormals kept. It needs no GPU, so that every chip's code can be
//! compiled anywhere. Compiled programs are kept in a folder, by the hash of
//! source, options and compiler version.

use std::path::Path;

use cudarc::nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts, sys};

use crate::dtype::Format;

/// The source of every kernel.
pub const SOURCE: &str = concat!(
    include_str!("kernels/common.cu"),
    include_str!("kernels/dequantise.cu"),
    include_str!("kernels/convert.cu"),
    include_str!("kernels/gemm.cu"),
    include_str!("kernels/transformer.cu"),
    include_str!("kernels/reference.cu"),
);

/// The names of the kernels.
pub const KERNELS: [&str; 13] = [
    "dequantise",
    "absmax_all",
    "absmax_groups",
    "scales",
    "convert",
    "finish",
    "add_block",
    "rms_norm",
    "rope",
    "attention",
    "swiglu",
    "add",
    "reference_product",
];

/// The options for a chip of that compute capability, and the numbers of the formats.
fn options(capability: (i32, i32)) -> Vec<String> {
    let architecture = format!("--gpu-architecture=sm_{}{}", capability.0, capability.1);
    let fixed = ["--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"];
    let number = |format: Format| {
        format!("--define-macro=FORMAT_{}={}", format.name().to_uppercase(), format.number())
    };
    let all = fixed.into_iter().map(str::to_owned).chain([architecture]);
    all.chain(Format::ALL.map(number)).collect()
}

/// NVRTC's version, if the library is there.
pub fn version() -> Option<(i32, i32)> {
    // SAFETY: it opens the library by its well-known names and calls nothing in it.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is present, and both pointers are to live integers.
    let status = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    (status == sys::nvrtcResult::NVRTC_SUCCESS).then_some((major, minor))
}

/// The kernels compiled for a chip, as PTX text; from `folder` if they are there.
///
/// # Errors
/// In words, if NVRTC is missing or refuses the source.
pub fn compile(capability: (i32, i32), folder: Option<&Path>) -> Result<String, String> {
    compile_kept(SOURCE, &KERNELS, capability, folder)
}

/// Another source with the same options, which begins with the kernels' common part; `kernels` are
/// the names of those that it has.
///
/// # Errors
/// As [`compile`].
pub fn compile_kept(
    source: &str,
    kernels: &[&str],
    capability: (i32, i32),
    folder: Option<&Path>,
) -> Result<String, String> {
    let version = version().ok_or("NVRTC is not installed (libnvrtc)")?;
    let options = options(capability);
    let mut hasher = blake3::Hasher::new();
    for part in [source, &options.join(" "), &format!("{version:?}")] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let kept = folder.map(|folder| folder.join(format!("{}.ptx", hasher.finalize().to_hex())));
    if let Some(text) = kept.as_ref().and_then(|path| std::fs::read_to_string(path).ok())
        && kernels.iter().all(|kernel| text.contains(kernel))
    {
        return Ok(text);
    }
    let text = compile_now(source, options)?;
    if let Some(path) = kept
        && let Err(error) = crate::cache::write_whole(&path, text.as_bytes())
    {
        tracing::warn!("compiled kernels are not kept: {error}");
    }
    Ok(text)
}

/// Another source compiled for a chip with nvcc's usual options, as PTX text.
///
/// # Errors
/// In words, if NVRTC is missing or refuses the source.
pub fn compile_usual(source: &str, (major, minor): (i32, i32)) -> Result<String, String> {
    version().ok_or("NVRTC is not installed (libnvrtc)")?;
    compile_now(source, vec![format!("--gpu-architecture=sm_{major}{minor}")])
}

fn compile_now(source: &str, options: Vec<String>) -> Result<String, String> {
    let options = CompileOptions { options, ..CompileOptions::default() };
    let compiled = compile_ptx_with_opts(source, options);
    let compiled = compiled.map_err(|error| match error {
        CompileError::CompileError { log, options, .. } => format!(
            "NVRTC refuses the kernels with {}: {}",
            options.join(" "),
            log.to_string_lossy().trim()
        ),
        other => format!("NVRTC fails: {other}"),
    })?;
    text_of(&compiled)
}

fn text_of(compiled: &Ptx) -> Result<String, String> {
    let bytes = compiled.as_bytes().unwrap_or_default();
    let text = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    String::from_utf8(text.to_vec()).map_err(|_| "NVRTC returned no text".to_owned())
}
