// AVX2: sixteen costs per register.
#include <immintrin.h>

#include "kernels.hpp"
#include "product.hpp"
#include "rotate.hpp"

namespace fewbit {
namespace {

#include "trellis_decode.hpp"
#include "trellis_encode.hpp"

struct Vec {
    static constexpr int lanes = 16;

    static __m256i broadcast(int16_t x) { return _mm256_set1_epi16(x); }

    static __m256i distance(__m256i x, const int16_t* levels) {
        const __m256i diff = _mm256_subs_epi16(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels)));
        return _mm256_mulhrs_epi16(diff, diff);
    }

    // 16 >> K costs, each repeated 2^K times.
    template <int K>
    static __m256i expand(const uint16_t* source) {
        if constexpr (K == 4) {
            return _mm256_set1_epi16(static_cast<int16_t>(*source));
        } else if constexpr (K == 3) {
            int pair;
            __builtin_memcpy(&pair, source, 4);
            const __m256i pick = _mm256_setr_epi64x(0x0100010001000100, 0x0100010001000100, 0x0302030203020302,
                                                    0x0302030203020302);
            return _mm256_shuffle_epi8(_mm256_set1_epi32(pair), pick);
        } else {
            long long four;
            __builtin_memcpy(&four, source, 8);
            const __m256i pick = _mm256_setr_epi64x(0x0100010001000100, 0x0302030203020302, 0x0504050405040504,
                                                    0x0706070607060706);
            return _mm256_shuffle_epi8(_mm256_set1_epi64x(four), pick);
        }
    }

    static __m256i add(__m256i a, __m256i b) { return _mm256_adds_epu16(a, b); }
    static __m256i min(__m256i a, __m256i b) { return _mm256_min_epu16(a, b); }
    static void store(uint16_t* to, __m256i costs) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), costs); }

    template <int P>
    static void subtract_minimum(uint16_t* costs) {
        __m256i least = _mm256_set1_epi16(-1);
        for (int p = 0; p < P; p += lanes) least = min(least, load(costs + p));
        const __m128i half = _mm_min_epu16(_mm256_castsi256_si128(least), _mm256_extracti128_si256(least, 1));
        const __m256i all = _mm256_broadcastw_epi16(_mm_minpos_epu16(half));
        for (int p = 0; p < P; p += lanes) {
            const __m256i before = load(costs + p);
            const __m256i unreachable = _mm256_cmpeq_epi16(before, _mm256_set1_epi16(-1));
            store(costs + p, _mm256_or_si256(_mm256_sub_epi16(before, all), unreachable));
        }
    }

    static __m256i load(const uint16_t* costs) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(costs));
    }
};

}  // namespace

constexpr Kernels kAvx2Kernels = {"avx2", encode_stream<Vec>, encode_row_group<Vec>, decode_row_group,
                              &kAvx2Product, rotate_quantize_avx2};

#ifdef FEWBIT_HAVE_AVXVNNI
// Nothing but products gains from VNNI.
constexpr Kernels kAvxVnniKernels = {"avxvnni", encode_stream<Vec>, encode_row_group<Vec>, decode_row_group,
                                     &kAvxVnniProduct, rotate_quantize_avx2};
#endif

}  // namespace fewbit
