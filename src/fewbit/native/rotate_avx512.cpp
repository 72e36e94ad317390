// AVX-512 (F, BW, VL, DQ): sixteen inputs per register.
#include <immintrin.h>

#include "rotate.hpp"

namespace fewbit {
namespace {

#include "prologues.hpp"
#include "rotate_quantize.hpp"

struct Rotation {
    static constexpr int lanes = 16, held = 16;
    using Floats = __m512;
    using Bits = __m512i;

    static Floats load(const float* x) { return _mm512_loadu_ps(x); }

    static Floats load(const uint16_t* x) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }

    static Floats flip(Floats v, const uint8_t* signs) {
        uint16_t bits;
        __builtin_memcpy(&bits, signs, 2);
        const __m512i x = _mm512_castps_si512(v), sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
        return _mm512_castsi512_ps(_mm512_mask_xor_epi32(x, bits, x, sign));
    }

    // x + partner in the lower lanes of pairs, partner - x in the upper ones: products with +-1 round nothing, so
    // one fused operation does what a sum or a difference does.
    static Floats butterfly(Floats x, Floats partner, int upper) {
        const Floats sign = _mm512_mask_blend_ps(static_cast<__mmask16>(upper), _mm512_set1_ps(1), _mm512_set1_ps(-1));
        return _mm512_fmadd_ps(x, sign, partner);
    }

    static Floats inner_butterflies(Floats v) {
        v = butterfly(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
        v = butterfly(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
        v = butterfly(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
        return butterfly(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
    }

    static Floats broadcast(float x) { return _mm512_set1_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats at_least(Floats v, Floats bound) { return _mm512_max_ps(bound, v); }  // v where it is NaN
    static Floats at_most(Floats v, Floats bound) { return _mm512_min_ps(bound, v); }
    static Floats power(Floats v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23)); }
    static void store(float* to, Floats v) { _mm512_store_ps(to, v); }
    static Bits nothing() { return _mm512_setzero_si512(); }
    static Bits magnitude(Floats v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
    static Bits larger(Bits a, Bits b) { return _mm512_max_epu32(a, b); }
    static uint32_t largest_of(Bits bits) { return _mm512_reduce_max_epu32(bits); }

    static int32_t quantize(const float* y, int count, float inverse, float most, int8_t* q) {
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < count; i += lanes) {
            const Floats scaled = mul(_mm512_load_ps(y + i), _mm512_set1_ps(inverse));
            const __m512i value = _mm512_cvtps_epi32(at_most(scaled, _mm512_set1_ps(most)));
            sum = _mm512_add_epi32(sum, value);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(value));
        }
        return _mm512_reduce_add_epi32(sum);
    }
};

}  // namespace

void rotate_quantize_avx512(const RotateJob& job, int64_t token) { rotate_quantize<Rotation>(job, token); }

}  // namespace fewbit
