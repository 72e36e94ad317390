// Dense products, norms, gates, rotary positions and writing to the cache, over V = Vectors.
// Include inside an anonymous namespace only.

// Dot products of a panel's rows with T tokens: one sum each, over the columns in order.
template <class V, int T>
inline void dense_tile(const DenseJob& job, int64_t panel, int64_t token) {
    constexpr int wide = kDenseRows / V::lanes, near = 32 * kDenseRows, far = 192 * kDenseRows;
    typename V::Floats sums[T][wide] = {};
    const float* x = job.x + token * job.cols;
    const uint16_t* weight = job.weight + panel * job.cols * kDenseRows;
    for (int64_t col = 0; col < job.cols; ++col, weight += kDenseRows) {
        if constexpr (T == 1) {
            __builtin_prefetch(weight + near);
            __builtin_prefetch(weight + far, 0, 2);
        }
        typename V::Floats w[wide];
#pragma GCC unroll 8
        for (int i = 0; i < wide; ++i) w[i] = V::load(weight + i * V::lanes);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
            for (int i = 0; i < wide; ++i) sums[t][i] = x[t * job.cols + col] * w[i] + sums[t][i];
    }
    const int64_t row = panel * kDenseRows, left = job.rows - row, count = left < kDenseRows ? left : kDenseRows;
    for (int t = 0; t < T; ++t) {
        float lane[kDenseRows];
        for (int i = 0; i < wide; ++i) V::store(lane + i * V::lanes, sums[t][i]);
        float* out = job.out + (token + t) * job.rows + row;
        for (int64_t i = 0; i < count; ++i) out[i] = job.bias ? lane[i] + job.bias[row + i] : lane[i];
    }
}

template <class V>
void dense(const DenseJob& job, int64_t panel) {
    // As many sums as registers hold; the narrower ones are for what is left.
    constexpr int most = V::lanes == 16 ? 8 : 2;
    int64_t token = 0;
    for (; token + most <= job.tokens; token += most) dense_tile<V, most>(job, panel, token);
    for (; token + 2 <= job.tokens; token += 2) dense_tile<V, 2>(job, panel, token);
    for (; token < job.tokens; ++token) dense_tile<V, 1>(job, panel, token);
}

// The sum of squares in vectors, the rest one by one.
template <class V>
inline float inverse_rms(const float* x, float eps, int64_t cols) {
    typename V::Floats squares{};
    const int64_t whole = cols / V::lanes * V::lanes;
    for (int64_t col = 0; col < whole; col += V::lanes) {
        const auto v = V::load(x + col);
        squares = v * v + squares;
    }
    float sum = V::sum(squares);
    for (int64_t col = whole; col < cols; ++col) sum = x[col] * x[col] + sum;
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(cols) + eps);
}

template <class V>
void rms_norm(const float* x, const float* weight, float eps, int64_t cols, float* out) {
    const float factor = inverse_rms<V>(x, eps, cols);
    for (int64_t col = 0; col < cols; ++col) out[col] = x[col] * factor * weight[col];
}

template <class V>
void add(float* x, const float* y, int64_t cols) {
    for (int64_t col = 0; col < cols; ++col) x[col] += y[col];
}

template <class V>
void gate(const float* gate, const float* up, Prologue activation, int64_t cols, float* out) {
    for (int64_t col = 0; col < cols; col += V::lanes) {
        const int count = cols - col < V::lanes ? static_cast<int>(cols - col) : V::lanes;
        float lane[V::lanes] = {};
        __builtin_memcpy(lane, gate + col, static_cast<size_t>(count) * 4);
        const auto g = V::load(lane);
        auto t = g;
        if (activation == Prologue::gelu_tanh) t = g * (g * g * 0.0713548139f + 1.59576917f);
        const auto below = t < -80.0f ? V::broadcast(-80.0f) : t;  // where exp(-t) is infinite the result is 0
        V::store(lane, g / (V::exp(-below) + 1.0f));
        for (int i = 0; i < count; ++i) out[col + i] = lane[i] * up[col + i];
    }
}

// The orthonormal Walsh-Hadamard transform of a head, in blocks of the largest power of two that divides it.
inline void rotate_head(float* x, int dim) {
    const int block = dim & -dim;
    const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(block));
    for (int first = 0; first < dim; first += block)
        for (int half = 1; half < block; half *= 2)
            for (int i = first; i < first + block; i += 2 * half)
                for (int j = i; j < i + half; ++j) {
                    const float low = x[j], high = x[j + half];
                    x[j] = low + high;
                    x[j + half] = low - high;
                }
    for (int i = 0; i < dim; ++i) x[i] *= norm;
}

template <class V>
inline void turn_heads(float* x, int heads, const RopeJob& job, const float* norm, float scale) {
    const int half = job.dim / 2;
    for (int h = 0; h < heads; ++h, x += job.dim) {
        if (norm) rms_norm<V>(x, norm, job.eps, job.dim, x);
        for (int i = 0; i < half; ++i) {
            const float a = x[i], b = x[i + half], c = job.cosines[i], s = job.sines[i];
            x[i] = (a * c - b * s) * scale;
            x[i + half] = (b * c + a * s) * scale;
        }
    }
}

// A head to 8 bits; returns its scale, which is NaN where the head holds NaN or infinity. Magnitudes are compared as the
// integers that their bits are, so a NaN is the largest of all and never gets lost.
inline float quantize_head(const float* x, int dim, int8_t* q) {
    uint32_t most = 0;
    for (int i = 0; i < dim; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    float largest;
    __builtin_memcpy(&largest, &most, sizeof largest);
    if (most >= 0x7f800000u || !(largest > kSmallest)) {
        __builtin_memset(q, 0, static_cast<size_t>(dim));
        return most >= 0x7f800000u ? __builtin_nanf("") : 0.0f;
    }
    const float inverse = 127.0f / largest;
    for (int i = 0; i < dim; ++i) q[i] = static_cast<int8_t>(__builtin_lrintf(x[i] * inverse));
    return largest / 127.0f;
}

template <class T>
inline void write_key(const T* key, int dim, int64_t position, T* keys) {
    T* to = keys + position / kCacheChunk * dim * kCacheChunk + position % kCacheChunk;
    for (int i = 0; i < dim; ++i) to[i * kCacheChunk] = key[i];
}

template <class V>
inline void write_head(const RopeJob& job, const CacheHead& cache, float* k, float* v) {
    const int dim = job.dim;
    if (job.type == CacheType::float32) {
        write_key(k, dim, job.position, static_cast<float*>(cache.keys));
        __builtin_memcpy(static_cast<float*>(cache.values) + job.position * dim, v, static_cast<size_t>(dim) * 4);
    } else if (job.type == CacheType::bf16) {
        uint16_t key[kMaxHead];
        uint16_t* value = static_cast<uint16_t*>(cache.values) + job.position * dim;
        for (int i = 0; i < dim; i += V::lanes) {
            V::store(key + i, V::load(k + i));
            V::store(value + i, V::load(v + i));
        }
        write_key(key, dim, job.position, static_cast<uint16_t*>(cache.keys));
    } else {
        int8_t key[kMaxHead];
        rotate_head(k, dim);
        rotate_head(v, dim);
        cache.key_scales[job.position] = quantize_head(k, dim, key);
        cache.value_scales[job.position] = quantize_head(v, dim, static_cast<int8_t*>(cache.values) + job.position * dim);
        write_key(key, dim, job.position, static_cast<int8_t*>(cache.keys));
    }
}

template <class V>
void rope(const RopeJob& job) {
    turn_heads<V>(job.q, job.heads, job, job.q_norm, job.scale);
    turn_heads<V>(job.k, job.kv_heads, job, job.k_norm, 1.0f);
    if (job.type == CacheType::int8)
        for (int h = 0; h < job.heads; ++h) rotate_head(job.q + h * job.dim, job.dim);
    for (int h = 0; h < job.kv_heads; ++h) write_head<V>(job, job.cache[h], job.k + h * job.dim, job.v + h * job.dim);
}
