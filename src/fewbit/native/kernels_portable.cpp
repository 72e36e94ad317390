// Plain C++ for every machine; compilers turn the short loops into whatever vectors they have.
#include "kernels.hpp"
#include "product.hpp"
#include "rotate.hpp"

namespace fewbit {
namespace {

#include "trellis_decode.hpp"
#include "trellis_encode.hpp"

// Eight costs, as loops of a fixed length over plain arrays.
struct Vec {
    static constexpr int lanes = 8;
    struct Costs {
        uint32_t at[lanes];
    };

    static int broadcast(int16_t x) { return x; }

    static Costs distance(int x, const int16_t* levels) {
        Costs out;
        for (int i = 0; i < lanes; ++i) {
            int diff = x - levels[i];
            diff = diff > 32767 ? 32767 : diff;
            diff = diff < -32768 ? -32768 : diff;
            out.at[i] = static_cast<uint32_t>((diff * diff + (1 << 14)) >> 15);
        }
        return out;
    }

    template <int K>
    static Costs expand(const uint16_t* source) {
        Costs out;
        for (int i = 0; i < lanes; ++i) out.at[i] = source[i >> K];
        return out;
    }

    // Saturates when it is stored: until then only minima are taken.
    static Costs add(const Costs& a, const Costs& b) {
        Costs out;
        for (int i = 0; i < lanes; ++i) out.at[i] = a.at[i] + b.at[i];
        return out;
    }

    static Costs min(const Costs& a, const Costs& b) {
        Costs out;
        for (int i = 0; i < lanes; ++i) out.at[i] = b.at[i] < a.at[i] ? b.at[i] : a.at[i];
        return out;
    }

    static void store(uint16_t* to, const Costs& costs) {
        for (int i = 0; i < lanes; ++i)
            to[i] = static_cast<uint16_t>(costs.at[i] > kUnreachable ? kUnreachable : costs.at[i]);
    }

    template <int P>
    static void subtract_minimum(uint16_t* costs) {
        uint16_t least = kUnreachable;
        for (int p = 0; p < P; ++p) least = costs[p] < least ? costs[p] : least;
        for (int p = 0; p < P; ++p)
            costs[p] = costs[p] == kUnreachable ? kUnreachable : static_cast<uint16_t>(costs[p] - least);
    }
};

}  // namespace

constexpr Kernels kPortableKernels = {"portable", encode_stream<Vec>, encode_row_group<Vec>, decode_row_group,
                                  &kPortableProduct, rotate_quantize_portable};

}  // namespace fewbit
