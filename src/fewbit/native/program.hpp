// A model as a list of steps over buffers that exist before the first token, with its cache of keys and values.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "floats.hpp"
#include "product_run.hpp"

namespace fewbit {

// Sizes that are fixed when a program is made.
struct ProgramShape {
    int64_t block;                                // most tokens of a forward
    int64_t slots, context, layers;
    int heads, kv_heads, dim;
    CacheType cache;
    int64_t vocabulary;
    int threads;                                  // 0: as many as calls use otherwise
};

// Consecutive tokens of one slot that attend together.
struct QueryTile {
    int64_t token;
    int tokens;
};

// The cache of all layers and slots: pages that were never written to take no memory.
class Cache {
public:
    explicit Cache(const ProgramShape& shape);
    ~Cache();
    Cache(const Cache&) = delete;
    Cache& operator=(const Cache&) = delete;

    // The key heads of a slot in a layer.
    const CacheHead* heads(int64_t layer, int64_t slot) const {
        return heads_.data() + (layer * slots_ + slot) * kv_heads_;
    }

    void copy(int64_t source, int64_t target, int64_t length);

private:
    void copy_head(const CacheHead& from, const CacheHead& to, int64_t length) const;

    int64_t slots_, layers_;
    int kv_heads_, dim_;
    CacheType type_;
    size_t bytes_;
    void* memory_;
    std::vector<CacheHead> heads_;
};

class Program;

// What a forward works on. `rows` are the rows that steps process: all tokens, and after Select the wanted ones.
struct Forward {
    Program& program;
    const FloatKernels& floats;
    const int32_t *tokens, *positions, *slots, *wanted;
    int64_t count, wanted_count;
    float* logits;                                // [wanted, vocabulary]
    int64_t rows;

    float* buffer(int index) const;
};

class Step {
public:
    virtual ~Step() = default;
    virtual void run(Forward& forward) = 0;
};

using StepList = std::vector<std::unique_ptr<Step>>;

constexpr int kLogits = -1;                       // the output of the last step, which the caller owns

class Program {
public:
    explicit Program(const ProgramShape& shape);

    const ProgramShape& shape() const { return shape_; }

    // A buffer [block, cols] for values between steps; its index.
    int add_buffer(int64_t cols);
    int64_t buffer_cols(int index) const { return cols_[static_cast<size_t>(index)]; }
    int buffers() const { return static_cast<int>(cols_.size()); }

    StepList& steps() { return steps_; }

    // Arguments are checked: count <= block, slots and positions in range, wanted ascending.
    void run(const int32_t* tokens, const int32_t* positions, const int32_t* slots, int64_t count, const int32_t* wanted,
             int64_t wanted_count, float* logits);

    void copy(int64_t source, int64_t target, int64_t length);

    float* buffer(int index) { return buffers_[static_cast<size_t>(index)].data(); }
    const std::vector<QueryTile>& tiles() const { return tiles_; }
    AttentionScratch& attention_scratch(int worker) { return attention_.data()[worker]; }

    Cache cache;
    ProductMemory products;
    QuantizedInputs inputs;
    Buffer<float> partial;                        // attention's states of segments
    std::unique_ptr<std::atomic<int>[]> left;     // segments of a tile and key head that are not done

private:
    void find_tiles(const int32_t* slots, int64_t count);

    ProgramShape shape_;
    std::vector<int64_t> cols_;
    std::vector<Buffer<float>> buffers_;
    StepList steps_;
    std::vector<QueryTile> tiles_;
    Buffer<AttentionScratch> attention_;
    std::mutex use_;
};

inline float* Forward::buffer(int index) const { return index == kLogits ? logits : program.buffer(index); }

}  // namespace fewbit
