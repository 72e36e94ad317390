// A model as a list of steps over buffers that exist before the first token, with its cache of keys and values.
#include "program.hpp"

#include <algorithm>
#include <cstring>

#include "arena.hpp"
#include "threads.hpp"

namespace fewbit {
namespace {

size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

Cache::Cache(const ProgramShape& shape)
    : slots_(shape.slots), layers_(shape.layers), kv_heads_(shape.kv_heads), dim_(shape.dim), type_(shape.cache) {
    const size_t positions = static_cast<size_t>((shape.context + kCacheChunk - 1) / kCacheChunk * kCacheChunk);
    const size_t values = whole_lines(positions * static_cast<size_t>(dim_) * bytes_of(type_));
    const size_t scales = type_ == CacheType::int8 ? whole_lines(positions * sizeof(float)) : 0;
    const size_t count = static_cast<size_t>(layers_ * slots_ * kv_heads_), each = 2 * (values + scales);
    bytes_ = std::max<size_t>(64, count * each);
    memory_ = reserve_pages(bytes_);            // a huge page would be many heads' worth
    heads_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        char* at = static_cast<char*>(memory_) + i * each;
        float* of_keys = scales ? reinterpret_cast<float*>(at + 2 * values) : nullptr;
        float* of_values = scales ? reinterpret_cast<float*>(at + 2 * values + scales) : nullptr;
        heads_.push_back({at, at + values, of_keys, of_values});
    }
}

Cache::~Cache() { release_pages(memory_, bytes_); }

void Cache::copy_head(const CacheHead& from, const CacheHead& to, int64_t length) const {
    const size_t element = bytes_of(type_), dim = static_cast<size_t>(dim_), positions = static_cast<size_t>(length);
    const size_t whole = positions / kCacheChunk * kCacheChunk, rest = positions - whole;
    std::memcpy(to.values, from.values, positions * dim * element);
    std::memcpy(to.keys, from.keys, whole * dim * element);
    for (size_t i = 0; rest && i < dim; ++i) {
        const size_t at = (whole * dim + i * kCacheChunk) * element;
        std::memcpy(static_cast<char*>(to.keys) + at, static_cast<const char*>(from.keys) + at, rest * element);
    }
    if (!from.key_scales) return;
    std::memcpy(to.key_scales, from.key_scales, positions * sizeof(float));
    std::memcpy(to.value_scales, from.value_scales, positions * sizeof(float));
}

void Cache::copy(int64_t source, int64_t target, int64_t length) {
    if (source == target || length == 0) return;
    parallel_for(num_threads(), layers_, [&](int64_t layer, int) {
        for (int head = 0; head < kv_heads_; ++head)
            copy_head(heads(layer, source)[head], heads(layer, target)[head], length);
    });
}

Program::Program(const ProgramShape& shape) : cache(shape), shape_(shape) {
    if (shape_.threads == 0) shape_.threads = num_threads();
    const size_t threads = static_cast<size_t>(shape_.threads);
    attention_.at_least(threads);
    tiles_.reserve(static_cast<size_t>(shape_.block));
    const int64_t segments = (shape_.context + kSegment - 1) / kSegment;
    const size_t units = 2 * threads + static_cast<size_t>(shape_.kv_heads);
    const int group = shape_.heads / shape_.kv_heads;
    partial.at_least(units * static_cast<size_t>(segments * group * (shape_.dim + 2)));
    left.reset(new std::atomic<int>[units]);
}

int Program::add_buffer(int64_t cols) {
    cols_.push_back(cols);
    buffers_.emplace_back();
    buffers_.back().at_least(static_cast<size_t>(cols * shape_.block));
    return buffers() - 1;
}

void Program::find_tiles(const int32_t* slots, int64_t count) {
    const int64_t most = std::max(1, kQueryRows / (shape_.heads / shape_.kv_heads));
    tiles_.clear();
    for (int64_t first = 0; first < count;) {
        int64_t end = first + 1;
        while (end < count && end - first < most && slots[end] == slots[first]) ++end;
        tiles_.push_back({first, static_cast<int>(end - first)});
        first = end;
    }
}

void Program::run(const int32_t* tokens, const int32_t* positions, const int32_t* slots, int64_t count,
                  const int32_t* wanted, int64_t wanted_count, float* logits) {
    const std::lock_guard<std::mutex> hold(use_);
    if (count == 0) return;
    const Session session(shape_.threads);
    find_tiles(slots, count);
    Forward forward{*this, float_kernels(), tokens, positions, slots, wanted, count, wanted_count, logits, count};
    for (const std::unique_ptr<Step>& step : steps_) step->run(forward);
}

void Program::copy(int64_t source, int64_t target, int64_t length) {
    const std::lock_guard<std::mutex> hold(use_);
    const Session session(shape_.threads);
    cache.copy(source, target, length);
}

}  // namespace fewbit
