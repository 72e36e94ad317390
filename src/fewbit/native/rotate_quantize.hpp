// Prologue, signs, Walsh-Hadamard transform and quantization of one token, written once over a small vector type.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.
//
// The order is that of the torch reference: sums and differences at distance 1, 2, 4, ..., one product with
// 1 / sqrt(block), then q = nearest(y * (m / largest)): m is 127, and with 4 bits 8 or -8, so that the value of the
// largest magnitude becomes -8. Magnitudes are compared as the integers that their bits are, so a NaN is the largest
// of all and never gets lost.
//
// A unit provides V: floats in vectors of `lanes`, of which `held` stay in registers while they are rotated.

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr int kStretch = 512;                     // columns that take a step together: as many units as fit

// Butterflies of N vectors that lie `step` vectors apart, at the distances 1, 2, ..., N / 2 times that; before them
// those inside each vector if First, after them the product with `norm` if Last.
template <class V, int N, bool First, bool Last>
inline void butterflies(float* y, int step, float norm) {
    typename V::Floats v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
        v[i] = V::load(y + i * step * V::lanes);
        if (First) v[i] = V::inner_butterflies(v[i]);
    }
#pragma GCC unroll 4
    for (int half = 1; half < N; half *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
            if (i & half) continue;
            const auto low = v[i], high = v[i + half];
            v[i] = V::add(low, high);
            v[i + half] = V::sub(low, high);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) V::store(y + i * step * V::lanes, Last ? V::mul(v[i], V::broadcast(norm)) : v[i]);
}

template <class V, int Block>
inline void rotate_block(float* y) {
    constexpr int vectors = Block / V::lanes, near = vectors < V::held ? vectors : V::held, far = vectors / near;
    const float norm = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(Block)));
    for (int i = 0; i < far; ++i) butterflies<V, near, true, far == 1>(y + i * near * V::lanes, 1, norm);
    for (int i = 0; far > 1 && i < near; ++i) butterflies<V, far, false, true>(y + i * V::lanes, near, norm);
}

template <class V>
inline void rotate_blocks(float* y, int count, int block) {
    for (int col = 0; block > 1 && col < count; col += block) {
        switch (block) {
            case 32: rotate_block<V, 32>(y + col); break;
            case 64: rotate_block<V, 64>(y + col); break;
            case 128: rotate_block<V, 128>(y + col); break;
            default: rotate_block<V, 256>(y + col);
        }
    }
}

// The bits of the largest magnitude of `count` values, of all or of those below zero.
template <class V, bool Negative>
inline uint32_t largest_bits(const float* y, int count) {
    auto magnitudes = V::nothing();
    for (int i = 0; i < count; i += V::lanes) {
        const auto v = V::load(y + i);
        magnitudes = V::larger(magnitudes, V::magnitude(Negative ? V::at_most(v, V::broadcast(0.0f)) : v));
    }
    return V::largest_of(magnitudes);
}

template <class V>
inline void quantize_group(const RotateJob& job, const float* y, int8_t* q, float* scale, int32_t* sum) {
    const uint32_t bits = largest_bits<V, false>(y, job.group);
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    if (bits >= kInfinityBits || largest < kSmallest) {
        *scale = bits >= kInfinityBits ? __builtin_nanf("") : 0.0f;
        *sum = 0;
        __builtin_memset(q, 0, static_cast<size_t>(job.group));
        return;
    }
    float whole = 127.0f, most = 127.0f;
    if (job.bits == 4) {
        whole = largest_bits<V, true>(y, job.group) == bits ? 8.0f : -8.0f;
        most = 7.0f;
    }
    *scale = largest / whole;
    *sum = V::quantize(y, job.group, whole / largest, most, q);
}

template <class V, class T, Prologue P>
void rotate_quantize_token(const RotateJob& job, int64_t token) {
    const int64_t offset = token * job.cols, q = token * job.stride;
    const int unit = job.block > job.group ? job.block : job.group;
    float factor = 0;
    if constexpr (P == Prologue::rms_norm)
        factor = inverse_root_mean_square<V>(static_cast<const T*>(job.x) + offset, job.cols, job.eps);
    alignas(64) float y[kStretch];
    const int stretch = kStretch / unit * unit;
    for (int64_t first = 0; first < job.cols; first += stretch) {
        const int count = job.cols - first < stretch ? static_cast<int>(job.cols - first) : stretch;
        prepare<V, T, P>(job, offset, first, count, factor, y);
        rotate_blocks<V>(y, count, job.block);
        for (int col = 0; col < count; col += job.group) {
            const int64_t at = q + first + col, g = at / job.group;
            quantize_group<V>(job, y + col, job.q + at, job.scale + g, job.sums + g);
        }
    }
}

template <class V, class T>
void rotate_quantize_inputs(const RotateJob& job, int64_t token) {
    switch (job.prologue) {
        case Prologue::none: return rotate_quantize_token<V, T, Prologue::none>(job, token);
        case Prologue::rms_norm: return rotate_quantize_token<V, T, Prologue::rms_norm>(job, token);
        case Prologue::silu: return rotate_quantize_token<V, T, Prologue::silu>(job, token);
        case Prologue::gelu_tanh: return rotate_quantize_token<V, T, Prologue::gelu_tanh>(job, token);
    }
}

template <class V>
void rotate_quantize(const RotateJob& job, int64_t token) {
    if (job.bf16) return rotate_quantize_inputs<V, uint16_t>(job, token);
    rotate_quantize_inputs<V, float>(job, token);
}
