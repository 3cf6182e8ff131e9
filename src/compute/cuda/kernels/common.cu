// What all kernels share: names of integers, conversions between formats, lanes.
//
// The kernels are compiled with --fmad=false and without fast math: every + - * / and
// square root below rounds once to nearest even, and only __fmaf_rn fuses. Each one
// follows the sequence that the file named at its head defines for the emulated arm.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// FORMAT_F32, FORMAT_BF16 and the like are the numbers of `src/dtype.rs`; `program.rs` defines them.

// Which values share a scale, as the host passes it.
enum Granularity { SCALE_TENSOR = 0, SCALE_ROW = 1, SCALE_BLOCK = 2 };

// Elements of K that share a block scale.
#define BLOCK_WIDTH 128

__device__ __forceinline__ u64 first_index() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ u64 all_threads() { return (u64)gridDim.x * blockDim.x; }

__device__ __forceinline__ float half_to_float(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

__device__ __forceinline__ float bf16_to_float(u16 code) { return __uint_as_float((u32)code << 16); }

__device__ __forceinline__ u16 float_to_half(float value) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

__device__ __forceinline__ u16 float_to_bf16(float value) {
    u16 code;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(code) : "f"(value));
    return code;
}

// Nearest, ties to even, -128 to 127; NaN is 0.
__device__ __forceinline__ u8 float_to_int8(float value) {
    int code;
    asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(code) : "f"(value));
    return (u8)code;
}

#if __CUDA_ARCH__ >= 890
// The hardware's own conversions: nearest, ties to even, saturating.
__device__ __forceinline__ u8 float_to_e4m3(float value) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
    return (u8)(pair & 0xff);
}

__device__ __forceinline__ u8 float_to_e5m2(float value) {
    u16 pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
    return (u8)(pair & 0xff);
}
#else
// The same for chips that have no such instruction; `src/dtype.rs` explains the steps.
__device__ __forceinline__ u8 float_to_fp8(float value, int fraction_bits, int min_exponent, float max_finite) {
    u32 bits = __float_as_uint(value);
    u32 magnitude = bits & 0x7fffffffu;
    u32 sign = (bits >> 24) & 0x80u;
    u32 limit = __float_as_uint(max_finite);
    u32 clamped = magnitude < limit ? magnitude : limit;
    int cut = 23 - fraction_bits;
    u32 odd = (clamped >> cut) & 1u;
    u32 bias_change = (u32)(min_exponent + 126) << fraction_bits;
    u32 normal = ((clamped + (1u << (cut - 1)) - 1u + odd) >> cut) - bias_change;
    u32 anchor = (u32)(min_exponent - fraction_bits + 23 + 127) << 23;
    u32 subnormal = __float_as_uint(__fadd_rn(__uint_as_float(clamped), __uint_as_float(anchor))) - anchor;
    u32 smallest_normal = (u32)(min_exponent + 127) << 23;
    u32 finite = clamped < smallest_normal ? subnormal : normal;
    return (u8)(magnitude > 0x7f800000u ? 0x7fu : (finite | sign));
}
__device__ __forceinline__ u8 float_to_e4m3(float value) { return float_to_fp8(value, 3, -6, 448.0f); }
__device__ __forceinline__ u8 float_to_e5m2(float value) { return float_to_fp8(value, 2, -14, 57344.0f); }
#endif

// The value of a finite FP8 code or NaN: these conversions saturate, so none is infinite.
__device__ __forceinline__ float fp8_to_float(u8 code, int fraction_bits, int min_exponent) {
    u32 magnitude = code & 0x7fu;
    if (magnitude == 0x7fu) return __uint_as_float(0x7fffffffu);
    u32 sign = (u32)(code & 0x80u) << 24;
    // As a subnormal of f32 with the same digits, and the difference of the biases.
    float digits = __uint_as_float(sign | magnitude << (23 - fraction_bits));
    return __fmul_rn(digits, __uint_as_float((u32)(127 + min_exponent + 126) << 23));
}

// The code of a value, as a format rounds it, at its place among others.
__device__ __forceinline__ void store_code(int format, float value, void* codes, u64 index) {
    switch (format) {
    case FORMAT_E4M3: ((u8*)codes)[index] = float_to_e4m3(value); break;
    case FORMAT_E5M2: ((u8*)codes)[index] = float_to_e5m2(value); break;
    case FORMAT_INT8: ((u8*)codes)[index] = float_to_int8(value); break;
    case FORMAT_BF16: ((u16*)codes)[index] = float_to_bf16(value); break;
    case FORMAT_F16: ((u16*)codes)[index] = float_to_half(value); break;
    default: ((float*)codes)[index] = value; break;
    }
}

// And the value of such a code.
__device__ __forceinline__ float load_code(int format, const void* codes, u64 index) {
    switch (format) {
    case FORMAT_E4M3: return fp8_to_float(((const u8*)codes)[index], 3, -6);
    case FORMAT_E5M2: return fp8_to_float(((const u8*)codes)[index], 2, -14);
    case FORMAT_INT8: return (float)((const signed char*)codes)[index];
    case FORMAT_BF16: return bf16_to_float(((const u16*)codes)[index]);
    case FORMAT_F16: return half_to_float(((const u16*)codes)[index]);
    default: return ((const float*)codes)[index];
    }
}

// A value after a trip through an output format.
__device__ __forceinline__ float round_to(int format, float value) {
    if (format == FORMAT_BF16) return bf16_to_float(float_to_bf16(value));
    if (format == FORMAT_F16) return half_to_float(float_to_half(value));
    return value;
}

// Knuth's exact sum: a + b = sum + error.
__device__ __forceinline__ float two_sum(float a, float b, float* error) {
    float sum = __fadd_rn(a, b);
    float shadow = __fsub_rn(sum, a);
    *error = __fadd_rn(__fsub_rn(a, __fsub_rn(sum, shadow)), __fsub_rn(b, shadow));
    return sum;
}

// The sum of a warp's lanes: lanes i and i + half, half from 16 down to 1. Lane 0 has it.
__device__ __forceinline__ float warp_sum(float value) {
    for (int half = 16; half > 0; half /= 2)
        value = __fadd_rn(value, __shfl_down_sync(0xffffffffu, value, half));
    return value;
}
