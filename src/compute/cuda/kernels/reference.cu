// The reference's product, `compute/reference.rs` and `compute/dots.rs`: element k of a dot
// product goes to lane k % 8, each lane adds in ascending k, and the lanes are added l and l + 4,
// then l and l + 2, then l and l + 1. A product of two f32 is exact in f64, so a fused
// multiply-add rounds as an addition does.

#define PRODUCT_LANES 8
#define PRODUCT_THREADS 128
// Rows of x and of w that a block multiplies, and what a thread has of them.
#define PRODUCT_ROWS 16
#define PRODUCT_OUTPUTS 32
#define ROW_GROUPS 2
#define OUTPUT_GROUPS 8
#define THREAD_ROWS (PRODUCT_ROWS / ROW_GROUPS)
#define THREAD_OUTPUTS (PRODUCT_OUTPUTS / OUTPUT_GROUPS)
// Values of K that are held at a time, and a pitch with which two rows lie in different banks.
#define PRODUCT_DEPTH 32
#define PRODUCT_PITCH 40

// Columns first.. of y[rows, stride] = x[rows, width] w[outputs, width]^T + bias. A thread has
// one lane of its outputs.
extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS) reference_product(
    const float* x, const float* w, const float* bias, u64 rows, u64 outputs, u64 width, u64 first, u64 stride,
    float* y) {
    __shared__ double held_x[PRODUCT_ROWS][PRODUCT_PITCH];
    __shared__ double held_w[PRODUCT_OUTPUTS][PRODUCT_PITCH];
    u32 lane = threadIdx.x % PRODUCT_LANES, group = threadIdx.x / PRODUCT_LANES;
    u32 row_group = group / OUTPUT_GROUPS, output_group = group % OUTPUT_GROUPS;
    u64 first_row = (u64)blockIdx.y * PRODUCT_ROWS, first_output = (u64)blockIdx.x * PRODUCT_OUTPUTS;
    double sums[THREAD_ROWS][THREAD_OUTPUTS];
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; i++)
#pragma unroll
        for (int j = 0; j < THREAD_OUTPUTS; j++) sums[i][j] = 0.0;

    for (u64 start = 0; start < width; start += PRODUCT_DEPTH) {
        // A zero product leaves a lane as it is, so what pads cannot be seen.
        for (u32 at = threadIdx.x; at < PRODUCT_ROWS * PRODUCT_DEPTH; at += PRODUCT_THREADS) {
            u64 row = first_row + at / PRODUCT_DEPTH, column = start + at % PRODUCT_DEPTH;
            bool there = row < rows && column < width;
            held_x[at / PRODUCT_DEPTH][at % PRODUCT_DEPTH] = there ? (double)x[row * width + column] : 0.0;
        }
        for (u32 at = threadIdx.x; at < PRODUCT_OUTPUTS * PRODUCT_DEPTH; at += PRODUCT_THREADS) {
            u64 output = first_output + at / PRODUCT_DEPTH, column = start + at % PRODUCT_DEPTH;
            bool there = output < outputs && column < width;
            held_w[at / PRODUCT_DEPTH][at % PRODUCT_DEPTH] = there ? (double)w[output * width + column] : 0.0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < PRODUCT_DEPTH; k += PRODUCT_LANES) {
            double a[THREAD_ROWS], b[THREAD_OUTPUTS];
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; i++) a[i] = held_x[row_group + i * ROW_GROUPS][k + lane];
#pragma unroll
            for (int j = 0; j < THREAD_OUTPUTS; j++) b[j] = held_w[output_group + j * OUTPUT_GROUPS][k + lane];
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; i++)
#pragma unroll
                for (int j = 0; j < THREAD_OUTPUTS; j++) sums[i][j] = __fma_rn(a[i], b[j], sums[i][j]);
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < THREAD_ROWS; i++) {
#pragma unroll
        for (int j = 0; j < THREAD_OUTPUTS; j++) {
            double sum = sums[i][j];
#pragma unroll
            for (int half = PRODUCT_LANES / 2; half > 0; half /= 2)
                sum = __dadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, half));
            u64 row = first_row + row_group + i * ROW_GROUPS;
            u64 output = first_output + output_group + j * OUTPUT_GROUPS;
            if (lane == 0 && row < rows && output < outputs) {
                double added = bias ? (double)bias[first + output] : 0.0;
                y[row * stride + first + output] = __double2float_rn(__dadd_rn(sum, added));
            }
        }
    }
}
