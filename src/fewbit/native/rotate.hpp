// Quantizing inputs to 8 or 4 bits after an optional norm or gated activation and an optional rotation.
// Nothing here allocates, throws or knows about Python; jobs are checked before they get here.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace fewbit {

constexpr float kSmallest = 1e-30f;                           // groups with less than this count as zero
constexpr int64_t kTokenWork = 1 << 15;                       // inputs worth waking another thread for

// What becomes of a token before its rotation.
enum class Prologue {
    none,
    rms_norm,                                                 // x * (1 / sqrt(mean(x^2) + eps)) * weight
    silu,                                                     // x / (1 + exp(-x)) * up
    gelu_tanh,                                                // GELU in its tanh form of x, times up
};

// Float operations are rounded one by one, in the order of the torch reference.
struct RotateJob {
    const void* x;                                            // [tokens, cols] float, or bfloat16 as its bits
    bool bf16;
    const uint8_t* signs;                                     // bits [cols / 8], set where -1; null: none
    int8_t* q;                                                // [tokens, cols of stride]
    float* scale;                                             // [tokens, cols / group of stride / group]
    int32_t* sums;                                            // [tokens, cols / group of stride / group]
    int64_t cols;                                             // a multiple of the larger of block and group
    int64_t stride;                                           // columns from a token's q to the next one's
    int block;                                                // 32, 64, 128 or 256; 1: no rotation
    int group;                                                // 32, 64, ... kMaxGroup; block divides it or it block
    int bits = 8;                                             // of q, or 4
    const float* shift = nullptr;                             // [cols], subtracted before the signs; null: nothing
    Prologue prologue = Prologue::none;
    const float* weight = nullptr;                            // [cols], of the norm
    float eps = 0;                                            // of the norm
    const void* up = nullptr;                                 // [tokens, cols] like x, the gate's other factor
};

void rotate_quantize_portable(const RotateJob& job, int64_t token);
#ifdef FEWBIT_HAVE_AVX2
void rotate_quantize_avx2(const RotateJob& job, int64_t token);
#endif
#ifdef FEWBIT_HAVE_AVX512
void rotate_quantize_avx512(const RotateJob& job, int64_t token);
#endif

// All tokens of a job with the instruction set in use, on one thread or all.
void rotate(const RotateJob& job, int64_t tokens);

}  // namespace fewbit
