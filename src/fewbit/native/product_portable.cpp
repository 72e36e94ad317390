// Plain C++ for every machine; compilers turn the short loops into whatever vectors they have.
#include "half.hpp"
#include "product.hpp"

namespace fewbit {
namespace {

#include "lanes.hpp"
#include "packed_product.hpp"

struct Plain {
    static constexpr Code kCode = Code::trellis;
    static constexpr int kBlock = 4, kPanel = 1, kPacked = 1;

    template <int K>
    struct Trellis {
        int8_t low[64], high[64];

        explicit Trellis(const int8_t* tables) {
            for (int i = 0; i < 64; ++i) {
                low[i] = static_cast<int8_t>(tables[i & 15] + tables[16 + (i >> 4)]);
                high[i] = static_cast<int8_t>(tables[20 + (i & 3)] + tables[24 + (i >> 2)]);
            }
        }

        void decode(const uint8_t* codes, int chunks, uint8_t* out) const {
            uint64_t window = 0;
            for (int t = 0; t < chunks * kChunk; t += 8, codes += K, out += 8) {
                uint64_t word = 0;
                for (int byte = 0; byte < K; ++byte) word |= static_cast<uint64_t>(codes[byte]) << (8 * byte);
                window |= word << kWindow;
                for (int i = 0; i < 8; ++i) {
                    const uint32_t w = static_cast<uint32_t>(window >> (K * (i + 1)));
                    out[i] = static_cast<uint8_t>(low[w & 63] + high[w >> 6 & 63]);
                }
                window >>= 8 * K;
            }
        }
    };

    // Two chunks in the low and the high halves of 64 bytes, each weight plus 8.
    struct Nibbles {
        explicit Nibbles(const int8_t*) {}

        void decode(const uint8_t* codes, int chunks, uint8_t* out) const {
            for (int c = 0; c < chunks; c += 2, codes += kChunk, out += 2 * kChunk)
                for (int i = 0; i < kChunk; ++i) {
                    out[i] = static_cast<uint8_t>((codes[i] & 15) - 8);
                    out[kChunk + i] = static_cast<uint8_t>((codes[i] >> 4) - 8);
                }
        }
    };

    static void write(const ProductJob& job, int64_t token, int64_t row_group, const float* total) {
        write_rows(job, token, row_group, total);
    }

    template <class Decoder>
    static void decode(const ProductJob& job, int64_t row_group, int count, int64_t g, const Decoder& decoder,
                       ProductScratch& scratch) {
        decode_row_groups(job, row_group, count, g, decoder, scratch);
    }

    template <int T>
    static void tile(const ProductJob& job, const Tile& tile) {
        int32_t dots[T][kTileRows] = {};
        const int8_t* weights = reinterpret_cast<const int8_t*>(tile.weights);
        const int8_t* inputs = tile.packed;
        for (int c = 0; c < job.group / 4; ++c, weights += kChunk, inputs += 4 * T)
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < kTileRows; ++r)
                    for (int i = 0; i < 4; ++i) dots[t][r] += weights[4 * r + i] * inputs[4 * t + i];
        const int64_t groups = job.stride / job.group;
        for (int r = 0; r < kTileRows; ++r) {
            const float weight_scale = half_to_float(tile.scales[r]) * job.scale;
            for (int t = 0; t < T; ++t) {
                const float both = weight_scale * job.input_scale[(tile.token + t) * groups + tile.g];
                tile.total[t * kTileRows + r] += static_cast<float>(dots[t][r]) * both;
            }
        }
    }
};

// There are no registers to name here: the tile of products itself, its operands in the first cache, as compiled here.
void multiply_cached_tile(int64_t steps) {
    alignas(64) uint8_t weights[kGroupWeights];
    int8_t inputs[kMaxGroup * Plain::kBlock];
    __builtin_memset(weights, 1, sizeof weights);
    __builtin_memset(inputs, 1, sizeof inputs);
    const uint16_t scales[kTileRows] = {};
    const float input_scale[Plain::kBlock] = {};
    float total[Plain::kBlock * kTileRows] = {};
    ProductJob job{};
    job.cols = job.stride = job.group = kMaxGroup;
    job.input_scale = input_scale;
    const Tile tile{weights, inputs, scales, total, 0, 0};
    for (; steps > 0; --steps) {
        // For all that the compiler knows, everything is another now, and the totals are read.
        __asm__ volatile("" ::"r"(&job), "r"(&tile) : "memory");
        Plain::tile<Plain::kBlock>(job, tile);
    }
}

}  // namespace

constexpr ProductKernels kPortableProduct = {0, nullptr, panel_kernels<Plain>(), {}, 0,
                                         {2 * kGroupWeights * Plain::kBlock, multiply_cached_tile}};

}  // namespace fewbit
