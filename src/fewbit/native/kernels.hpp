// The kernels that exist once per instruction set, and the jobs they are given.
// Nothing here allocates, throws or knows about Python; jobs are checked before they get here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit {

constexpr int kWindow = 12;                       // bits that decide one weight
constexpr int kStates = 1 << kWindow;             // states of the trellis
constexpr int kTileRows = 16;                     // rows of a row group
constexpr int kTileCols = 16;                     // columns between two steps of error feedback
constexpr int kTile = kTileRows * kTileCols;      // weights of one Viterbi search
constexpr int kLook = 32;                         // weights of the next tile that a search looks at
constexpr int kChunk = 64;                        // weights of 16 rows x 4 columns, 8 k bytes
constexpr int kLevelsPerUnit = 256;               // fixed point of the search: 1 table unit is 256
constexpr int kMaxGroup = 256;                    // columns that share a scale

// 16-bit costs of every context after every step of one search (k = 2 has the most contexts).
constexpr size_t kHistory = static_cast<size_t>(kTile + kLook + 1) * (kStates >> 2);

// What one thread needs while it encodes.
struct alignas(64) Workspace {
    uint16_t history[kHistory];
    float rest[kTileRows * kMaxGroup];            // weights still to be encoded, feedback included
    int16_t x[kTile + kLook];                     // fixed-point targets
    uint16_t path[kTile + kLook];                 // contexts of the path traced last
    uint8_t symbols[kTile + kLook];
};

// Plain sequences of `steps` fixed-point values, in tiles of 256 whose contexts follow on.
struct StreamJob {
    const int16_t* x;                             // [streams, steps]
    const int16_t* levels;                        // [4096] in state order
    uint8_t* symbols;                             // [streams, steps]
    int64_t steps;
    int bits;
};

// One scale group of columns for all rows.
struct EncodeJob {
    const float* weight;                          // [rows, group]
    const float* scales;                          // [rows], weight per table unit
    const float* inverse;                         // [rows], 256 / scale, or 0
    const float* factor;                          // [group, group] upper triangular, or null
    const int16_t* levels;                        // [4096] in state order
    uint8_t* codes;                               // [row groups, 2 k group]
    float* values;                                // [rows, group]
    float* error;                                 // [rows, group] with error U = weight - values, null without U
    float* weighted;                              // [rows, group] with weighted U = values, null without U
    int64_t rows;
    int group;
    int bits;
};

// A whole tensor back to floats.
struct DecodeJob {
    const uint8_t* codes;                         // [row groups, 2 k cols]
    const float* scales;                          // [rows, cols / group]
    const int8_t* values;                         // [4096] in window order
    float* out;                                   // [rows, cols]
    int64_t rows;
    int64_t cols;
    int group;
    int bits;
};

struct ProductKernels;                            // product.hpp
struct RotateJob;                                 // rotate.hpp

// The functions of one instruction set; `index` is a stream or a row group.
struct Kernels {
    const char* name;
    void (*encode_stream)(const StreamJob& job, int64_t index, Workspace& work);
    void (*encode_row_group)(const EncodeJob& job, int64_t index, Workspace& work);
    void (*decode_row_group)(const DecodeJob& job, int64_t index);
    const ProductKernels* product;
    void (*rotate_quantize)(const RotateJob& job, int64_t token);
};

extern const Kernels kPortableKernels;
#ifdef FEWBIT_HAVE_AVX2
extern const Kernels kAvx2Kernels;
#endif
#ifdef FEWBIT_HAVE_AVXVNNI
extern const Kernels kAvxVnniKernels;
#endif
#ifdef FEWBIT_HAVE_AVX512
extern const Kernels kAvx512Kernels;
#endif
#ifdef FEWBIT_HAVE_AMX
const Kernels& amx_kernels();
const Kernels& emulated_amx_kernels();            // the same code with tiles in plain C++, for tests
#endif

}  // namespace fewbit
