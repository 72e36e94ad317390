// Weights to integers times a scale per row and group: the scale that loses least, and rounding column by column with
// error feedback; over V = Vectors. Include inside an anonymous namespace only, after group_rounding.hpp.
//
// A row's result does not depend on the other rows.

template <class V>
void round_columns(const ColumnsJob& job, int64_t block) {
    constexpr int wide = kRoundedRows / V::lanes;
    const int64_t first = block * kRoundedRows, left = job.rows - first;
    const int count = left < kRoundedRows ? static_cast<int>(left) : kRoundedRows, group = job.group;
    // A column of all rows side by side, rows that are not there zero.
    alignas(64) float rest[kMaxGroup * kRoundedRows] = {}, steps[kRoundedRows] = {}, inverse[kRoundedRows] = {};
    for (int row = 0; row < count; ++row) {
        steps[row] = job.steps[first + row];
        inverse[row] = steps[row] != 0.0f ? 1.0f / steps[row] : 0.0f;
        const float* weight = job.weight + (first + row) * group;
        for (int col = 0; col < group; ++col) rest[col * kRoundedRows + row] = weight[col];
    }
    for (int col = 0; col < group; ++col) {
        float* now = rest + col * kRoundedRows;
        alignas(64) float levels[kRoundedRows];
        for (int row = 0; row < kRoundedRows; ++row)
            levels[row] = nearest_level(now[row] * inverse[row], job.low, job.high);
        for (int row = 0; row < count; ++row) {
            const int64_t place = (first + row) * group + col;
            job.codes[place] = static_cast<int8_t>(levels[row]);
            job.values[place] = levels[row] * steps[row];
        }
        if (!job.factor) continue;
        const float* factor = job.factor + static_cast<int64_t>(col) * group;
        typename V::Floats error[wide];
        for (int i = 0; i < wide; ++i) {
            const int at = i * V::lanes;
            error[i] = (V::load(now + at) - V::load(levels + at) * V::load(steps + at)) / factor[col];
            V::store(now + at, error[i]);
        }
        for (int later = col + 1; later < group; ++later)
#pragma GCC unroll 4
            for (int i = 0; i < wide; ++i) {
                float* at = rest + later * kRoundedRows + i * V::lanes;
                V::store(at, V::load(at) - factor[later] * error[i]);
            }
    }
    for (int row = 0; job.factor && row < count; ++row)
        for (int col = 0; col < group; ++col)
            job.error[(first + row) * group + col] = rest[col * kRoundedRows + row];
}

// Of the scales extreme / whole * clip the one whose squared error is least, the first of equals.
template <class V>
void best_scale(const ScaleJob& job, int64_t row) {
    const float* weight = job.weight + row * job.group;
    const float widest = extreme_of<V>(weight, job.group) / job.whole;
    float least = __builtin_inff(), lost[kMaxGroup];
    job.scales[row] = widest;
    for (int i = 0; widest != 0.0f && i < job.count; ++i) {
        const float scale = widest * job.clips[i], inverse = 1.0f / scale;
        for (int col = 0; col < job.group; ++col)
            lost[col] = weight[col] - nearest_level(weight[col] * inverse, job.low, job.high) * scale;
        typename V::Floats squares{};
        for (int col = 0; col < job.group; col += V::lanes) {
            const auto v = V::load(lost + col);
            squares = v * v + squares;
        }
        const float error = V::sum(squares);
        if (error < least) {
            least = error;
            job.scales[row] = scale;
        }
    }
}
