// What follows a tensor-core product: scales that the library did not apply, the rounding
// to the output type, the bias. `emulated/gemm.rs` and `emulated/arm.rs`.

__device__ __forceinline__ float scale_at(const float* scale, int granularity, u64 row, u64 group_rows, u64 across, u64 block) {
    return granularity == SCALE_TENSOR ? scale[0]
        : granularity == SCALE_ROW     ? scale[row]
                                       : scale[row / group_rows * across + block];
}

// A product of int8 operands is their sums in 32 bits.
__device__ __forceinline__ float load(int format, const void* y, u64 index) {
    if (format == FORMAT_INT8) return __int2float_rn(((const int*)y)[index]);
    if (format == FORMAT_BF16) return bf16_to_float(((const u16*)y)[index]);
    if (format == FORMAT_F16) return half_to_float(((const u16*)y)[index]);
    return ((const float*)y)[index];
}

// y[tokens, outputs] from the library's product, whose rows are `stride` apart:
// (scale_x * scale_w) * product where `scaled` is 0, of integers scale_x * (scale_w * product), rounded
// to `output`, plus the bias.
extern "C" __global__ void finish(
    const void* product, int product_format, u64 stride, u64 tokens, u64 outputs, int scaled, const float* scale_x,
    int granularity_x, const float* scale_w, int granularity_w, int output, const float* bias, float* y) {
    for (u64 index = first_index(); index < tokens * outputs; index += all_threads()) {
        u64 token = index / outputs, column = index % outputs;
        float value = load(product_format, product, token * stride + column);
        if (!scaled) {
            float x = scale_at(scale_x, granularity_x, token, 1, 0, 0);
            float w = scale_at(scale_w, granularity_w, column, 1, 0, 0);
            value = product_format == FORMAT_INT8 ? __fmul_rn(x, __fmul_rn(w, value)) : __fmul_rn(__fmul_rn(x, w), value);
        }
        value = round_to(output, value);
        y[index] = bias ? __fadd_rn(value, bias[column]) : value;
    }
}

// main = main + (scale_x * scale_w) * partial, for one block of K. The first block starts
// the sum.
extern "C" __global__ void add_block(
    const float* partial, u64 stride, u64 tokens, u64 outputs, u64 block, u64 across, const float* scale_x,
    int granularity_x, const float* scale_w, int granularity_w, float* main) {
    for (u64 index = first_index(); index < tokens * outputs; index += all_threads()) {
        u64 token = index / outputs, column = index % outputs;
        float x = scale_at(scale_x, granularity_x, token, 1, across, block);
        float w = scale_at(scale_w, granularity_w, column, BLOCK_WIDTH, across, block);
        float scaled = __fmul_rn(__fmul_rn(x, w), partial[token * stride + column]);
        main[index] = block ? __fadd_rn(main[index], scaled) : scaled;
    }
}
