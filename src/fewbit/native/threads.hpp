// One pool of worker threads, made when first needed and again in a forked child.
#pragma once

#include <cstdint>
#include <functional>

namespace fewbit {

int num_threads();

// At least 1; takes effect with the next parallel_for.
void set_num_threads(int count);

// Calls body(index, worker) for every index in [0, count) with worker < threads; indices are handed out one by one.
// Returns when all are done. A second caller meanwhile works alone, as worker 0 of its own. The body must not throw.
void parallel_for(int threads, int64_t count, const std::function<void(int64_t index, int worker)>& body);

}  // namespace fewbit
