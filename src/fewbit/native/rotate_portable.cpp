// Plain C++ for every machine; compilers turn the short loops into whatever vectors they have.
#include "rotate.hpp"

namespace fewbit {
namespace {

#include "prologues.hpp"
#include "rotate_quantize.hpp"

struct Rotation {
    static constexpr int lanes = 8, held = 2;
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

    static Floats div(Floats a, const Floats& b) {
        for (int i = 0; i < lanes; ++i) a.at[i] /= b.at[i];
        return a;
    }

    // Both leave a NaN as it is.
    static Floats at_least(Floats v, const Floats& bound) {
        for (int i = 0; i < lanes; ++i) v.at[i] = v.at[i] < bound.at[i] ? bound.at[i] : v.at[i];
        return v;
    }

    static Floats at_most(Floats v, const Floats& bound) {
        for (int i = 0; i < lanes; ++i) v.at[i] = v.at[i] > bound.at[i] ? bound.at[i] : v.at[i];
        return v;
    }

    static Floats power(const Floats& v) {
        uint32_t bits[lanes];
        __builtin_memcpy(bits, v.at, sizeof bits);
        for (uint32_t& lane : bits) lane <<= 23;
        Floats power;
        __builtin_memcpy(power.at, bits, sizeof power.at);
        return power;
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

    static int32_t quantize(const float* y, int count, float inverse, float most, int8_t* q) {
        // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
        constexpr float shift = 12582912.0f;
        int32_t sum = 0;
        for (int i = 0; i < count; ++i) {
            const float scaled = y[i] * inverse;
            const int32_t value = static_cast<int32_t>(((scaled > most ? most : scaled) + shift) - shift);
            q[i] = static_cast<int8_t>(value);
            sum += value;
        }
        return sum;
    }
};

}  // namespace

void rotate_quantize_portable(const RotateJob& job, int64_t token) { rotate_quantize<Rotation>(job, token); }

}  // namespace fewbit
