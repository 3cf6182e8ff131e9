// The ops of a transformer that are no GEMM: `emulated/kernels.rs`, operation by operation.

// Lanes of RMSNorm's reduction: the threads of its block.
#define NORM_LANES 256

// Knows no special cases: the reduction constants and the polynomial of `kernels.rs`.
__device__ __forceinline__ float exponential(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -105.0f ? -105.0f : x;
    float n = rintf(__fmul_rn(x, 1.44269504088896340736f));
    float r = __fmaf_rn(n, -0.6933594f, x);
    r = __fmaf_rn(n, 2.1219444e-4f, r);
    float p = 1.9875691e-4f;
    p = __fmaf_rn(p, r, 1.3981999e-3f);
    p = __fmaf_rn(p, r, 8.333452e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.6666665e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    float square = __fmul_rn(r, r);
    p = __fadd_rn(__fmaf_rn(p, square, r), 1.0f);
    int power = (int)n;
    int half = power >> 1;
    p = __fmul_rn(p, __int_as_float((half + 127) << 23));
    return __fmul_rn(p, __int_as_float((power - half + 127) << 23));
}

// One group of RMSNorm a block: y = x / sqrt(mean(x^2) + eps) * gain.
extern "C" __global__ void rms_norm(const float* x, const float* gain, u64 width, float eps, float* y) {
    __shared__ float high[NORM_LANES];
    __shared__ float low[NORM_LANES];
    int lane = threadIdx.x;
    x += blockIdx.x * width;
    y += blockIdx.x * width;
    float sum = 0.0f, sum_low = 0.0f, error;
    for (u64 index = lane; index < width; index += NORM_LANES) {
        float product = __fmul_rn(x[index], x[index]);
        float product_error = __fmaf_rn(x[index], x[index], -product);
        sum = two_sum(sum, product, &error);
        sum_low = __fadd_rn(sum_low, __fadd_rn(error, product_error));
    }
    high[lane] = sum;
    low[lane] = sum_low;
    for (int half = NORM_LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane < half) {
            float total = two_sum(high[lane], high[lane + half], &error);
            high[lane] = total;
            low[lane] = __fadd_rn(__fadd_rn(low[lane], low[lane + half]), error);
        }
    }
    __syncthreads();
    float whole_low;
    float whole = two_sum(high[0], low[0], &whole_low);

    float count = (float)width;
    float mean = __fdiv_rn(whole, count);
    float mean_low = __fdiv_rn(__fadd_rn(__fmaf_rn(-mean, count, whole), whole_low), count);
    float radicand = two_sum(mean, eps, &error);
    float radicand_low = __fadd_rn(mean_low, error);

    float root = __fdiv_rn(1.0f, __fsqrt_rn(radicand));
    float square = __fmul_rn(root, root);
    float square_low = __fmaf_rn(root, root, -square);
    float residual = __fmaf_rn(-radicand, square, 1.0f);
    residual = __fmaf_rn(-radicand, square_low, residual);
    residual = __fmaf_rn(-radicand_low, square, residual);
    float root_low = __fmul_rn(__fmul_rn(0.5f, root), residual);

    for (u64 index = lane; index < width; index += NORM_LANES) {
        float product = __fmul_rn(x[index], gain[index]);
        float product_error = __fmaf_rn(x[index], gain[index], -product);
        float correction = __fmaf_rn(product_error, root, __fmul_rn(product, root_low));
        y[index] = __fmaf_rn(product, root, correction);
    }
}

// The sum of all lanes over `count`, in two f32; every thread of the block takes part.
__device__ __forceinline__ float mean_of(float sum, float sum_low, float count, float* high, float* low, float* mean_low) {
    int lane = threadIdx.x;
    float error;
    __syncthreads();
    high[lane] = sum;
    low[lane] = sum_low;
    for (int half = NORM_LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (lane < half) {
            float total = two_sum(high[lane], high[lane + half], &error);
            high[lane] = total;
            low[lane] = __fadd_rn(__fadd_rn(low[lane], low[lane + half]), error);
        }
    }
    __syncthreads();
    float whole_low;
    float whole = two_sum(high[0], low[0], &whole_low);
    float mean = __fdiv_rn(whole, count);
    *mean_low = __fdiv_rn(__fadd_rn(__fmaf_rn(-mean, count, whole), whole_low), count);
    return mean;
}

// A value less the mean, in two f32.
__device__ __forceinline__ float centre(float x, float mean, float mean_low, float* low) {
    float error;
    float centred = two_sum(x, -mean, &error);
    *low = __fsub_rn(error, mean_low);
    return centred;
}

// One group of LayerNorm a block: y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * gain + bias.
extern "C" __global__ void layer_norm(
    const float* x, const float* gain, const float* bias, u64 width, u64 rows, float eps, float* y) {
    __shared__ float high[NORM_LANES];
    __shared__ float low[NORM_LANES];
    int lane = threadIdx.x;
    x += blockIdx.x * width;
    y += blockIdx.x * width;
    // The groups take the rows of gain and bias in turns.
    gain += blockIdx.x % rows * width;
    bias += blockIdx.x % rows * width;
    float count = (float)width, error;
    float sum = 0.0f, sum_low = 0.0f;
    for (u64 index = lane; index < width; index += NORM_LANES) {
        sum = two_sum(sum, x[index], &error);
        sum_low = __fadd_rn(sum_low, error);
    }
    float mean_low;
    float mean = mean_of(sum, sum_low, count, high, low, &mean_low);

    sum = 0.0f;
    sum_low = 0.0f;
    for (u64 index = lane; index < width; index += NORM_LANES) {
        float centred_low;
        float centred = centre(x[index], mean, mean_low, &centred_low);
        float product = __fmul_rn(centred, centred);
        float product_error = __fmaf_rn(centred, centred, -product);
        product_error = __fmaf_rn(__fadd_rn(centred, centred), centred_low, product_error);
        sum = two_sum(sum, product, &error);
        sum_low = __fadd_rn(sum_low, __fadd_rn(error, product_error));
    }
    float variance_low;
    float variance = mean_of(sum, sum_low, count, high, low, &variance_low);
    float radicand = two_sum(variance, eps, &error);
    float radicand_low = __fadd_rn(variance_low, error);
    float root = __fdiv_rn(1.0f, __fsqrt_rn(radicand));
    float square = __fmul_rn(root, root);
    float square_low = __fmaf_rn(root, root, -square);
    float residual = __fmaf_rn(-radicand, square, 1.0f);
    residual = __fmaf_rn(-radicand, square_low, residual);
    residual = __fmaf_rn(-radicand_low, square, residual);
    float root_low = __fmul_rn(__fmul_rn(0.5f, root), residual);

    for (u64 index = lane; index < width; index += NORM_LANES) {
        float centred_low;
        float centred = centre(x[index], mean, mean_low, &centred_low);
        float product = __fmul_rn(centred, gain[index]);
        float product_error = __fmaf_rn(centred_low, gain[index], __fmaf_rn(centred, gain[index], -product));
        float scaled = __fmul_rn(product, root);
        float scaled_error = __fmaf_rn(product, root, -scaled);
        float correction = __fmaf_rn(product_error, root, __fmul_rn(product, root_low));
        float total = two_sum(scaled, bias[index], &error);
        y[index] = __fadd_rn(total, __fadd_rn(error, __fadd_rn(scaled_error, correction)));
    }
}

// The hyperbolic tangent of `kernels.rs`.
__device__ __forceinline__ float tangent(float x) {
    float size = fabsf(x);
    if (size >= 0.625f) {
        float large = __fsub_rn(1.0f, __fdiv_rn(2.0f, __fadd_rn(1.0f, exponential(__fadd_rn(size, size)))));
        return copysignf(large, x);
    }
    float square = __fmul_rn(x, x);
    float p = -5.7049887e-3f;
    p = __fmaf_rn(p, square, 2.0639089e-2f);
    p = __fmaf_rn(p, square, -5.3739716e-2f);
    p = __fmaf_rn(p, square, 1.3331442e-1f);
    p = __fmaf_rn(p, square, -3.3333281e-1f);
    return __fmaf_rn(__fmul_rn(p, square), x, x);
}

__device__ __forceinline__ float bent(float x, float cap) { return __fmul_rn(tangent(__fdiv_rn(x, cap)), cap); }

// Each pair of each head of each row, by the angle of its position. `interleaved` pairs
// neighbours, else the halves of what turns are paired. What turns begins with value `start` of a
// head; its other values stay. Tables are [rows, pairs].
extern "C" __global__ void rope(
    const float* x, const float* sines, const float* cosines, u64 rows, u64 heads, u64 head_dim, u64 pairs, u64 start,
    int interleaved, float* y) {
    for (u64 index = first_index(); index < rows * heads * pairs; index += all_threads()) {
        u64 pair = index % pairs, head = index / pairs, row = head / heads;
        u64 first = head * head_dim + start + (interleaved ? 2 * pair : pair);
        u64 second = first + (interleaved ? 1 : pairs);
        float sin = sines[row * pairs + pair], cos = cosines[row * pairs + pair];
        float a = x[first], b = x[second];
        y[first] = __fmaf_rn(a, cos, -__fmul_rn(b, sin));
        y[second] = __fmaf_rn(a, sin, __fmul_rn(b, cos));
    }
    u64 rest = head_dim - 2 * pairs;
    for (u64 index = first_index(); index < rows * heads * rest; index += all_threads()) {
        u64 other = index % rest;
        u64 place = index / rest * head_dim + (other < start ? other : other + 2 * pairs);
        y[place] = x[place];
    }
}

// One query head of one row a block: blockIdx.x is the head, blockIdx.y the row. `scores`
// has room for `positions` values per head and row. A query sees `window` positions, its own
// among them. Where `cap` is not 0, scores are bent towards it. Heads of values are `value_dim` wide.
// Where `sinks` is not null, each head has a score more that has no value.
extern "C" __global__ void attention(
    const float* q, const float* k, const float* v, int kv_heads, int head_dim, int value_dim,
    u64 first_position, u64 positions, u64 window, float scale, float cap, const float* sinks, float* scores,
    float* out) {
    int heads = gridDim.x, head = blockIdx.x;
    u64 row = blockIdx.y, end = first_position + row + 1, begin = end > window ? end - window : 0;
    u64 seen = end - begin;
    u64 kv_head = head / (heads / kv_heads);
    u64 stride = (u64)kv_heads * head_dim, offset = kv_head * head_dim;
    u64 value_stride = (u64)kv_heads * value_dim, value_offset = kv_head * value_dim;
    const float* query = q + (row * heads + head) * head_dim;
    float* score = scores + (row * heads + head) * positions;
    k += begin * stride;
    v += begin * value_stride;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

    for (u64 position = warp; position < seen; position += warps) {
        const float* key = k + position * stride + offset;
        float sum = 0.0f;
        for (int index = lane; index < head_dim; index += 32) sum = __fmaf_rn(query[index], key[index], sum);
        sum = warp_sum(sum);
        if (lane == 0) {
            float scaled = __fmul_rn(sum, scale);
            score[position] = cap != 0.0f ? bent(scaled, cap) : scaled;
        }
    }
    __syncthreads();

    __shared__ float shared_largest;
    if (threadIdx.x == 0) {
        float largest = sinks ? sinks[head] : __int_as_float(0xff800000);
        for (u64 position = 0; position < seen; position++) {
            float s = score[position];
            if (s > largest || s != s) largest = s;
        }
        shared_largest = largest;
    }
    __syncthreads();
    for (u64 position = threadIdx.x; position < seen; position += blockDim.x)
        score[position] = exponential(__fsub_rn(score[position], shared_largest));
    __syncthreads();

    __shared__ float shared_total;
    if (warp == 0) {
        float sum = 0.0f;
        for (u64 position = lane; position < seen; position += 32) sum = __fadd_rn(sum, score[position]);
        sum = warp_sum(sum);
        if (lane == 0)
            shared_total = sinks ? __fadd_rn(sum, exponential(__fsub_rn(sinks[head], shared_largest))) : sum;
    }
    __syncthreads();
    for (int index = threadIdx.x; index < value_dim; index += blockDim.x) {
        float sum = 0.0f;
        for (u64 position = 0; position < seen; position++)
            sum = __fmaf_rn(score[position], v[position * value_stride + value_offset + index], sum);
        out[(row * heads + head) * value_dim + index] = __fdiv_rn(sum, shared_total);
    }
}

// gate / (1 + e^-gate) * up.
extern "C" __global__ void swiglu(const float* gate, const float* up, u64 count, float* y) {
    for (u64 index = first_index(); index < count; index += all_threads())
        y[index] = __fmul_rn(__fdiv_rn(gate[index], __fadd_rn(1.0f, exponential(-gate[index]))), up[index]);
}

// gate / (1 + e^-z) * up with GELU's z.
extern "C" __global__ void geglu(const float* gate, const float* up, u64 count, float* y) {
    for (u64 index = first_index(); index < count; index += all_threads()) {
        float x = gate[index];
        float z = __fmul_rn(__fmaf_rn(__fmul_rn(x, x), 0.071354814f, 1.5957691f), x);
        y[index] = __fmul_rn(__fdiv_rn(x, __fadd_rn(1.0f, exponential(-z))), up[index]);
    }
}

// gpt-oss: of a gate of at most 7 and an `up` within 7 of 0.
extern "C" __global__ void clamped_swiglu(const float* gate, const float* up, u64 count, float* y) {
    for (u64 index = first_index(); index < count; index += all_threads()) {
        float x = gate[index], other = up[index];
        x = x > 7.0f ? 7.0f : x;
        other = other > 7.0f ? 7.0f : other;
        other = other < -7.0f ? -7.0f : other;
        float activated = __fdiv_rn(x, __fadd_rn(1.0f, exponential(-__fmul_rn(1.702f, x))));
        y[index] = __fmul_rn(activated, __fadd_rn(other, 1.0f));
    }
}

// The weights of the experts that `taken` says each row goes to, [rows, used], ascending; the powers of
// their scores over a sum, times `factor`. `kind` is 0 for softmax over all, 1 over those that are taken,
// 2 for sigmoids, 3 for sigmoids over their sum. `y` is zero before. A thread a row.
extern "C" __global__ void route(
    const float* scores, const int* taken, u64 rows, u64 experts, u64 used, int kind, float factor, float* y) {
    for (u64 row = first_index(); row < rows; row += all_threads()) {
        const float* score = scores + row * experts;
        const int* chosen = taken + row * used;
        float largest = __int_as_float(0xff800000);
        for (u64 expert = 0; expert < experts; expert++)
            if (score[expert] > largest || score[expert] != score[expert]) largest = score[expert];
        float total = 0.0f;
        if (kind == 0)
            for (u64 expert = 0; expert < experts; expert++)
                total = __fadd_rn(total, exponential(__fsub_rn(score[expert], largest)));
        for (u64 place = 0; place < used; place++) {
            float x = score[chosen[place]];
            float power = kind < 2 ? exponential(__fsub_rn(x, largest))
                                   : __fdiv_rn(1.0f, __fadd_rn(1.0f, exponential(-x)));
            if (kind == 1 || kind == 3) total = __fadd_rn(total, power);
            y[row * experts + chosen[place]] = power;
        }
        if (kind == 2) total = 1.0f;
        if (kind == 3) total = __fadd_rn(total, 1e-20f);
        for (u64 place = 0; place < used; place++) {
            float* weight = y + row * experts + chosen[place];
            *weight = __fmul_rn(__fdiv_rn(*weight, total), factor);
        }
    }
}

// 1 / (1 + e^-x).
extern "C" __global__ void sigmoid(const float* x, u64 count, float* y) {
    for (u64 index = first_index(); index < count; index += all_threads())
        y[index] = __fdiv_rn(1.0f, __fadd_rn(1.0f, exponential(-x[index])));
}

// Each row's sum of its experts' outputs, [rows, used * width], times their weights, [rows, used].
extern "C" __global__ void mix(const float* x, const float* weights, u64 rows, u64 used, u64 width, float* y) {
    for (u64 index = first_index(); index < rows * width; index += all_threads()) {
        u64 row = index / width, column = index % width;
        float sum = 0.0f;
        for (u64 place = 0; place < used; place++)
            sum = __fmaf_rn(weights[row * used + place], x[(row * used + place) * width + column], sum);
        y[index] = sum;
    }
}

// x / (1 + e^-gate), a gate for each row, or for each value.
extern "C" __global__ void sigmoid_gate(const float* x, const float* gate, u64 rows, u64 width, u64 gates, float* y) {
    for (u64 index = first_index(); index < rows * width; index += all_threads()) {
        float g = gate[gates == 1 ? index / width : index];
        y[index] = __fdiv_rn(x[index], __fadd_rn(1.0f, exponential(-g)));
    }
}

// SiLU of each channel's sum over its last `count` positions; the last tap is the position's own.
extern "C" __global__ void convolve(
    const float* x, const float* taps, u64 rows, u64 channels, u64 count, u64 first, float* y) {
    for (u64 index = first_index(); index < rows * channels; index += all_threads()) {
        u64 position = first + index / channels, channel = index % channels;
        float sum = 0.0f;
        for (u64 tap = 0; tap < count; tap++)
            if (position + tap + 1 >= count)
                sum = __fmaf_rn(taps[channel * count + tap], x[(position + tap + 1 - count) * channels + channel], sum);
        y[index] = __fdiv_rn(sum, __fadd_rn(1.0f, exponential(-sum)));
    }
}

// The gated delta rule: a block for each head of values, a thread for each of its columns. `memory` is
// [heads, key_dim, value_dim], zero before; results are those from position `first` on.
extern "C" __global__ void delta(
    const float* x, const float* gates, u64 key_heads, u64 key_dim, u64 value_dim, u64 positions, u64 first,
    float* memory, float* y) {
    u64 heads = gridDim.x, head = blockIdx.x, keys = key_heads * key_dim;
    u64 key_head = head / (heads / key_heads) * key_dim, channels = 2 * keys + heads * value_dim;
    float* state = memory + head * key_dim * value_dim;
    float scale = __fdiv_rn(1.0f, __fsqrt_rn((float)key_dim));
    __shared__ float inverse[2];
    for (u64 position = 0; position < positions; position++) {
        const float* query = x + position * channels + key_head;
        const float* key = query + keys;
        const float* value = x + position * channels + 2 * keys + head * value_dim;
        float decay = gates[position * 2 * heads + head], beta = gates[position * 2 * heads + heads + head];
        __syncthreads();
        if (threadIdx.x < 64) {
            int lane = threadIdx.x % 32, which = threadIdx.x / 32;
            const float* of = which ? key : query;
            float sum = 0.0f;
            for (u64 index = lane; index < key_dim; index += 32) sum = __fmaf_rn(of[index], of[index], sum);
            sum = warp_sum(sum);
            if (lane == 0) inverse[which] = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(sum, 1e-6f)));
        }
        __syncthreads();
        for (u64 column = threadIdx.x; column < value_dim; column += blockDim.x) {
            float kept = 0.0f;
            for (u64 row = 0; row < key_dim; row++) {
                float* cell = state + row * value_dim + column;
                *cell = __fmul_rn(*cell, decay);
                kept = __fmaf_rn(*cell, __fmul_rn(key[row], inverse[1]), kept);
            }
            float change = __fmul_rn(__fsub_rn(value[column], kept), beta);
            float sum = 0.0f;
            for (u64 row = 0; row < key_dim; row++) {
                float* cell = state + row * value_dim + column;
                *cell = __fmaf_rn(__fmul_rn(key[row], inverse[1]), change, *cell);
                sum = __fmaf_rn(*cell, __fmul_rn(__fmul_rn(query[row], inverse[0]), scale), sum);
            }
            if (position >= first) y[((position - first) * heads + head) * value_dim + column] = sum;
        }
    }
}

extern "C" __global__ void scale(const float* x, float factor, u64 count, float* y) {
    for (u64 index = first_index(); index < count; index += all_threads()) y[index] = __fmul_rn(x[index], factor);
}

extern "C" __global__ void soft_cap(const float* x, float cap, u64 count, float* y) {
    for (u64 index = first_index(); index < count; index += all_threads()) y[index] = bent(x[index], cap);
}

// What a cache of keys or values gives back: the code of x / scale, times the scale.
extern "C" __global__ void cached(const float* x, int format, float scale, u64 count, float* y) {
    for (u64 index = first_index(); index < count; index += all_threads()) {
        float value = __fdiv_rn(x[index], scale);
        if (format == FORMAT_E4M3) value = fp8_to_float(float_to_e4m3(value), 3, -6);
        else if (format == FORMAT_E5M2) value = fp8_to_float(float_to_e5m2(value), 2, -14);
        else value = round_to(format, value);
        y[index] = __fmul_rn(value, scale);
    }
}

extern "C" __global__ void add(const float* a, const float* b, u64 count, float* y) {
    for (u64 index = first_index(); index < count; index += all_threads()) y[index] = __fadd_rn(a[index], b[index]);
}
