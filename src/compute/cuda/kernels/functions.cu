// Functions of one number as the chip and CUDA's own math library compute them, with nvcc's
// usual options. The numbers of `which` are the rows of `functions.rs`.
#define APPROXIMATE(instruction) \
    { float y; asm(instruction " %0, %1;" : "=f"(y) : "f"(x)); return y; }

__device__ float applied(int which, float x, float second) {
    switch (which) {
    case 0: APPROXIMATE("ex2.approx.ftz.f32")
    case 1: APPROXIMATE("ex2.approx.f32")
    case 2: APPROXIMATE("lg2.approx.ftz.f32")
    case 3: APPROXIMATE("lg2.approx.f32")
    case 4: APPROXIMATE("rcp.approx.ftz.f32")
    case 5: APPROXIMATE("rcp.approx.f32")
    case 6: APPROXIMATE("rsqrt.approx.ftz.f32")
    case 7: APPROXIMATE("rsqrt.approx.f32")
    case 8: APPROXIMATE("sqrt.approx.ftz.f32")
    case 9: APPROXIMATE("sqrt.approx.f32")
    case 10: APPROXIMATE("sin.approx.ftz.f32")
    case 11: APPROXIMATE("cos.approx.ftz.f32")
    case 12: return expf(x);
    case 13: return __expf(x);
    case 14: return exp2f(x);
    case 15: return logf(x);
    case 16: return __logf(x);
    case 17: return log2f(x);
    case 18: return sinf(x);
    case 19: return cosf(x);
    case 20: return tanhf(x);
    case 21: return erff(x);
    default: return powf(x, second);
    }
}

// y[i] is the function of the float whose bits are (first + i) * step. powf's second operand is
// drawn from those bits.
extern "C" __global__ void functions(float *y, int which, unsigned long long first,
                                     unsigned long long step, unsigned long long count) {
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    unsigned int bits = (unsigned int)((first + i) * step);
    unsigned int drawn = bits * 2654435761u ^ bits >> 13;
    y[i] = applied(which, __uint_as_float(bits), (float)(int)drawn * (1.0f / 67108864.0f));
}
