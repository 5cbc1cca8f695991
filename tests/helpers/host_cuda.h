// CUDA sources as they stand, run on a CPU: the threads of a block are threads of this process, and blocks follow one
// another. Included before a source whose launches `kernel<<<grid, threads, 0, stream>>>(…)` have become
// `host_launch(grid, threads, [&] { kernel(…); })`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <barrier>
#include <cmath>
#include <mutex>
#include <thread>
#include <vector>

// one for all threads of a block; blocks find what the one before left in it, as on a GPU
#undef __shared__
#define __shared__ static
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

inline thread_local uint3 threadIdx, blockIdx;
inline std::barrier<>* host_barrier = nullptr;
inline std::mutex host_mutex;

inline void __syncthreads() { host_barrier->arrive_and_wait(); }

// arithmetic that is rounded on its own; the compiler is told not to contract it either
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline void atomicMin(unsigned long long* place, unsigned long long value) {
    const std::lock_guard lock(host_mutex);
    if (value < *place) *place = value;
}

template <typename Body>
void host_launch(dim3 grid, int threads, Body body) {
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            std::barrier<> barrier(threads);
            host_barrier = &barrier;
            std::vector<std::thread> block;
            for (int thread = 0; thread < threads; ++thread) {
                block.emplace_back([&, thread] {
                    threadIdx = {static_cast<unsigned>(thread), 0, 0};
                    blockIdx = {x, y, 0};
                    body();
                    // who has left a kernel is waited for no more
                    barrier.arrive_and_drop();
                });
            }
            for (auto& thread : block) thread.join();
        }
    }
}

extern "C" {
inline cudaError_t host_last_error() { return cudaSuccess; }
}
#define cudaGetLastError host_last_error
#define cudaGetErrorString(error) "on the host"
#define cudaFuncGetAttributes(attributes, kernel) cudaSuccess
