// The products of quantized inputs with packed weights, once per instruction set.
// Nothing here allocates, throws or knows about Python; jobs are checked before they get here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace fewbit {

constexpr int kMaxPanel = 2;                                  // row groups that a product handles together
constexpr int kTokenTile = 384;                               // tokens whose sums stay near the core
constexpr int kGroupWeights = kTileRows * kMaxGroup;          // weights of a row group in one scale group
constexpr int kLaneCols = 64;                                 // columns whose chunks stand side by side in lanes
constexpr int kLaneChunks = 16;                               // these chunks, of one row group
constexpr int kMaxLaneGroups = 4;
constexpr int kSlack = 64;                                    // bytes around a group's codes that kernels may read
constexpr int kEdge = 2 * kSlack + 8 * kMaxGroup;             // a group's codes with that space around them

// What the codes of a matrix mean. All take 2 * bits * cols bytes per row group and start anew in every scale group.
enum class Code {
    trellis,                                                  // the canonical stream
    lanes,                                                    // the trellis, its bytes rearranged: see lanes.hpp
    nibbles,                                                  // 4 bits, value + 8
};

// out = q W' + bias: exact integer sums per group, times (weight scale * input scale), groups in order.
struct ProductJob {
    const int8_t* q;                                          // [tokens, cols of stride], within +-127
    const float* input_scale;                                 // [tokens, cols / group of stride / group]
    const int32_t* sums;                                      // [tokens, cols / group of stride / group]
    const uint8_t* codes;                                     // [row groups, 2 k cols]
    const uint16_t* scales;                                   // [rows, cols / group] half floats as their bits
    float scale;                                              // of the whole tensor
    const int8_t* tables;                                     // A 16, B 4, C 4, D 16; null for nibbles
    const float* bias;                                        // [rows] or null
    void* out;                                                // [tokens, rows] float, or bfloat16 as its bits
    bool bf16;
    int64_t tokens, rows, cols;
    int64_t stride;                                           // columns from a token's inputs to the next one's
    int group;                                                // a multiple of 32, at most kMaxGroup
    int bits;
    Code code;
    int lane_groups;                                          // row groups side by side in Code::lanes
    int8_t* packed;                                           // for `pack`: see PanelKernels
    int panels;                                               // panels of a unit of work
};

// What one thread needs while it multiplies.
struct alignas(64) ProductScratch {
    uint8_t weights[kMaxPanel * kGroupWeights];
    float total[kTokenTile * kMaxPanel * kTileRows];
    uint8_t edge[kEdge];                                      // codes of one row group in one scale group
    uint16_t* scales;                                         // [cols / group, panel, 16]
    void* more;                                               // as many bytes as the kernels ask for
};

// Products that pack blocks of `block` tokens first, each into block * (bytes * cols + 4 * groups) bytes, then work on
// panels of `panel` row groups, or on units of job.panels of these, up to `panels`.
struct PanelKernels {
    int block, bytes, panel;
    void (*pack)(const ProductJob& job, int64_t block);
    void (*multiply)(const ProductJob& job, int64_t unit, ProductScratch& scratch);
    int panels = 1;
    size_t scratch = 0;                                       // bytes of ProductScratch::more
};

// The dot products alone, on registers, to measure what the instruction set multiplies at most: `steps` steps of
// `operations` each, a multiplication and its addition being two.
struct PeakKernel {
    int64_t operations;
    void (*multiply)(int64_t steps);
};

struct ProductKernels {
    // Products of at most `few` tokens may read q itself, work on one row group and need no packing.
    int few;
    void (*multiply_few)(const ProductJob& job, int64_t row_group, ProductScratch& scratch);
    PanelKernels panels;
    // For Code::lanes with as many row groups side by side as this panel has, up to `most_in_lanes` tokens; others put
    // the codes back in order first. Empty where nothing is gained by lanes.
    PanelKernels lanes;
    int64_t most_in_lanes;
    PeakKernel peak;
    // Kernels for scale groups that are no multiple of `columns`.
    int columns = 1;
    const ProductKernels* otherwise = nullptr;
};

extern const ProductKernels kPortableProduct;
#ifdef FEWBIT_HAVE_AVX2
extern const ProductKernels kAvx2Product;
#endif
#ifdef FEWBIT_HAVE_AVXVNNI
extern const ProductKernels kAvxVnniProduct;
#endif
#ifdef FEWBIT_HAVE_AVX512
extern const ProductKernels kAvx512Product;
#endif

}  // namespace fewbit
