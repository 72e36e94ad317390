// Kernels in floating point: dense products, norms, rotary positions, the cache and attention, once per instruction set.
// Nothing here allocates, throws or knows about Python; jobs are checked before they get here.
//
// A token's results do not depend on what else is computed with it, as long as that is finite: every sum runs in an
// order that its own position decides. Between instruction sets they may differ by rounding, because sums run over as many lanes as there are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rotate.hpp"

namespace fewbit {

constexpr int kCacheChunk = 64;                   // positions whose keys stand side by side
constexpr int64_t kSegment = 512;                 // positions that are reduced by themselves, a multiple of the chunk
constexpr int kMaxHead = 256;                     // size of a head, a multiple of kHeadUnit
constexpr int kHeadUnit = 16;
constexpr int kQueryRows = 32;                    // queries (tokens times heads of one key) of a tile, at most

// How keys and values are kept. int8 ones are rotated head by head and have a scale per position.
enum class CacheType { bf16, int8, float32 };

inline size_t bytes_of(CacheType type) { return type == CacheType::bf16 ? 2 : type == CacheType::int8 ? 1 : 4; }

// Keys and values of one head of one sequence; scales are null unless they are int8.
struct CacheHead {
    void* keys;                                   // [context / kCacheChunk, dim, kCacheChunk]
    void* values;                                 // [context, dim]
    float* key_scales;                            // [context]
    float* value_scales;
};

constexpr int kDenseRows = 32;                    // rows of a panel

// out = x W^T + bias with W bfloat16 as its bits, in panels whose rows stand side by side for every column, so that a
// product reads one stream.
struct DenseJob {
    const float* x;                               // [tokens, cols]
    const uint16_t* weight;                       // [ceil(rows / kDenseRows), cols, kDenseRows]
    const float* bias;                            // [rows] or null
    float* out;                                   // [tokens, rows]
    int64_t tokens, rows, cols;
};

// One token: norms of its heads' queries and keys if there are any, rotary positions, and its key and value written.
struct RopeJob {
    float* q;                                     // [heads, dim], changed in place
    float* k;                                     // [kv heads, dim], changed in place
    float* v;                                     // [kv heads, dim], changed in place
    int heads, kv_heads, dim;
    const float* q_norm;                          // [dim] or null
    const float* k_norm;
    float eps;
    const float* cosines;                         // [dim / 2], of the token's position
    const float* sines;
    float scale;                                  // of the queries
    CacheType type;
    const CacheHead* cache;                       // [kv heads]
    int64_t position;
};

// Queries of one tile and one key head against the segments [first, last) of the cache.
struct AttentionJob {
    const float* q;                               // [tokens, heads, dim], scaled
    float* out;                                   // [tokens, heads, dim]; null: the state goes to `partial`
    float* partial;                               // [tokens * group, dim + 2]
    const int32_t* positions;                     // [tokens], ascending
    int tokens, heads, group, dim;                // group: heads of one key head, tokens * group <= kQueryRows
    int head;                                     // the first of them
    int64_t window;                               // positions that a token sees, its own included
    CacheType type;
    CacheHead cache;
    int64_t first, last;
};

// Rows of values [rows, cols] rounded to integers times a scale per group, or a gradient on its way back through that.
struct GroupJob {
    const float* x;
    const float* gradient;                        // of the rounded values; null on the way there
    float* out;
    int64_t cols;
    int group;                                    // a multiple of 32, at most kMaxGroup
    float whole, low, high;                       // the integer of the value that sets the scale, and the range of all
};

constexpr int kRoundedRows = 16;                  // rows that are rounded side by side

// One scale group of columns to integers low..high, column by column with error feedback where there is a factor.
struct ColumnsJob {
    const float* weight;                          // [rows, group]
    const float* steps;                           // [rows], weight per integer
    const float* factor;                          // [group, group] upper triangular, or null
    int8_t* codes;                                // [rows, group]
    float* values;                                // [rows, group], codes * steps
    float* error;                                 // [rows, group] with error U = weight - values, null without U
    int64_t rows;
    int group;                                    // at most kMaxGroup
    float low, high;
};

// The scale of each row that loses least in squares, among clips of the one that makes the extreme value `whole`.
struct ScaleJob {
    const float* weight;                          // [rows, group]
    const float* clips;                           // [count]
    float* scales;                                // [rows]
    int group;                                    // a multiple of 32, at most kMaxGroup
    int count;
    float whole, low, high;
};

// What a thread needs while it attends.
struct alignas(64) AttentionScratch {
    float keys[kMaxHead * kCacheChunk];
    float values[kMaxHead * kCacheChunk];
    float scores[kQueryRows * kCacheChunk];
    float outputs[kQueryRows * kMaxHead];
    float folded[kQueryRows * kMaxHead];
    float most[kQueryRows], sum[kQueryRows], folded_most[kQueryRows], folded_sum[kQueryRows];
};

struct FloatKernels {
    void (*dense)(const DenseJob& job, int64_t panel);
    // out = x / sqrt(mean(x^2) + eps) * weight for one token.
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t cols, float* out);
    // x += y
    void (*add)(float* x, const float* y, int64_t cols);
    // out = activation(gate) * up
    void (*gate)(const float* gate, const float* up, Prologue activation, int64_t cols, float* out);
    void (*rope)(const RopeJob& job);
    void (*attend)(const AttentionJob& job, AttentionScratch& scratch);
    // Folds `count` states [tokens * group, dim + 2], one after the other, `stride` floats apart, into job.out.
    void (*fold)(const AttentionJob& job, const float* states, int64_t stride, int64_t count, AttentionScratch& scratch);
    // One row each.
    void (*round_groups)(const GroupJob& job, int64_t row);
    void (*round_groups_back)(const GroupJob& job, int64_t row);
    void (*best_scale)(const ScaleJob& job, int64_t row);
    // kRoundedRows rows.
    void (*round_columns)(const ColumnsJob& job, int64_t block);
};

extern const FloatKernels kPortableFloats;
#ifdef FEWBIT_HAVE_AVX2
extern const FloatKernels kAvx2Floats;
#endif
#ifdef FEWBIT_HAVE_AVX512
extern const FloatKernels kAvx512Floats;
#endif

// Those of the instruction set in use.
const FloatKernels& float_kernels();

}  // namespace fewbit
