// The bit layout of int6 on the CPU and the GPU. Codes are 6-bit two's-complement numbers, packed one after another,
// lowest bit first.
//
//   byte        0                 1                 2
//   bit   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
//   code  1 1 0 0 0 0 0 0   2 2 2 2 1 1 1 1   3 3 3 3 3 3 2 2
//
// Code i is in bits [6i, 6i + 6). Four codes take three bytes. Unused bits of the last byte are zero.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GOLF_INLINE __host__ __device__ __forceinline__
#else
#define GOLF_INLINE inline __attribute__((always_inline))
#endif

namespace golf {

constexpr float kInt6FakeLimit = 31.0f;

GOLF_INLINE int64_t int6_bytes(int64_t count) { return count / 4 * 3 + (count % 4 * 6 + 7) / 8; }

// packs four int8 codes of one word into 24 bits
GOLF_INLINE uint32_t int6_squeeze(uint32_t codes) {
    uint32_t pairs = (codes & 0x003f003fu) | ((codes >> 2) & 0x0fc00fc0u);
    return (pairs & 0x00000fffu) | ((pairs >> 4) & 0x00fff000u);
}

// unpacks the lower 24 bits into four sign-extended int8 codes in one word
GOLF_INLINE uint32_t int6_spread(uint32_t bits) {
    uint32_t pairs = (bits & 0x00000fffu) | ((bits << 4) & 0x0fff0000u);
    uint32_t codes = (pairs & 0x003f003fu) | ((pairs << 2) & 0x3f003f00u);
    uint32_t signs = codes & 0x20202020u;
    return codes | (signs << 1) | (signs << 2);
}

// returns a word with a nonzero byte for each code outside -32..31, that is, whose bits 5, 6 and 7 are not all equal
GOLF_INLINE uint32_t int6_out_of_range(uint32_t codes) { return (codes ^ (codes >> 1)) & 0x60606060u; }

}  // namespace golf
