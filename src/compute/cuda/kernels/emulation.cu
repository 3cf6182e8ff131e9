// The emulated arm's product on any GPU: a chip's tensor core in ordinary floats, to the bits of
// `compute/emulated/gemm.rs` and `compute/emulated/tensor_core.rs`.
//
// A block of products takes two passes. The first finds M, the largest exponent of all addends.
// In the second one fused multiply-add, rounded toward zero, multiplies, aligns and cuts: the
// magnitude |x w| is added to an anchor whose last place is 2^(M - F), so that what falls below is
// dropped, and the anchor is taken off again. The anchor has the product's sign. What is left are
// multiples of 2^(M - F), whose sum is exact in an f32 where F is at most 16, and in an f64 always.
//
// NaN and infinities among the operands are not handled here: the host computes the outputs of
// their rows.

// A zero takes no part in M.
#define NO_EXPONENT (-8192)
// Elements of K that are held at a time.
#define STAGE 32
#define TILE_ROWS 64
#define EMULATION_THREADS 128
// A thread has some outputs of this many rows of x; so many threads share a row.
#define OWN_ROWS 4
#define ACROSS 8

// What a product is to be computed by, as the host passes it.
struct Emulated {
    u64 rows, outputs, width;
    // Elements between promotions, and of a part of K.
    u64 stretch, part;
    // Of the tensor core: F, R, and the least exponent to which addends are aligned.
    int alignment_bits, result_bits, exponent_floor;
    // The least exponents of both formats.
    int x_least, w_least;
    // Whether scales multiply each partial sum: then those of x are [rows, ceil(width / 128)], and
    // those of w [outputs, ceil(width / 128)].
    int by_block;
};

enum Epilogue { SCALES_FIRST = 0, ACTIVATION_THEN_WEIGHT = 1, WEIGHT_THEN_ACTIVATION = 2 };

// The values of codes.
extern "C" __global__ void decode_operand(const void* codes, int format, u64 count, float* values) {
    for (u64 index = first_index(); index < count; index += all_threads()) values[index] = load_code(format, codes, index);
}

// A subnormal has its format's least exponent, without a hidden one.
__device__ __forceinline__ int exponent_of(float value, int least) {
    u32 magnitude = __float_as_uint(value) & 0x7fffffffu;
    if (magnitude == 0) return NO_EXPONENT;
    int exponent = (int)(magnitude >> 23) - 127;
    return exponent > least ? exponent : least;
}

// In each half the larger of c and a + b, signed.
__device__ __forceinline__ u32 largest_sums(u32 a, u32 b, u32 c) {
    return __viaddmax_s16x2(a, b, c);
}

// The arithmetic of a thread's sums in f32 or f64.
template <typename Real> struct Arithmetic;

template <> struct Arithmetic<float> {
    static __device__ __forceinline__ u32 sign(float value) { return __float_as_uint(value) & 0x80000000u; }
    // The upper word of 2^exponent, whose last place is 2^(exponent - 23).
    static __device__ __forceinline__ u32 anchor(int last_place) { return (u32)(last_place + 23 + 127) << 23; }
    static __device__ __forceinline__ float real(u32 upper) { return __uint_as_float(upper); }
    static __device__ __forceinline__ float cut_product(float a, float b, float anchor) {
        return __fsub_rn(__fmaf_rz(a, b, anchor), anchor);
    }
    static __device__ __forceinline__ float cut(float c, float anchor) { return __fsub_rn(__fadd_rz(c, anchor), anchor); }
    static __device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
    // Cut toward zero to R fraction bits. No sum of FP8 products is subnormal.
    static __device__ __forceinline__ float result(float sum, int result_bits) {
        return __uint_as_float(__float_as_uint(sum) & 0xffffffffu << (23 - result_bits));
    }
};

template <> struct Arithmetic<double> {
    static __device__ __forceinline__ u32 sign(double value) { return (u32)__double2hiint(value) & 0x80000000u; }
    static __device__ __forceinline__ u32 anchor(int last_place) { return (u32)(last_place + 52 + 1023) << 20; }
    static __device__ __forceinline__ double real(u32 upper) { return __hiloint2double((int)upper, 0); }
    static __device__ __forceinline__ double cut_product(double a, double b, double anchor) {
        return __dsub_rn(__fma_rz(a, b, anchor), anchor);
    }
    static __device__ __forceinline__ double cut(double c, double anchor) {
        return __dsub_rn(__dadd_rz(c, anchor), anchor);
    }
    static __device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
    static __device__ __forceinline__ float result(double sum, int result_bits) {
        u64 bits = (u64)__double_as_longlong(sum);
        u64 magnitude = bits & 0x7fffffffffffffffull;
        if (magnitude == 0) return 0.0f;
        u32 sign = (u32)(bits >> 63) << 31;
        int exponent = (int)(magnitude >> 52) - 1023;
        if (exponent > 127) return __uint_as_float(sign | 0x7f800000u);
        // Below f32's normal range the fraction loses a bit per exponent.
        int f32_bits = exponent < -126 ? 23 - (-126 - exponent) : 23;
        int kept = result_bits < f32_bits ? result_bits : f32_bits;
        if (kept < 0) return __uint_as_float(sign);
        u64 cut = magnitude & ~0ull << (52 - kept);
        return __uint_as_float(sign | __float_as_uint(__double2float_rn(__longlong_as_double((long long)cut))));
    }
};

// One operand's rows for a stage: values, and exponents in pairs along K.
template <typename Real, int ROWS> struct Held {
    Real values[STAGE][ROWS];
    u32 exponents[STAGE / 2][ROWS];
};

template <typename Real, int ROWS>
__device__ __forceinline__ void hold(
    Held<Real, ROWS>* held, const float* values, int least, u64 first_row, u64 rows, u64 width, u64 start, u64 end) {
    // A thread has one row, and every second pair of K.
    u32 row = threadIdx.x % ROWS;
    bool there = first_row + row < rows;
    values += there ? (first_row + row) * width : 0;
#pragma unroll 4
    for (u32 pair = threadIdx.x / ROWS; pair < STAGE / 2; pair += EMULATION_THREADS / ROWS) {
        u64 k = start + 2 * pair;
        float low = there && k < end ? values[k] : 0.0f;
        float high = there && k + 1 < end ? values[k + 1] : 0.0f;
        held->values[2 * pair][row] = (Real)low;
        held->values[2 * pair + 1][row] = (Real)high;
        held->exponents[pair][row] =
            ((u32)exponent_of(low, least) & 0xffffu) | (u32)exponent_of(high, least) << 16;
    }
}

// `COUNT` neighbours, loaded as wide words.
template <typename Word, int COUNT>
__device__ __forceinline__ void load_some(const Word* from, Word (&to)[COUNT]) {
    struct alignas(16) Wide { Word words[16 / sizeof(Word)]; };
#pragma unroll
    for (int at = 0; at < COUNT; at += 16 / sizeof(Word)) {
        Wide wide = *(const Wide*)(from + at);
#pragma unroll
        for (int i = 0; i < (int)(16 / sizeof(Word)); i++) to[at + i] = wide.words[i];
    }
}

template <typename Real, int PRODUCTS, int OWN_OUTPUTS>
__device__ __forceinline__ void emulate(
    const Emulated& e, const float* x, const float* w, const float* x_scales, const float* w_scales, float* y) {
    typedef Arithmetic<Real> Do;
    const int TILE_OUTPUTS = ACROSS * OWN_OUTPUTS;
    __shared__ Held<Real, TILE_ROWS> held_x;
    __shared__ Held<Real, TILE_OUTPUTS> held_w;
    u64 first_row = (u64)blockIdx.y * TILE_ROWS, first_output = (u64)blockIdx.x * TILE_OUTPUTS;
    u32 own_row = threadIdx.x / ACROSS * OWN_ROWS;
    u32 own_output = threadIdx.x % ACROSS * OWN_OUTPUTS;
    // The tensor core's accumulator, and the promoted sum of the part of K at hand; the total of the
    // parts stands in y.
    float chained[OWN_ROWS][OWN_OUTPUTS], main[OWN_ROWS][OWN_OUTPUTS];
    bool main_started = false, total_started = false;
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
        for (int j = 0; j < OWN_OUTPUTS; j++) chained[i][j] = main[i][j] = 0.0f;

    for (u64 part = 0; part < e.width; part += e.part) {
        u64 part_end = part + e.part < e.width ? part + e.part : e.width;
        for (u64 step = part; step < part_end; step += e.stretch) {
            u64 step_end = step + e.stretch < part_end ? step + e.stretch : part_end;
            for (u64 start = step; start < step_end; start += STAGE) {
                __syncthreads();
                hold(&held_x, x, e.x_least, first_row, e.rows, e.width, start, step_end);
                hold(&held_w, w, e.w_least, first_output, e.outputs, e.width, start, step_end);
                __syncthreads();
#pragma unroll 1
                for (u32 block = 0; block < STAGE && start + block < step_end; block += PRODUCTS) {
                    u32 largest[OWN_ROWS][OWN_OUTPUTS];
#pragma unroll
                    for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
                        for (int j = 0; j < OWN_OUTPUTS; j++) largest[i][j] = 0xc000c000u;
#pragma unroll 4
                    for (u32 pair = block / 2; pair < (block + PRODUCTS) / 2; pair++) {
                        u32 a[OWN_ROWS], b[OWN_OUTPUTS];
                        load_some(&held_x.exponents[pair][own_row], a);
                        load_some(&held_w.exponents[pair][own_output], b);
#pragma unroll
                        for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
                            for (int j = 0; j < OWN_OUTPUTS; j++)
                                largest[i][j] = largest_sums(a[i], b[j], largest[i][j]);
                    }
                    // From here on the anchor's upper word stands in `largest`.
                    Real sums[OWN_ROWS][OWN_OUTPUTS];
#pragma unroll
                    for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
                        for (int j = 0; j < OWN_OUTPUTS; j++) {
                            float c = chained[i][j];
                            int low = (int)(short)(largest[i][j] & 0xffffu), high = (int)largest[i][j] >> 16;
                            int m = max(max(low, high), max(exponent_of(c, -126), e.exponent_floor));
                            u32 anchor = Do::anchor(m - e.alignment_bits);
                            largest[i][j] = anchor;
                            sums[i][j] = Do::cut((Real)c, Do::real(anchor ^ Do::sign((Real)c)));
                        }
#pragma unroll 4
                    for (u32 k = block; k < block + PRODUCTS; k++) {
                        Real a[OWN_ROWS], b[OWN_OUTPUTS];
                        load_some(&held_x.values[k][own_row], a);
                        load_some(&held_w.values[k][own_output], b);
#pragma unroll
                        for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
                            for (int j = 0; j < OWN_OUTPUTS; j++) {
                                Real anchor = Do::real(largest[i][j] ^ Do::sign(a[i]) ^ Do::sign(b[j]));
                                sums[i][j] = Do::add(sums[i][j], Do::cut_product(a[i], b[j], anchor));
                            }
                    }
#pragma unroll
                    for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
                        for (int j = 0; j < OWN_OUTPUTS; j++) {
                            // A sum that went beyond f32 stays there.
                            bool beyond = (__float_as_uint(chained[i][j]) & 0x7f800000u) == 0x7f800000u;
                            if (!beyond) chained[i][j] = Do::result(sums[i][j], e.result_bits);
                        }
                }
            }
            bool last = step_end == part_end;
            float x_scale[OWN_ROWS], w_scale[OWN_OUTPUTS];
            if (e.by_block) {
                u64 across = (e.width + BLOCK_WIDTH - 1) / BLOCK_WIDTH, at = step / BLOCK_WIDTH;
#pragma unroll
                for (int i = 0; i < OWN_ROWS; i++)
                    x_scale[i] = x_scales[min(first_row + own_row + i, e.rows - 1) * across + at];
#pragma unroll
                for (int j = 0; j < OWN_OUTPUTS; j++)
                    w_scale[j] = w_scales[min(first_output + own_output + j, e.outputs - 1) * across + at];
#pragma unroll
                for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
                    for (int j = 0; j < OWN_OUTPUTS; j++)
                        chained[i][j] = __fmul_rn(chained[i][j], __fmul_rn(x_scale[i], w_scale[j]));
            }
#pragma unroll
            for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
                for (int j = 0; j < OWN_OUTPUTS; j++) {
                    main[i][j] = main_started ? __fadd_rn(main[i][j], chained[i][j]) : chained[i][j];
                    chained[i][j] = 0.0f;
                }
            if (last) {
                // The total of the parts stands in y.
#pragma unroll
                for (int i = 0; i < OWN_ROWS; i++) {
                    u64 row = first_row + own_row + i;
                    float* total = y + row * e.outputs + first_output + own_output;
#pragma unroll
                    for (int j = 0; j < OWN_OUTPUTS; j++)
                        if (row < e.rows && first_output + own_output + j < e.outputs)
                            total[j] = total_started ? __fadd_rn(total[j], main[i][j]) : main[i][j];
                }
            }
            main_started = !last;
            total_started = total_started || last;
        }
    }
}

#define EMULATION(name, real, products, own)                                                                            \
    extern "C" __global__ void __launch_bounds__(EMULATION_THREADS) name(                                            \
        Emulated e, const float* x, const float* w, const float* x_scales, const float* w_scales, float* y) {          \
        emulate<real, products, own>(e, x, w, x_scales, w_scales, y);                                                     \
    }

EMULATION(emulate_f32_16, float, 16, 8)
EMULATION(emulate_f32_32, float, 32, 8)
EMULATION(emulate_f64_4, double, 4, 4)
EMULATION(emulate_f64_8, double, 8, 4)
EMULATION(emulate_f64_16, double, 16, 4)
EMULATION(emulate_f64_32, double, 32, 4)

// The unit of f32: fused multiply-adds one after the other.
extern "C" __global__ void emulate_fma(
    Emulated e, const float* x, const float* w, const float* x_scales, const float* w_scales, float* y) {
    for (u64 index = first_index(); index < e.rows * e.outputs; index += all_threads()) {
        const float* a = x + index / e.outputs * e.width;
        const float* b = w + index % e.outputs * e.width;
        float total = 0.0f;
        for (u64 part = 0; part < e.width; part += e.part) {
            u64 end = part + e.part < e.width ? part + e.part : e.width;
            float sum = 0.0f;
            for (u64 k = part; k < end; k++) sum = __fmaf_rn(a[k], b[k], sum);
            total = part ? __fadd_rn(total, sum) : sum;
        }
        y[index] = total;
    }
}

// The epilogue: scales of the tensors or of their rows, and the rounding to the result's format.
extern "C" __global__ void finish_emulated(
    float* y, u64 rows, u64 outputs, int scaled, const float* x_scales, int x_granularity, const float* w_scales,
    int w_granularity, int epilogue, int output) {
    for (u64 index = first_index(); index < rows * outputs; index += all_threads()) {
        float total = y[index];
        if (scaled) {
            float x = x_scales[x_granularity == SCALE_ROW ? index / outputs : 0];
            float w = w_scales[w_granularity == SCALE_ROW ? index % outputs : 0];
            total = epilogue == ACTIVATION_THEN_WEIGHT   ? __fmul_rn(__fmul_rn(total, x), w)
                : epilogue == WEIGHT_THEN_ACTIVATION ? __fmul_rn(__fmul_rn(total, w), x)
                                                     : __fmul_rn(__fmul_rn(x, w), total);
        }
        y[index] = round_to(output, total);
    }
}
