// Comes before everything else in units that are compiled for machines which lack their instructions: SIMDe's
// functions take the place of the intrinsics of AVX-512 and AVX-VNNI, and what SIMDe lacks is here, in plain loops.
#pragma once

#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fewbit_emulated {

template <class To, class From>
To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// A register as lanes of T.
template <class T, class Register>
struct Lanes {
    static constexpr int count = sizeof(Register) / sizeof(T);
    T lane[count];

    Lanes() : lane{} {}
    explicit Lanes(const Register& from) { std::memcpy(lane, &from, sizeof lane); }
    operator Register() const { return bits<Register>(*this); }
};

// `op` of every lane.
template <class To, class ToRegister, class From, class FromRegister, class Op>
ToRegister each(const FromRegister& from, const Op& op) {
    const Lanes<From, FromRegister> x(from);
    Lanes<To, ToRegister> y;
    static_assert(y.count == x.count, "lane by lane");
    for (int i = 0; i < x.count; ++i) y.lane[i] = static_cast<To>(op(x.lane[i]));
    return y;
}

template <class To, class ToRegister, class From, class FromRegister>
ToRegister converted(const FromRegister& from) {
    return each<To, ToRegister, From>(from, [](From x) { return x; });
}

template <class T, class Register>
Register masked_load(uint64_t mask, const void* from) {
    Lanes<T, Register> x;
    for (int i = 0; i < x.count; ++i)
        if (mask >> i & 1) std::memcpy(x.lane + i, static_cast<const T*>(from) + i, sizeof(T));
    return x;
}

template <class T, class Register>
void masked_store(void* to, uint64_t mask, const Register& from) {
    const Lanes<T, Register> x(from);
    for (int i = 0; i < x.count; ++i)
        if (mask >> i & 1) std::memcpy(static_cast<T*>(to) + i, x.lane + i, sizeof(T));
}

inline __m512i alignr_epi8(__m512i high, __m512i low, int count) {
    const Lanes<uint8_t, __m512i> a(high), b(low);
    Lanes<uint8_t, __m512i> y;
    for (int i = 0; i < y.count; ++i) {
        const int from = i % 16 + count, start = i / 16 * 16;
        y.lane[i] = from < 16 ? b.lane[start + from] : from < 32 ? a.lane[start + from - 16] : 0;
    }
    return y;
}

inline __mmask32 differs(__m512i a, __m512i b) {
    const Lanes<uint16_t, __m512i> x(a), y(b);
    __mmask32 mask = 0;
    for (int i = 0; i < x.count; ++i) mask |= static_cast<__mmask32>(x.lane[i] != y.lane[i]) << i;
    return mask;
}

inline __m512i masked_difference(__m512i otherwise, __mmask32 mask, __m512i a, __m512i b) {
    const Lanes<uint16_t, __m512i> x(a), y(b);
    Lanes<uint16_t, __m512i> z(otherwise);
    for (int i = 0; i < z.count; ++i)
        if (mask >> i & 1) z.lane[i] = static_cast<uint16_t>(x.lane[i] - y.lane[i]);
    return z;
}

// `which` names, two bits each, the lanes of four (of `parts` in all) that the result takes.
template <int Size>
__m512 shuffled(__m512 a, __m512 b, int which, int parts) {
    const Lanes<float, __m512> x(a), y(b);
    Lanes<float, __m512> z;
    for (int i = 0; i < z.count; ++i) {
        const int part = i / Size, first = part / 4 * 4;
        const auto& from = part % parts < parts / 2 ? x : y;
        z.lane[i] = from.lane[(first + (which >> 2 * (part % 4) & 3)) * Size + i % Size];
    }
    return z;
}

template <class T, class Op>
T reduced(__m512i v, const Op& op) {
    const Lanes<T, __m512i> x(v);
    T all = x.lane[0];
    for (int i = 1; i < x.count; ++i) all = op(all, x.lane[i]);
    return all;
}

// To the nearest bfloat16, ties to even; subnormal numbers become zeros, as the instruction has it.
inline uint16_t to_bfloat16(float value) {
    const auto x = bits<uint32_t>(value);
    if ((x & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(x >> 16 | 0x40);
    if ((x & 0x7f800000) == 0) return static_cast<uint16_t>(x >> 16 & 0x8000);
    return static_cast<uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

}  // namespace fewbit_emulated

#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _mm256_mask_storeu_epi16 fewbit_emulated::masked_store<uint16_t, __m256i>
#define _mm256_maskz_loadu_epi8 fewbit_emulated::masked_load<uint8_t, __m256i>
#define _mm512_alignr_epi8 fewbit_emulated::alignr_epi8
#define _mm512_cmpneq_epu16_mask fewbit_emulated::differs
#define _mm512_cvtepi32_epi16 fewbit_emulated::converted<int16_t, __m256i, int32_t, __m512i>
#define _mm512_cvtepi32_epi8 fewbit_emulated::converted<int8_t, __m128i, int32_t, __m512i>
#define _mm512_cvtepi32_ps fewbit_emulated::converted<float, __m512, int32_t, __m512i>
#define _mm512_cvtepi8_epi32 fewbit_emulated::converted<int32_t, __m512i, int8_t, __m128i>
#define _mm512_cvtepu16_epi32 fewbit_emulated::converted<uint32_t, __m512i, uint16_t, __m256i>
#define _mm512_cvtneps_pbh(v) \
    fewbit_emulated::bits<__m256bh>(fewbit_emulated::each<uint16_t, __m256i, float>(v, fewbit_emulated::to_bfloat16))
#define _mm512_cvtph_ps(v) (fewbit_emulated::each<float, __m512, uint16_t>(v, [](uint16_t x) { return _cvtsh_ss(x); }))
#define _mm512_cvtps_epi32(v) \
    (fewbit_emulated::each<int32_t, __m512i, float>(v, [](float x) { return _mm_cvtss_si32(_mm_set_ss(x)); }))
#define _mm512_mask_storeu_ps fewbit_emulated::masked_store<float, __m512>
#define _mm512_mask_sub_epi16 fewbit_emulated::masked_difference
#define _mm512_maskz_load_ps fewbit_emulated::masked_load<float, __m512>
#define _mm512_maskz_loadu_epi8 fewbit_emulated::masked_load<uint8_t, __m512i>
#define _mm512_maskz_loadu_ps fewbit_emulated::masked_load<float, __m512>
#define _mm512_permute_ps(v, which) fewbit_emulated::shuffled<1>(v, v, which, 4)
#define _mm512_reduce_add_epi32(v) (fewbit_emulated::reduced<int32_t>(v, [](int a, int b) { return a + b; }))
#define _mm512_reduce_max_epu32(v) \
    (fewbit_emulated::reduced<uint32_t>(v, [](uint32_t a, uint32_t b) { return std::max(a, b); }))
#define _mm512_shuffle_f32x4(a, b, which) fewbit_emulated::shuffled<4>(a, b, which, 4)

// What units choose their own AVX-512 by.
#define __AVX512F__ 1
