// One pool of worker threads, made when first needed and again in a forked child.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace fewbit {

int num_threads();

// At least 1; takes effect with the next parallel_for.
void set_num_threads(int count);

// Calls body(index, worker) for every index in [0, count) with worker < threads; indices are handed out one by one.
// Returns when all are done. A second caller meanwhile works alone, as worker 0 of its own. The body must not throw.
void parallel_for(int threads, int64_t count, const std::function<void(int64_t index, int worker)>& body);

// One thread or all: a pool of another size would have to be made anew.
inline int threads_for(int64_t work, int64_t grain) { return work < 2 * grain ? 1 : num_threads(); }

constexpr int kPiecesPerThread = 8;

// Hands out `count` indices in runs, so that memory is read in long stretches and neighbouring outputs come from
// one thread.
template <class Body>
void run(int threads, int64_t count, const Body& body) {
    const int64_t length = threads == 1 ? count : std::max<int64_t>(1, count / (threads * kPiecesPerThread));
    if (count == 0) return;
    parallel_for(threads, (count + length - 1) / length, [&](int64_t piece, int worker) {
        const int64_t end = std::min(count, (piece + 1) * length);
        for (int64_t index = piece * length; index < end; ++index) body(index, worker);
    });
}

}  // namespace fewbit
