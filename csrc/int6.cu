// int6 on the GPU. A thread block takes a chunk of 4,096 codes and moves its 3,072 packed bytes through shared memory.
// So every access to device memory is 16 bytes wide and coalesced.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "int6.h"
#include "launchers.h"

namespace {

using golf::int6_bytes;

constexpr int kThreads = 256;
constexpr int kChunk = 16 * kThreads;
constexpr int kChunkBytes = kChunk / 4 * 3;
// most matrices per launch: their table must fit in the 4 KB of kernel arguments that every driver takes
constexpr int kMatrices = 80;

// with at most this many columns, a column plus an offset within a chunk fits in 32 bits
constexpr int64_t kMaxColumns = 2147483647;

struct Table {
    GolfInt6Matrix matrices[kMatrices];
    int first_block[kMatrices + 1];
    int count;
};
static_assert(sizeof(Table) + 16 <= 4096, "kernel arguments are limited to 4 KB");

int64_t blocks_of(int64_t count) { return (count + kChunk - 1) / kChunk; }

// a chunk's packed bytes, and one more quad so that the last group, too, can be read as two words
struct Staged {
    uint4 quads[kChunkBytes / 16 + 1];
    __device__ uint32_t* words() { return reinterpret_cast<uint32_t*>(quads); }
};

__device__ void read_chunk(Staged& staged, const uint8_t* packed, int64_t bytes) {
    const int first = threadIdx.x * 16;
    if (first >= kChunkBytes) return;
    uint4 quad = {0, 0, 0, 0};
    if (first + 16 <= bytes) {
        quad = *reinterpret_cast<const uint4*>(packed + first);
    } else {
        uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            if (first + k < bytes) words[k / 4] |= static_cast<uint32_t>(packed[first + k]) << (k % 4 * 8);
        }
        quad = {words[0], words[1], words[2], words[3]};
    }
    staged.quads[threadIdx.x] = quad;
}

// returns the 24 bits of a chunk's group number `group`; a group is four codes
__device__ uint32_t group_bits(const uint32_t* words, int group) {
    const int bit = 24 * group;
    return __funnelshift_r(words[bit / 32], words[bit / 32 + 1], bit % 32);
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* codes, uint8_t* packed, int64_t count, unsigned long long* first_bad) {
    __shared__ Staged staged;
    const int64_t first = blockIdx.x * static_cast<int64_t>(kChunk) + threadIdx.x * 16;
    uint32_t words[4] = {0, 0, 0, 0};
    if (first + 16 <= count) {
        const uint4 quad = *reinterpret_cast<const uint4*>(codes + first);
        words[0] = quad.x, words[1] = quad.y, words[2] = quad.z, words[3] = quad.w;
    } else {
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            if (first + k < count) words[k / 4] |= static_cast<uint32_t>(codes[first + k]) << (k % 4 * 8);
        }
    }
    uint32_t bits[4];
    int64_t bad = -1;
#pragma unroll
    for (int k = 3; k >= 0; --k) {
        const uint32_t out_of_range = golf::int6_out_of_range(words[k]);
        if (out_of_range) bad = first + 4 * k + (__ffs(out_of_range) - 1) / 8;
        bits[k] = golf::int6_squeeze(words[k]);
    }
    if (bad >= 0) atomicMin(first_bad, static_cast<unsigned long long>(bad));
    uint32_t* target = staged.words() + 3 * threadIdx.x;
    target[0] = bits[0] | bits[1] << 24;
    target[1] = bits[1] >> 8 | bits[2] << 16;
    target[2] = bits[2] >> 16 | bits[3] << 8;
    __syncthreads();

    const int64_t base = blockIdx.x * static_cast<int64_t>(kChunkBytes);
    const int64_t bytes = int6_bytes(count) - base;
    const int offset = threadIdx.x * 16;
    if (offset >= kChunkBytes) return;
    if (offset + 16 <= bytes) {
        *reinterpret_cast<uint4*>(packed + base + offset) = staged.quads[threadIdx.x];
    } else {
        const auto* tail = reinterpret_cast<const uint8_t*>(staged.quads);
        for (int k = offset; k < bytes; ++k) packed[base + k] = tail[k];
    }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const uint8_t* packed, uint8_t* codes, int64_t count) {
    __shared__ Staged staged;
    const int64_t base = blockIdx.x * static_cast<int64_t>(kChunkBytes);
    read_chunk(staged, packed + base, int6_bytes(count) - base);
    __syncthreads();

    const int64_t first = blockIdx.x * static_cast<int64_t>(kChunk) + threadIdx.x * 16;
    const int group = threadIdx.x * 4;
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) words[k] = golf::int6_spread(group_bits(staged.words(), group + k));
    if (first + 16 <= count) {
        *reinterpret_cast<uint4*>(codes + first) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            if (first + k < count) codes[first + k] = static_cast<uint8_t>(words[k / 4] >> (k % 4 * 8));
        }
    }
}

__device__ float read_scale(const void* scales, int64_t row, int dtype) {
    if (dtype == GOLF_FLOAT16) return __half2float(static_cast<const __half*>(scales)[row]);
    if (dtype == GOLF_BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(scales)[row]);
    return static_cast<const float*>(scales)[row];
}

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void from_float(float* target, float value) { *target = value; }
__device__ void from_float(__half* target, float value) { *target = __float2half_rn(value); }
__device__ void from_float(__nv_bfloat16* target, float value) { *target = __float2bfloat16_rn(value); }

// 16 bytes of values, the unit of a coalesced access
template <typename Value>
struct alignas(16) Pack {
    static constexpr int kSize = 16 / sizeof(Value);
    Value values[kSize];
};

// row and column of a chunk's first element; a block divides in 64 bits once, so that its threads divide in 32 bits
struct Origin {
    int64_t row;
    uint32_t column;
};

__device__ Origin origin_of(int64_t element, int64_t columns) {
    return {element / columns, static_cast<uint32_t>(element % columns)};
}

// calls body(k, scale) for each element k of a Pack; its elements may be in several rows
template <int kSize, typename ReadScale, typename Body>
__device__ void for_each_scaled(const Origin& origin, uint32_t local, uint32_t columns, int64_t rows,
                                ReadScale read, Body body) {
    const uint32_t offset = origin.column + local;
    int64_t row = origin.row + offset / columns;
    uint32_t column = offset % columns;
    float scale = read(row);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
        body(k, scale);
        if (++column == columns) {
            column = 0;
            if (++row < rows) scale = read(row);
        }
    }
}

template <typename Value>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Table table, int scale_dtype) {
    constexpr int kSize = Pack<Value>::kSize;
    __shared__ Staged staged;
    __shared__ Origin origin;
    int low = 0, high = table.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.first_block[middle] <= static_cast<int>(blockIdx.x)) low = middle;
        else high = middle;
    }
    const GolfInt6Matrix& matrix = table.matrices[low];
    const int64_t chunk = static_cast<int>(blockIdx.x) - table.first_block[low];
    const int64_t count = matrix.rows * matrix.columns;
    read_chunk(staged, static_cast<const uint8_t*>(matrix.packed) + chunk * kChunkBytes,
               int6_bytes(count) - chunk * kChunkBytes);
    if (threadIdx.x == 0) origin = origin_of(chunk * kChunk, matrix.columns);
    __syncthreads();

    const int64_t left = count - chunk * kChunk;
    Value* values = static_cast<Value*>(matrix.values) + chunk * kChunk;
    for (int local = threadIdx.x * kSize; local < kChunk && local < left; local += kThreads * kSize) {
        uint32_t words[kSize / 4];
#pragma unroll
        for (int k = 0; k < kSize / 4; ++k) words[k] = golf::int6_spread(group_bits(staged.words(), local / 4 + k));
        Pack<Value> pack;
        for_each_scaled<kSize>(
            origin, local, static_cast<uint32_t>(matrix.columns), matrix.rows,
            [&](int64_t row) { return read_scale(matrix.scales, row, scale_dtype); },
            [&](int k, float scale) {
                const auto code = static_cast<int8_t>(words[k / 4] >> (k % 4 * 8));
                from_float(&pack.values[k], scale * static_cast<float>(code));
            });
        if (local + kSize <= left) {
            *reinterpret_cast<Pack<Value>*>(values + local) = pack;
        } else {
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                if (local + k < left) values[local + k] = pack.values[k];
            }
        }
    }
}

template <typename Value>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_kernel(const Value* weight, const float* scales, Value* result, int64_t rows, int64_t columns) {
    constexpr int kSize = Pack<Value>::kSize;
    __shared__ Origin origin;
    const int64_t base = blockIdx.x * static_cast<int64_t>(kChunk);
    if (threadIdx.x == 0) origin = origin_of(base, columns);
    __syncthreads();

    const int64_t left = rows * columns - base;
    for (int local = threadIdx.x * kSize; local < kChunk && local < left; local += kThreads * kSize) {
        const bool whole = local + kSize <= left;
        Pack<Value> pack;
        if (whole) {
            pack = *reinterpret_cast<const Pack<Value>*>(weight + base + local);
        } else {
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                if (local + k < left) pack.values[k] = weight[base + local + k];
            }
        }
        for_each_scaled<kSize>(
            origin, local, static_cast<uint32_t>(columns), rows, [&](int64_t row) { return scales[row]; },
            [&](int k, float scale) {
                float ratio = to_float(pack.values[k]) / scale;
                // comparisons, because fminf would turn a NaN into the limit
                ratio = ratio < -golf::kInt6FakeLimit ? -golf::kInt6FakeLimit : ratio;
                ratio = ratio > golf::kInt6FakeLimit ? golf::kInt6FakeLimit : ratio;
                from_float(&pack.values[k], rintf(ratio) * scale);
            });
        if (whole) {
            *reinterpret_cast<Pack<Value>*>(result + base + local) = pack;
        } else {
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                if (local + k < left) result[base + local + k] = pack.values[k];
            }
        }
    }
}

template <typename Value>
int dequantize(const GolfInt6Matrix* matrices, int64_t count, int scale_dtype, cudaStream_t stream) {
    Table table;
    table.count = 0;
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (matrices[i].columns > kMaxColumns) return cudaErrorInvalidValue;
        const int64_t elements = matrices[i].rows * matrices[i].columns;
        if (elements > 0) {
            table.matrices[table.count] = matrices[i];
            table.first_block[table.count++] = static_cast<int>(blocks);
            blocks += blocks_of(elements);
        }
        if (table.count == kMatrices || (i + 1 == count && table.count > 0)) {
            dequantize_kernel<Value><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table, scale_dtype);
            const int error = cudaGetLastError();
            if (error != cudaSuccess) return error;
            table.count = 0;
            blocks = 0;
        }
    }
    return cudaSuccess;
}

template <typename Value>
int fake_quantize(const void* weight, const void* scales, void* result, int64_t rows, int64_t columns,
                  cudaStream_t stream) {
    if (columns > kMaxColumns) return cudaErrorInvalidValue;
    if (rows * columns == 0) return cudaSuccess;
    fake_quantize_kernel<Value><<<static_cast<unsigned>(blocks_of(rows * columns)), kThreads, 0, stream>>>(
        static_cast<const Value*>(weight), static_cast<const float*>(scales), static_cast<Value*>(result), rows,
        columns);
    return cudaGetLastError();
}

}  // namespace

extern "C" int golf_int6_pack_cuda(const void* codes, void* packed, int64_t count, void* first_bad, void* stream) {
    if (count == 0) return cudaSuccess;
    pack_kernel<<<static_cast<unsigned>(blocks_of(count)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const uint8_t*>(codes), static_cast<uint8_t*>(packed), count,
        static_cast<unsigned long long*>(first_bad));
    return cudaGetLastError();
}

extern "C" int golf_int6_unpack_cuda(const void* packed, void* codes, int64_t count, void* stream) {
    if (count == 0) return cudaSuccess;
    unpack_kernel<<<static_cast<unsigned>(blocks_of(count)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const uint8_t*>(packed), static_cast<uint8_t*>(codes), count);
    return cudaGetLastError();
}

extern "C" int golf_int6_dequantize_cuda(const void* matrices, int64_t count, int scale_dtype, int value_dtype,
                                         void* stream) {
    const auto* list = static_cast<const GolfInt6Matrix*>(matrices);
    const auto queue = static_cast<cudaStream_t>(stream);
    if (value_dtype == GOLF_FLOAT32) return dequantize<float>(list, count, scale_dtype, queue);
    if (value_dtype == GOLF_FLOAT16) return dequantize<__half>(list, count, scale_dtype, queue);
    if (value_dtype == GOLF_BFLOAT16) return dequantize<__nv_bfloat16>(list, count, scale_dtype, queue);
    return cudaErrorInvalidValue;
}

extern "C" int golf_int6_fake_quantize_cuda(const void* weight, const void* scales, void* result, int64_t rows,
                                            int64_t columns, int dtype, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    if (dtype == GOLF_FLOAT32) return fake_quantize<float>(weight, scales, result, rows, columns, queue);
    if (dtype == GOLF_FLOAT16) return fake_quantize<__half>(weight, scales, result, rows, columns, queue);
    if (dtype == GOLF_BFLOAT16) return fake_quantize<__nv_bfloat16>(weight, scales, result, rows, columns, queue);
    return cudaErrorInvalidValue;
}

extern "C" int golf_cuda_probe() {
    cudaFuncAttributes attributes;
    const int error = cudaFuncGetAttributes(&attributes, unpack_kernel);
    // clears the error; otherwise the next launch would report it
    cudaGetLastError();
    return error;
}

extern "C" const char* golf_cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
