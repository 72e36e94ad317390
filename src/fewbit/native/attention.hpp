// Attention of a tile of queries over the cache, in chunks of positions with running maxima, over V = Vectors.
// Include inside an anonymous namespace only, after float_kernels.hpp.
//
// A query's chunks begin where the cache's do, whatever the tile; what it does not see has weight 0, so that chunks and
// segments that only others of its tile see leave its state as it is, bit for bit, where their values are finite.

constexpr float kNothing = -1e30f;                // the maximum over no scores
constexpr int kRowTile = 4;                       // queries that share what is loaded
constexpr int kDirectRows = 8;                    // up to so many queries read the cache itself

// Scores of R queries with a chunk of keys [dim, kCacheChunk].
template <class V, int R, class T>
inline void score_rows(const float* const* q, const T* keys, int dim, float* scores) {
    constexpr int wide = 4;
    for (int first = 0; first < kCacheChunk; first += wide * V::lanes) {
        typename V::Floats sums[R][wide] = {};
        for (int d = 0; d < dim; ++d) {
            typename V::Floats key[wide];
#pragma GCC unroll 4
            for (int i = 0; i < wide; ++i) key[i] = V::load(keys + d * kCacheChunk + first + i * V::lanes);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < wide; ++i) sums[r][i] = q[r][d] * key[i] + sums[r][i];
        }
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < wide; ++i) V::store(scores + r * kCacheChunk + first + i * V::lanes, sums[r][i]);
    }
}

// Adds the values of positions [0, count), weighted with R queries' weights, to their outputs: W vectors of a head.
template <class V, int R, int W, class T>
inline void add_values(const float* weights, const T* values, int dim, int begin, int end, float* outputs) {
    typename V::Floats sums[R][W];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < W; ++i) sums[r][i] = V::load(outputs + r * dim + i * V::lanes);
    for (int position = begin; position < end; ++position) {
        typename V::Floats value[W];
#pragma GCC unroll 4
        for (int i = 0; i < W; ++i) value[i] = V::load(values + position * dim + i * V::lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < W; ++i) sums[r][i] = weights[r * kCacheChunk + position] * value[i] + sums[r][i];
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < W; ++i) V::store(outputs + r * dim + i * V::lanes, sums[r][i]);
}

template <class V, int R, class T>
inline void value_rows(const float* weights, const T* values, int dim, int begin, int end, float* outputs) {
    int at = 0;
    for (; at + 4 * V::lanes <= dim; at += 4 * V::lanes)
        add_values<V, R, 4>(weights, values + at, dim, begin, end, outputs + at);
    for (; at < dim; at += V::lanes) add_values<V, R, 1>(weights, values + at, dim, begin, end, outputs + at);
}

// Calls body with the number of rows of each tile as a constant, and the first row.
template <class Body>
inline void tiles_of_rows(int rows, const Body& body) {
    int row = 0;
    for (; row + kRowTile <= rows; row += kRowTile) body(std::integral_constant<int, kRowTile>(), row);
    switch (rows - row) {
        case 3: return body(std::integral_constant<int, 3>(), row);
        case 2: return body(std::integral_constant<int, 2>(), row);
        case 1: return body(std::integral_constant<int, 1>(), row);
    }
}

// The positions of a chunk that a token sees: [begin, end) within it.
struct Seen {
    int begin, end;
};

inline Seen seen_of(const AttentionJob& job, int64_t position, int64_t chunk) {
    const int64_t first = chunk * kCacheChunk, last = position + 1 - first, oldest = position + 1 - job.window - first;
    const int64_t end = last < kCacheChunk ? last : kCacheChunk, begin = oldest > 0 ? oldest : 0;
    return begin < end ? Seen{static_cast<int>(begin), static_cast<int>(end)} : Seen{0, 0};
}

// Scores of one query to weights; its maximum, sum and outputs so far are brought to the new maximum.
template <class V>
inline void weigh(const AttentionJob& job, Seen seen, int64_t chunk, float* scores, float& most, float& sum,
                  float* outputs) {
    constexpr int count = kCacheChunk / V::lanes;
    if (seen.begin == seen.end) {
        __builtin_memset(scores, 0, kCacheChunk * sizeof(float));
        return;
    }
    const bool scaled = job.type == CacheType::int8;
    const float* value_scales = job.cache.value_scales + chunk * kCacheChunk;
    for (int i = seen.begin; scaled && i < seen.end; ++i) scores[i] *= job.cache.key_scales[chunk * kCacheChunk + i];
    for (int i = 0; i < seen.begin; ++i) scores[i] = -__builtin_inff();
    for (int i = seen.end; i < kCacheChunk; ++i) scores[i] = -__builtin_inff();
    typename V::Floats v[count], highest = V::broadcast(most);
    for (int i = 0; i < count; ++i) {
        v[i] = V::load(scores + i * V::lanes);
        highest = V::larger(v[i], highest);
    }
    const float now = V::largest(highest);
    typename V::Floats added{};
    for (int i = 0; i < count; ++i) {
        v[i] = V::exp(v[i] - now);
        added += v[i];
        V::store(scores + i * V::lanes, v[i]);
    }
    if (now > most) {
        const float factor = V::exp(V::broadcast(most - now))[0];
        for (int i = 0; i < job.dim; i += V::lanes) V::store(outputs + i, V::load(outputs + i) * factor);
        sum *= factor;
        most = now;
    }
    sum += V::sum(added);
    for (int i = seen.begin; scaled && i < seen.end; ++i) scores[i] *= value_scales[i];
}

template <class V, class T>
inline void attend_chunk(const AttentionJob& job, const float* const* q, int64_t chunk, AttentionScratch& scratch) {
    const int rows = job.tokens * job.group, dim = job.dim;
    const T* keys = static_cast<const T*>(job.cache.keys) + chunk * dim * kCacheChunk;
    const T* values = static_cast<const T*>(job.cache.values) + chunk * kCacheChunk * dim;
    int begin = kCacheChunk, end = 0;
    for (int t = 0; t < job.tokens; ++t) {
        const Seen seen = seen_of(job, job.positions[t], chunk);
        if (seen.begin == seen.end) continue;
        begin = seen.begin < begin ? seen.begin : begin;
        end = seen.end > end ? seen.end : end;
    }
    if (begin >= end) return;
    const bool direct = rows <= kDirectRows;
    if (!direct) {
        for (int i = 0; i < dim * kCacheChunk; i += V::lanes) V::store(scratch.keys + i, V::load(keys + i));
        for (int i = begin * dim; i < end * dim; i += V::lanes) V::store(scratch.values + i, V::load(values + i));
    }
    tiles_of_rows(rows, [&](auto count, int row) {
        float* scores = scratch.scores + row * kCacheChunk;
        if (direct) score_rows<V, count()>(q + row, keys, dim, scores);
        else score_rows<V, count()>(q + row, scratch.keys, dim, scores);
    });
    for (int row = 0; row < rows; ++row) {
        const Seen seen = seen_of(job, job.positions[row / job.group], chunk);
        weigh<V>(job, seen, chunk, scratch.scores + row * kCacheChunk, scratch.most[row], scratch.sum[row],
                 scratch.outputs + row * dim);
    }
    tiles_of_rows(rows, [&](auto count, int row) {
        const float* weights = scratch.scores + row * kCacheChunk;
        float* outputs = scratch.outputs + row * dim;
        if (direct) value_rows<V, count()>(weights, values, dim, begin, end, outputs);
        else value_rows<V, count()>(weights, scratch.values, dim, begin, end, outputs);
    });
}

// Brings a further state of one query into the folded one. Not inlined: there must be one way to fuse its products.
template <class V>
__attribute__((noinline)) void fold_state(int dim, float most, float sum, const float* outputs, float& all_most, float& all_sum,
                       float* all) {
    const float now = most > all_most ? most : all_most;
    const float old = V::exp(V::broadcast(all_most - now))[0], fresh = V::exp(V::broadcast(most - now))[0];
    all_sum = all_sum * old + sum * fresh;
    for (int i = 0; i < dim; i += V::lanes) V::store(all + i, V::load(all + i) * old + V::load(outputs + i) * fresh);
    all_most = now;
}

inline void clear(int rows, int dim, float* most, float* sum, float* outputs) {
    for (int row = 0; row < rows; ++row) {
        most[row] = kNothing;
        sum[row] = 0.0f;
    }
    __builtin_memset(outputs, 0, static_cast<size_t>(rows * dim) * sizeof(float));
}

// The folded outputs divided by their sums of weights, on the heads' own axes.
inline void finish(const AttentionJob& job, AttentionScratch& scratch) {
    for (int row = 0; row < job.tokens * job.group; ++row) {
        const int64_t head = static_cast<int64_t>(row / job.group) * job.heads + job.head + row % job.group;
        float* out = job.out + head * job.dim;
        const float factor = 1.0f / scratch.folded_sum[row];
        for (int i = 0; i < job.dim; ++i) out[i] = scratch.folded[row * job.dim + i] * factor;
        if (job.type == CacheType::int8) rotate_head(out, job.dim);
    }
}

template <class V, class T>
inline void attend_segments(const AttentionJob& job, AttentionScratch& scratch) {
    constexpr int64_t chunks = kSegment / kCacheChunk;
    const int rows = job.tokens * job.group, dim = job.dim;
    const float* q[kQueryRows];
    for (int row = 0; row < rows; ++row)
        q[row] = job.q + (static_cast<int64_t>(row / job.group) * job.heads + job.head + row % job.group) * dim;
    clear(rows, dim, scratch.folded_most, scratch.folded_sum, scratch.folded);
    for (int64_t segment = job.first; segment < job.last; ++segment) {
        clear(rows, dim, scratch.most, scratch.sum, scratch.outputs);
        for (int64_t chunk = segment * chunks; chunk < (segment + 1) * chunks; ++chunk)
            attend_chunk<V, T>(job, q, chunk, scratch);
        for (int row = 0; row < rows; ++row)
            fold_state<V>(dim, scratch.most[row], scratch.sum[row], scratch.outputs + row * dim,
                          scratch.folded_most[row], scratch.folded_sum[row], scratch.folded + row * dim);
    }
    if (job.out) return finish(job, scratch);
    for (int row = 0; row < rows; ++row) {
        float* to = job.partial + row * (dim + 2);
        to[0] = scratch.folded_most[row];
        to[1] = scratch.folded_sum[row];
        __builtin_memcpy(to + 2, scratch.folded + row * dim, static_cast<size_t>(dim) * sizeof(float));
    }
}

template <class V>
void attend(const AttentionJob& job, AttentionScratch& scratch) {
    switch (job.type) {
        case CacheType::bf16: return attend_segments<V, uint16_t>(job, scratch);
        case CacheType::int8: return attend_segments<V, int8_t>(job, scratch);
        case CacheType::float32: return attend_segments<V, float>(job, scratch);
    }
}

template <class V>
void fold(const AttentionJob& job, const float* states, int64_t stride, int64_t count, AttentionScratch& scratch) {
    const int rows = job.tokens * job.group, dim = job.dim;
    clear(rows, dim, scratch.folded_most, scratch.folded_sum, scratch.folded);
    for (int64_t i = 0; i < count; ++i, states += stride)
        for (int row = 0; row < rows; ++row) {
            const float* state = states + row * (dim + 2);
            fold_state<V>(dim, state[0], state[1], state + 2, scratch.folded_most[row], scratch.folded_sum[row],
                          scratch.folded + row * dim);
        }
    finish(job, scratch);
}
