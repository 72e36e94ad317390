// Values rounded to integers times a scale per group, as inputs are, and a gradient's way back through that, over
// V = Vectors. Include inside an anonymous namespace only, after float_vectors.hpp.
//
// The integers and scales are those of rotate_quantize.hpp without a rotation. On the way back the integers stand still
// and the scale moves with the value that sets it.

// The value of the largest magnitude, of two opposite ones the negative.
template <class V>
inline float extreme_of(const float* x, int group) {
    auto most = V::load(x), least = -most;
    for (int i = V::lanes; i < group; i += V::lanes) {
        const auto v = V::load(x + i);
        most = V::larger(most, v);
        least = V::larger(least, -v);
    }
    const float high = V::largest(most), low = V::largest(least);
    return high > low ? high : -low;
}

inline float nearest_level(float exact, float low, float high) {
    const float level = __builtin_rintf(exact);
    return level < low ? low : level > high ? high : level;
}

template <class V>
void round_groups(const GroupJob& job, int64_t row) {
    for (int64_t first = row * job.cols; first < (row + 1) * job.cols; first += job.group) {
        const float* x = job.x + first;
        float* out = job.out + first;
        const float extreme = extreme_of<V>(x, job.group);
        // Not the other way round: of a group with a NaN something has to stay one.
        if (__builtin_fabsf(extreme) < kSmallest) {
            for (int i = 0; i < job.group; ++i) out[i] = x[i] * 0.0f;
            continue;
        }
        const float inverse = job.whole / extreme, scale = extreme / job.whole;
        for (int i = 0; i < job.group; ++i) out[i] = nearest_level(x[i] * inverse, job.low, job.high) * scale;
    }
}

template <class V>
void round_groups_back(const GroupJob& job, int64_t row) {
    for (int64_t first = row * job.cols; first < (row + 1) * job.cols; first += job.group) {
        const float *x = job.x + first, *gradient = job.gradient + first;
        float* out = job.out + first;
        __builtin_memcpy(out, gradient, static_cast<size_t>(job.group) * 4);
        const float extreme = extreme_of<V>(x, job.group);
        if (__builtin_fabsf(extreme) < kSmallest) continue;
        const float inverse = job.whole / extreme;
        float lost[kMaxGroup];
        for (int i = 0; i < job.group; ++i) {
            const float exact = x[i] * inverse;
            lost[i] = nearest_level(exact, job.low, job.high) - exact;
        }
        typename V::Floats sums{};
        for (int i = 0; i < job.group; i += V::lanes) sums = V::load(gradient + i) * V::load(lost + i) + sums;
        int place = 0;
        while (place < job.group - 1 && x[place] != extreme) ++place;
        out[place] += V::sum(sums) / job.whole;
    }
}
