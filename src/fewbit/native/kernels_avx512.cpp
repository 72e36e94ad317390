// AVX-512 (F, BW, VL, DQ, VBMI, VNNI): thirty-two costs per register, decoding by byte permutation.
#include <immintrin.h>

#include "kernels.hpp"
#include "product.hpp"
#include "rotate.hpp"

namespace fewbit {
namespace {

#include "trellis_encode.hpp"

struct Vec {
    static constexpr int lanes = 32;

    static __m512i broadcast(int16_t x) { return _mm512_set1_epi16(x); }

    static __m512i distance(__m512i x, const int16_t* levels) {
        const __m512i diff = _mm512_subs_epi16(x, _mm512_loadu_si512(levels));
        return _mm512_mulhrs_epi16(diff, diff);
    }

    // 32 >> K costs, each repeated 2^K times: a broadcasting load, then a permutation inside 128 bits.
    template <int K>
    static __m512i expand(const uint16_t* source) {
        if constexpr (K == 4) {
            int pair;
            __builtin_memcpy(&pair, source, 4);
            const __m512i pick = _mm512_setr_epi64(0x0100010001000100, 0x0100010001000100, 0x0100010001000100,
                                                   0x0100010001000100, 0x0302030203020302, 0x0302030203020302,
                                                   0x0302030203020302, 0x0302030203020302);
            return _mm512_shuffle_epi8(_mm512_set1_epi32(pair), pick);
        } else if constexpr (K == 3) {
            long long four;
            __builtin_memcpy(&four, source, 8);
            const __m512i pick = _mm512_setr_epi64(0x0100010001000100, 0x0100010001000100, 0x0302030203020302,
                                                   0x0302030203020302, 0x0504050405040504, 0x0504050405040504,
                                                   0x0706070607060706, 0x0706070607060706);
            return _mm512_shuffle_epi8(_mm512_set1_epi64(four), pick);
        } else {
            const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
            const __m512i pick = _mm512_setr_epi64(0x0100010001000100, 0x0302030203020302, 0x0504050405040504,
                                                   0x0706070607060706, 0x0908090809080908, 0x0b0a0b0a0b0a0b0a,
                                                   0x0d0c0d0c0d0c0d0c, 0x0f0e0f0e0f0e0f0e);
            return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(eight), pick);
        }
    }

    static __m512i add(__m512i a, __m512i b) { return _mm512_adds_epu16(a, b); }
    static __m512i min(__m512i a, __m512i b) { return _mm512_min_epu16(a, b); }
    static void store(uint16_t* to, __m512i costs) { _mm512_storeu_si512(to, costs); }

    template <int P>
    static void subtract_minimum(uint16_t* costs) {
        __m512i least = _mm512_set1_epi16(-1);
        for (int p = 0; p < P; p += lanes) least = min(least, _mm512_loadu_si512(costs + p));
        const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(least), _mm512_extracti64x4_epi64(least, 1));
        const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        const __m512i all = _mm512_broadcastw_epi16(_mm_minpos_epu16(quarter));
        for (int p = 0; p < P; p += lanes) {
            const __m512i before = _mm512_loadu_si512(costs + p);
            const __mmask32 reachable = _mm512_cmpneq_epu16_mask(before, _mm512_set1_epi16(-1));
            store(costs + p, _mm512_mask_sub_epi16(before, reachable, before, all));
        }
    }
};

// The two 64-entry tables (A + B and C + D) and where the windows of 64 weights stand.
template <int K>
struct Decoder {
    __m512i low, high, gather, low_shift, high_shift;

    explicit Decoder(const int8_t* values) {
        // A window's halves add up, so entry 0 of one half serves as origin for the other.
        alignas(64) int8_t low_table[64], high_table[64];
        alignas(64) uint8_t bytes[64], shift[64];
        for (int i = 0; i < 64; ++i) {
            low_table[i] = static_cast<int8_t>(values[i] - values[0]);
            high_table[i] = values[i << 6];
            // Seen from two bytes before the chunk, weight i of eight has its window at bit k + 4 + k i.
            bytes[i] = static_cast<uint8_t>(K * (i >> 3) + (i & 7));
            shift[i] = static_cast<uint8_t>(K + 4 + K * (i & 7));
        }
        low = _mm512_load_si512(low_table);
        high = _mm512_load_si512(high_table);
        gather = _mm512_load_si512(bytes);
        low_shift = _mm512_load_si512(shift);
        high_shift = _mm512_add_epi8(low_shift, _mm512_set1_epi8(6));
    }

    // 64 weights, 16 rows x 4 columns; the two bytes before `codes` count as zero at the start of a group.
    __m512i chunk(const uint8_t* codes, bool start) const {
        const __mmask64 mask = (1ull << (8 * K + 2)) - (start ? 4 : 1);
        const __m512i stream = _mm512_permutexvar_epi8(gather, _mm512_maskz_loadu_epi8(mask, codes - 2));
        const __m512i a = _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(low_shift, stream), low);
        const __m512i b = _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(high_shift, stream), high);
        return _mm512_add_epi8(a, b);
    }
};

// Four chunks are 16 columns: transposing their 4-byte pieces gives 16 bytes of one row.
template <int K>
void decode_tile(const Decoder<K>& decoder, const uint8_t* codes, bool start, float (*out)[kTileCols]) {
    const __m512i a = decoder.chunk(codes, start);
    const __m512i b = decoder.chunk(codes + 8 * K, false);
    const __m512i c = decoder.chunk(codes + 16 * K, false);
    const __m512i d = decoder.chunk(codes + 24 * K, false);
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    const __m512i rows[4] = {_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
                             _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
    for (int i = 0; i < 4; ++i) {
        alignas(64) int8_t bytes[64];
        _mm512_store_si512(bytes, rows[i]);
        for (int lane = 0; lane < 4; ++lane) {
            const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes + 16 * lane));
            _mm512_storeu_ps(out[4 * lane + i], _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen)));
        }
    }
}

template <int K>
void decode_rows(const DecodeJob& job, int64_t index) {
    const int64_t row = index * kTileRows;
    const int rows = job.rows - row < kTileRows ? static_cast<int>(job.rows - row) : kTileRows;
    const int64_t groups = job.cols / job.group;
    const uint8_t* codes = job.codes + index * 2 * K * job.cols;
    const Decoder<K> decoder(job.values);
    for (int64_t col = 0; col < job.cols; col += kTileCols, codes += 32 * K) {
        alignas(64) float tile[kTileRows][kTileCols];
        decode_tile<K>(decoder, codes, col % job.group == 0, tile);
        for (int r = 0; r < rows; ++r) {
            const __m512 scale = _mm512_set1_ps(job.scales[(row + r) * groups + col / job.group]);
            _mm512_storeu_ps(job.out + (row + r) * job.cols + col, _mm512_mul_ps(_mm512_load_ps(tile[r]), scale));
        }
    }
}

void decode_row_group(const DecodeJob& job, int64_t index) {
    switch (job.bits) {
        case 2: return decode_rows<2>(job, index);
        case 3: return decode_rows<3>(job, index);
        default: return decode_rows<4>(job, index);
    }
}

}  // namespace

constexpr Kernels kAvx512Kernels = {"avx512", encode_stream<Vec>, encode_row_group<Vec>, decode_row_group,
                                &kAvx512Product, rotate_quantize_avx512};

}  // namespace fewbit
