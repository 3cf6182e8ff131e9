// Absmax, scales and codes: `emulated/quantize.rs`.

// The largest magnitude of all values, as bits, into *most, which starts at 0. Magnitudes
// order like their bits, and every NaN lies above infinity.
extern "C" __global__ void absmax_all(const float* x, u64 count, u32* most) {
    u32 largest = 0;
    for (u64 index = first_index(); index < count; index += all_threads()) {
        u32 magnitude = __float_as_uint(x[index]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int half = 16; half > 0; half /= 2) {
        u32 other = __shfl_down_sync(0xffffffffu, largest, half);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % 32 == 0) atomicMax(most, largest);
}

// The same for groups of `group_rows` by `group_width` values, one block of threads each;
// groups are numbered row by row. `most` starts at 0.
extern "C" __global__ void absmax_groups(
    const float* x, u64 rows, u64 width, u64 group_rows, u64 group_width, u32* most) {
    u64 across = (width + group_width - 1) / group_width;
    u64 first_row = blockIdx.x / across * group_rows, first_column = blockIdx.x % across * group_width;
    u64 last_row = first_row + group_rows < rows ? first_row + group_rows : rows;
    u64 columns = first_column + group_width < width ? group_width : width - first_column;
    u32 largest = 0;
    for (u64 index = threadIdx.x; index < (last_row - first_row) * columns; index += blockDim.x) {
        u64 place = (first_row + index / columns) * width + first_column + index % columns;
        u32 magnitude = __float_as_uint(x[place]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int half = 16; half > 0; half /= 2) {
        u32 other = __shfl_down_sync(0xffffffffu, largest, half);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % 32 == 0) atomicMax(most + blockIdx.x, largest);
}

// absmax / largest finite value, and 1 where absmax is 0.
extern "C" __global__ void scales(const u32* most, u64 count, float max_finite, float* scale) {
    for (u64 index = first_index(); index < count; index += all_threads())
        scale[index] = most[index] ? __fdiv_rn(__uint_as_float(most[index]), max_finite) : 1.0f;
}

// Codes of `rows` rows, each padded with zeros to `padded` codes.
extern "C" __global__ void convert(
    int format, const float* x, u64 rows, u64 width, u64 padded, int granularity, u64 group_rows, const float* scale,
    void* codes) {
    u64 across = (width + BLOCK_WIDTH - 1) / BLOCK_WIDTH;
    for (u64 index = first_index(); index < rows * padded; index += all_threads()) {
        u64 row = index / padded, column = index % padded;
        float value = 0.0f;
        if (column < width) {
            u64 place = granularity == SCALE_TENSOR ? 0
                : granularity == SCALE_ROW          ? row
                                                    : row / group_rows * across + column / BLOCK_WIDTH;
            value = __fdiv_rn(x[row * width + column], scale[place]);
        }
        switch (format) {
        case FORMAT_E4M3: ((u8*)codes)[index] = float_to_e4m3(value); break;
        case FORMAT_E5M2: ((u8*)codes)[index] = float_to_e5m2(value); break;
        case FORMAT_INT8: ((u8*)codes)[index] = float_to_int8(value); break;
        case FORMAT_BF16: ((u16*)codes)[index] = float_to_bf16(value); break;
        case FORMAT_F16: ((u16*)codes)[index] = float_to_half(value); break;
        default: ((float*)codes)[index] = value; break;
        }
    }
}
