// The products of quantized inputs with trellis weights, once per instruction set.
// Nothing here allocates, throws or knows about Python; jobs are checked before they get here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace fewbit {

constexpr int kMaxPanel = 2;                                  // row groups that a product handles together
constexpr int kTokenTile = 384;                               // tokens whose sums stay near the core
constexpr int kGroupWeights = kTileRows * kMaxGroup;          // weights of a row group in one scale group
constexpr int kSlack = 64;                                    // bytes around a group's codes that kernels may read

// out = q W' + bias: exact integer sums per group, times (weight scale * input scale), groups in order.
struct ProductJob {
    const int8_t* q;                                          // [tokens, cols], within +-127
    const float* input_scale;                                 // [tokens, cols / group]
    const int32_t* sums;                                      // [tokens, cols / group]
    const uint8_t* codes;                                     // [row groups, 2 k cols]
    const uint16_t* scales;                                   // [rows, cols / group] half floats as their bits
    float scale;                                              // of the whole tensor
    const int8_t* tables;                                     // A 16, B 4, C 4, D 16
    const float* bias;                                        // [rows] or null
    void* out;                                                // [tokens, rows] float, or bfloat16 as its bits
    bool bf16;
    int64_t tokens, rows, cols;
    int group;                                                // a multiple of 32, at most kMaxGroup
    int bits;
    int8_t* packed;                                           // [tokens, cols] for `pack`; unused for few tokens
};

// What one thread needs while it multiplies.
struct alignas(64) ProductScratch {
    uint8_t weights[kMaxPanel * kGroupWeights];
    float total[kTokenTile * kMaxPanel * kTileRows];
    uint8_t edge[2 * kSlack + 8 * kMaxGroup];
    uint16_t* scales;                                         // [cols / group, panel, 16]
};

struct ProductKernels {
    // Products of at most `few` tokens read q itself, work on one row group and need no packing.
    int few;
    void (*multiply_few)(const ProductJob& job, int64_t row_group, ProductScratch& scratch);
    // All others pack blocks of `block` tokens first, then work on panels of `panel` row groups.
    int block;
    void (*pack)(const ProductJob& job, int64_t block);
    int panel;
    void (*multiply)(const ProductJob& job, int64_t panel, ProductScratch& scratch);
};

extern const ProductKernels kPortableProduct;
#ifdef FEWBIT_HAVE_AVX2
extern const ProductKernels kAvx2Product;
#endif
#ifdef FEWBIT_HAVE_AVX512
extern const ProductKernels kAvx512Product;
#endif

}  // namespace fewbit
