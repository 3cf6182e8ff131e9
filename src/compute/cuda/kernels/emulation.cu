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
#define TILE_OUTPUTS 64
#define EMULATION_THREADS 128
// Outputs of a thread: rows of x by rows of w.
#define OWN_ROWS 4
#define OWN_OUTPUTS 8

// What a product is to be computed by, as the host passes it.
struct Emulated {
    // Shape and formats.
    u64 rows, outputs, width;
    int x_format, w_format, output;
    // Of the tensor core: F, R, and the least exponent to which addends are aligned.
    int alignment_bits, result_bits, exponent_floor;
    // Elements between promotions; elements of a part of K.
    u64 stretch, part;
    // Scales: who shares one, and whether they multiply each partial sum of 128 elements.
    int x_granularity, w_granularity, by_block, epilogue;
    u64 x_group_rows, w_group_rows, w_first_row, across;
};

enum Epilogue { SCALES_FIRST = 0, ACTIVATION_THEN_WEIGHT = 1, WEIGHT_THEN_ACTIVATION = 2 };

__device__ __forceinline__ float value_of(int format, const void* codes, u64 index) {
    switch (format) {
        case FORMAT_E4M3: return fp8_to_float(((const u8*)codes)[index], 3, -6);
        case FORMAT_E5M2: return fp8_to_float(((const u8*)codes)[index], 2, -14);
        case FORMAT_BF16: return bf16_to_float(((const u16*)codes)[index]);
        case FORMAT_F16: return half_to_float(((const u16*)codes)[index]);
        default: return ((const float*)codes)[index];
    }
}

// The least exponent of a value; a subnormal has it too, without a hidden one.
__device__ __forceinline__ int least_exponent(int format) {
    return format == FORMAT_E4M3 ? -6 : format == FORMAT_E5M2 || format == FORMAT_F16 ? -14 : -126;
}

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
    Held<Real, ROWS>* held, const void* codes, int format, u64 first_row, u64 rows, u64 width, u64 start, u64 end) {
    int least = least_exponent(format);
    // A thread has one row, and every second pair of K.
    u32 row = threadIdx.x % ROWS;
    bool there = first_row + row < rows;
    u64 base = (first_row + row) * width;
#pragma unroll 4
    for (u32 pair = threadIdx.x / ROWS; pair < STAGE / 2; pair += EMULATION_THREADS / ROWS) {
        u64 k = start + 2 * pair;
        float low = there && k < end ? value_of(format, codes, base + k) : 0.0f;
        float high = there && k + 1 < end ? value_of(format, codes, base + k + 1) : 0.0f;
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

__device__ __forceinline__ float scaled_total(const Emulated& e, float total, float x, float w) {
    switch (e.epilogue) {
        case ACTIVATION_THEN_WEIGHT: return __fmul_rn(__fmul_rn(total, x), w);
        case WEIGHT_THEN_ACTIVATION: return __fmul_rn(__fmul_rn(total, w), x);
        default: return __fmul_rn(__fmul_rn(x, w), total);
    }
}

__device__ __forceinline__ float x_scale_at(const Emulated& e, const float* scales, u64 row, u64 block) {
    return scale_at(scales, e.x_granularity, row, e.x_group_rows, e.across, block);
}

__device__ __forceinline__ float w_scale_at(const Emulated& e, const float* scales, u64 output, u64 block) {
    u64 row = e.w_granularity == SCALE_BLOCK ? e.w_first_row + output : output;
    return scale_at(scales, e.w_granularity, row, e.w_group_rows, e.across, block);
}

template <typename Real, int PRODUCTS>
__device__ __forceinline__ void emulate(
    const Emulated& e, const void* x, const void* w, const float* x_scales, const float* w_scales, float* y) {
    typedef Arithmetic<Real> Do;
    __shared__ Held<Real, TILE_ROWS> held_x;
    __shared__ Held<Real, TILE_OUTPUTS> held_w;
    u64 first_row = (u64)blockIdx.y * TILE_ROWS, first_output = (u64)blockIdx.x * TILE_OUTPUTS;
    u32 own_row = threadIdx.x / (TILE_OUTPUTS / OWN_OUTPUTS) * OWN_ROWS;
    u32 own_output = threadIdx.x % (TILE_OUTPUTS / OWN_OUTPUTS) * OWN_OUTPUTS;
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
                hold(&held_x, x, e.x_format, first_row, e.rows, e.width, start, step_end);
                hold(&held_w, w, e.w_format, first_output, e.outputs, e.width, start, step_end);
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
#pragma unroll
            for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
                for (int j = 0; j < OWN_OUTPUTS; j++) {
                    u64 row = first_row + own_row + i, output = first_output + own_output + j;
                    float partial = chained[i][j];
                    chained[i][j] = 0.0f;
                    bool there = row < e.rows && output < e.outputs;
                    if (e.by_block && there) {
                        u64 block = step / BLOCK_WIDTH;
                        float scale = __fmul_rn(
                            x_scale_at(e, x_scales, row, block), w_scale_at(e, w_scales, output, block));
                        partial = __fmul_rn(partial, scale);
                    }
                    float sum = main_started ? __fadd_rn(main[i][j], partial) : partial;
                    main[i][j] = sum;
                    if (last && there) {
                        float* total = y + row * e.outputs + output;
                        *total = total_started ? __fadd_rn(*total, sum) : sum;
                    }
                }
            main_started = !last;
            total_started = total_started || last;
        }
    }
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++)
#pragma unroll
        for (int j = 0; j < OWN_OUTPUTS; j++) {
            u64 row = first_row + own_row + i, output = first_output + own_output + j;
            if (row < e.rows && output < e.outputs) {
                float* place = y + row * e.outputs + output;
                float total = *place;
                if (!e.by_block)
                    total = scaled_total(e, total, x_scale_at(e, x_scales, row, 0), w_scale_at(e, w_scales, output, 0));
                *place = round_to(e.output, total);
            }
        }
}

#define EMULATION(name, real, products)                                                                              \
    extern "C" __global__ void __launch_bounds__(EMULATION_THREADS) name(                                            \
        Emulated e, const void* x, const void* w, const float* x_scales, const float* w_scales, float* y) {          \
        emulate<real, products>(e, x, w, x_scales, w_scales, y);                                                     \
    }

EMULATION(emulate_f32_16, float, 16)
EMULATION(emulate_f32_32, float, 32)
EMULATION(emulate_f64_4, double, 4)
EMULATION(emulate_f64_8, double, 8)
EMULATION(emulate_f64_16, double, 16)
EMULATION(emulate_f64_32, double, 32)

// The unit of f32: fused multiply-adds one after the other.
extern "C" __global__ void emulate_fma(
    Emulated e, const void* x, const void* w, const float* x_scales, const float* w_scales, float* y) {
    for (u64 index = first_index(); index < e.rows * e.outputs; index += all_threads()) {
        u64 row = index / e.outputs, output = index % e.outputs;
        const float* a = (const float*)x + row * e.width;
        const float* b = (const float*)w + output * e.width;
        float total = 0.0f;
        for (u64 part = 0; part < e.width; part += e.part) {
            u64 end = part + e.part < e.width ? part + e.part : e.width;
            float sum = 0.0f;
            for (u64 k = part; k < end; k++) sum = __fmaf_rn(a[k], b[k], sum);
            total = part ? __fadd_rn(total, sum) : sum;
        }
        float scaled = scaled_total(e, total, x_scale_at(e, x_scales, row, 0), w_scale_at(e, w_scales, output, 0));
        y[index] = round_to(e.output, scaled);
    }
}
