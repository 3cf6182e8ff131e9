// From the blocks of a GGUF tensor to f32: `emulated/dequant.rs`, value by value.

__device__ __forceinline__ float half_at(const u8* block, int offset) {
    return half_to_float((u16)(block[offset] | (block[offset + 1] << 8)));
}

// Code i of 32 in 16 bytes: their low nibbles, then their high ones.
__device__ __forceinline__ int nibble(const u8* bytes, int i) { return (bytes[i % 16] >> (4 * (i / 16))) & 15; }

__device__ __forceinline__ int bit_of(const u8* bytes, int i) { return (bytes[i / 8] >> (i % 8)) & 1; }

// Code i of a group of 16 among 256 codes of 2 bits.
__device__ __forceinline__ int crumb(const u8* bytes, int group, int i) {
    return (bytes[32 * (group / 8) + 16 * (group % 2) + i] >> (2 * (group % 8 / 2))) & 3;
}

// Scale and minimum of one of 8 groups, 6 bits each.
__device__ __forceinline__ void scale_and_minimum(const u8* packed, int group, int* scale, int* minimum) {
    if (group < 4) {
        *scale = packed[group] & 63;
        *minimum = packed[group + 4] & 63;
        return;
    }
    int lower = packed[group + 4];
    *scale = (lower & 15) | ((packed[group - 4] >> 6) << 4);
    *minimum = (lower >> 4) | ((packed[group] >> 6) << 4);
}

// Value i of a block; `kind` is ggml's number of the type.
__device__ float decode(int kind, const u8* block, int i) {
    switch (kind) {
    case 0:  // F32
        return __uint_as_float((u32)block[0] | (u32)block[1] << 8 | (u32)block[2] << 16 | (u32)block[3] << 24);
    case 1:  // F16
        return half_at(block, 0);
    case 30:  // BF16
        return bf16_to_float((u16)(block[0] | (block[1] << 8)));
    case 2:  // Q4_0
        return __fmul_rn((float)(nibble(block + 2, i) - 8), half_at(block, 0));
    case 3:  // Q4_1
        return __fadd_rn(__fmul_rn((float)nibble(block + 4, i), half_at(block, 0)), half_at(block, 2));
    case 6:  // Q5_0
        return __fmul_rn((float)((nibble(block + 6, i) | (bit_of(block + 2, i) << 4)) - 16), half_at(block, 0));
    case 7:  // Q5_1
        return __fadd_rn(
            __fmul_rn((float)(nibble(block + 8, i) | (bit_of(block + 4, i) << 4)), half_at(block, 0)),
            half_at(block, 2));
    case 8:  // Q8_0
        return __fmul_rn((float)(signed char)block[2 + i], half_at(block, 0));
    case 10: {  // Q2_K
        int group = i / 16;
        float scale = __fmul_rn(half_at(block, 80), (float)(block[group] & 15));
        float minimum = __fmul_rn(half_at(block, 82), (float)(block[group] >> 4));
        return __fsub_rn(__fmul_rn(scale, (float)crumb(block + 16, group, i % 16)), minimum);
    }
    case 11: {  // Q3_K
        int group = i / 16;
        const u8* scales = block + 96;
        int lower = (scales[group % 8] >> (4 * (group / 8))) & 15;
        int upper = (scales[8 + group % 4] >> (2 * (group / 4))) & 3;
        float scale = __fmul_rn(half_at(block, 108), (float)((lower | (upper << 4)) - 32));
        int third = (block[16 * (group % 2) + i % 16] >> (group / 2)) & 1;
        int code = (crumb(block + 32, group, i % 16) | (third << 2)) - 4;
        return __fmul_rn(scale, (float)code);
    }
    case 12:    // Q4_K
    case 13: {  // Q5_K
        int group = i / 32, low, high;
        scale_and_minimum(block + 4, group, &low, &high);
        float scale = __fmul_rn(half_at(block, 0), (float)low);
        float minimum = __fmul_rn(half_at(block, 2), (float)high);
        const u8* nibbles = block + (kind == 12 ? 16 : 48);
        int code = (nibbles[32 * (group / 2) + i % 32] >> (4 * (group % 2))) & 15;
        if (kind == 13) code |= ((block[16 + i % 32] >> group) & 1) << 4;
        return __fsub_rn(__fmul_rn(scale, (float)code), minimum);
    }
    case 14: {  // Q6_K
        int group = i / 16;
        float scale = __fmul_rn(half_at(block, 208), (float)(signed char)block[192 + group]);
        int first = 64 * (group / 8) + 16 * (group % 4);
        int lower = (block[first + i % 16] >> (4 * (group % 8 / 4))) & 15;
        int code = (lower | (crumb(block + 128, group, i % 16) << 4)) - 32;
        return __fmul_rn(scale, (float)code);
    }
    case 15: {  // Q8_K
        float d = __uint_as_float((u32)block[0] | (u32)block[1] << 8 | (u32)block[2] << 16 | (u32)block[3] << 24);
        return __fmul_rn(d, (float)(signed char)block[4 + i]);
    }
    default:
        return __uint_as_float(0x7fffffffu);
    }
}

// Rows of a table: `tokens` picks them, or, if it is null, the first `rows` in order.
extern "C" __global__ void dequantise(
    int kind, int block_width, int block_bytes, const u8* table, const u32* tokens, u64 rows, u64 width, float* out) {
    u64 row_bytes = width / block_width * block_bytes;
    for (u64 index = first_index(); index < rows * width; index += all_threads()) {
        u64 row = index / width, column = index % width;
        u64 source = tokens ? tokens[row] : row;
        const u8* block = table + source * row_bytes + column / block_width * block_bytes;
        out[index] = decode(kind, block, (int)(column % block_width));
    }
}
