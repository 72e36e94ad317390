// Vectors of kLanes floats in the compiler's own notation, and what is computed with them.
// Include inside an anonymous namespace only, after kLanes: every unit compiles its own copy with its own flags.

struct Vectors {
    static constexpr int N = kLanes;
    static constexpr int lanes = N;
    typedef float Floats __attribute__((vector_size(4 * N)));
    typedef int32_t Ints __attribute__((vector_size(4 * N)));
    typedef uint32_t Words __attribute__((vector_size(4 * N)));
    typedef uint16_t Halves __attribute__((vector_size(2 * N)));
    typedef int8_t Bytes __attribute__((vector_size(N)));

    static Floats broadcast(float x) { return Floats{} + x; }

    static Floats load(const float* from) {
        Floats v;
        __builtin_memcpy(&v, from, sizeof v);
        return v;
    }

    // bfloat16 as its bits. GCC 12 takes three times the instructions for wide conversions in the compiler's notation.
    static Floats load(const uint16_t* from) {
#ifdef __AVX512F__
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#endif
        Halves v;
        __builtin_memcpy(&v, from, sizeof v);
        return reinterpret_cast<Floats>(__builtin_convertvector(v, Words) << 16);
    }

    static Floats load(const int8_t* from) {
#ifdef __AVX512F__
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
        Bytes v;
        __builtin_memcpy(&v, from, sizeof v);
        return __builtin_convertvector(__builtin_convertvector(v, Ints), Floats);
    }

    static void store(float* to, Floats v) { __builtin_memcpy(to, &v, sizeof v); }

    // To the nearest bfloat16, ties to even; a NaN stays one.
    static void store(uint16_t* to, Floats v) {
        const Words bits = reinterpret_cast<Words>(v);
        const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const Words halves = (bits & 0x7fffffff) > 0x7f800000 ? Words{} + 0x7fc0 : rounded;
        const Halves narrow = __builtin_convertvector(halves, Halves);
        __builtin_memcpy(to, &narrow, sizeof narrow);
    }

    static Floats larger(Floats a, Floats b) { return a > b ? a : b; }

    static float sum(Floats v) {
        float lane[N];
        __builtin_memcpy(lane, &v, sizeof v);
        for (int half = N / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
        return lane[0];
    }

    static float largest(Floats v) {
        float lane[N];
        __builtin_memcpy(lane, &v, sizeof v);
        for (int half = N / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
        return lane[0];
    }

    // exp(x) for x <= 88 or so, 0 below -87: with n = nearest(x / ln 2) it is 2^n times a polynomial in x - n ln 2.
    static Floats exp(Floats x) {
        const Floats shift = broadcast(12582912.0f);  // 1.5 * 2^23: leaves n in the low bits of a sum
        const Floats clipped = x < -87.0f ? broadcast(-87.0f) : x;
        const Floats shifted = clipped * 1.44269504f + shift;
        const Floats n = shifted - shift;
        const Floats r = clipped - n * 0.693145752f - n * 1.42860677e-06f;
        Floats p = r * 0.00138214685f + 0.00836866256f;
        p = p * r + 0.0416682549f;
        p = p * r + 0.166665211f;
        p = p * r + 0.49999994f;
        p = p * (r * r) + r + 1.0f;
        const Ints power = (reinterpret_cast<Ints>(shifted) << 23) + reinterpret_cast<Ints>(p);
        return x < -87.0f ? Floats{} : reinterpret_cast<Floats>(power);
    }
};
