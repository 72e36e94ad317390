// AVX2: eight inputs per register.
#include <immintrin.h>

#include "rotate.hpp"

namespace fewbit {
namespace {

#include "prologues.hpp"
#include "rotate_quantize.hpp"

struct Rotation {
    static constexpr int lanes = 8, held = 8;
    using Floats = __m256;
    using Bits = __m256i;

    static Floats load(const float* x) { return _mm256_loadu_ps(x); }

    static Floats load(const uint16_t* x) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }

    static Floats flip(Floats v, const uint8_t* signs) {
        const __m256i place = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
        const __m256i moved = _mm256_sllv_epi32(_mm256_set1_epi32(*signs), place);
        const __m256i sign = _mm256_and_si256(moved, _mm256_set1_epi32(static_cast<int>(0x80000000u)));
        return _mm256_xor_ps(v, _mm256_castsi256_ps(sign));
    }

    // x + partner in the lower lane of a pair, partner - x in the upper one, where `upper` changes x's sign.
    static Floats butterfly(Floats x, Floats partner, Floats upper) {
        return _mm256_add_ps(partner, _mm256_xor_ps(x, upper));
    }

    static Floats inner_butterflies(Floats v) {
        v = butterfly(v, _mm256_permute_ps(v, 0xb1), _mm256_setr_ps(0, -0.0f, 0, -0.0f, 0, -0.0f, 0, -0.0f));
        v = butterfly(v, _mm256_permute_ps(v, 0x4e), _mm256_setr_ps(0, 0, -0.0f, -0.0f, 0, 0, -0.0f, -0.0f));
        return butterfly(v, _mm256_permute2f128_ps(v, v, 1), _mm256_setr_ps(0, 0, 0, 0, -0.0f, -0.0f, -0.0f, -0.0f));
    }

    static Floats broadcast(float x) { return _mm256_set1_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static Floats at_least(Floats v, Floats bound) { return _mm256_max_ps(bound, v); }  // v where it is NaN
    static Floats at_most(Floats v, Floats bound) { return _mm256_min_ps(bound, v); }
    static Floats power(Floats v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 23)); }
    static void store(float* to, Floats v) { _mm256_store_ps(to, v); }
    static Bits nothing() { return _mm256_setzero_si256(); }
    static Bits magnitude(Floats v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
    static Bits larger(Bits a, Bits b) { return _mm256_max_epu32(a, b); }

    static uint32_t largest_of(Bits bits) {
        alignas(32) uint32_t lane[lanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lane), bits);
        uint32_t most = lane[0];
        for (int i = 1; i < lanes; ++i) most = lane[i] > most ? lane[i] : most;
        return most;
    }

    static __m256i nearest(const float* y, __m256 inverse, __m256 most) {
        return _mm256_cvtps_epi32(_mm256_min_ps(most, _mm256_mul_ps(_mm256_load_ps(y), inverse)));
    }

    static int32_t quantize(const float* y, int count, float inverse, float most, int8_t* q) {
        const __m256 factor = _mm256_set1_ps(inverse), bound = _mm256_set1_ps(most);
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < count; i += 32) {
            const __m256i a = nearest(y + i, factor, bound), b = nearest(y + i + 8, factor, bound);
            const __m256i c = nearest(y + i + 16, factor, bound), d = nearest(y + i + 24, factor, bound);
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)));
            const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_permutevar8x32_epi32(bytes, order));
        }
        alignas(32) int32_t lane[lanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lane), sum);
        int32_t total = 0;
        for (const int32_t part : lane) total += part;
        return total;
    }
};

}  // namespace

void rotate_quantize_avx2(const RotateJob& job, int64_t token) { rotate_quantize<Rotation>(job, token); }

}  // namespace fewbit
