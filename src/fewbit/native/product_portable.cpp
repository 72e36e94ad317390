// Plain C++ for every machine; compilers turn the short loops into whatever vectors they have.
#include "product.hpp"

namespace fewbit {
namespace {

#include "rotate_quantize.hpp"
#include "lanes.hpp"
#include "packed_product.hpp"

struct Rotation {
    static constexpr int lanes = 8;
    struct Floats {
        float at[lanes];
    };
    struct Bits {
        uint32_t at[lanes];
    };

    static Floats load(const float* x) {
        Floats v;
        __builtin_memcpy(v.at, x, sizeof v.at);
        return v;
    }

    static Floats load(const uint16_t* x) {
        uint32_t bits[lanes];
        for (int i = 0; i < lanes; ++i) bits[i] = static_cast<uint32_t>(x[i]) << 16;
        Floats v;
        __builtin_memcpy(v.at, bits, sizeof v.at);
        return v;
    }

    static Floats flip(Floats v, const uint8_t* signs) {
        for (int i = 0; i < lanes; ++i) v.at[i] = *signs >> i & 1 ? -v.at[i] : v.at[i];
        return v;
    }

    static Floats inner_butterflies(Floats v) {
        for (int half = 1; half < lanes; half *= 2) {
            Floats next;
            for (int i = 0; i < lanes; ++i)
                next.at[i] = i & half ? v.at[i - half] - v.at[i] : v.at[i] + v.at[i + half];
            v = next;
        }
        return v;
    }

    static Floats broadcast(float x) {
        Floats v;
        for (float& lane : v.at) lane = x;
        return v;
    }

    static Floats add(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i) a.at[i] += b.at[i];
        return a;
    }

    static Floats sub(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i) a.at[i] -= b.at[i];
        return a;
    }

    static Floats mul(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i) a.at[i] *= b.at[i];
        return a;
    }

    static void store(float* to, const Floats& v) { __builtin_memcpy(to, v.at, sizeof v.at); }

    static Bits nothing() { return Bits{}; }

    static Bits magnitude(const Floats& v) {
        Bits bits;
        __builtin_memcpy(bits.at, v.at, sizeof bits.at);
        for (uint32_t& lane : bits.at) lane &= 0x7fffffff;
        return bits;
    }

    static Bits larger(Bits a, const Bits& b) {
        for (int i = 0; i < lanes; ++i) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
        return a;
    }

    static uint32_t largest_of(const Bits& bits) {
        uint32_t most = 0;
        for (const uint32_t lane : bits.at) most = lane > most ? lane : most;
        return most;
    }

    static int32_t quantize(const float* y, int count, float inverse, int8_t* q) {
        // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
        constexpr float shift = 12582912.0f;
        int32_t sum = 0;
        for (int i = 0; i < count; ++i) {
            const int32_t value = static_cast<int32_t>((y[i] * inverse + shift) - shift);
            q[i] = static_cast<int8_t>(value);
            sum += value;
        }
        return sum;
    }
};

// Half floats by hand; every one of them is exact in single precision.
inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) {
        const float small = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -small : small;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

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
        const int64_t groups = job.cols / job.group;
        for (int r = 0; r < kTileRows; ++r) {
            const float weight_scale = half_to_float(tile.scales[r]) * job.scale;
            for (int t = 0; t < T; ++t) {
                const float both = weight_scale * job.input_scale[(tile.token + t) * groups + tile.g];
                tile.total[t * kTileRows + r] += static_cast<float>(dots[t][r]) * both;
            }
        }
    }
};

}  // namespace

const ProductKernels kPortableProduct = {rotate_quantize<Rotation>, 0, nullptr, panel_kernels<Plain>(), {}, 0};

}  // namespace fewbit
