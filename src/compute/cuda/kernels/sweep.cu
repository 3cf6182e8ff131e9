// Operands of `runner chip sweep`, a function of a seed and of a place: `compute/sweep.rs`.

enum Values { VALUES_BELL = 0, VALUES_SPREAD = 1, VALUES_MARKED_X = 2, VALUES_MARKED_W = 3, VALUES_CODES = 4 };

#define MARK_STEP 37

__device__ __forceinline__ u64 mixed(u64 state) {
    u64 z = state + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ u32 encoded(int format, float value) {
    switch (format) {
        case FORMAT_TF32: return __float_as_uint(value) & 0xffffe000u;
        case FORMAT_BF16: return float_to_bf16(value);
        case FORMAT_F16: return float_to_half(value);
        case FORMAT_E4M3: return float_to_e4m3(value);
        case FORMAT_E5M2: return float_to_e5m2(value);
        default: return __float_as_uint(value);
    }
}

__device__ __forceinline__ u32 spread(int format, u32 high, u32 low) {
    u32 sign = high >> 31, some = high & 0xffffu;
    switch (format) {
        case FORMAT_E4M3: return (low & 0x7fu) == 0x7fu ? (low & 0xffu) ^ 1u : low & 0xffu;
        case FORMAT_E5M2: return (low & 0x7cu) == 0x7cu ? (low & 0xffu) ^ 0x40u : low & 0xffu;
        case FORMAT_F16: return sign << 15 | (5 + some % 10) << 10 | (low & 0x3ffu);
        case FORMAT_BF16: return sign << 15 | (111 + some % 32) << 7 | (low & 0x7fu);
        case FORMAT_TF32: return sign << 31 | (111 + some % 32) << 23 | (low & 0x3ffu) << 13;
        default: return sign << 31 | (111 + some % 32) << 23 | (low & 0x7fffffu);
    }
}

// Any finite code: where all bits of the exponent are set, one is not.
__device__ __forceinline__ u32 finite(int format, u32 low) {
    u32 code, exponent, flip;
    switch (format) {
        case FORMAT_E4M3: code = low & 0xffu, exponent = 0x7fu, flip = 1u; break;
        case FORMAT_E5M2: code = low & 0xffu, exponent = 0x7cu, flip = 0x40u; break;
        case FORMAT_F16: code = low & 0xffffu, exponent = 0x7c00u, flip = 0x4000u; break;
        case FORMAT_BF16: code = low & 0xffffu, exponent = 0x7f80u, flip = 0x4000u; break;
        case FORMAT_TF32: code = low & 0xffffe000u, exponent = 0x7f800000u, flip = 0x40000000u; break;
        default: code = low, exponent = 0x7f800000u, flip = 0x40000000u; break;
    }
    return (code & exponent) == exponent ? code ^ flip : code;
}

__device__ __forceinline__ u32 code_at(int format, int values, u64 seed, u64 row, u64 column, u64 width) {
    if (values == VALUES_MARKED_X || values == VALUES_MARKED_W) {
        u64 marked = ((values == VALUES_MARKED_X ? row * MARK_STEP : row) + seed) % width;
        float mark = values == VALUES_MARKED_X ? 1099511627776.0f : -1099511627776.0f;
        return encoded(format, column == marked ? mark : 1.0f);
    }
    u64 hash = mixed(seed ^ (row << 32 | column) * 0xd1342543de82ef95ull);
    u32 high = (u32)(hash >> 32), low = (u32)hash;
    if (values == VALUES_CODES) return finite(format, low);
    if (values == VALUES_SPREAD) return spread(format, high, low);
    int sum = (int)((high >> 16) + (high & 0xffffu) + (low >> 16) + (low & 0xffffu)) - 131070;
    bool narrow = format == FORMAT_E4M3 || format == FORMAT_E5M2;
    return encoded(format, __fmul_rn((float)sum, narrow ? 1.0f / 1024.0f : 1.0f / 65536.0f));
}

extern "C" __global__ void fill_operand(void* codes, int format, int values, u64 seed, u64 rows, u64 width) {
    for (u64 index = first_index(); index < rows * width; index += all_threads()) {
        u32 code = code_at(format, values, seed, index / width, index % width, width);
        if (format == FORMAT_E4M3 || format == FORMAT_E5M2) ((u8*)codes)[index] = (u8)code;
        else if (format == FORMAT_BF16 || format == FORMAT_F16) ((u16*)codes)[index] = (u16)code;
        else ((u32*)codes)[index] = code;
    }
}
