//! The door to the GPU: whether a device arm can run here, and if not, why.
//!
//! The device arm itself does not exist yet; nothing here computes.

/// Why no device arm can run on this machine, in words for a report.
pub fn why_unavailable() -> String {
    imp::why_unavailable()
}

#[cfg(feature = "cuda")]
mod imp {
    use cudarc::driver::{result, sys};

    pub fn why_unavailable() -> String {
        // cudarc panics on a missing library unless it is asked first.
        // SAFETY: it opens the driver library by its well-known name and calls nothing in it.
        if !unsafe { sys::is_culib_present() } {
            return "no CUDA device: the driver library libcuda is not installed".to_owned();
        }
        if let Err(error) = result::init() {
            return format!("no CUDA device: the driver does not start ({error})");
        }
        match result::device::get_count() {
            Ok(0) => "no CUDA device: the driver sees none".to_owned(),
            Ok(count) => {
                format!("{count} CUDA device(s) found, but this version has no device arm yet")
            }
            Err(error) => format!("no CUDA device: the driver cannot count them ({error})"),
        }
    }
}

#[cfg(not(feature = "cuda"))]
mod imp {
    pub fn why_unavailable() -> String {
        "built without the feature `cuda`".to_owned()
    }
}
