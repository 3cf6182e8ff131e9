//! GEMMs through cuBLASLt: descriptors, the algorithms on offer, one product.
//!
//! `y[N, M] = x[N, K] w[M, K]^T` in row-major is, column-major, `D = A^T B` with
//! `A = w`, `B = x`: the one form in which FP8 exists. The safe wrapper of cudarc
//! has no FP8 and forgets the algorithm, hence its `result` and `sys` layers. It
//! knows pointers and shapes, not weights or recipes.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};

use super::gpu::DeviceError;
use crate::compute::emulated::plan::Record;
use crate::dtype::Format;
use crate::op::Pin;

/// Bytes that an algorithm may use beside its operands; what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Algorithms that are asked for.
const MOST_ALGORITHMS: usize = 64;

pub use crate::compute::emulated::plan::STREAM_K;

/// One product's types and shapes; algorithms are looked up by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// Format of both operands.
    pub operands: Format,
    /// Format of the result; of int8 operands that, and then it is their sums in 32 bits.
    pub output: Format,
    /// Rows of x: N.
    pub tokens: usize,
    /// Rows of w: M.
    pub outputs: usize,
    /// K.
    pub inner: usize,
    /// Elements from one row of w to the next.
    pub stride: usize,
    /// The same of x.
    pub x_stride: usize,
    /// Whether the tensor core's accumulator carries all along K; FP8 only.
    pub fast: bool,
    /// Whether the library multiplies the result with a scale of each operand.
    pub scaled: bool,
}

/// Where one product finds its operands.
pub struct Operands<'a> {
    /// w, `[outputs, stride]`.
    pub w: &'a CudaSlice<u8>,
    /// x, `[tokens, x_stride]`.
    pub x: &'a CudaSlice<u8>,
    /// Bytes to skip at the start of w.
    pub skip: usize,
    /// The same of x.
    pub x_skip: usize,
    /// One scale each, where the product is scaled: of w and of x.
    pub scales: Option<(&'a CudaSlice<f32>, &'a CudaSlice<f32>)>,
}

/// One algorithm on offer, with the numbers that distinguish it.
#[derive(Clone, Copy)]
pub struct Algorithm {
    raw: sys::cublasLtMatmulAlgo_t,
    /// `CUBLASLT_ALGO_CONFIG_ID`.
    pub id: u32,
    /// `CUBLASLT_ALGO_CONFIG_TILE_ID`.
    pub tile: u32,
    /// `CUBLASLT_ALGO_CONFIG_STAGES_ID`.
    pub stages: u32,
    /// Parts that K is cut into; [`STREAM_K`] where work is dealt out otherwise.
    pub split_k: u32,
    /// `CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME`: how the parts are added.
    pub reduction: u32,
    /// `CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION`.
    pub custom: u32,
    /// `CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID`.
    pub inner_shape: u16,
    /// `CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID`.
    pub cluster_shape: u16,
    /// Bytes of workspace that it uses.
    pub workspace: usize,
}

impl Algorithm {
    /// The numbers without the library's own bytes.
    pub fn record(&self) -> Record {
        let Algorithm { id, tile, stages, split_k, reduction, custom, .. } = *self;
        let Algorithm { inner_shape, cluster_shape, workspace, .. } = *self;
        Record {
            id,
            tile,
            stages,
            split_k,
            reduction,
            custom,
            inner_shape,
            cluster_shape,
            workspace,
        }
    }
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.record().fmt(f)
    }
}

/// Whether an algorithm adds along K in the order that `schedule.rs` describes.
///
/// Measured on an H200 with cuBLASLt 13.0 (`runner chip measure`): every algorithm
/// does for FP8, bf16 and f16. Of tf32 and f32, number 11 sums in an order of its own.
fn order_is_known(operands: Format, algorithm: u32) -> bool {
    const OWN_ORDER: u32 = 11;
    !matches!(operands, Format::Tf32 | Format::F32) || algorithm != OWN_ORDER
}

/// The library's handle for one GPU, and its workspace.
pub struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    /// cuBLASLt's version, as it counts: 130000 is 13.0.
    pub version: usize,
}

// SAFETY: cuBLASLt's handle may be used from any thread (its manual, section 2.1.2), and
// every use here is behind the lock of one GPU's state.
unsafe impl Send for Library {}

impl Library {
    /// Opens the library for the GPU of `stream`.
    ///
    /// # Errors
    /// If it refuses, or if there is no memory for the workspace.
    pub fn open(stream: &Arc<CudaStream>) -> Result<Library, DeviceError> {
        let handle = result::create_handle().map_err(refused("cannot start"))?;
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE)?;
        // SAFETY: the library is loaded, and the call reads nothing.
        let version = unsafe { sys::cublasLtGetVersion() };
        Ok(Library { handle, workspace, version })
    }

    /// The algorithms that the library offers for a product, its favourite first.
    /// `split` says whether K may be cut.
    ///
    /// # Errors
    /// If the library cannot compute such a product.
    pub fn algorithms(
        &self,
        stream: &Arc<CudaStream>,
        spec: &Spec,
        operands: &Operands<'_>,
        split: bool,
    ) -> Result<Vec<Algorithm>, DeviceError> {
        let call = Call::new(stream, spec, operands)?;
        let preference = Preference::new(split)?;
        // SAFETY: an all-zero result is a valid value of this plain C struct.
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> =
            (0..MOST_ALGORITHMS).map(|_| unsafe { std::mem::zeroed() }).collect();
        let mut count = 0;
        // SAFETY: every descriptor lives until the end of this function, and `found` has room
        // for as many results as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                call.description.0,
                call.w.0,
                call.x.0,
                call.y.0,
                call.y.0,
                preference.0,
                MOST_ALGORITHMS as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        if status == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        status.result().map_err(refused("cannot list its algorithms"))?;
        found.truncate(count.max(0) as usize);
        found.retain(|one| one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(found.iter().map(|one| describe(one.algo, one.workspaceSize)).collect())
    }

    /// The algorithm for a product: the library's favourite among those whose order
    /// of additions is known, that cut K into as many parts as the pin says (one, if
    /// it says nothing), and that have all else that it says.
    ///
    /// # Errors
    /// If there is none; says what is on offer.
    pub fn choose(
        &self,
        stream: &Arc<CudaStream>,
        spec: &Spec,
        operands: &Operands<'_>,
        pin: &Pin,
    ) -> Result<Algorithm, DeviceError> {
        let parts = pin.parts();
        let fits = |wanted: Option<u32>, has: u32| wanted.is_none_or(|wanted| wanted == has);
        let acceptable = |one: &Algorithm| {
            one.split_k == parts
                && (pin.algorithm.is_some() || order_is_known(spec.operands, one.id))
                && fits(pin.algorithm, one.id)
                && fits(pin.tile, one.tile)
                && fits(pin.stages, one.stages)
        };
        let offered = self.algorithms(stream, spec, operands, parts > 1)?;
        if let Some(found) = offered.iter().find(|one| acceptable(one)) {
            return Ok(*found);
        }
        // The favourites may all cut K otherwise; most of them can do without.
        let call = Call::new(stream, spec, operands)?;
        let flexible = self.algorithms(stream, spec, operands, true)?;
        let recut = flexible.iter().filter_map(|one| self.split(&call, one, parts).ok());
        recut.into_iter().find(acceptable).ok_or_else(|| {
            let offered: Vec<String> = offered.iter().map(Algorithm::to_string).collect();
            DeviceError::Refused(match offered.as_slice() {
                [] => format!(
                    "cuBLASLt cannot multiply {} operands to {} for [{}, {}] x [{}, {}]^T on this \
                     GPU; choose another `gemm` or `output`",
                    spec.operands, spec.output, spec.tokens, spec.inner, spec.outputs, spec.inner
                ),
                offered => format!(
                    "cuBLASLt offers no algorithm as the recipe's `pin` wants it; it offers: {}",
                    offered.join("; ")
                ),
            })
        })
    }

    /// An algorithm made to cut K into `parts`, if it can.
    fn split(&self, call: &Call, one: &Algorithm, parts: u32) -> Result<Algorithm, DeviceError> {
        use sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;
        let mut raw = one.raw;
        let scheme = match parts {
            1 => sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE,
            _ => sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
        } as u32;
        for (attribute, value) in [
            (Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM, parts),
            (Attribute::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, scheme),
        ] {
            // SAFETY: both attributes are 32 bits wide, and the pointers are to live values.
            unsafe {
                sys::cublasLtMatmulAlgoConfigSetAttribute(
                    &mut raw,
                    attribute,
                    (&raw const value).cast(),
                    size_of::<u32>(),
                )
            }
            .result()
            .map_err(refused("cannot configure an algorithm"))?;
        }
        // SAFETY: an all-zero result is a valid value of this plain C struct.
        let mut checked: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptors live as long as `call`; `raw` and `checked` are live.
        unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                call.description.0,
                call.w.0,
                call.x.0,
                call.y.0,
                call.y.0,
                &raw,
                &mut checked,
            )
        }
        .result()
        .map_err(refused("does not split this product"))?;
        if checked.workspaceSize > WORKSPACE {
            return Err(DeviceError::Refused("the split needs more workspace".to_owned()));
        }
        Ok(describe(raw, checked.workspaceSize))
    }

    /// Computes one product into `y`, `[tokens, outputs]` of the spec's output format.
    ///
    /// # Errors
    /// If the library refuses it.
    pub fn multiply(
        &mut self,
        stream: &Arc<CudaStream>,
        spec: &Spec,
        operands: &Operands<'_>,
        algorithm: &Algorithm,
        y: &mut CudaSlice<u8>,
    ) -> Result<(), DeviceError> {
        let needed = spec.tokens * spec.outputs * spec.output_bytes();
        assert!(y.len() >= needed, "the result holds {} bytes of {needed}", y.len());
        let call = Call::new(stream, spec, operands)?;
        // Of the type that the descriptor says, four bytes either way.
        let one = if spec.operands == Format::Int8 { 1 } else { 1.0f32.to_bits() };
        let (alpha, beta) = (one, 0u32);
        let (w, _w_read) = operands.w.device_ptr(stream);
        let (x, _x_read) = operands.x.device_ptr(stream);
        let (y, _y_written) = y.device_ptr_mut(stream);
        let (workspace, _workspace_used) = self.workspace.device_ptr_mut(stream);
        let (skip, x_skip) = (operands.skip as u64, operands.x_skip as u64);
        // SAFETY: the descriptors live until the end of this function; `Call::new` checked
        // that the operands hold what they describe, the assertion above that the result does;
        // the workspace is as large as the algorithms were told.
        unsafe {
            result::matmul(
                self.handle,
                call.description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                (w + skip) as *const c_void,
                call.w.0,
                (x + x_skip) as *const c_void,
                call.x.0,
                y as *const c_void,
                call.y.0,
                y as *mut c_void,
                call.y.0,
                &algorithm.raw,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cu_stream() as sys::cudaStream_t,
            )
        }
        .map_err(refused("fails at a product"))
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `open` and is destroyed once.
        if let Err(error) = unsafe { result::destroy_handle(self.handle) } {
            tracing::warn!("cuBLASLt does not close: {error}");
        }
    }
}

fn refused(what: &'static str) -> impl Fn(result::CublasError) -> DeviceError {
    move |error| DeviceError::Library(format!("cuBLASLt {what}: {error}"))
}

fn describe(raw: sys::cublasLtMatmulAlgo_t, workspace: usize) -> Algorithm {
    use sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;
    let read = |attribute, bytes: usize| {
        let mut value = 0u32;
        let mut written = 0usize;
        // SAFETY: the value has room for the attribute's `bytes`, at most four.
        let status = unsafe {
            sys::cublasLtMatmulAlgoConfigGetAttribute(
                &raw,
                attribute,
                (&raw mut value).cast(),
                bytes,
                &mut written,
            )
        };
        if status.result().is_ok() { value } else { 0 }
    };
    Algorithm {
        raw,
        id: read(Attribute::CUBLASLT_ALGO_CONFIG_ID, 4),
        tile: read(Attribute::CUBLASLT_ALGO_CONFIG_TILE_ID, 4),
        stages: read(Attribute::CUBLASLT_ALGO_CONFIG_STAGES_ID, 4),
        split_k: read(Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 4).max(1),
        reduction: read(Attribute::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, 4),
        custom: read(Attribute::CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, 4),
        inner_shape: read(Attribute::CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, 2) as u16,
        cluster_shape: read(Attribute::CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, 2) as u16,
        workspace,
    }
}

/// The descriptors of one product.
struct Call {
    description: Description,
    w: Layout,
    x: Layout,
    y: Layout,
}

impl Call {
    fn new(
        stream: &Arc<CudaStream>,
        spec: &Spec,
        operands: &Operands<'_>,
    ) -> Result<Call, DeviceError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let bytes = spec.operands.bytes();
        for (operand, skip, rows, stride) in [
            (operands.w, operands.skip, spec.outputs, spec.stride),
            (operands.x, operands.x_skip, spec.tokens, spec.x_stride),
        ] {
            let needed = skip + ((rows - 1) * stride + spec.inner) * bytes;
            assert!(
                operand.len() >= needed,
                "an operand holds {} bytes of {needed}",
                operand.len()
            );
        }
        let compute = match spec.operands {
            Format::Int8 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32I,
            Format::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let description = Description::new(compute, scale_type(spec.operands))?;
        let (transposed, plain) = (1i32, 0i32);
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &plain)?;
        if spec.operands.is_fp8() {
            description.set(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &i8::from(spec.fast))?;
        }
        if let (true, Some((w, x))) = (spec.scaled, operands.scales) {
            let (w, _w_read) = w.device_ptr(stream);
            let (x, _x_read) = x.device_ptr(stream);
            description.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &w)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x)?;
        }
        let operand = data_type(spec.operands);
        Ok(Call {
            description,
            w: Layout::new(operand, spec.inner, spec.outputs, spec.stride)?,
            x: Layout::new(operand, spec.inner, spec.tokens, spec.x_stride)?,
            y: Layout::new(spec.output_type(), spec.outputs, spec.tokens, spec.outputs)?,
        })
    }
}

impl Spec {
    /// Bytes of one value of the result.
    pub fn output_bytes(&self) -> usize {
        if self.output == Format::Int8 { 4 } else { self.output.bytes() }
    }

    fn output_type(&self) -> sys::cudaDataType {
        match self.output {
            Format::Int8 => sys::cudaDataType::CUDA_R_32I,
            output => data_type(output),
        }
    }
}

/// The type of alpha and beta.
fn scale_type(operands: Format) -> sys::cudaDataType {
    match operands {
        Format::Int8 => sys::cudaDataType::CUDA_R_32I,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

fn data_type(format: Format) -> sys::cudaDataType {
    match format {
        Format::F32 | Format::Tf32 => sys::cudaDataType::CUDA_R_32F,
        Format::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Format::F16 => sys::cudaDataType::CUDA_R_16F,
        Format::E4m3 => sys::cudaDataType::CUDA_R_8F_E4M3,
        Format::E5m2 => sys::cudaDataType::CUDA_R_8F_E5M2,
        // The library has no type of the fnuz kind, and no chip that it runs on multiplies one.
        Format::Int8 | Format::E4m3fnuz | Format::E5m2fnuz => sys::cudaDataType::CUDA_R_8I,
        Format::E2m3 => sys::cudaDataType::CUDA_R_6F_E2M3,
        Format::E3m2 => sys::cudaDataType::CUDA_R_6F_E3M2,
        Format::E2m1 => sys::cudaDataType::CUDA_R_4F_E2M1,
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(
        compute: sys::cublasComputeType_t,
        scale: sys::cudaDataType,
    ) -> Result<Description, DeviceError> {
        result::create_matmul_desc(compute, scale)
            .map(Description)
            .map_err(refused("cannot describe a product"))
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<(), DeviceError> {
        let place: *const T = value;
        // SAFETY: the descriptor is alive, and the value is read before the call returns; each
        // caller passes the type that the attribute has in cuBLASLt's manual.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, place.cast(), size_of::<T>())
        }
        .map_err(refused("cannot describe a product"))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it was made by `new` and is destroyed once. An error leaks it, no more.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// Column-major: `rows` values of a column lie together, columns are `stride` apart.
    fn new(
        kind: sys::cudaDataType,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<Layout, DeviceError> {
        result::create_matrix_layout(kind, rows as u64, columns as u64, stride as i64)
            .map(Layout)
            .map_err(refused("cannot describe a matrix"))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was made by `new` and is destroyed once. An error leaks it, no more.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(split: bool) -> Result<Preference, DeviceError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref()
            .map(Preference)
            .map_err(refused("cannot take a preference"))?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
        let scheme = if split {
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_MASK
        } else {
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE
        } as u32;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme)?;
        Ok(preference)
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), DeviceError> {
        let place: *const T = value;
        // SAFETY: as in `Description::set`.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, place.cast(), size_of::<T>())
        }
        .map_err(refused("cannot take a preference"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was made by `new` and is destroyed once. An error leaks it, no more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
