// Signs, Walsh-Hadamard transform and quantization of one token, written once over a small vector type.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.
//
// The order is that of the torch reference: sums and differences at distance 1, 2, 4, ..., one product with
// 1 / sqrt(block), then q = nearest(y * (127 / largest)). Magnitudes are compared as the integers that their
// bits are, so a NaN is the largest of all and never gets lost.

constexpr uint32_t kInfinityBits = 0x7f800000u;

template <class V, int Block>
inline void rotate_block(const RotateJob& job, int64_t offset, int64_t col, float norm, float* out,
                         typename V::Bits& largest) {
    constexpr int N = Block / V::lanes;
    typename V::Floats v[N];
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) {
        const int64_t at = offset + col + i * V::lanes;
        v[i] = job.bf16 ? V::load(static_cast<const uint16_t*>(job.x) + at) : V::load(static_cast<const float*>(job.x) + at);
        if (job.signs) v[i] = V::flip(v[i], job.signs + (col + i * V::lanes) / 8);
        v[i] = V::inner_butterflies(v[i]);
    }
#pragma GCC unroll 8
    for (int half = 1; half < N; half *= 2) {
#pragma GCC unroll 32
        for (int i = 0; i < N; ++i) {
            if (i & half) continue;
            const auto low = v[i], high = v[i + half];
            v[i] = V::add(low, high);
            v[i + half] = V::sub(low, high);
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) {
        const auto y = V::mul(v[i], V::broadcast(norm));
        largest = V::larger(largest, V::magnitude(y));
        V::store(out + i * V::lanes, y);
    }
}

template <class V, int Block>
void rotate_quantize_blocks(const RotateJob& job, int64_t token) {
    const int64_t groups = job.cols / job.group, offset = token * job.cols;
    const float norm = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(Block)));
    alignas(64) float y[kMaxGroup];
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * job.group;
        auto most = V::nothing();
        for (int col = 0; col < job.group; col += Block)
            rotate_block<V, Block>(job, offset, first + col, norm, y + col, most);
        const uint32_t bits = V::largest_of(most);
        float largest;
        __builtin_memcpy(&largest, &bits, 4);
        float* scale = job.scale + token * groups + g;
        int32_t* sum = job.sums + token * groups + g;
        if (bits >= kInfinityBits || largest < kSmallest) {
            *scale = bits >= kInfinityBits ? __builtin_nanf("") : 0.0f;
            *sum = 0;
            __builtin_memset(job.q + offset + first, 0, static_cast<size_t>(job.group));
            continue;
        }
        *scale = largest / kQuantMax;
        *sum = V::quantize(y, job.group, kQuantMax / largest, job.q + offset + first);
    }
}

template <class V>
void rotate_quantize(const RotateJob& job, int64_t token) {
    switch (job.block) {
        case 32: return rotate_quantize_blocks<V, 32>(job, token);
        case 64: return rotate_quantize_blocks<V, 64>(job, token);
        case 128: return rotate_quantize_blocks<V, 128>(job, token);
        default: return rotate_quantize_blocks<V, 256>(job, token);
    }
}
