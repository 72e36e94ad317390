// The kinds of steps that a program is made of.
#include "steps.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.hpp"
#include "threads.hpp"

namespace fewbit {
namespace {

constexpr int64_t kElements = 1 << 15;            // numbers worth waking another thread for
constexpr int64_t kMultiplications = 1 << 18;

// Calls body(row, worker) for all rows of `cols` numbers.
template <class Body>
void for_rows(int64_t rows, int64_t cols, const Body& body) {
    fewbit::run(threads_for(rows * cols, kElements), rows, body);
}

// Quantizes the inputs of a step, `stride` columns apart.
void quantize(const Forward& forward, const LinearInputs& inputs, int64_t stride) {
    RotateJob job = inputs.rotation;
    job.x = forward.buffer(inputs.buffer);
    if (inputs.up >= 0) job.up = forward.buffer(inputs.up);
    forward.program.inputs.at_least(forward.rows, stride, job.group);
    forward.program.inputs.quantize(job, forward.rows);
}

void set_inputs(const Forward& forward, ProductJob& job) {
    forward.program.inputs.set(job);
    job.tokens = forward.rows;
}

// Byte `index` of the stream of a row group in scale group g, in whichever order the codes stand.
inline uint32_t stream_byte(const ProductJob& job, int64_t row_group, int64_t g, int64_t index) {
    const int64_t column = 2 * job.bits;
    if (index < 0 || index >= column * job.group) return 0;
    if (job.code != Code::lanes) return job.codes[(row_group * job.cols + g * job.group) * column + index];
    const int64_t bytes = 8 * job.bits, chunk = index / bytes, unit = chunk / kLaneChunks;
    const int64_t panel = row_group / job.lane_groups, lane = row_group % job.lane_groups;
    const uint8_t* from = job.codes + (panel * job.cols + g * job.group) * column * job.lane_groups;
    return from[(unit * bytes + index % bytes) * job.lane_groups * kLaneChunks + lane * kLaneChunks + chunk % kLaneChunks];
}

// One row of a trellis, still on the rotated axes.
void decode_row(const ProductJob& job, int64_t row, float* out) {
    const int64_t groups = job.cols / job.group, row_group = row / kTileRows;
    const int8_t* tables = job.tables;
    for (int64_t g = 0; g < groups; ++g) {
        const float scale = half_to_float(job.scales[row * groups + g]) * job.scale;
        for (int64_t chunk = 0; chunk < job.group / 4; ++chunk, out += 4) {
            const int64_t first = (chunk * kChunk + row % kTileRows * 4 + 1) * job.bits - kWindow;
            const int64_t byte = first >> 3;
            uint32_t word = 0;
            for (int i = 0; i < 4; ++i) word |= stream_byte(job, row_group, g, byte + i) << (8 * i);
            word >>= first & 7;
            for (int i = 0; i < 4; ++i, word >>= job.bits) {
                const int value = tables[word & 15] + tables[16 + (word >> 4 & 3)] + tables[20 + (word >> 6 & 3)] +
                                  tables[24 + (word >> 8 & 15)];
                out[i] = static_cast<float>(value) * scale;
            }
        }
    }
}

void transform(float* x, int block) {
    const float norm = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
    for (int half = 1; half < block; half *= 2)
        for (int i = 0; i < block; i += 2 * half)
            for (int j = i; j < i + half; ++j) {
                const float low = x[j], high = x[j + half];
                x[j] = low + high;
                x[j + half] = low - high;
            }
    for (int i = 0; i < block; ++i) x[i] *= norm;
}

}  // namespace

void EmbedDense::run(Forward& forward) {
    float* out = forward.buffer(out_);
    for_rows(forward.rows, cols_, [&](int64_t row, int) {
        const int64_t token = forward.tokens[row];
        const uint16_t* from = table_ + token / kDenseRows * cols_ * kDenseRows + token % kDenseRows;
        for (int64_t col = 0; col < cols_; ++col) {
            const uint32_t bits = static_cast<uint32_t>(from[col * kDenseRows]) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            out[row * cols_ + col] = value * multiplier_;
        }
    });
}

void EmbedPacked::row(int64_t index, float* out) const {
    decode_row(table_, index, out);
    for (int64_t col = 0; block_ > 1 && col < table_.cols; col += block_) transform(out + col, block_);
    for (int64_t col = 0; col < table_.cols; ++col) {
        const bool negative = signs_ && (signs_[col / 8] >> (col % 8) & 1);
        out[col] *= negative ? -multiplier_ : multiplier_;
    }
}

void EmbedPacked::run(Forward& forward) {
    float* out = forward.buffer(out_);
    for_rows(forward.rows, 4 * table_.cols,
             [&](int64_t at, int) { row(forward.tokens[at], out + at * table_.cols); });
}

Linears::Linears(Program& program, const LinearInputs& inputs, std::vector<ProductJob> jobs, std::vector<int> outs)
    : inputs_(inputs), jobs_(std::move(jobs)), outs_(std::move(outs)) {
    program.inputs.at_least(program.shape().block, inputs_.rotation.cols, inputs_.rotation.group);
}

void Linears::run(Forward& forward) {
    quantize(forward, inputs_, inputs_.rotation.cols);
    for (size_t i = 0; i < jobs_.size(); ++i) {
        set_inputs(forward, jobs_[i]);
        jobs_[i].out = forward.buffer(outs_[i]);
    }
    multiply(jobs_.data(), static_cast<int>(jobs_.size()), forward.program.products);
}

TwinLinears::TwinLinears(Program& program, const LinearInputs& inputs, std::vector<ProductJob> down,
                         std::vector<ProductJob> both, std::vector<int> outs)
    : inputs_(inputs), down_(std::move(down)), both_(std::move(both)), outs_(std::move(outs)), hidden_(down_.size()) {
    for (size_t i = 0; i < down_.size(); ++i) {
        stride_ = std::max(stride_, both_[i].cols);
        hidden_[i].at_least(static_cast<size_t>(program.shape().block * down_[i].rows));
    }
    program.inputs.at_least(program.shape().block, stride_, inputs_.rotation.group);
}

void TwinLinears::run(Forward& forward) {
    quantize(forward, inputs_, stride_);
    for (size_t i = 0; i < down_.size(); ++i) {
        set_inputs(forward, down_[i]);
        down_[i].out = hidden_[i].data();
    }
    multiply(down_.data(), static_cast<int>(down_.size()), forward.program.products);
    for (size_t i = 0; i < both_.size(); ++i) second(forward, i);
}

void TwinLinears::second(Forward& forward, size_t index) {
    RotateJob job{};
    job.x = hidden_[index].data();
    job.cols = down_[index].rows;
    job.block = 1;
    job.group = inputs_.rotation.group;
    job.bits = inputs_.rotation.bits;
    forward.program.inputs.quantize(job, forward.rows, inputs_.rotation.cols);
    set_inputs(forward, both_[index]);
    both_[index].out = forward.buffer(outs_[index]);
    multiply(&both_[index], 1, forward.program.products);
}

void DenseLinears::run(Forward& forward) {
    for (size_t i = 0; i < jobs_.size(); ++i) {
        DenseJob& job = jobs_[i];
        job.x = forward.buffer(input_);
        job.out = forward.buffer(outs_[i]);
        job.tokens = forward.rows;
        if (job.tokens == 0) continue;
        const int64_t work = job.tokens * job.rows * job.cols;
        fewbit::run(threads_for(work, kMultiplications), (job.rows + kDenseRows - 1) / kDenseRows,
                    [&](int64_t panel, int) { forward.floats.dense(job, panel); });
    }
}

Norm::Norm(Program& program, int input, const float* weight, float eps, int64_t cols, int out, bool added)
    : input_(input), weight_(weight), eps_(eps), cols_(cols), out_(out), added_(added) {
    if (!added) return;
    rows_.resize(static_cast<size_t>(program.shape().threads));
    for (Buffer<float>& row : rows_) row.at_least(static_cast<size_t>(cols));
}

void Norm::run(Forward& forward) {
    const float* x = forward.buffer(input_);
    float* out = forward.buffer(out_);
    for_rows(forward.rows, cols_, [&](int64_t row, int worker) {
        float* to = added_ ? rows_[static_cast<size_t>(worker)].data() : out + row * cols_;
        forward.floats.rms_norm(x + row * cols_, weight_, eps_, cols_, to);
        if (added_) forward.floats.add(out + row * cols_, to, cols_);
    });
}

void Add::run(Forward& forward) {
    float* x = forward.buffer(x_);
    const float* y = forward.buffer(y_);
    for_rows(forward.rows, cols_, [&](int64_t row, int) { forward.floats.add(x + row * cols_, y + row * cols_, cols_); });
}

void Gate::run(Forward& forward) {
    const float *gate = forward.buffer(gate_), *up = forward.buffer(up_);
    float* out = forward.buffer(out_);
    for_rows(forward.rows, 8 * cols_, [&](int64_t row, int) {
        forward.floats.gate(gate + row * cols_, up + row * cols_, activation_, cols_, out + row * cols_);
    });
}

void Rope::run(Forward& forward) {
    const ProgramShape& shape = forward.program.shape();
    RopeJob all{};
    all.heads = shape.heads;
    all.kv_heads = shape.kv_heads;
    all.dim = shape.dim;
    all.q_norm = inputs_.q_norm;
    all.k_norm = inputs_.k_norm;
    all.eps = inputs_.eps;
    all.scale = inputs_.scale;
    all.type = shape.cache;
    float *q = forward.buffer(inputs_.q), *k = forward.buffer(inputs_.k), *v = forward.buffer(inputs_.v);
    const int64_t queries = static_cast<int64_t>(shape.heads) * shape.dim;
    const int64_t keys = static_cast<int64_t>(shape.kv_heads) * shape.dim;
    for_rows(forward.rows, 2 * (queries + 2 * keys), [&](int64_t row, int) {
        RopeJob job = all;
        job.position = forward.positions[row];
        job.q = q + row * queries;
        job.k = k + row * keys;
        job.v = v + row * keys;
        job.cosines = inputs_.cosines + job.position * (shape.dim / 2);
        job.sines = inputs_.sines + job.position * (shape.dim / 2);
        job.cache = forward.program.cache.heads(layer_, forward.slots[row]);
        forward.floats.rope(job);
    });
}

AttentionJob Attention::job_of(const Forward& forward, const QueryTile& tile, int head) const {
    const ProgramShape& shape = forward.program.shape();
    const int64_t width = static_cast<int64_t>(shape.heads) * shape.dim;
    const int32_t* positions = forward.positions + tile.token;
    AttentionJob job{};
    job.q = forward.buffer(q_) + tile.token * width;
    job.out = forward.buffer(out_) + tile.token * width;
    job.positions = positions;
    job.tokens = tile.tokens;
    job.heads = shape.heads;
    job.group = shape.heads / shape.kv_heads;
    job.dim = shape.dim;
    job.head = head * job.group;
    job.window = window_;
    job.type = shape.cache;
    job.cache = forward.program.cache.heads(layer_, forward.slots[tile.token])[head];
    job.first = std::max<int64_t>(0, positions[0] + 1 - window_) / kSegment;
    job.last = positions[tile.tokens - 1] / kSegment + 1;
    return job;
}

void Attention::run_tiles(Forward& forward, int threads) const {
    const std::vector<QueryTile>& tiles = forward.program.tiles();
    const int kv_heads = forward.program.shape().kv_heads;
    parallel_for(threads, static_cast<int64_t>(tiles.size()) * kv_heads, [&](int64_t unit, int worker) {
        // The last tiles of a prompt see most, so they come first.
        const QueryTile& tile = tiles[tiles.size() - 1 - static_cast<size_t>(unit / kv_heads)];
        const AttentionJob job = job_of(forward, tile, static_cast<int>(unit % kv_heads));
        forward.floats.attend(job, forward.program.attention_scratch(worker));
    });
}

// Every unit is one segment of a token and key head; whoever does the last of them folds them all.
void Attention::run_segments(Forward& forward, int threads, int64_t most) const {
    Program& program = forward.program;
    const ProgramShape& shape = program.shape();
    const int64_t pairs = static_cast<int64_t>(program.tiles().size()) * shape.kv_heads;
    const int64_t stride = static_cast<int64_t>(shape.heads / shape.kv_heads) * (shape.dim + 2);
    const auto job_at = [&](int64_t pair) {
        return job_of(forward, program.tiles()[static_cast<size_t>(pair / shape.kv_heads)],
                      static_cast<int>(pair % shape.kv_heads));
    };
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const AttentionJob job = job_at(pair);
        program.left[static_cast<size_t>(pair)].store(static_cast<int>(job.last - job.first));
    }
    parallel_for(threads, pairs * most, [&](int64_t unit, int worker) {
        const int64_t pair = unit / most;
        const AttentionJob whole = job_at(pair);
        AttentionJob job = whole;
        job.first += unit % most;
        if (job.first >= whole.last) return;
        job.last = job.first + 1;
        float* states = program.partial.data() + pair * most * stride;
        job.partial = states + unit % most * stride;
        job.out = nullptr;
        AttentionScratch& scratch = program.attention_scratch(worker);
        forward.floats.attend(job, scratch);
        if (program.left[static_cast<size_t>(pair)].fetch_sub(1) == 1)
            forward.floats.fold(whole, states, stride, whole.last - whole.first, scratch);
    });
}

void Attention::run(Forward& forward) {
    const ProgramShape& shape = forward.program.shape();
    const std::vector<QueryTile>& tiles = forward.program.tiles();
    int64_t seen = 0, most = 0;
    bool single = true;
    for (const QueryTile& tile : tiles) {
        const AttentionJob job = job_of(forward, tile, 0);
        single = single && tile.tokens == 1;
        most = std::max(most, job.last - job.first);
        seen += tile.tokens * std::min<int64_t>(window_, job.positions[tile.tokens - 1] + 1);
    }
    const int threads = threads_for(2 * seen * shape.heads * shape.dim, kMultiplications);
    const int64_t pairs = static_cast<int64_t>(tiles.size()) * shape.kv_heads;
    if (threads > 1 && single && most > 1 && pairs < 2 * threads) return run_segments(forward, threads, most);
    run_tiles(forward, threads);
}

Experts::Experts(Program& program, const ExpertsInputs& inputs)
    : inputs_(inputs), steps_(static_cast<size_t>(inputs.experts)) {
    const size_t block = static_cast<size_t>(program.shape().block), each = static_cast<size_t>(inputs.chosen);
    chosen_.resize(block * each);
    weights_.resize(block * each);
    rows_.reserve(block);
    of_rows_.reserve(block);
}

// The experts with the largest probabilities; of equal ones the first.
void Experts::choose(const float* logits, int64_t row) {
    const int64_t experts = inputs_.experts;
    const float* own = logits + row * experts;
    int64_t* chosen = chosen_.data() + row * inputs_.chosen;
    float* weights = weights_.data() + row * inputs_.chosen;
    const float most = *std::max_element(own, own + experts);
    float all = 0.0f, some = 0.0f;
    for (int64_t e = 0; e < experts; ++e) all += std::exp(own[e] - most);
    for (int i = 0; i < inputs_.chosen; ++i) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; ++e)
            if ((best < 0 || own[e] > own[best]) && std::find(chosen, chosen + i, e) == chosen + i) best = e;
        chosen[i] = best;
    }
    std::sort(chosen, chosen + inputs_.chosen);
    for (int i = 0; i < inputs_.chosen; ++i) some += weights[i] = std::exp(own[chosen[i]] - most) / all;
    for (int i = 0; inputs_.normalized && i < inputs_.chosen; ++i) weights[i] /= some;
}

void Experts::run_expert(Forward& forward, int64_t expert) {
    const int64_t cols = inputs_.cols;
    const float* x = forward.buffer(inputs_.input);
    float* gathered = forward.buffer(inputs_.gathered);
    rows_.clear();
    of_rows_.clear();
    for (int64_t at = 0; at < forward.rows * inputs_.chosen; ++at) {
        if (chosen_[static_cast<size_t>(at)] != expert) continue;
        const int64_t row = at / inputs_.chosen;
        std::copy(x + row * cols, x + (row + 1) * cols, gathered + static_cast<int64_t>(rows_.size()) * cols);
        rows_.push_back(row);
        of_rows_.push_back(weights_[static_cast<size_t>(at)]);
    }
    if (rows_.empty()) return;
    Forward own = forward;
    own.rows = static_cast<int64_t>(rows_.size());
    for (const std::unique_ptr<Step>& step : steps(expert)) step->run(own);
    const float* result = forward.buffer(inputs_.result);
    float* out = forward.buffer(inputs_.out);
    for_rows(own.rows, cols, [&](int64_t i, int) {
        float* to = out + rows_[static_cast<size_t>(i)] * cols;
        const float weight = of_rows_[static_cast<size_t>(i)];
        for (int64_t col = 0; col < cols; ++col) to[col] += result[i * cols + col] * weight;
    });
}

void Experts::run(Forward& forward) {
    const float* logits = forward.buffer(inputs_.logits);
    for_rows(forward.rows, 8 * inputs_.experts, [&](int64_t row, int) { choose(logits, row); });
    float* out = forward.buffer(inputs_.out);
    std::fill(out, out + forward.rows * inputs_.cols, 0.0f);
    for (int64_t expert = 0; expert < inputs_.experts; ++expert) run_expert(forward, expert);
}

void Select::run(Forward& forward) {
    const float* x = forward.buffer(input_);
    float* out = forward.buffer(out_);
    for (int64_t i = 0; i < forward.wanted_count; ++i)
        std::copy(x + forward.wanted[i] * cols_, x + (forward.wanted[i] + 1) * cols_, out + i * cols_);
    forward.rows = forward.wanted_count;
}

}  // namespace fewbit
