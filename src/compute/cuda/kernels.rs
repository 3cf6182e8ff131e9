//! Typed launchers of the kernels: the only place where kernels are started.
//!
//! Each checks that its buffers are as long as the kernel will reach, and starts
//! it on the GPU's stream. It knows shapes, not ops or weights.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, CudaView, CudaViewMut, DriverError,
    LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use crate::dtype::Format;
use crate::model::{Activation, DeltaNet, RouterScores, WeightType};

/// Threads of a block, where a kernel does not prescribe them.
const THREADS: u32 = 256;
/// Blocks of a kernel that strides over its elements.
const MOST_BLOCKS: u64 = 4096;
/// Threads of RMSNorm's block: its reduction has that many lanes.
const NORM_THREADS: u32 = crate::compute::emulated::kernels::NORM_LANES as u32;
/// Threads of attention's block: four warps.
const ATTENTION_THREADS: u32 = 128;
/// Rows of x and of w that a block of the reference's product multiplies, and its threads.
const REFERENCE_TILE: (u64, u64) = (16, 32);
const REFERENCE_THREADS: u32 = 128;

/// Which values share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// All of them.
    Tensor,
    /// Those of a row.
    Row,
    /// Those of a block of this many rows by 128.
    Block(u64),
}

impl Granularity {
    /// As the kernels know it.
    fn code(self) -> i32 {
        match self {
            Granularity::Tensor => 0,
            Granularity::Row => 1,
            Granularity::Block(_) => 2,
        }
    }

    fn group_rows(self) -> u64 {
        match self {
            Granularity::Block(rows) => rows,
            _ => 1,
        }
    }
}

/// A library's product that is to be finished.
pub struct Product<'a> {
    /// Its bytes, rows of `stride` values.
    pub values: &'a CudaSlice<u8>,
    /// Their format; of int8 operands that, and then the values are sums in 32 bits.
    pub format: Format,
    /// Values from one row to the next.
    pub stride: u64,
    /// Rows.
    pub tokens: u64,
    /// Values of a row that count.
    pub outputs: u64,
}

/// An operand's scales.
#[derive(Clone, Copy)]
pub struct Scales<'a> {
    /// The values.
    pub values: &'a CudaSlice<f32>,
    /// Who shares one.
    pub granularity: Granularity,
}

/// The shape of one attention call.
#[derive(Clone, Copy)]
pub struct AttentionCall {
    /// Query rows.
    pub rows: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of a head of queries and keys.
    pub head_dim: u64,
    /// Width of a head of values.
    pub value_dim: u64,
    /// Position of the first query row.
    pub first_position: u64,
    /// Rows of keys and values.
    pub positions: u64,
    /// Positions that a query sees, its own among them.
    pub window: u64,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Towards what scores are bent; 0 for not at all.
    pub cap: f32,
}

/// The shape of one product of the reference, and its place in the result.
#[derive(Clone, Copy)]
pub struct ReferenceShape {
    /// Rows of x.
    pub rows: u64,
    /// Rows of w.
    pub outputs: u64,
    /// Values of a row of both.
    pub width: u64,
    /// The column of the result that the first row of w gives.
    pub first: u64,
    /// Columns of the result.
    pub stride: u64,
}

/// The kernels of one GPU.
pub struct Kernels {
    dequantise: CudaFunction,
    absmax_all: CudaFunction,
    absmax_groups: CudaFunction,
    scales: CudaFunction,
    convert: CudaFunction,
    finish: CudaFunction,
    add_block: CudaFunction,
    rms_norm: CudaFunction,
    layer_norm: CudaFunction,
    rope: CudaFunction,
    attention: CudaFunction,
    swiglu: CudaFunction,
    geglu: CudaFunction,
    clamped_swiglu: CudaFunction,
    route: CudaFunction,
    sigmoid: CudaFunction,
    mix: CudaFunction,
    sigmoid_gate: CudaFunction,
    convolve: CudaFunction,
    delta: CudaFunction,
    scale: CudaFunction,
    soft_cap: CudaFunction,
    cached: CudaFunction,
    add: CudaFunction,
    reference_product: CudaFunction,
}

/// Starts a kernel: `launch!(stream, function, config, argument, ...)`.
macro_rules! launch {
    ($stream:expr, $function:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        let mut builder = $stream.launch_builder(&$function);
        $(builder.arg($argument);)+
        // SAFETY: the arguments are those of the kernel, in its order and of its types (see
        // `kernels/*.cu`), and the caller has checked that the buffers are long enough.
        unsafe { builder.launch($config) }.map(|_| ())
    }};
}

fn striding(elements: u64) -> LaunchConfig {
    let blocks = elements.div_ceil(u64::from(THREADS)).clamp(1, MOST_BLOCKS);
    LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// A bug of ours, not of the user's: a buffer that a kernel would run out of.
fn must_hold(what: &str, length: usize, needed: u64) {
    assert!(length as u64 >= needed, "{what} holds {length} values, the kernel needs {needed}");
}

impl Kernels {
    /// Loads the compiled program into a GPU.
    pub fn load(context: &Arc<CudaContext>, program: String) -> Result<Kernels, DriverError> {
        let module = context.load_module(Ptx::from_src(program))?;
        let load = |name| module.load_function(name);
        Ok(Kernels {
            dequantise: load("dequantise")?,
            absmax_all: load("absmax_all")?,
            absmax_groups: load("absmax_groups")?,
            scales: load("scales")?,
            convert: load("convert")?,
            finish: load("finish")?,
            add_block: load("add_block")?,
            rms_norm: load("rms_norm")?,
            layer_norm: load("layer_norm")?,
            rope: load("rope")?,
            attention: load("attention")?,
            swiglu: load("swiglu")?,
            geglu: load("geglu")?,
            clamped_swiglu: load("clamped_swiglu")?,
            route: load("route")?,
            sigmoid: load("sigmoid")?,
            mix: load("mix")?,
            sigmoid_gate: load("sigmoid_gate")?,
            convolve: load("convolve")?,
            delta: load("delta")?,
            scale: load("scale")?,
            soft_cap: load("soft_cap")?,
            cached: load("cached")?,
            add: load("add")?,
            reference_product: load("reference_product")?,
        })
    }

    /// Rows of a table of blocks as f32: the rows that `tokens` names, or the first `rows`.
    #[expect(clippy::too_many_arguments, reason = "the kernel's own parameters")]
    pub fn dequantise(
        &self,
        stream: &Arc<CudaStream>,
        kind: WeightType,
        table: &CudaView<'_, u8>,
        tokens: Option<&CudaSlice<u32>>,
        rows: u64,
        width: u64,
        out: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        must_hold("the decoded rows", out.len(), rows * width);
        if let Some(tokens) = tokens {
            must_hold("the tokens", tokens.len(), rows);
        } else {
            must_hold("the table", table.len(), rows * kind.row_bytes(width as usize) as u64);
        }
        let (code, block_width) = (kind.ggml() as i32, kind.block_width() as i32);
        let block_bytes = kind.block_bytes() as i32;
        let config = striding(rows * width);
        match tokens {
            Some(tokens) => launch!(
                stream,
                self.dequantise,
                config,
                &code,
                &block_width,
                &block_bytes,
                table,
                tokens,
                &rows,
                &width,
                out
            ),
            None => launch!(
                stream,
                self.dequantise,
                config,
                &code,
                &block_width,
                &block_bytes,
                table,
                &0u64,
                &rows,
                &width,
                out
            ),
        }
    }

    /// The absmax, as bits, of all values; joins what `most` held before.
    pub fn absmax_all(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        count: u64,
        most: &mut CudaSlice<u32>,
    ) -> Result<(), DriverError> {
        must_hold("the values", x.len(), count);
        must_hold("the absmax", most.len(), 1);
        launch!(stream, self.absmax_all, striding(count), x, &count, most)
    }

    /// The absmax, as bits, of each group of `group` (rows, width) values; `most` starts at 0.
    pub fn absmax_groups(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        (rows, width): (u64, u64),
        (group_rows, group_width): (u64, u64),
        most: &mut CudaSlice<u32>,
    ) -> Result<(), DriverError> {
        let groups = rows.div_ceil(group_rows) * width.div_ceil(group_width);
        must_hold("the values", x.len(), rows * width);
        must_hold("the absmaxes", most.len(), groups);
        let config = LaunchConfig {
            grid_dim: (groups as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        launch!(
            stream,
            self.absmax_groups,
            config,
            x,
            &rows,
            &width,
            &group_rows,
            &group_width,
            most
        )
    }

    /// Scales from absmaxes.
    pub fn scales(
        &self,
        stream: &Arc<CudaStream>,
        most: &CudaSlice<u32>,
        format: Format,
        scale: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let (count, max_finite) = (scale.len() as u64, format.max_finite());
        must_hold("the absmaxes", most.len(), count);
        launch!(stream, self.scales, striding(count), most, &count, &max_finite, scale)
    }

    /// Codes of `rows` rows of `x`, each padded with zeros to `padded`.
    pub fn convert(
        &self,
        stream: &Arc<CudaStream>,
        format: Format,
        x: &CudaSlice<f32>,
        (rows, width, padded): (u64, u64, u64),
        scales: Scales<'_>,
        codes: &mut CudaViewMut<'_, u8>,
    ) -> Result<(), DriverError> {
        must_hold("the values", x.len(), rows * width);
        must_hold("the codes", codes.len(), rows * padded * format.bytes() as u64);
        let needed = match scales.granularity {
            Granularity::Tensor => 1,
            Granularity::Row => rows,
            Granularity::Block(group) => rows.div_ceil(group) * width.div_ceil(128),
        };
        must_hold("the scales", scales.values.len(), needed);
        let (format, granularity) = (format.number(), scales.granularity.code());
        let group_rows = scales.granularity.group_rows();
        launch!(
            stream,
            self.convert,
            striding(rows * padded),
            &format,
            x,
            &rows,
            &width,
            &padded,
            &granularity,
            &group_rows,
            scales.values,
            codes
        )
    }

    /// Scales that the library did not apply, the output's rounding, the bias.
    pub fn finish(
        &self,
        stream: &Arc<CudaStream>,
        product: &Product<'_>,
        unscaled: Option<(Scales<'_>, Scales<'_>)>,
        output: Format,
        bias: Option<&CudaSlice<f32>>,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let Product { values, format, stride, tokens, outputs } = product;
        let bytes = if *format == Format::Int8 { 4 } else { format.bytes() as u64 };
        must_hold("the product", values.len(), tokens * stride * bytes);
        must_hold("the result", y.len(), tokens * outputs);
        if let Some((x, w)) = unscaled {
            let needed = |scales: Scales<'_>, rows| match scales.granularity {
                Granularity::Row => rows,
                _ => 1,
            };
            must_hold("the scales of x", x.values.len(), needed(x, *tokens));
            must_hold("the scales of w", w.values.len(), needed(w, *outputs));
        }
        if let Some(bias) = bias {
            must_hold("the bias", bias.len(), *outputs);
        }
        let (format, output) = (format.number(), output.number());
        let scaled = i32::from(unscaled.is_none());
        let config = striding(tokens * outputs);
        let mut builder = stream.launch_builder(&self.finish);
        builder.arg(*values).arg(&format).arg(stride).arg(tokens).arg(outputs).arg(&scaled);
        let codes = unscaled.map(|(x, w)| (x.granularity.code(), w.granularity.code()));
        match (&unscaled, &codes) {
            (Some((x, w)), Some((x_code, w_code))) => {
                builder.arg(x.values).arg(x_code).arg(w.values).arg(w_code);
            }
            _ => {
                builder.arg(&0u64).arg(&0i32).arg(&0u64).arg(&0i32);
            }
        }
        builder.arg(&output);
        match bias {
            Some(bias) => builder.arg(bias),
            None => builder.arg(&0u64),
        };
        builder.arg(y);
        // SAFETY: the arguments are those of `finish` in `kernels/gemm.cu`, in its order and of
        // its types; the buffers were checked above, and a null pointer is never followed.
        unsafe { builder.launch(config) }.map(|_| ())
    }

    /// Adds the scaled partial product of one block of K.
    pub fn add_block(
        &self,
        stream: &Arc<CudaStream>,
        partial: &Product<'_>,
        (block, blocks): (u64, u64),
        x: Scales<'_>,
        w: Scales<'_>,
        main: &mut CudaSlice<u8>,
    ) -> Result<(), DriverError> {
        let Product { values, stride, tokens, outputs, .. } = partial;
        must_hold("the partial product", values.len(), tokens * stride * 4);
        must_hold("the sum", main.len(), tokens * outputs * 4);
        must_hold("the scales of x", x.values.len(), tokens * blocks);
        must_hold("the scales of w", w.values.len(), outputs.div_ceil(128) * blocks);
        let (x_code, w_code) = (x.granularity.code(), w.granularity.code());
        launch!(
            stream,
            self.add_block,
            striding(tokens * outputs),
            *values,
            stride,
            tokens,
            outputs,
            &block,
            &blocks,
            x.values,
            &x_code,
            w.values,
            &w_code,
            main
        )
    }

    /// RMSNorm of each group of `gain.len()` values.
    pub fn rms_norm(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        gain: &CudaSlice<f32>,
        eps: f32,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let width = gain.len() as u64;
        let groups = (x.len() as u64).checked_div(width).unwrap_or(0);
        must_hold("the result", y.len(), groups * width);
        let config = LaunchConfig {
            grid_dim: (groups as u32, 1, 1),
            block_dim: (NORM_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        launch!(stream, self.rms_norm, config, x, gain, &width, &eps, y)
    }

    /// LayerNorm of each group of `width` values; the groups take the rows of gain and bias in turns.
    pub fn layer_norm(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        (gain, bias, width): (&CudaSlice<f32>, &CudaSlice<f32>, usize),
        eps: f32,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let width = width as u64;
        let groups = (x.len() as u64).checked_div(width).unwrap_or(0);
        let rows = (gain.len() as u64).checked_div(width).unwrap_or(0).max(1);
        must_hold("the gain", gain.len(), rows * width);
        must_hold("the bias", bias.len(), rows * width);
        must_hold("the result", y.len(), groups * width);
        let config = LaunchConfig {
            grid_dim: (groups as u32, 1, 1),
            block_dim: (NORM_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        launch!(stream, self.layer_norm, config, x, gain, bias, &width, &rows, &eps, y)
    }

    /// Rotates each pair of each head of each row; tables are `[rows, pairs]`, and the shape
    /// is rows, heads, the width of a head, pairs, and the first value of a head that turns.
    pub fn rope(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        (sines, cosines): (&CudaSlice<f32>, &CudaSlice<f32>),
        (rows, heads, head_dim, pairs, start): (u64, u64, u64, u64, u64),
        interleaved: bool,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let count = rows * heads * head_dim;
        assert!(start + 2 * pairs <= head_dim, "no more turns than a head has");
        must_hold("the values", x.len(), count);
        must_hold("the result", y.len(), count);
        must_hold("the sines", sines.len(), rows * pairs);
        must_hold("the cosines", cosines.len(), rows * pairs);
        let interleaved = i32::from(interleaved);
        launch!(
            stream,
            self.rope,
            striding(count),
            x,
            sines,
            cosines,
            &rows,
            &heads,
            &head_dim,
            &pairs,
            &start,
            &interleaved,
            y
        )
    }

    /// Causal attention with grouped queries.
    #[expect(clippy::too_many_arguments, reason = "the kernel's own parameters")]
    pub fn attention(
        &self,
        stream: &Arc<CudaStream>,
        q: &CudaSlice<f32>,
        k: &CudaSlice<f32>,
        v: &CudaSlice<f32>,
        call: AttentionCall,
        sinks: Option<&CudaSlice<f32>>,
        scores: &mut CudaSlice<f32>,
        out: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let AttentionCall { rows, heads, kv_heads, head_dim, first_position, positions, .. } = call;
        let AttentionCall { window, scale, cap, value_dim, .. } = call;
        must_hold("the queries", q.len(), rows * heads * head_dim);
        must_hold("the keys", k.len(), positions * kv_heads * head_dim);
        must_hold("the values", v.len(), positions * kv_heads * value_dim);
        must_hold("the scores", scores.len(), rows * heads * positions);
        must_hold("the result", out.len(), rows * heads * value_dim);
        if let Some(sinks) = sinks {
            must_hold("the sinks", sinks.len(), heads);
        }
        assert!(first_position + rows <= positions, "a query sees no position beyond the keys");
        let config = LaunchConfig {
            grid_dim: (heads as u32, rows as u32, 1),
            block_dim: (ATTENTION_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let [kv_heads, head_dim, value_dim] = [kv_heads, head_dim, value_dim].map(|n| n as i32);
        let mut builder = stream.launch_builder(&self.attention);
        builder.arg(q).arg(k).arg(v).arg(&kv_heads).arg(&head_dim).arg(&value_dim);
        builder.arg(&first_position).arg(&positions).arg(&window).arg(&scale).arg(&cap);
        match sinks {
            Some(sinks) => builder.arg(sinks),
            None => builder.arg(&0u64),
        };
        builder.arg(scores).arg(out);
        // SAFETY: the arguments are those of `attention` in `kernels/transformer.cu`, in its order
        // and of its types; the buffers were checked above, and a null pointer is never followed.
        unsafe { builder.launch(config) }.map(|_| ())
    }

    /// The weights of the experts that each row takes, `[rows, experts]`; `y` is zero before.
    #[expect(clippy::too_many_arguments, reason = "the kernel's own parameters")]
    pub fn route(
        &self,
        stream: &Arc<CudaStream>,
        scores: &CudaSlice<f32>,
        taken: &CudaSlice<i32>,
        (rows, experts, used): (u64, u64, u64),
        kind: RouterScores,
        factor: f32,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        must_hold("the scores", scores.len(), rows * experts);
        must_hold("the experts", taken.len(), rows * used);
        must_hold("the result", y.len(), rows * experts);
        let kind = match kind {
            RouterScores::Softmax => 0i32,
            RouterScores::SoftmaxOfTaken => 1,
            RouterScores::Sigmoid => 2,
            RouterScores::SigmoidNormalised => 3,
        };
        let config = striding(rows);
        launch!(
            stream, self.route, config, scores, taken, &rows, &experts, &used, &kind, &factor, y
        )
    }

    /// `1 / (1 + e^-x)`.
    pub fn sigmoid(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let count = y.len() as u64;
        must_hold("the input", x.len(), count);
        launch!(stream, self.sigmoid, striding(count), x, &count, y)
    }

    /// Each row's sum of its experts' outputs, times their weights, `[rows, used]`.
    pub fn mix(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        weights: &CudaSlice<f32>,
        (rows, used, width): (u64, u64, u64),
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        must_hold("the outputs", x.len(), rows * used * width);
        must_hold("the weights", weights.len(), rows * used);
        must_hold("the result", y.len(), rows * width);
        let config = striding(rows * width);
        launch!(stream, self.mix, config, x, weights, &rows, &used, &width, y)
    }

    /// SiLU of each channel's convolution over its last `taps` positions; the shape is rows,
    /// channels, taps, and the position of the first row.
    pub fn convolve(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        taps: &CudaSlice<f32>,
        (rows, channels, count, first): (u64, u64, u64, u64),
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        must_hold("the positions", x.len(), (first + rows) * channels);
        must_hold("the taps", taps.len(), channels * count);
        must_hold("the result", y.len(), rows * channels);
        let config = striding(rows * channels);
        launch!(stream, self.convolve, config, x, taps, &rows, &channels, &count, &first, y)
    }

    /// The gated delta rule over all positions; results from `first` on. `memory` is zero before.
    #[expect(clippy::too_many_arguments, reason = "the kernel's own parameters")]
    pub fn delta(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        gates: &CudaSlice<f32>,
        net: &DeltaNet,
        (positions, first): (u64, u64),
        memory: &mut CudaSlice<f32>,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let [key_heads, value_heads, key_dim, value_dim] =
            [net.key_heads, net.value_heads, net.key_dim, net.value_dim].map(|n| n as u64);
        must_hold("queries, keys and values", x.len(), positions * net.channels() as u64);
        must_hold("the gates", gates.len(), positions * 2 * value_heads);
        must_hold("the states", memory.len(), value_heads * key_dim * value_dim);
        let rows = positions.saturating_sub(first);
        must_hold("the result", y.len(), rows * value_heads * value_dim);
        let config = LaunchConfig {
            grid_dim: (value_heads as u32, 1, 1),
            block_dim: (ATTENTION_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        launch!(
            stream, self.delta, config, x, gates, &key_heads, &key_dim, &value_dim, &positions,
            &first, memory, y
        )
    }

    /// `x / (1 + e^-gate)`, a gate for each row or for each value: `gates` of a row.
    pub fn sigmoid_gate(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        gate: &CudaSlice<f32>,
        (rows, width, gates): (u64, u64, u64),
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        must_hold("the input", x.len(), rows * width);
        must_hold("the gates", gate.len(), rows * gates);
        must_hold("the result", y.len(), rows * width);
        let config = striding(rows * width);
        launch!(stream, self.sigmoid_gate, config, x, gate, &rows, &width, &gates, y)
    }

    /// `activation(gate) * up`.
    pub fn gated(
        &self,
        stream: &Arc<CudaStream>,
        activation: Activation,
        gate: &CudaSlice<f32>,
        up: &CudaSlice<f32>,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let count = y.len() as u64;
        must_hold("the gate", gate.len(), count);
        must_hold("the other factor", up.len(), count);
        let kernel = match activation {
            Activation::Silu => &self.swiglu,
            Activation::GeluTanh => &self.geglu,
            Activation::ClampedSwiglu => &self.clamped_swiglu,
        };
        launch!(stream, *kernel, striding(count), gate, up, &count, y)
    }

    /// `x * factor`.
    pub fn scale(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        factor: f32,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let count = y.len() as u64;
        must_hold("what is scaled", x.len(), count);
        launch!(stream, self.scale, striding(count), x, &factor, &count, y)
    }

    /// `cap * tanh(x / cap)`.
    pub fn soft_cap(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        cap: f32,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let count = y.len() as u64;
        must_hold("what is bent", x.len(), count);
        launch!(stream, self.soft_cap, striding(count), x, &cap, &count, y)
    }

    /// What a cache of keys or values in that format, with that scale, gives back of `x`.
    pub fn cached(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        (format, scale): (Format, f32),
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let (count, format) = (y.len() as u64, format.number());
        must_hold("what is kept", x.len(), count);
        launch!(stream, self.cached, striding(count), x, &format, &scale, &count, y)
    }

    /// The reference's product, in f64, lane by lane.
    pub fn reference_product(
        &self,
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        w: &CudaSlice<f32>,
        bias: Option<&CudaSlice<f32>>,
        shape: ReferenceShape,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let ReferenceShape { rows, outputs, width, first, stride } = shape;
        must_hold("x", x.len(), rows * width);
        must_hold("w", w.len(), outputs * width);
        must_hold("a row of the result", stride as usize, first + outputs);
        must_hold("the result", y.len(), rows * stride);
        if let Some(bias) = bias {
            must_hold("the bias", bias.len(), first + outputs);
        }
        let (tall, wide) = REFERENCE_TILE;
        // More rows than a grid is high go one after the other.
        let most = 32_768 * tall;
        for above in (0..rows).step_by(most as usize) {
            let here = most.min(rows - above);
            let config = LaunchConfig {
                grid_dim: (outputs.div_ceil(wide) as u32, here.div_ceil(tall) as u32, 1),
                block_dim: (REFERENCE_THREADS, 1, 1),
                shared_mem_bytes: 0,
            };
            let x = x.slice((above * width) as usize..);
            let mut y = y.slice_mut((above * stride) as usize..);
            let mut builder = stream.launch_builder(&self.reference_product);
            builder.arg(&x).arg(w);
            match bias {
                Some(bias) => builder.arg(bias),
                None => builder.arg(&0u64),
            };
            builder.arg(&here).arg(&outputs).arg(&width).arg(&first).arg(&stride).arg(&mut y);
            // SAFETY: the arguments are those of `reference_product` in `kernels/reference.cu`, in
            // its order and of its types; the buffers were checked above, and a null pointer is
            // never followed.
            unsafe { builder.launch(config) }?;
        }
        Ok(())
    }

    /// `a + b`.
    pub fn add(
        &self,
        stream: &Arc<CudaStream>,
        a: &CudaSlice<f32>,
        b: &CudaSlice<f32>,
        y: &mut CudaSlice<f32>,
    ) -> Result<(), DriverError> {
        let count = y.len() as u64;
        must_hold("one addend", a.len(), count);
        must_hold("the other addend", b.len(), count);
        launch!(stream, self.add, striding(count), a, b, &count, y)
    }
}
