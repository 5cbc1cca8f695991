// The whole interface between Python and the native code. The functions take addresses, 64-bit sizes and, for CUDA, a
// stream. They return 0 or an error code. No function allocates memory, waits for the GPU or keeps a pointer.
#pragma once

#include <cstdint>

// version of this interface; ABI in golf_kernels/native.py must be the same number
#define GOLF_ABI 2

extern "C" {

enum GolfDtype : int { GOLF_FLOAT32 = 0, GOLF_FLOAT16 = 1, GOLF_BFLOAT16 = 2, GOLF_FLOAT64 = 3 };

// error codes of the CPU functions; CUDA functions return a cudaError_t
enum GolfError : int { GOLF_OK = 0, GOLF_UNSUPPORTED_DTYPE = 1, GOLF_UNSUPPORTED_SIZE = 2 };

// a matrix of 6-bit codes with one scale per row
struct GolfInt6Matrix {
    const void* packed;  // ceil(6 * rows * columns / 8) bytes
    const void* scales;  // rows values
    void* values;        // rows * columns values
    int64_t rows;
    int64_t columns;
};

// first_bad: int64, receives the index of the first code outside -32..31; unchanged if there is none
int golf_int6_pack_cpu(const void* codes, void* packed, int64_t count, void* first_bad);
int golf_int6_unpack_cpu(const void* packed, void* codes, int64_t count);
int golf_int6_dequantize_cpu(const void* matrices, int64_t count, int scale_dtype, int value_dtype);
int golf_int6_fake_quantize_cpu(const void* weight, const void* scales, void* result, int64_t rows, int64_t columns);

// all addresses are on the GPU and 16-byte aligned, except `matrices`, which the function reads on the host at once
int golf_int6_pack_cuda(const void* codes, void* packed, int64_t count, void* first_bad, void* stream);
int golf_int6_unpack_cuda(const void* packed, void* codes, int64_t count, void* stream);
int golf_int6_dequantize_cuda(const void* matrices, int64_t count, int scale_dtype, int value_dtype, void* stream);
int golf_int6_fake_quantize_cuda(const void* weight, const void* scales, void* result, int64_t rows, int64_t columns,
                                 int dtype, void* stream);

// most columns of a block that GPTQ's functions take
#define GOLF_GPTQ_MAX_COLUMNS 128

// shapes: work, codes and errors (batch, columns, rows), lower (batch, columns, columns), scales (batch, rows)
// codes is int8; the other arrays are all float32 or all float64
int golf_gptq_block_cpu(const void* work, const void* lower, const void* scales, void* codes, void* errors,
                        int64_t batch, int64_t columns, int64_t rows, int limit, int dtype);
int golf_gptq_block_cuda(const void* work, const void* lower, const void* scales, void* codes, void* errors,
                         int64_t batch, int64_t columns, int64_t rows, int limit, int dtype, void* stream);

// returns 0 if the kernels of this build can run on the current GPU, otherwise a cudaError_t
int golf_cuda_probe();
const char* golf_cuda_error_text(int error);
}
