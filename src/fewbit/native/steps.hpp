// The kinds of steps that a program is made of.
#pragma once

#include <cstdint>
#include <vector>

#include "program.hpp"

namespace fewbit {

// Rows of a bfloat16 table [vocabulary, cols], in the panels of DenseJob, times a number.
class EmbedDense : public Step {
public:
    EmbedDense(const uint16_t* table, int64_t cols, float multiplier, int out)
        : table_(table), cols_(cols), multiplier_(multiplier), out_(out) {}
    void run(Forward& forward) override;

private:
    const uint16_t* table_;
    int64_t cols_;
    float multiplier_;
    int out_;
};

// Rows of a packed trellis table, turned back to their own axes, times a number.
class EmbedPacked : public Step {
public:
    EmbedPacked(const ProductJob& table, const uint8_t* signs, int block, float multiplier, int out)
        : table_(table), signs_(signs), block_(block), multiplier_(multiplier), out_(out) {}
    void run(Forward& forward) override;

private:
    void row(int64_t index, float* out) const;

    ProductJob table_;
    const uint8_t* signs_;
    int block_;
    float multiplier_;
    int out_;
};

// Where a step's inputs come from and what becomes of them before they are quantized.
struct LinearInputs {
    int buffer;
    int up = -2;                                  // of a gated activation
    RotateJob rotation;                           // without the pointers to inputs and outputs
};

// Products of one input, quantized once, with packed matrices.
class Linears : public Step {
public:
    Linears(Program& program, const LinearInputs& inputs, std::vector<ProductJob> jobs, std::vector<int> outs);
    void run(Forward& forward) override;

private:
    LinearInputs inputs_;
    std::vector<ProductJob> jobs_;
    std::vector<int> outs_;
};

// The same for matrices of two components: the product with `down` is quantized to beside the inputs of `both`.
class TwinLinears : public Step {
public:
    TwinLinears(Program& program, const LinearInputs& inputs, std::vector<ProductJob> down, std::vector<ProductJob> both,
                std::vector<int> outs);
    void run(Forward& forward) override;

private:
    void second(Forward& forward, size_t index);

    LinearInputs inputs_;
    std::vector<ProductJob> down_, both_;
    std::vector<int> outs_;
    std::vector<Buffer<float>> hidden_;           // products with `down`
    int64_t stride_ = 0;                          // columns per token: the inputs and the longest of these products
};

// Products with bfloat16 matrices.
class DenseLinears : public Step {
public:
    DenseLinears(int input, std::vector<DenseJob> jobs, std::vector<int> outs)
        : input_(input), jobs_(std::move(jobs)), outs_(std::move(outs)) {}
    void run(Forward& forward) override;

private:
    int input_;
    std::vector<DenseJob> jobs_;
    std::vector<int> outs_;
};

// out = rms_norm(in) * weight, or x += that.
class Norm : public Step {
public:
    Norm(Program& program, int input, const float* weight, float eps, int64_t cols, int out, bool added);
    void run(Forward& forward) override;

private:
    int input_;
    const float* weight_;
    float eps_;
    int64_t cols_;
    int out_;
    bool added_;
    std::vector<Buffer<float>> rows_;             // a row per thread
};

// x += y
class Add : public Step {
public:
    Add(int x, int y, int64_t cols) : x_(x), y_(y), cols_(cols) {}
    void run(Forward& forward) override;

private:
    int x_, y_;
    int64_t cols_;
};

// out = activation(gate) * up
class Gate : public Step {
public:
    Gate(int gate, int up, Prologue activation, int64_t cols, int out)
        : gate_(gate), up_(up), activation_(activation), cols_(cols), out_(out) {}
    void run(Forward& forward) override;

private:
    int gate_, up_;
    Prologue activation_;
    int64_t cols_;
    int out_;
};

// What a layer's rotary positions need; buffers q [heads, dim], k and v [kv heads, dim].
struct RopeInputs {
    int q, k, v;
    const float *q_norm, *k_norm;                 // [dim] or null
    float eps, scale;
    const float *cosines, *sines;                 // [context, dim / 2]
};

// Norms of heads, rotary positions, and keys and values into the cache.
class Rope : public Step {
public:
    Rope(int64_t layer, const RopeInputs& inputs) : layer_(layer), inputs_(inputs) {}
    void run(Forward& forward) override;

private:
    int64_t layer_;
    RopeInputs inputs_;
};

// Queries against the cache, tile by tile and key head by key head; a long cache is cut into segments if there are not
// enough of these for all threads.
class Attention : public Step {
public:
    Attention(int64_t layer, int q, int out, int64_t window) : layer_(layer), q_(q), out_(out), window_(window) {}
    void run(Forward& forward) override;

private:
    AttentionJob job_of(const Forward& forward, const QueryTile& tile, int head) const;
    void run_tiles(Forward& forward, int threads) const;
    void run_segments(Forward& forward, int threads, int64_t most) const;

    int64_t layer_;
    int q_, out_;
    int64_t window_;
};

// Where a mixture of experts takes its inputs and what its steps write.
struct ExpertsInputs {
    int input, logits;                            // normed hidden states [cols] and the router's logits [experts]
    int gathered, result;                         // [cols] each: what the steps of an expert read and write
    int out;                                      // [cols]
    int64_t cols, experts;
    int chosen;                                   // experts of a token
    bool normalized;                              // whether the weights of these add up to 1
};

// A mixture of experts: every expert's steps run on the rows that chose it, and a token's results are added in the order
// of its experts.
class Experts : public Step {
public:
    Experts(Program& program, const ExpertsInputs& inputs);
    void run(Forward& forward) override;

    int64_t count() const { return inputs_.experts; }
    StepList& steps(int64_t expert) { return steps_[static_cast<size_t>(expert)]; }

private:
    void choose(const float* logits, int64_t row);
    void run_expert(Forward& forward, int64_t expert);

    ExpertsInputs inputs_;
    std::vector<StepList> steps_;
    std::vector<int64_t> chosen_;                 // [rows, chosen], ascending in a row
    std::vector<float> weights_;
    std::vector<int64_t> rows_;                   // that chose an expert, and where among the chosen
    std::vector<float> of_rows_;
};

// Goes on with the wanted rows alone.
class Select : public Step {
public:
    Select(int input, int out, int64_t cols) : input_(input), out_(out), cols_(cols) {}
    void run(Forward& forward) override;

private:
    int input_, out_;
    int64_t cols_;
};

}  // namespace fewbit
