// GPTQ's inner loop on one CPU core. It takes a tile of rows at a time, so that the tile's errors stay in the L1 cache.
#include <cstring>

#include "launchers.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GOLF_HAVE_AVX2 1
#define GOLF_AVX2 __attribute__((target("avx2")))
#endif
#define GOLF_ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kVectors = 8;

// adding and subtracting 1.5 * 2^(mantissa bits) rounds to the nearest integer, halves to even, on every CPU
constexpr float rounder(float) { return 12582912.0f; }
constexpr double rounder(double) { return 6755399441055744.0; }

template <typename Value>
struct Tile {
    typedef Value Vector __attribute__((vector_size(32)));
    static constexpr int kLanes = 32 / sizeof(Value);
    static constexpr int kRows = kVectors * kLanes;
};

struct Block {
    const void* work;
    const void* lower;
    const void* scales;
    int8_t* codes;
    void* errors;
    int64_t columns;
    int64_t rows;
    int limit;
};

// rounds rows [first, first + count) of one block; fills an incomplete tile with zero weights and scales of one
template <typename Value>
GOLF_ALWAYS_INLINE void round_tile(const Block& block, int64_t first, int64_t count) {
    using Vector = typename Tile<Value>::Vector;
    constexpr int kLanes = Tile<Value>::kLanes, kRows = Tile<Value>::kRows;
    alignas(64) Vector kept[GOLF_GPTQ_MAX_COLUMNS * kVectors];
    alignas(64) Value scales[kRows], column[kRows];
    const auto* work = static_cast<const Value*>(block.work) + first;
    auto* errors = static_cast<Value*>(block.errors) + first;
    const Value limit = static_cast<Value>(block.limit), half_up = rounder(Value());
    for (int r = 0; r < kRows; ++r) scales[r] = 1, column[r] = 0;
    std::memcpy(scales, static_cast<const Value*>(block.scales) + first, count * sizeof(Value));
    for (int64_t j = 0; j < block.columns; ++j) {
        const Value* factors = static_cast<const Value*>(block.lower) + j * block.columns;
        std::memcpy(column, work + j * block.rows, count * sizeof(Value));
        Vector sums[kVectors];
        std::memcpy(sums, column, sizeof(sums));
        for (int64_t i = 0; i < j; ++i) {
            const Value factor = factors[i];
            for (int v = 0; v < kVectors; ++v) sums[v] -= factor * kept[i * kVectors + v];
        }
        std::memcpy(column, sums, sizeof(sums));
        alignas(64) Value rounded[kRows], error[kRows];
        for (int r = 0; r < kRows; ++r) {
            Value ratio = column[r] / scales[r];
            ratio = ratio < -limit ? -limit : ratio;
            ratio = ratio > limit ? limit : ratio;
            rounded[r] = (ratio + half_up) - half_up;
            error[r] = (column[r] - rounded[r] * scales[r]) / factors[j];
        }
        std::memcpy(kept + j * kVectors, error, sizeof(error));
        std::memcpy(errors + j * block.rows, error, count * sizeof(Value));
        int8_t* codes = block.codes + j * block.rows + first;
        // the conversion of NaN is undefined; its error is NaN
        for (int r = 0; r < count; ++r) codes[r] = static_cast<int8_t>(rounded[r] == rounded[r] ? rounded[r] : 0);
    }
    static_assert(sizeof(Vector) == kLanes * sizeof(Value));
}

template <typename Value>
GOLF_ALWAYS_INLINE void round_block(const Block& block) {
    constexpr int64_t kRows = Tile<Value>::kRows;
    for (int64_t first = 0; first < block.rows; first += kRows) {
        round_tile<Value>(block, first, block.rows - first < kRows ? block.rows - first : kRows);
    }
}

using RoundBlock = void (*)(const Block&);

#ifdef GOLF_HAVE_AVX2
GOLF_AVX2 void round_float32_avx2(const Block& block) { round_block<float>(block); }
GOLF_AVX2 void round_float64_avx2(const Block& block) { round_block<double>(block); }
#endif
void round_float32_plain(const Block& block) { round_block<float>(block); }
void round_float64_plain(const Block& block) { round_block<double>(block); }

RoundBlock chosen(int dtype) {
#ifdef GOLF_HAVE_AVX2
    static const bool have_avx2 = (__builtin_cpu_init(), __builtin_cpu_supports("avx2"));
    if (have_avx2) return dtype == GOLF_FLOAT32 ? round_float32_avx2 : round_float64_avx2;
#endif
    return dtype == GOLF_FLOAT32 ? round_float32_plain : round_float64_plain;
}

}  // namespace

extern "C" int golf_gptq_block_cpu(const void* work, const void* lower, const void* scales, void* codes, void* errors,
                                   int64_t batch, int64_t columns, int64_t rows, int limit, int dtype) {
    if (dtype != GOLF_FLOAT32 && dtype != GOLF_FLOAT64) return GOLF_UNSUPPORTED_DTYPE;
    if (columns > GOLF_GPTQ_MAX_COLUMNS) return GOLF_UNSUPPORTED_SIZE;
    const int64_t size = dtype == GOLF_FLOAT32 ? 4 : 8;
    const RoundBlock round = chosen(dtype);
    for (int64_t b = 0; b < batch; ++b) {
        round({static_cast<const char*>(work) + b * columns * rows * size,
               static_cast<const char*>(lower) + b * columns * columns * size,
               static_cast<const char*>(scales) + b * rows * size, static_cast<int8_t*>(codes) + b * columns * rows,
               static_cast<char*>(errors) + b * columns * rows * size, columns, rows, limit});
    }
    return GOLF_OK;
}
