// Runs CUDA sources on a CPU. The threads of a block are threads of this process, and blocks run one after another.
// Include this header before a source. Its launches `kernel<<<grid, threads, 0, stream>>>(…)` must have been replaced
// by `host_launch(grid, threads, [&] { kernel(…); })`; nothing else changes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <barrier>
#include <cmath>
#include <mutex>
#include <thread>
#include <vector>

// all threads of a block share this memory; a block finds in it what the previous block left, as on a GPU
#undef __shared__
#define __shared__ static
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

inline thread_local uint3 threadIdx, blockIdx;
inline std::barrier<>* host_barrier = nullptr;
inline std::mutex host_mutex;

inline void __syncthreads() { host_barrier->arrive_and_wait(); }

// operations that are rounded one by one; the compiler is told not to contract them
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
                    // the other threads do not wait for a thread that has left the kernel
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
