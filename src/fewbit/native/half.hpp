// Half floats by hand.
#pragma once

#include <cstdint>

namespace fewbit {

// Every half float is exact in single precision.
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

}  // namespace fewbit
