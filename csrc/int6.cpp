// int6 on one CPU core. On aarch64 a compiler can vectorize the plain loops (ld3/st4). Baseline x86-64 has no byte
// shuffle, so AVX2 versions of the loops run there if the processor has AVX2.
#include "int6.h"

#include <cmath>
#include <cstring>

#include "launchers.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define GOLF_HAVE_AVX2 1
#define GOLF_AVX2 __attribute__((target("avx2")))
#define GOLF_AVX512 __attribute__((target("avx512bw")))
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "int6 reads words of the stream as little-endian integers");

namespace {

using golf::int6_bytes;

// number of codes unpacked at a time: a multiple of 32 that fits in the L1 cache
constexpr int64_t kChunk = 2048;

// from this many codes per row on, a table of the row's 64 possible values is cheaper than a product per code
constexpr int64_t kTableRun = 128;

bool pack_plain(const int8_t* __restrict codes, uint8_t* __restrict packed, int64_t count) {
    uint8_t out_of_range = 0;
    const int64_t groups = count / 4;
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t a = codes[4 * g], b = codes[4 * g + 1], c = codes[4 * g + 2], d = codes[4 * g + 3];
        out_of_range |= static_cast<uint8_t>(a + 32) | static_cast<uint8_t>(b + 32) | static_cast<uint8_t>(c + 32) |
                        static_cast<uint8_t>(d + 32);
        packed[3 * g] = static_cast<uint8_t>((a & 63) | (b << 6));
        packed[3 * g + 1] = static_cast<uint8_t>(((b >> 2) & 15) | (c << 4));
        packed[3 * g + 2] = static_cast<uint8_t>(((c >> 4) & 3) | (d << 2));
    }
    uint32_t word = 0;
    for (int64_t i = 4 * groups; i < count; ++i) {
        const uint8_t code = codes[i];
        out_of_range |= static_cast<uint8_t>(code + 32);
        word |= static_cast<uint32_t>(code & 63) << (6 * (i % 4));
    }
    for (int64_t byte = 3 * groups; byte < int6_bytes(count); ++byte, word >>= 8) packed[byte] = word & 255;
    return (out_of_range & 0xc0) != 0;
}

void unpack_plain(const uint8_t* __restrict packed, int8_t* __restrict codes, int64_t count) {
    const int64_t groups = count / 4;
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t a = packed[3 * g], b = packed[3 * g + 1], c = packed[3 * g + 2];
        const uint8_t second = static_cast<uint8_t>(a >> 6) | static_cast<uint8_t>((b & 15) << 2);
        const uint8_t third = static_cast<uint8_t>(b >> 4) | static_cast<uint8_t>((c & 3) << 4);
        codes[4 * g] = static_cast<int8_t>(((a & 63) ^ 32) - 32);
        codes[4 * g + 1] = static_cast<int8_t>((second ^ 32) - 32);
        codes[4 * g + 2] = static_cast<int8_t>((third ^ 32) - 32);
        codes[4 * g + 3] = static_cast<int8_t>(((c >> 2) ^ 32) - 32);
    }
    uint32_t bits = 0;
    for (int64_t byte = int6_bytes(count); byte-- > 3 * groups;) bits = (bits << 8) | packed[byte];
    uint32_t spread = golf::int6_spread(bits);
    for (int64_t i = 4 * groups; i < count; ++i, spread >>= 8) codes[i] = static_cast<int8_t>(spread & 255);
}

#ifdef GOLF_HAVE_AVX2
GOLF_AVX2 bool pack_avx2(const int8_t* codes, uint8_t* packed, int64_t count) {
    const __m256i keep = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,  //
                                          0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256i join = _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7);
    __m256i out_of_range = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        out_of_range = _mm256_or_si256(out_of_range, _mm256_add_epi8(bytes, _mm256_set1_epi8(32)));
        // joins two codes to a + 64 b in 16 bits, then two such pairs to p + 4096 q in 32 bits
        const __m256i fields = _mm256_and_si256(bytes, _mm256_set1_epi8(63));
        const __m256i pairs = _mm256_maddubs_epi16(fields, _mm256_set1_epi16(0x4001));
        const __m256i words = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x10000001));
        const __m256i result = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(words, keep), join);
        std::memcpy(packed + i / 4 * 3, &result, 24);
    }
    const bool bad = !_mm256_testz_si256(out_of_range, _mm256_set1_epi8(static_cast<char>(0xc0)));
    return pack_plain(codes + i, packed + i / 4 * 3, count - i) || bad;
}

GOLF_AVX2 void unpack_avx2(const uint8_t* packed, int8_t* codes, int64_t count) {
    const __m256i place = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                           4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    const __m256i sign = _mm256_set1_epi8(32);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        // the second load overlaps the first, so that both read exactly the 24 bytes of 32 codes
        const uint8_t* source = packed + i / 4 * 3;
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 8));
        const __m256i bits = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), place);
        const __m256i first = _mm256_and_si256(bits, _mm256_set1_epi32(0x3f));
        const __m256i second = _mm256_and_si256(_mm256_slli_epi32(bits, 2), _mm256_set1_epi32(0x3f00));
        const __m256i third = _mm256_and_si256(_mm256_slli_epi32(bits, 4), _mm256_set1_epi32(0x3f0000));
        const __m256i fourth = _mm256_and_si256(_mm256_slli_epi32(bits, 6), _mm256_set1_epi32(0x3f000000));
        const __m256i fields = _mm256_or_si256(_mm256_or_si256(first, second), _mm256_or_si256(third, fourth));
        const __m256i signed_codes = _mm256_sub_epi8(_mm256_xor_si256(fields, sign), sign);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), signed_codes);
    }
    unpack_plain(packed + i / 4 * 3, codes + i, count - i);
}
#endif

float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float half_to_float(uint16_t half) {
    const uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
    // the exponent biases of float16 and float32 differ by 112; infinity and NaN (exponent 31) need 224 to become 255
    const uint32_t shift = exponent == 31 ? 224 : 112;
    const float magnitude = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-24f
                                          : float_of_bits(((half & 0x7fffu) << 13) + (shift << 23));
    return half & 0x8000 ? -magnitude : magnitude;
}

float read_scale(const void* scales, int64_t row, int dtype) {
    if (dtype == GOLF_FLOAT32) return static_cast<const float*>(scales)[row];
    const uint16_t bits = static_cast<const uint16_t*>(scales)[row];
    return dtype == GOLF_FLOAT16 ? half_to_float(bits) : float_of_bits(static_cast<uint32_t>(bits) << 16);
}

GOLF_INLINE void to_float32(const int8_t* __restrict codes, float scale, float* __restrict values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = scale * static_cast<float>(codes[i]);
}

GOLF_INLINE void to_bfloat16(const int8_t* __restrict codes, float scale, uint16_t* __restrict values,
                             int64_t count) {
    // rounding with integers would turn some NaNs into infinity; values are NaN only if the scale is not finite
    const bool finite = std::isfinite(scale);
    for (int64_t i = 0; finite && i < count; ++i) {
        const float value = scale * static_cast<float>(codes[i]);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        values[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    for (int64_t i = 0; !finite && i < count; ++i) {
        const float value = scale * static_cast<float>(codes[i]);
        const uint16_t infinity = value < 0 ? 0xff80 : 0x7f80;
        values[i] = std::isnan(value) ? 0x7fc0 : infinity;
    }
}

GOLF_INLINE void fake_quantize(const float* __restrict weight, float scale, float* __restrict result,
                                   int64_t count) {
    // adding and then subtracting 1.5 * 2^23 rounds to the nearest integer, halves to even, on every instruction set
    constexpr float kRounder = 12582912.0f;
    for (int64_t i = 0; i < count; ++i) {
        float ratio = weight[i] / scale;
        ratio = ratio < -golf::kInt6FakeLimit ? -golf::kInt6FakeLimit : ratio;
        ratio = ratio > golf::kInt6FakeLimit ? golf::kInt6FakeLimit : ratio;
        result[i] = std::copysign((ratio + kRounder) - kRounder, ratio) * scale;
    }
}

// the loops of int6 for one instruction set
struct Loops {
    bool (*pack)(const int8_t*, uint8_t*, int64_t);
    void (*unpack)(const uint8_t*, int8_t*, int64_t);
    void (*to_float32)(const int8_t*, float, float*, int64_t);
    void (*to_bfloat16)(const int8_t*, float, uint16_t*, int64_t);
    void (*fake_quantize)(const float*, float, float*, int64_t);
};

#ifdef GOLF_HAVE_AVX2
GOLF_AVX2 void float32_avx2(const int8_t* c, float s, float* v, int64_t n) { to_float32(c, s, v, n); }
GOLF_AVX2 void bfloat16_avx2(const int8_t* c, float s, uint16_t* v, int64_t n) { to_bfloat16(c, s, v, n); }

// a row has at most 64 different values; one instruction looks up the values of 32 codes in a table
GOLF_AVX512 void bfloat16_avx512(const int8_t* codes, float scale, uint16_t* values, int64_t count) {
    if (count < kTableRun) return bfloat16_avx2(codes, scale, values, count);
    alignas(64) int8_t every_code[64];
    alignas(64) uint16_t table[64];
    for (int field = 0; field < 64; ++field) every_code[field] = static_cast<int8_t>((field ^ 32) - 32);
    bfloat16_avx2(every_code, scale, table, 64);
    const __m512i low = _mm512_load_si512(table), high = _mm512_load_si512(table + 32);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m512i words = _mm512_permutex2var_epi16(low, _mm512_cvtepi8_epi16(bytes), high);
        _mm512_storeu_si512(values + i, words);
    }
    for (; i < count; ++i) values[i] = table[codes[i] & 63];
}

GOLF_AVX2 void fake_avx2(const float* w, float s, float* r, int64_t n) { fake_quantize(w, s, r, n); }
#endif
void float32_plain(const int8_t* c, float s, float* v, int64_t n) { to_float32(c, s, v, n); }
void bfloat16_plain(const int8_t* c, float s, uint16_t* v, int64_t n) { to_bfloat16(c, s, v, n); }
void fake_plain(const float* w, float s, float* r, int64_t n) { fake_quantize(w, s, r, n); }

const Loops& loops() {
    static const Loops plain = {pack_plain, unpack_plain, float32_plain, bfloat16_plain, fake_plain};
#ifdef GOLF_HAVE_AVX2
    static const Loops avx2 = {pack_avx2, unpack_avx2, float32_avx2, bfloat16_avx2, fake_avx2};
    static const Loops avx512 = {pack_avx2, unpack_avx2, float32_avx2, bfloat16_avx512, fake_avx2};
    static const bool have_avx2 = (__builtin_cpu_init(), __builtin_cpu_supports("avx2"));
    static const bool have_avx512 = __builtin_cpu_supports("avx512bw");
    return have_avx512 ? avx512 : have_avx2 ? avx2 : plain;
#else
    return plain;
#endif
}

template <typename Value>
void dequantize(const GolfInt6Matrix& matrix, int scale_dtype,
                void (*convert)(const int8_t*, float, Value*, int64_t)) {
    alignas(64) int8_t codes[kChunk];
    const int64_t count = matrix.rows * matrix.columns;
    int64_t row = 0, column = 0;
    for (int64_t base = 0; base < count; base += kChunk) {
        const int64_t size = count - base < kChunk ? count - base : kChunk;
        loops().unpack(static_cast<const uint8_t*>(matrix.packed) + base / 4 * 3, codes, size);
        for (int64_t done = 0; done < size;) {
            const int64_t left = matrix.columns - column;
            const int64_t run = left < size - done ? left : size - done;
            convert(codes + done, read_scale(matrix.scales, row, scale_dtype),
                    static_cast<Value*>(matrix.values) + base + done, run);
            done += run;
            column += run;
            if (column == matrix.columns) column = 0, ++row;
        }
    }
}

}  // namespace

extern "C" int golf_int6_pack_cpu(const void* codes, void* packed, int64_t count, void* first_bad) {
    const auto* source = static_cast<const int8_t*>(codes);
    if (!loops().pack(source, static_cast<uint8_t*>(packed), count)) return GOLF_OK;
    int64_t index = 0;
    while (source[index] >= -32 && source[index] <= 31) ++index;
    *static_cast<int64_t*>(first_bad) = index;
    return GOLF_OK;
}

extern "C" int golf_int6_unpack_cpu(const void* packed, void* codes, int64_t count) {
    loops().unpack(static_cast<const uint8_t*>(packed), static_cast<int8_t*>(codes), count);
    return GOLF_OK;
}

extern "C" int golf_int6_dequantize_cpu(const void* matrices, int64_t count, int scale_dtype, int value_dtype) {
    if (value_dtype != GOLF_FLOAT32 && value_dtype != GOLF_BFLOAT16) return GOLF_UNSUPPORTED_DTYPE;
    for (int64_t i = 0; i < count; ++i) {
        const GolfInt6Matrix& matrix = static_cast<const GolfInt6Matrix*>(matrices)[i];
        if (value_dtype == GOLF_FLOAT32) dequantize<float>(matrix, scale_dtype, loops().to_float32);
        if (value_dtype == GOLF_BFLOAT16) dequantize<uint16_t>(matrix, scale_dtype, loops().to_bfloat16);
    }
    return GOLF_OK;
}

extern "C" int golf_int6_fake_quantize_cpu(const void* weight, const void* scales, void* result, int64_t rows,
                                           int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) {
        loops().fake_quantize(static_cast<const float*>(weight) + row * columns,
                              static_cast<const float*>(scales)[row],
                              static_cast<float*>(result) + row * columns, columns);
    }
    return GOLF_OK;
}
