// One pool of worker threads, made when first needed and again in a forked child.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fewbit {

// The threads of a call: those of the session that the calling thread is in, else as many as set.
int num_threads();

// At least 1; takes effect with the next parallel_for outside a session.
void set_num_threads(int count);

// A function that is called by reference, so that nothing is allocated.
class BodyRef {
public:
    template <class Body>
    explicit BodyRef(const Body& body)
        : object_(&body), call_([](const void* object, int64_t index, int worker) {
              (*static_cast<const Body*>(object))(index, worker);
          }) {}

    void operator()(int64_t index, int worker) const { call_(object_, index, worker); }

private:
    const void* object_;
    void (*call_)(const void* object, int64_t index, int worker);
};

void parallel_for_ref(int threads, int64_t count, const BodyRef& body);

// Calls body(index, worker) for every index in [0, count) with worker < threads; indices are handed out one by one.
// Returns when all are done. A second caller meanwhile works alone, as worker 0 of its own. What a body throws, some
// further bodies may or may not run, then the caller gets it.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
    parallel_for_ref(threads, count, BodyRef(body));
}

// While one exists, the calling thread has the pool for itself and its workers stay awake between two calls, for a
// while: waking a thread costs more than a small product. The workers sleep when it ends.
class Session {
public:
    explicit Session(int threads);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

private:
    const bool nested_;
};

bool in_session();

// One thread or all: a pool of another size would have to be made anew. In a session, threads that are awake are worth
// less work.
inline int threads_for(int64_t work, int64_t grain) {
    constexpr int64_t awake = 8;
    return work < (in_session() ? 2 * grain / awake : 2 * grain) ? 1 : num_threads();
}

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
