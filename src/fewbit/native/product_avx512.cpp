// AVX-512 (F, BW, VL, DQ, VBMI, VNNI): 64 weights per register, decoded by byte permutation, multiplied by vpdpbusd.
#include <immintrin.h>

#include <utility>

#include "product.hpp"

namespace fewbit {
namespace {

#include "lanes.hpp"
#include "packed_product.hpp"
#include "decode_avx512.hpp"

inline __m512i broadcast4(const int8_t* four) {
    int word;
    __builtin_memcpy(&word, four, 4);
    return _mm512_set1_epi32(word);
}

// sum += four products in each lane, unsigned weights times signed x. Written in assembly because GCC 12 copies
// every accumulator of an array once per step around the intrinsic, which halves the speed.
inline void accumulate(__m512i& sum, __m512i weights, __m512i x) {
#ifdef FEWBIT_EMULATED
    sum = _mm512_dpbusd_epi32(sum, weights, x);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
#endif
}

// For all that the compiler knows, x is another one now: sums that are equal stay apart, and none is idle.
inline void renew(__m512i& x) {
#ifdef FEWBIT_EMULATED
    __asm__ volatile("" : "+m"(x));
#else
    __asm__ volatile("" : "+v"(x));
#endif
}

constexpr int kStep = 8;                          // chunks that the decoders' unrolled loops take at once

struct Wide {
    static constexpr Code kCode = Code::trellis;
    static constexpr int kBlock = 12, kPanel = 2, kPacked = 1, kFew = 8;

    template <int K>
    using Trellis = TrellisChunks<K>;
    using Nibbles = NibbleChunks;

    static void write(const ProductJob& job, int64_t token, int64_t row_group, const float* total) {
        write_sums(job, token, row_group, _mm512_loadu_ps(total));
    }

    template <class Decoder>
    static void decode(const ProductJob& job, int64_t row_group, int count, int64_t g, const Decoder& decoder,
                       ProductScratch& scratch) {
        decode_row_groups(job, row_group, count, g, decoder, scratch);
    }

    template <int T>
    static void tile(const ProductJob& job, const Tile& tile) {
        const int64_t groups = job.stride / job.group, first = tile.token * groups + tile.g;
        __m512i a[T], b[T];
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) a[t] = b[t] = _mm512_set1_epi32(-kUnsigned * job.sums[first + t * groups]);
        const uint8_t* weights = tile.weights;
        const int8_t* inputs = tile.packed;
        for (int c = 0; c < job.group / 4; ++c, weights += kChunk, inputs += 4 * T) {
            const __m512i wa = _mm512_load_si512(weights), wb = _mm512_load_si512(weights + kGroupWeights);
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) {
                const __m512i x = broadcast4(inputs + 4 * t);
                accumulate(a[t], wa, x);
                accumulate(b[t], wb, x);
            }
        }
        const __m512 scale_a = load_scales(tile.scales, job.scale);
        const __m512 scale_b = load_scales(tile.scales + kTileRows, job.scale);
        float* total = tile.total;
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t, total += 2 * kTileRows) {
            const float input_scale = job.input_scale[first + t * groups];
            _mm512_storeu_ps(total, add_scaled(_mm512_loadu_ps(total), a[t], scale_a, input_scale));
            float* next = total + kTileRows;
            _mm512_storeu_ps(next, add_scaled(_mm512_loadu_ps(next), b[t], scale_b, input_scale));
        }
    }
};

// The group's sums of T tokens, decoding in registers; a token's sum is the total of its `copies` chains.
template <class Decoder, int T>
struct Few {
    static constexpr int copies = T == 1 ? 4 : T <= 3 ? 2 : 1;
    static constexpr int kBytes = Decoder::kBytes;
    static constexpr int kNear = 1536, kFar = 12288;

    template <bool Start>
    static inline void step(const Decoder& decoder, const uint8_t* codes, const int8_t* const* inputs, int c,
                            __m512i (&dots)[T][copies]) {
#pragma GCC unroll 4
        for (int line = 0; line < kStep * kBytes / 64; ++line) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + kFar + 64 * line), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(codes + kNear + 64 * line), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kStep; ++i) {
            const __m512i weights = decoder.chunk(codes, i, Start && i == 0);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                __m512i& dot = dots[t][i % copies];
                dot = _mm512_dpbusd_epi32(dot, weights, broadcast4(inputs[t] + 4 * (c + i)));
            }
        }
    }

    static void multiply(const ProductJob& job, int64_t row_group, const Decoder& decoder, ProductScratch& scratch) {
        const int64_t groups = job.cols / job.group, stride = job.stride / job.group;
        panel_scales(job, row_group, 1, scratch.scales);
        __m512 total[T];
        for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g) {
            const uint8_t* codes = group_codes(job, row_group, g, scratch.edge);
            const int8_t* inputs[T];
            __m512i dots[T][copies];
            for (int t = 0; t < T; ++t) {
                inputs[t] = job.q + t * job.stride + g * job.group;
                dots[t][0] = _mm512_set1_epi32(-Decoder::kOrigin * job.sums[t * stride + g]);
                for (int i = 1; i < copies; ++i) dots[t][i] = _mm512_setzero_si512();
            }
            step<true>(decoder, codes, inputs, 0, dots);
            for (int c = kStep; c < job.group / 4; c += kStep)
                step<false>(decoder, codes + c * kBytes, inputs, c, dots);
            const __m512 scale = load_scales(scratch.scales + g * kTileRows, job.scale);
            for (int t = 0; t < T; ++t) {
                for (int i = 1; i < copies; ++i) dots[t][0] = _mm512_add_epi32(dots[t][0], dots[t][i]);
                total[t] = add_scaled(total[t], dots[t][0], scale, job.input_scale[t * stride + g]);
            }
        }
        for (int t = 0; t < T; ++t) write_sums(job, t, row_group, total[t]);
    }
};

template <class Decoder, int T = Wide::kFew>
void multiply_few_with(const ProductJob& job, int64_t row_group, const Decoder& decoder, ProductScratch& scratch) {
    if constexpr (T > 1) {
        if (job.tokens < T) return multiply_few_with<Decoder, T - 1>(job, row_group, decoder, scratch);
    }
    Few<Decoder, T>::multiply(job, row_group, decoder, scratch);
}

void multiply_few(const ProductJob& job, int64_t row_group, ProductScratch& scratch) {
    with_decoder<Wide>(job, [&](const auto& decoder) { multiply_few_with(job, row_group, decoder, scratch); });
}

#include "lanes_avx512.hpp"

constexpr int kChains = 16;                       // independent products, since each waits for the last of its own

void multiply_registers(int64_t steps) {
    __m512i sums[kChains], weights = _mm512_set1_epi8(1), x = _mm512_set1_epi8(1);
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) renew(sums[i] = _mm512_setzero_si512());
    for (; steps > 0; --steps)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) accumulate(sums[i], weights, x);
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) renew(sums[i]);
}

}  // namespace

constexpr ProductKernels kAvx512Product = {Wide::kFew, multiply_few, panel_kernels<Wide>(),
                                       {LaneProduct::kTokens, 1, LaneProduct::kPanel, LaneProduct::pack,
                                        LaneProduct::multiply},
                                       LaneProduct::kTokens,
                                       {2 * 64 * kChains, multiply_registers}};

}  // namespace fewbit
