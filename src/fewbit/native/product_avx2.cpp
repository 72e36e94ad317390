// AVX2 (and F16C): 32 weights per register, decoded by three 16-entry byte shuffles.
#include <immintrin.h>

#include "product.hpp"

namespace fewbit {
namespace {

#include "trellis_product.hpp"

inline __m256i repeat(const int8_t* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
}

struct Narrow {
    static constexpr int kBlock = 4, kPanel = 1;

    // Three 16-entry tables: A of the window's bits 0-3, B + C of 4-7, D of 8-11.
    template <int K>
    struct Decoder {
        static constexpr int kBack = K == 4 ? 1 : 2;  // an older weight's upper bits hold A's
        static constexpr int kNear = 1536, kFar = 12288;
        __m256i a, bc, d, even_pick, odd_pick, even_shift, odd_shift;

        explicit Decoder(const int8_t* tables) {
            int8_t middle[16];
            for (int i = 0; i < 16; ++i) middle[i] = static_cast<int8_t>(tables[16 + (i & 3)] + tables[20 + (i >> 2)]);
            a = repeat(tables);
            bc = repeat(middle);
            d = repeat(tables + 24);
            alignas(16) int8_t pick[2][16];
            alignas(16) int16_t shift[2][8];
            for (int i = 0; i < 16; ++i) {
                // Seen from two bytes before 16 weights, the last 8 bits of window i begin at bit 8 + k + k i;
                // a 16-bit product with 2^(8 - rest) brings them to the top of their two bytes.
                const int bit = 8 + K + K * i;
                pick[i & 1][i & ~1] = static_cast<int8_t>(bit >> 3);
                pick[i & 1][i | 1] = static_cast<int8_t>((bit >> 3) + 1);
                shift[i & 1][i >> 1] = static_cast<int16_t>(1 << (8 - (bit & 7)));
            }
            even_pick = repeat(pick[0]);
            odd_pick = repeat(pick[1]);
            even_shift = repeat(reinterpret_cast<const int8_t*>(shift[0]));
            odd_shift = repeat(reinterpret_cast<const int8_t*>(shift[1]));
        }

        // The last 8 bits of 32 windows.
        __m256i recent(const uint8_t* codes, bool start) const {
            __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes - 2));
            if (start) first = _mm_and_si128(first, _mm_setr_epi32(static_cast<int>(0xffff0000u), -1, -1, -1));
            const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes - 2 + 2 * K));
            const __m256i stream = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
            const __m256i even = _mm256_mullo_epi16(_mm256_shuffle_epi8(stream, even_pick), even_shift);
            const __m256i odd = _mm256_mullo_epi16(_mm256_shuffle_epi8(stream, odd_pick), odd_shift);
            const __m256i top = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
            return _mm256_or_si256(_mm256_srli_epi16(even, 8), _mm256_and_si256(odd, top));
        }

        // 32 weights from their windows' last bits and those of the 32 weights before.
        __m256i values(__m256i now, __m256i before) const {
            const __m256i nibble = _mm256_set1_epi8(15);
            const __m256i across = _mm256_permute2x128_si256(before, now, 0x21);
            __m256i oldest = _mm256_alignr_epi8(now, across, 16 - kBack);
            if constexpr (K == 3) oldest = _mm256_srli_epi16(oldest, 2);
            const __m256i from_a = _mm256_shuffle_epi8(a, _mm256_and_si256(oldest, nibble));
            const __m256i from_bc = _mm256_shuffle_epi8(bc, _mm256_and_si256(now, nibble));
            const __m256i from_d = _mm256_shuffle_epi8(d, _mm256_and_si256(_mm256_srli_epi16(now, 4), nibble));
            return _mm256_add_epi8(_mm256_add_epi8(from_a, from_bc), from_d);
        }

        void decode(const uint8_t* codes, int chunks, uint8_t* out) const {
            __m256i before = _mm256_setzero_si256();
            for (int half = 0; half < 2 * chunks; ++half, codes += 4 * K, out += 32) {
                if (half % 4 == 0) {
                    _mm_prefetch(reinterpret_cast<const char*>(codes + kFar), _MM_HINT_T1);
                    _mm_prefetch(reinterpret_cast<const char*>(codes + kNear), _MM_HINT_T0);
                }
                const __m256i now = recent(codes, half == 0);
                _mm256_store_si256(reinterpret_cast<__m256i*>(out), values(now, before));
                before = now;
            }
        }
    };

    // Sums of four products; magnitude and sign apart because pairs of unsigned x signed could saturate.
    static __m256i dot(__m256i magnitude, __m256i weights, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, weights));
        return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }

    static __m256 add_scaled(const float* total, __m256i dots, __m256 weight_scale, float input_scale) {
        const __m256 both = _mm256_mul_ps(weight_scale, _mm256_set1_ps(input_scale));
        return _mm256_add_ps(_mm256_loadu_ps(total), _mm256_mul_ps(_mm256_cvtepi32_ps(dots), both));
    }

    static __m256 load_scales(const uint16_t* halves, float scale) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves));
        return _mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(scale));
    }

    template <int T>
    static void tile(const ProductJob& job, const Tile& tile) {
        const int64_t groups = job.cols / job.group, first = tile.token * groups + tile.g;
        __m256i a[T], b[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) a[t] = b[t] = _mm256_setzero_si256();
        const __m256i* weights = reinterpret_cast<const __m256i*>(tile.weights);
        const int8_t* inputs = tile.packed;
        for (int c = 0; c < job.group / 4; ++c, weights += 2, inputs += 4 * T) {
            const __m256i wa = _mm256_load_si256(weights), wb = _mm256_load_si256(weights + 1);
            const __m256i ma = _mm256_abs_epi8(wa), mb = _mm256_abs_epi8(wb);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                int word;
                __builtin_memcpy(&word, inputs + 4 * t, 4);
                const __m256i x = _mm256_set1_epi32(word);
                a[t] = _mm256_add_epi32(a[t], dot(ma, wa, x));
                b[t] = _mm256_add_epi32(b[t], dot(mb, wb, x));
            }
        }
        const __m256 scale_a = load_scales(tile.scales, job.scale), scale_b = load_scales(tile.scales + 8, job.scale);
        float* total = tile.total;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t, total += kTileRows) {
            const float input_scale = job.input_scale[first + t * groups];
            _mm256_storeu_ps(total, add_scaled(total, a[t], scale_a, input_scale));
            _mm256_storeu_ps(total + 8, add_scaled(total + 8, b[t], scale_b, input_scale));
        }
    }
};

}  // namespace

const ProductKernels kAvx2Product = {0, nullptr, Narrow::kBlock, pack_tokens<Narrow>, Narrow::kPanel, multiply<Narrow>};

}  // namespace fewbit
