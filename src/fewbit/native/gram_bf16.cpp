// X'X with AVX-512's dot products of bfloat16 pairs.
#include <immintrin.h>

#include <algorithm>
#include <memory>

#include "gram.hpp"
#include "threads.hpp"

namespace fewbit {
namespace {

constexpr int kLanes = 16, kRows = 8, kVectors = kGramPanel / kLanes;
constexpr int kPanelsPerJob = 4;                  // panels of rows that share a panel of columns while it is in cache

// Two tokens' values of `count` columns as pairs, the earlier token in the low half; zeros beyond.
inline __m512i pairs(const float* low, const float* high, __mmask16 mask) {
    const __m256bh first = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, low));
    const __m256bh second = high ? _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, high)) : _mm512_cvtneps_pbh(_mm512_setzero_ps());
    return _mm512_or_si512(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(first)),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(second)), 16));
}

// One panel of columns, [pairs of tokens, kGramPanel].
void pack(const GramJob& job, int64_t panel, uint32_t* out) {
    for (int64_t token = 0; token < job.tokens; token += 2) {
        for (int vector = 0; vector < kVectors; ++vector, out += kLanes) {
            const int64_t col = panel * kGramPanel + vector * kLanes;
            const int64_t count = std::clamp<int64_t>(job.cols - col, 0, kLanes);
            const float* low = job.x + token * job.cols + col;
            const float* high = token + 1 < job.tokens ? low + job.cols : nullptr;
            _mm512_storeu_si512(out, pairs(low, high, static_cast<__mmask16>((1u << count) - 1)));
        }
    }
}

// kRows rows of sums by one panel of columns.
void add_tile(const GramJob& job, const uint32_t* rows, const uint32_t* columns, int64_t row, int64_t col) {
    const int64_t steps = (job.tokens + 1) / 2;
    __m512 sums[kRows][kVectors];
    for (auto& line : sums)
        for (auto& sum : line) sum = _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step, rows += kGramPanel, columns += kGramPanel) {
        __m512bh right[kVectors];
        for (int vector = 0; vector < kVectors; ++vector)
            right[vector] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(columns + vector * kLanes));
        for (int line = 0; line < kRows; ++line) {
            const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(rows[line])));
            for (int vector = 0; vector < kVectors; ++vector)
                sums[line][vector] = _mm512_dpbf16_ps(sums[line][vector], left, right[vector]);
        }
    }
    for (int line = 0; line < kRows && row + line < job.cols; ++line) {
        for (int vector = 0; vector < kVectors; ++vector) {
            const int64_t first = col + vector * kLanes;
            const int64_t count = std::clamp<int64_t>(job.cols - first, 0, kLanes);
            const auto mask = static_cast<__mmask16>((1u << count) - 1);
            float* out = job.sums + (row + line) * job.cols + first;
            _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sums[line][vector]));
        }
    }
}

}  // namespace

void add_gram_bf16(const GramJob& job) {
    const int64_t panels = (job.cols + kGramPanel - 1) / kGramPanel;
    const int64_t size = (job.tokens + 1) / 2 * kGramPanel;  // of a packed panel
    const std::unique_ptr<uint32_t[]> packed(new uint32_t[static_cast<size_t>(panels * size)]);
    const int threads = num_threads();
    run(threads, panels, [&](int64_t panel, int) { pack(job, panel, packed.get() + panel * size); });
    const int64_t jobs = (panels + kPanelsPerJob - 1) / kPanelsPerJob;
    parallel_for(threads, jobs, [&](int64_t index, int) {
        const int64_t begin = index * kPanelsPerJob, end = std::min(panels, begin + kPanelsPerJob);
        for (int64_t column = begin; column < panels; ++column) {
            const uint32_t* columns = packed.get() + column * size;
            for (int64_t panel = begin; panel < std::min(end, column + 1); ++panel)
                for (int line = 0; line < kGramPanel; line += kRows)
                    add_tile(job, packed.get() + panel * size + line, columns, panel * kGramPanel + line,
                             column * kGramPanel);
        }
    });
}

}  // namespace fewbit
