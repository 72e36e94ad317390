// AMX int8 (beside AVX-512): products of many tokens, 16 tokens x 16 rows x 64 columns per instruction.
//
// Two tiles of inputs meet two of weights: the sums of 32 tokens x 32 rows. At the end of a scale group they go to
// memory, from where the vector unit scales them while the tiles work on the next block; it decodes the weights that
// come next meanwhile, too. Loading tiles is what takes long, so everything is arranged for the caches: a unit of work
// decodes every weight once for kFar tokens into the second cache, from where the inputs come, too; the totals of
// kNear tokens x 32 rows and a scale group's weights stay in the first one.
#include <immintrin.h>

#include "product.hpp"

namespace fewbit {
namespace {

#include "lanes.hpp"
#include "packed_product.hpp"
#include "decode_avx512.hpp"
#include "tiles_amx.hpp"

constexpr int kBlock = 32;                        // tokens of a block, in two halves
constexpr int kPair = 2;                          // row groups of a block
constexpr int kWidth = kPair * kTileRows;
constexpr int kDepth = 64;                        // columns that one instruction reads
constexpr int kPairs = 8;                         // of a unit of work, at most
constexpr int kSlice = 2048;                      // columns whose weights are decoded at once
constexpr int kNear = 64;                         // tokens whose totals stay in the first cache
constexpr int kFar = 512;                         // tokens for which weights are decoded once
constexpr int kGroups = kSlice / kDepth;          // scale groups of a slice, at most

struct alignas(64) Scratch {
    int8_t weights[kPairs * kWidth * kSlice];     // [pair][group][row group][columns / 4][16][4]
    float scales[kPairs * kGroups][kWidth];       // [pair][group][row], weight per unit
    float total[kPairs][kFar][kWidth];
    int32_t sums[kBlock][kWidth];
    uint8_t edge[kPair][kEdge];
};

// Decoders to signed bytes, as the tiles take them: no origin to subtract later.
struct Signed {
    static constexpr Code kCode = Code::trellis;

    template <int K>
    using Trellis = TrellisChunks<K, 0>;

    struct Nibbles : NibbleChunks {
        using NibbleChunks::NibbleChunks;

        __m512i chunk(const uint8_t* codes, int i, bool start) const {
            return _mm512_sub_epi8(NibbleChunks::chunk(codes, i, start), _mm512_set1_epi8(kOrigin));
        }
    };
};

// Inputs of a block in one scale group: bytes [half][columns / 64][16][64], then scales [32].
int64_t packed_group(const ProductJob& job) { return kBlock * (job.group + int64_t{sizeof(float)}); }

int8_t* packed_block(const ProductJob& job, int64_t block) {
    return job.packed + block * (job.cols / job.group) * packed_group(job);
}

// A half without tokens stays as it is: nothing reads it.
void pack(const ProductJob& job, int64_t block) {
    const int64_t first = block * kBlock, groups = job.cols / job.group, stride = job.stride / job.group;
    const int64_t steps = job.group / kDepth;
    const int count = job.tokens - first < kBlock ? static_cast<int>(job.tokens - first) : kBlock;
    int8_t* out = packed_block(job, block);
    for (int64_t g = 0; g < groups; ++g, out += packed_group(job)) {
        for (int t = 0; t < (count > 16 ? kBlock : 16); ++t) {
            int8_t* to = out + t / 16 * steps * kTileBytes + t % 16 * kDepth;
            const int8_t* from = job.q + (first + t) * job.stride + g * job.group;
            for (int64_t k = 0; k < steps; ++k, to += kTileBytes, from += kDepth) {
                if (t < count) __builtin_memcpy(to, from, kDepth);
                else __builtin_memset(to, 0, kDepth);
            }
        }
        float* scales = reinterpret_cast<float*>(out + kBlock * job.group);
        for (int t = 0; t < count; ++t) scales[t] = job.input_scale[(first + t) * stride + g];
    }
}

// The rows of one unit of work. `at` counts its pairs' scale groups: [pair][group of the slice].
template <class Tiles, class Decoder>
class Slab {
public:
    Slab(const ProductJob& job, int64_t unit, const Decoder& decoder, Scratch& scratch)
        : job_(job),
          decoder_(decoder),
          scratch_(scratch),
          groups_(job.cols / job.group),
          steps_(job.group / kDepth),
          row_group_(unit * job.panels * kPair),
          row_groups_((job.rows + kTileRows - 1) / kTileRows) {
        const int64_t pairs = (row_groups_ - row_group_ + kPair - 1) / kPair;
        pairs_ = pairs < job.panels ? static_cast<int>(pairs) : job.panels;
    }

    void multiply() {
        const int64_t slice = kSlice / job_.group;
        for (far_ = 0; far_ < job_.tokens; far_ += kFar) {
            const int64_t end = job_.tokens - far_ < kFar ? job_.tokens : far_ + kFar;
            for (group_ = 0; group_ < groups_; group_ += slice) {
                count_ = static_cast<int>(groups_ - group_ < slice ? groups_ - group_ : slice);
                begin_decoding(0);
                decode(kPair * steps_);
                for (int64_t token = far_; token < end; token += kNear) {
                    const int64_t last = end - token < kNear ? end : token + kNear;
                    if (token == far_) multiply_near<true>(token, last);
                    else multiply_near<false>(token, last);
                }
            }
        }
        add(0, left_.tokens);
        write(kNear);
    }

private:
    // Up to 32 tokens in scale group `group`, number `at` of the slab.
    struct Block {
        int at;
        int64_t group, token;
        int tokens;
        float* total;
    };

    // Sums of a block that are not in its totals yet.
    struct Left {
        __m512 scales[kPair];
        const float* input_scales;
        float* total;
        __mmask16 before;                         // lanes of the totals that count: none in the first scale group
        int tokens = 0;
    };

    // Tokens whose totals are complete and not written yet.
    struct Done {
        int64_t token = 0, end = 0;
    };

    // Weights of a pair in one scale group that are not decoded yet.
    struct Next {
        const uint8_t* codes[kPair];
        int8_t* out;
        int left = 0, step = 0;                   // tiles; the next one's place in its row group
    };

    // One pass over the slice's weights; the first one decodes them, a scale group ahead. What is left to add when a
    // block ends and to write when a pass ends is done along with the blocks that follow.
    template <bool First>
    void multiply_near(int64_t begin, int64_t end) {
        static_assert(kNear == kPair * kBlock, "a pass has one or two blocks");
        const int blocks = end - begin > kBlock ? 2 : 1, all = pairs_ * count_ * blocks;
        const auto ahead = [&] {
            if (First) decode(kPair / blocks);
        };
        int due = 0;                              // tokens to write, in units of 1 / all
        for (int pair = 0; pair < pairs_; ++pair) {
            float* total = scratch_.total[pair][begin - far_];
            for (int g = 0; g < count_; ++g) {
                const int at = pair * count_ + g;
                if (First) begin_decoding(at + 1);
                for (int64_t token = begin; token < end; token += kBlock, due = due % all + kNear) {
                    const int tokens = end - token < kBlock ? static_cast<int>(end - token) : kBlock;
                    const Block block{at, group_ + g, token, tokens, total + (token - begin) * kWidth};
                    if (tokens > 16) multiply_block<2>(block, ahead);
                    else multiply_block<1>(block, ahead);
                    write(due / all);
                }
            }
        }
        if (group_ + count_ < groups_) return;
        write(kNear);
        done_ = {begin, end};
    }

    // The sums of a block with `Halves` times 16 tokens; adds those of the block before meanwhile.
    template <int Halves, class Ahead>
    void multiply_block(const Block& block, const Ahead& ahead) {
        const int8_t* packed = packed_block(job_, block.token / kBlock) + block.group * packed_group(job_);
        const int8_t* inputs = packed;
        const int8_t* weights = weights_at(block.at);
        const int64_t other = steps_ * kTileBytes;  // the distance to the other half and to the other row group
        const int share = (left_.tokens + steps_ - 1) / steps_;
        tiles_.template zero<0>();
        tiles_.template zero<1>();
        if (Halves == 2) tiles_.template zero<2>();
        if (Halves == 2) tiles_.template zero<3>();
        for (int k = 0, token = 0; k < steps_; ++k, inputs += kTileBytes, weights += kTileBytes) {
            tiles_.template load<4>(inputs);
            tiles_.template load<6>(weights);
            tiles_.template multiply<0, 4, 6>();
            tiles_.template load<7>(weights + other);
            tiles_.template multiply<1, 4, 7>();
            if (Halves == 2) {
                tiles_.template load<5>(inputs + other);
                tiles_.template multiply<2, 5, 6>();
                tiles_.template multiply<3, 5, 7>();
            }
            const int end = token + share < left_.tokens ? token + share : left_.tokens;
            add(token, end);
            token = end;
            ahead();
        }
        int32_t* sums = scratch_.sums[0];
        tiles_.template store<0, kWidth>(sums);
        tiles_.template store<1, kWidth>(sums + 16);
        if (Halves == 2) tiles_.template store<2, kWidth>(sums + 16 * kWidth);
        if (Halves == 2) tiles_.template store<3, kWidth>(sums + 16 * kWidth + 16);
        const float* scales = scratch_.scales[block.at];
        left_.scales[0] = _mm512_load_ps(scales);
        left_.scales[1] = _mm512_load_ps(scales + kTileRows);
        left_.input_scales = reinterpret_cast<const float*>(packed + kBlock * job_.group);
        left_.total = block.total;
        left_.before = block.group == 0 ? 0 : 0xffff;
        left_.tokens = block.tokens;
    }

    // Scales the last block's sums of the tokens from `begin` and adds them to their totals.
    void add(int begin, int end) const {
        const Left left = left_;
        const int32_t* sums = scratch_.sums[begin];
        for (int t = begin; t < end; ++t, sums += kWidth) {
            float* total = left.total + t * kWidth;
            float* second = total + kTileRows;
            const float scale = left.input_scales[t];
            _mm512_store_ps(total, add_scaled(_mm512_maskz_load_ps(left.before, total), _mm512_load_si512(sums),
                                              left.scales[0], scale));
            _mm512_store_ps(second, add_scaled(_mm512_maskz_load_ps(left.before, second),
                                               _mm512_load_si512(sums + kTileRows), left.scales[1], scale));
        }
    }

    // Writes `tokens` more of the pass that is complete: all rows of the slab, so that memory sees long pieces, and a
    // few tokens at a time, so that it keeps up.
    void write(int tokens) {
        for (; tokens > 0 && done_.token < done_.end; --tokens, ++done_.token)
            for (int r = 0; r < pairs_ * kPair && row_group_ + r < row_groups_; ++r) {
                const float* total = scratch_.total[r / kPair][done_.token % kFar] + r % kPair * kTileRows;
                write_sums(job_, done_.token, row_group_ + r, _mm512_load_ps(total));
            }
    }

    int8_t* weights_at(int at) const { return scratch_.weights + at * kWidth * job_.group; }

    // Prepares a pair's scales in one scale group and the decoding of its weights there, unless the slab ends before.
    void begin_decoding(int at) {
        next_.left = at < pairs_ * count_ ? kPair * steps_ : 0;
        if (next_.left == 0) return;
        const int64_t row_group = row_group_ + at / count_ * kPair, group = group_ + at % count_;
        for (int i = 0; i < kPair; ++i) {
            // A pair that lacks its second row group takes the first one twice.
            const int64_t there = row_group + i < row_groups_ ? row_group + i : row_group;
            next_.codes[i] = group_codes(job_, there, group, scratch_.edge[i]);
        }
        next_.out = weights_at(at);
        next_.step = 0;
        alignas(64) uint16_t halves[kWidth];
        for (int r = 0; r < kWidth; ++r) {
            const int64_t row = row_group * kTileRows + r;
            halves[r] = row < job_.rows ? job_.scales[row * groups_ + group] : 0;
        }
        float* scales = scratch_.scales[at];
        _mm512_store_ps(scales, load_scales(halves, job_.scale));
        _mm512_store_ps(scales + kTileRows, load_scales(halves + kTileRows, job_.scale));
    }

    // Decodes the next `tiles` tiles of 16 rows x 64 columns.
    void decode(int tiles) {
        for (; tiles > 0 && next_.left > 0; --tiles, --next_.left) {
            const Decoder decoder = decoder_;
            const uint8_t* codes = next_.codes[0] + next_.step * (kDepth / 4) * Decoder::kBytes;
            int8_t* out = next_.out;
            _mm512_store_si512(out, decoder.chunk(codes, 0, next_.step == 0));
#pragma GCC unroll 16
            for (int c = 1; c < kDepth / 4; ++c) _mm512_store_si512(out + c * kChunk, decoder.chunk(codes, c, false));
            next_.out = out + kTileBytes;
            if (++next_.step < steps_) continue;
            next_.codes[0] = next_.codes[1];
            next_.step = 0;
        }
    }

    const ProductJob& job_;
    const Decoder decoder_;
    Scratch& scratch_;
    const int64_t groups_;
    const int steps_;                             // tiles along a scale group
    const int64_t row_group_, row_groups_;        // the first one of the slab; all of the matrix
    int pairs_;
    int64_t far_ = 0;                             // first token of those that share decoded weights
    int64_t group_ = 0;                           // first scale group of the slice
    int count_ = 0;                               // scale groups of the slice
    Left left_{};
    Done done_;
    Next next_{};
    Tiles tiles_;
};

template <class Tiles, class Decoder>
void multiply_slab(const ProductJob& job, int64_t unit, const Decoder& decoder, ProductScratch& scratch) {
    Slab<Tiles, Decoder> slab(job, unit, decoder, *static_cast<Scratch*>(scratch.more));
    slab.multiply();
}

template <class Tiles>
void multiply_many(const ProductJob& job, int64_t unit, ProductScratch& scratch) {
    with_decoder<Signed>(job, [&](const auto& decoder) { multiply_slab<Tiles>(job, unit, decoder, scratch); });
}

// A block's four products on tiles that stay loaded.
template <class Tiles>
void multiply_tiles(int64_t steps) {
    alignas(64) int8_t ones[kTileBytes];
    alignas(64) int32_t sums[4][kTileBytes / 4];
    __builtin_memset(ones, 1, sizeof ones);
    Tiles tiles;
    tiles.template zero<0>();
    tiles.template zero<1>();
    tiles.template zero<2>();
    tiles.template zero<3>();
    tiles.template load<4>(ones);
    tiles.template load<5>(ones);
    tiles.template load<6>(ones);
    tiles.template load<7>(ones);
    for (; steps > 0; --steps) {
        tiles.template multiply<0, 4, 6>();
        tiles.template multiply<1, 4, 7>();
        tiles.template multiply<2, 5, 6>();
        tiles.template multiply<3, 5, 7>();
    }
    tiles.template store<0, kTileRows>(sums[0]);
    tiles.template store<1, kTileRows>(sums[1]);
    tiles.template store<2, kTileRows>(sums[2]);
    tiles.template store<3, kTileRows>(sums[3]);
    __asm__ volatile("" ::"m"(sums));             // read, for all that the compiler knows
}

// Everything but the products of many tokens is AVX-512's. Made when asked for: nothing in this unit may run on
// machines that lack AVX-512.
template <class Tiles>
const Kernels& kernels_with(const char* name) {
    static const ProductKernels product = [] {
        ProductKernels made = kAvx512Product;
        made.panels = {kBlock, 1, kPair, pack, multiply_many<Tiles>, kPairs, sizeof(Scratch)};
        made.peak = {4 * 2 * kTileRows * 16 * kDepth, multiply_tiles<Tiles>};
        made.columns = kDepth;
        made.otherwise = &kAvx512Product;
        return made;
    }();
    static const Kernels kernels = [name] {
        Kernels made = kAvx512Kernels;
        made.name = name;
        made.product = &product;
        return made;
    }();
    return kernels;
}

}  // namespace

const Kernels& amx_kernels() { return kernels_with<HardwareTiles>("amx"); }

const Kernels& emulated_amx_kernels() { return kernels_with<EmulatedTiles>("amx-emulated"); }

}  // namespace fewbit
