//! NCCL: sums of what several GPUs of this machine computed.
//!
//! The driver and Python's packages ship the library under the name of its interface's version,
//! which cudarc does not look for; the functions that are called here have not changed since NCCL
//! 2.0, and are looked up by their names. It knows buffers and GPUs, not what is added.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, result, sys};
use libloading::Library;

use super::gpu::DeviceError;
use crate::dtype::Format;

/// Names of the library's file.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// `ncclSuccess`.
const SUCCESS: c_int = 0;
/// `ncclSum`.
const SUM: c_int = 0;

type Communicator = *mut c_void;

/// The library's functions.
struct Nccl {
    version: unsafe extern "C" fn(*mut c_int) -> c_int,
    init_all: unsafe extern "C" fn(*mut Communicator, c_int, *const c_int) -> c_int,
    destroy: unsafe extern "C" fn(Communicator) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Communicator,
        *mut c_void,
    ) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: Library,
}

impl Nccl {
    /// The library, opened at the first call.
    fn get() -> Result<&'static Nccl, &'static String> {
        static OPENED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        OPENED.get_or_init(Nccl::open).as_ref()
    }

    fn open() -> Result<Nccl, String> {
        let [usual, plain] = NAMES.map(|name| {
            // SAFETY: it opens the library by its well-known name; what that runs is its own start.
            unsafe { Library::new(name) }
        });
        let library = usual.or_else(|error| plain.map_err(|_| error)).map_err(|error| {
            format!(
                "libnccl cannot be opened ({error}); it comes with NVIDIA's package libnccl2 and \
                 with the Python package nvidia-nccl: put its folder on LD_LIBRARY_PATH"
            )
        })?;
        let lacks = |error: libloading::Error| format!("libnccl is not one of version 2: {error}");
        // SAFETY: the types are those of these functions in nccl.h of every version 2: an enum is
        // an int, a communicator and a stream are pointers.
        unsafe {
            Ok(Nccl {
                version: *library.get(b"ncclGetVersion\0").map_err(lacks)?,
                init_all: *library.get(b"ncclCommInitAll\0").map_err(lacks)?,
                destroy: *library.get(b"ncclCommDestroy\0").map_err(lacks)?,
                all_reduce: *library.get(b"ncclAllReduce\0").map_err(lacks)?,
                group_start: *library.get(b"ncclGroupStart\0").map_err(lacks)?,
                group_end: *library.get(b"ncclGroupEnd\0").map_err(lacks)?,
                error: *library.get(b"ncclGetErrorString\0").map_err(lacks)?,
                _library: library,
            })
        }
    }

    fn check(&self, what: &str, status: c_int) -> Result<(), DeviceError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: the library has a text for every number, which lives as long as itself.
        let text = unsafe { CStr::from_ptr((self.error)(status)) };
        Err(DeviceError::Library(format!("NCCL {what}: {}", text.to_string_lossy())))
    }
}

/// The library's version, or why it cannot be used.
pub fn version() -> Result<String, String> {
    let nccl = Nccl::get().map_err(String::clone)?;
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    let status = unsafe { (nccl.version)(&mut version) };
    nccl.check("does not say its version", status).map_err(|error| error.to_string())?;
    // Since 2.9 a version has two digits for its second number.
    Ok(match version {
        0..10_000 => {
            format!("{}.{}.{}", version / 1000, version / 100 % 10, version % 100)
        }
        _ => format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100),
    })
}

/// One GPU of a sum.
struct Rank {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

/// A pair of GPUs that add: the communicator of the first GPU, and of the other.
struct Pair {
    communicators: [Communicator; 2],
}

/// Sums over some GPUs, the first one's result and then each other's in their order. Each step is
/// an all-reduce of two GPUs, whose sum is the same in either order.
pub struct Sums {
    nccl: &'static Nccl,
    ranks: Vec<Rank>,
    /// The first GPU with each of the others.
    pairs: Vec<Pair>,
}

// SAFETY: a communicator may be used from any thread, by one at a time (NCCL's manual, "Using
// multiple NCCL communicators concurrently"); every use here is behind one lock.
unsafe impl Send for Sums {}

/// Sums are made one at a time: two of them could wait for each other's GPUs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

impl Sums {
    /// Sums over the GPUs of these contexts.
    ///
    /// # Errors
    /// If the library is missing or cannot connect them.
    pub fn new(contexts: &[Arc<CudaContext>]) -> Result<Sums, DeviceError> {
        let nccl = Nccl::get().map_err(|why| DeviceError::Library(why.clone()))?;
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let rank = |context: &Arc<CudaContext>| {
            Ok(Rank { context: Arc::clone(context), stream: context.new_stream()? })
        };
        let ranks = contexts.iter().map(rank).collect::<Result<Vec<_>, DeviceError>>()?;
        let mut sums = Sums { nccl, ranks, pairs: Vec::new() };
        let first = sums.ranks.first().map_or(0, |rank| rank.context.ordinal());
        for other in contexts.iter().skip(1) {
            let devices = [first as c_int, other.ordinal() as c_int];
            let mut communicators: [Communicator; 2] = [null_mut(); 2];
            // SAFETY: both arrays have two elements and live until the call returns.
            let status =
                unsafe { (nccl.init_all)(communicators.as_mut_ptr(), 2, devices.as_ptr()) };
            nccl.check("cannot connect two GPUs", status)?;
            sums.pairs.push(Pair { communicators });
        }
        Ok(sums)
    }

    /// The sum of each GPU's values, `parts` in the GPUs' order as bytes of that format.
    ///
    /// # Errors
    /// If the parts are not one of each GPU, or the driver or the library refuses.
    pub fn add(&mut self, parts: &[Vec<u8>], format: Format) -> Result<Vec<u8>, DeviceError> {
        let kind: c_int = match format {
            Format::F16 => 6,
            Format::F32 => 7,
            Format::Bf16 => 9,
            other => {
                return Err(DeviceError::Refused(format!("results of {other} are not added")));
            }
        };
        let bytes = parts.first().map_or(0, Vec::len);
        if parts.len() != self.ranks.len() || parts.iter().any(|part| part.len() != bytes) {
            return Err(DeviceError::Refused("a sum of other shapes than its GPUs'".to_owned()));
        }
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let buffers = self.ranks.iter().zip(parts).map(|(rank, part)| Buffer::of(rank, part));
        let buffers = buffers.collect::<Result<Vec<_>, DeviceError>>()?;
        for (other, pair) in self.pairs.iter().enumerate() {
            // SAFETY: a group has no operands.
            self.nccl.check("begins no group", unsafe { (self.nccl.group_start)() })?;
            let mut called = Ok(());
            for (rank, communicator) in [0, other + 1].into_iter().zip(pair.communicators) {
                let place = buffers[rank].place as *mut c_void;
                let stream = self.ranks[rank].stream.cu_stream().cast::<c_void>();
                let count = bytes / format.bytes();
                // SAFETY: the buffer holds `count` values of this type until the streams are waited
                // for below, on the GPU of this communicator, whose stream it is; a sum may take
                // the place of its addend.
                let status = unsafe {
                    (self.nccl.all_reduce)(place, place, count, kind, SUM, communicator, stream)
                };
                called = called.and(self.nccl.check("adds nothing", status));
            }
            // SAFETY: as above; a group that was begun is ended whatever stood in it.
            let ended = self.nccl.check("ends no group", unsafe { (self.nccl.group_end)() });
            called.and(ended)?;
        }
        let mut sum = vec![0u8; bytes];
        if let (Some(rank), Some(buffer)) = (self.ranks.first(), buffers.first()) {
            rank.context.bind_to_thread()?;
            // SAFETY: both hold so many bytes, and `sum` is waited for below.
            unsafe {
                result::memcpy_dtoh_async(&mut sum, buffer.place, rank.stream.cu_stream())?;
            }
        }
        for rank in &self.ranks {
            rank.stream.synchronize()?;
        }
        Ok(sum)
    }
}

impl Drop for Sums {
    fn drop(&mut self) {
        for communicator in self.pairs.iter().flat_map(|pair| pair.communicators) {
            // SAFETY: it was made by `new` and is destroyed once; no work is left on it.
            let status = unsafe { (self.nccl.destroy)(communicator) };
            if let Err(error) = self.nccl.check("does not close", status) {
                tracing::warn!("{error}");
            }
        }
    }
}

/// Memory of one GPU that another one can read: what a pool gives is its own GPU's alone.
struct Buffer<'r> {
    rank: &'r Rank,
    place: sys::CUdeviceptr,
}

impl Buffer<'_> {
    /// These bytes on a GPU, once its stream gets there.
    fn of<'r>(rank: &'r Rank, bytes: &[u8]) -> Result<Buffer<'r>, DeviceError> {
        rank.context.bind_to_thread()?;
        // SAFETY: the context is current; memory of no byte is not asked for.
        let place = unsafe { result::malloc_sync(bytes.len().max(1))? };
        let buffer = Buffer { rank, place };
        // SAFETY: the memory holds as many bytes; what is not page-locked is read before the call
        // returns.
        unsafe { result::memcpy_htod_async(place, bytes, rank.stream.cu_stream())? };
        Ok(buffer)
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // Where an error ended the work early something may still read it.
        let waited =
            self.rank.stream.synchronize().and_then(|()| self.rank.context.bind_to_thread());
        // SAFETY: it was made by `of`, and is freed once, when its stream has nothing left to do.
        let freed = waited.and_then(|()| unsafe { result::free_sync(self.place) });
        if let Err(error) = freed {
            tracing::warn!("memory of a GPU is not given back: {error}");
        }
    }
}
