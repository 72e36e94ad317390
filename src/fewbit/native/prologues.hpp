// What becomes of a token's inputs before their rotation, written once over a small vector type.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.
//
// The order of operations is that of the torch reference, every one of them rounded by itself.

constexpr int kPartialSums = 64;

// exp(-x), x limited to [-89, 86]: infinity where that is too large, NaN for NaN. With n = nearest(-x / ln 2) and
// r = x + n ln 2 (ln 2 in two parts, the first of which has exact products with n) it is 2^n times a polynomial in r.
template <class V>
inline typename V::Floats exp_minus(typename V::Floats x) {
    constexpr float kShift = 12583038.0f;         // 1.5 * 2^23 + 126: leaves n + 126 in the low bits of a sum
    x = V::at_most(V::at_least(x, V::broadcast(-89.0f)), V::broadcast(86.0f));
    const auto shifted = V::add(V::mul(x, V::broadcast(-1.44269502f)), V::broadcast(kShift));
    const auto n = V::sub(shifted, V::broadcast(kShift));
    const auto near = V::add(x, V::mul(n, V::broadcast(0.693145752f)));
    const auto r = V::add(near, V::mul(n, V::broadcast(1.4286068e-06f)));
    const auto square = V::mul(r, r);
    auto upper = V::add(V::mul(square, V::broadcast(0.00138214685f)), V::mul(r, V::broadcast(-0.00836866256f)));
    upper = V::mul(V::add(upper, V::broadcast(0.0416682549f)), square);
    const auto lower = V::add(V::mul(r, V::broadcast(-0.166665211f)), V::broadcast(0.49999994f));
    const auto p = V::add(V::sub(V::mul(V::add(upper, lower), square), r), V::broadcast(1.0f));
    return V::mul(V::add(p, p), V::power(shifted));
}

// Both activations are gate / (1 + exp(-t)): t = gate for SiLU, and for GELU, with tanh written as an exponential,
// t = 2 sqrt(2 / pi) (gate + 0.044715 gate^3).
template <class V, Prologue P>
inline typename V::Floats activation(typename V::Floats gate) {
    auto t = gate;
    if constexpr (P == Prologue::gelu_tanh) {
        const auto inner = V::mul(V::mul(gate, gate), V::broadcast(0.0713548139f));
        t = V::mul(gate, V::add(inner, V::broadcast(1.59576917f)));
    }
    return V::div(gate, V::add(exp_minus<V>(t), V::broadcast(1.0f)));
}

// 1 / sqrt(mean(x^2) + eps) of one token: 64 interleaved partial sums, then halves added to halves.
template <class V, class T>
inline float inverse_root_mean_square(const T* x, int64_t cols, float eps) {
    constexpr int N = kPartialSums / V::lanes;
    typename V::Floats sums[N];
    for (auto& sum : sums) sum = V::broadcast(0.0f);
    for (int64_t col = 0; col < cols; col += kPartialSums) {
        const int count = cols - col < kPartialSums ? static_cast<int>(cols - col) / V::lanes : N;
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            if (i >= count) continue;
            const auto v = V::load(x + col + i * V::lanes);
            sums[i] = V::add(sums[i], V::mul(v, v));
        }
    }
    alignas(64) float lane[kPartialSums];
    for (int i = 0; i < N; ++i) V::store(lane + i * V::lanes, sums[i]);
    for (int half = kPartialSums / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return 1.0f / __builtin_sqrtf(lane[0] / static_cast<float>(cols) + eps);
}

// Columns [col, col + count) of a token whose values begin at `offset`, through prologue, shift and signs into y. The next
// token's are fetched meanwhile: it is worth a fifth of the time where they are not in a near cache.
template <class V, class T, Prologue P>
inline void prepare(const RotateJob& job, int64_t offset, int64_t col, int count, float factor, float* y) {
    constexpr bool gated = P == Prologue::silu || P == Prologue::gelu_tanh;
    const T* x = static_cast<const T*>(job.x) + offset + col;
    const T* up = gated ? static_cast<const T*>(job.up) + offset + col : nullptr;
    for (int i = 0; i < count; i += V::lanes) {
        __builtin_prefetch(x + i + job.cols);
        if constexpr (gated) __builtin_prefetch(up + i + job.cols);
        auto v = V::load(x + i);
        if constexpr (P == Prologue::rms_norm)
            v = V::mul(V::mul(v, V::broadcast(factor)), V::load(job.weight + col + i));
        if constexpr (gated) v = V::mul(activation<V, P>(v), V::load(up + i));
        if (job.shift) v = V::sub(v, V::load(job.shift + col + i));
        if (job.signs) v = V::flip(v, job.signs + (col + i) / 8);
        V::store(y + i, v);
    }
}
