// Functions of one number as the chip and CUDA's own math library compute them, with nvcc's
// usual options. `functions.rs` writes a line for each function of its table into the switch.
__device__ float applied(int which, float x, float second) {
    float y;
    switch (which) {
CASES
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
