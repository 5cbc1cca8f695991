// GPTQ's inner loop on the GPU. Each thread takes one row and keeps the row's errors in shared memory. Each product,
// difference and quotient is rounded separately, as on the CPU; the compiler must not fuse them.
#include <cuda_runtime.h>

#include "launchers.h"

namespace {

constexpr int kSharedBytes = 32 * 1024;

__device__ float minus_product(float a, float b, float c) { return __fsub_rn(a, __fmul_rn(b, c)); }
__device__ double minus_product(double a, double b, double c) { return __dsub_rn(a, __dmul_rn(b, c)); }
__device__ float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ double quotient(double a, double b) { return __ddiv_rn(a, b); }
__device__ float nearest(float value) { return rintf(value); }
__device__ double nearest(double value) { return rint(value); }

template <typename Value>
constexpr int kRows = kSharedBytes / sizeof(Value) / GOLF_GPTQ_MAX_COLUMNS;

template <typename Value>
__global__ void __launch_bounds__(kRows<Value>)
    block_kernel(const Value* __restrict__ work, const Value* __restrict__ lower, const Value* __restrict__ scales,
                 signed char* __restrict__ codes, Value* __restrict__ errors, int columns, int64_t rows, Value limit) {
    __shared__ Value kept[GOLF_GPTQ_MAX_COLUMNS][kRows<Value>];
    const int64_t row = blockIdx.x * static_cast<int64_t>(kRows<Value>) + threadIdx.x;
    // a thread without a row may return, because no thread waits for another
    if (row >= rows) return;
    const int64_t matrix = blockIdx.y;
    const int64_t offset = matrix * columns * rows + row;
    lower += matrix * columns * columns;
    const Value scale = scales[matrix * rows + row];
    for (int j = 0; j < columns; ++j) {
        const Value* factors = lower + j * columns;
        Value value = work[offset + j * rows];
#pragma unroll 8
        for (int i = 0; i < j; ++i) value = minus_product(value, factors[i], kept[i][threadIdx.x]);
        Value ratio = quotient(value, scale);
        ratio = ratio < -limit ? -limit : ratio;
        ratio = ratio > limit ? limit : ratio;
        const Value rounded = nearest(ratio);
        const Value error = quotient(minus_product(value, rounded, scale), factors[j]);
        kept[j][threadIdx.x] = error;
        errors[offset + j * rows] = error;
        codes[offset + j * rows] = static_cast<signed char>(rounded);
    }
}

template <typename Value>
int launch(const void* work, const void* lower, const void* scales, void* codes, void* errors, int64_t batch,
           int64_t columns, int64_t rows, int limit, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((rows + kRows<Value> - 1) / kRows<Value>), static_cast<unsigned>(batch));
    block_kernel<Value><<<grid, kRows<Value>, 0, stream>>>(
        static_cast<const Value*>(work), static_cast<const Value*>(lower), static_cast<const Value*>(scales),
        static_cast<signed char*>(codes), static_cast<Value*>(errors), static_cast<int>(columns), rows,
        static_cast<Value>(limit));
    return cudaGetLastError();
}

}  // namespace

extern "C" int golf_gptq_block_cuda(const void* work, const void* lower, const void* scales, void* codes, void* errors,
                                    int64_t batch, int64_t columns, int64_t rows, int limit, int dtype, void* stream) {
    if (batch * columns * rows == 0) return cudaSuccess;
    // the grid's second dimension, the batch, has 16 bits
    if (columns > GOLF_GPTQ_MAX_COLUMNS || batch > 65535) return cudaErrorInvalidValue;
    const auto queue = static_cast<cudaStream_t>(stream);
    if (dtype == GOLF_FLOAT32) return launch<float>(work, lower, scales, codes, errors, batch, columns, rows, limit, queue);
    if (dtype == GOLF_FLOAT64) return launch<double>(work, lower, scales, codes, errors, batch, columns, rows, limit, queue);
    return cudaErrorInvalidValue;
}
