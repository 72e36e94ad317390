// One pool of worker threads, made when first needed and again in a forked child.
#include "threads.hpp"

#include <atomic>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <fstream>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#endif

namespace fewbit {
namespace {

// The cores that a container's quota of processor time amounts to, rounded up; INT_MAX where there is none.
int quota_cores() {
#ifdef __linux__
    double quota = 0, period = 0;
    if (std::ifstream file("/sys/fs/cgroup/cpu.max"); file >> quota >> period) {
    } else {                                      // "max", or the first version of control groups
        std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
        std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
    }
    if (quota > 0 && period > 0) return static_cast<int>(std::min(std::ceil(quota / period), 1e6));
#endif
    return INT_MAX;
}

int usable_cores() {
    static const int quota = quota_cores();
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::min(CPU_COUNT(&set), quota);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? std::min(static_cast<int>(count), quota) : 1;
}

// The i-th pause of somebody who waits. Now and then it lets other threads have the core: what is waited for may be one
// of them where more threads are busy than there are cores.
inline void pause(int i) {
#if defined(__unix__) || defined(__APPLE__)
    if (i % 256 == 255) {
        sched_yield();
        return;
    }
#endif
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Rounds of work. A worker enters a round only while it is open, and the caller closes it when nothing is left to hand
// out: it waits for those that entered, never for a worker that the system has not got round to run.
class Pool {
public:
    explicit Pool(int threads) : wanted_(threads) {
        try {
            for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { serve(worker); });
        } catch (const std::exception&) {
            // The system gives no more threads, or no memory for them: those that there are do the work.
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stop_.store(true);
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    int wanted() const { return wanted_; }

    void keep_awake(bool awake) { awake_.store(awake); }

    void run(int64_t count, const BodyRef& body) {
        body_ = &body;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        const uint64_t round = (state_.load(std::memory_order_relaxed) / kRound + 1) * kRound;
        state_.store(round | kOpen);              // sequentially consistent, as is the count of sleepers
        if (sleepers_.load() > 0) {
            { std::lock_guard<std::mutex> hold(mutex_); }
            wake_.notify_all();
        }
        work(0);
        if (state_.fetch_and(~kOpen) != (round | kOpen)) wait_for_workers(round);
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

private:
    static constexpr uint64_t kRound = uint64_t{1} << 32, kOpen = uint64_t{1} << 31;  // below: workers inside
    static constexpr int kSpins = 4000;           // some 50 to 100 microseconds

    // What the body throws first is kept for the caller, and nothing more is handed out.
    void work(int worker) {
        try {
            for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*body_)(i, worker);
        } catch (...) {
            next_.store(count_, std::memory_order_relaxed);
            std::lock_guard<std::mutex> hold(mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
    }

    void wait_for_workers(uint64_t round) {
        for (int i = 0; i < kSpins; ++i) {
            if (state_.load(std::memory_order_acquire) == round) return;
            pause(i);
        }
        waiting_.store(true);
        std::unique_lock<std::mutex> hold(mutex_);
        done_.wait(hold, [&] { return state_.load() == round; });
        waiting_.store(false);
    }

    // A new round that is open, or the end.
    bool called(uint64_t seen) const {
        const uint64_t state = state_.load();
        return stop_.load() || (state / kRound != seen && (state & kOpen));
    }

    void sleep(uint64_t seen) {
        for (int i = 0; i < kSpins && awake_.load(std::memory_order_relaxed); ++i) {
            if (called(seen)) return;
            pause(i);
        }
        std::unique_lock<std::mutex> hold(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(hold, [&] { return called(seen); });
        sleepers_.fetch_sub(1);
    }

    void serve(int worker) {
        uint64_t seen = 0;
        for (;;) {
            sleep(seen);
            if (stop_.load()) return;
            uint64_t state = state_.load();
            while ((state & kOpen) && !state_.compare_exchange_weak(state, state + 1)) {
            }
            seen = state / kRound;
            if (!(state & kOpen)) continue;
            work(worker);
            state = state_.fetch_sub(1) - 1;
            if (!(state & kOpen) && state % kOpen == 0 && waiting_.load()) {
                { std::lock_guard<std::mutex> hold(mutex_); }
                done_.notify_one();
            }
        }
    }

    const int wanted_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const BodyRef* body_ = nullptr;
    int64_t count_ = 0;
    std::exception_ptr failure_;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint64_t> state_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> awake_{false}, waiting_{false}, stop_{false};
};

struct Shared {
    std::mutex use;           // held while a caller runs the pool
    Pool* pool = nullptr;     // never freed at exit: workers may be waiting in it
    std::atomic<int> wanted{0};

    Pool& pool_of(int threads) {
        if (pool && pool->wanted() != threads) {
            delete pool;
            pool = nullptr;
        }
        if (!pool) pool = new Pool(threads);
        return *pool;
    }
};

Shared* shared = new Shared;

#if defined(__unix__) || defined(__APPLE__)
// A forked child has the caller's thread only: forget the parent's pool and its locks.
void after_fork_in_child() {
    Shared* fresh = new Shared;
    fresh->wanted.store(shared->wanted.load());
    shared = fresh;
}
const int fork_handler = pthread_atfork(nullptr, nullptr, after_fork_in_child);
#endif

// The session of a thread: its number of threads and the pool it holds, if it got one.
struct Held {
    int threads = 0;
    Pool* pool = nullptr;
};
thread_local Held held;

}  // namespace

int num_threads() {
    if (held.threads) return held.threads;
    const int wanted = shared->wanted.load();
    return wanted ? wanted : usable_cores();
}

void set_num_threads(int count) { shared->wanted.store(count); }

bool in_session() { return held.threads != 0; }

Session::Session(int threads) : nested_(in_session()) {
    if (nested_) return;
    Held now{threads, nullptr};
    std::unique_lock<std::mutex> hold(shared->use, std::defer_lock);
    if (threads != 1 && hold.try_lock()) {
        now.pool = &shared->pool_of(threads);
        now.pool->keep_awake(true);
        hold.release();                           // the destructor's
    }
    held = now;
}

Session::~Session() {
    if (nested_) return;
    if (held.pool) {
        held.pool->keep_awake(false);
        shared->use.unlock();
    }
    held = Held{};
}

void parallel_for_ref(int threads, int64_t count, const BodyRef& body) {
    const auto alone = [&] {
        for (int64_t i = 0; i < count; ++i) body(i, 0);
    };
    if (threads == 1 || count <= 1) return alone();
    if (in_session()) return held.pool ? held.pool->run(count, body) : alone();
    const std::unique_lock<std::mutex> hold(shared->use, std::try_to_lock);
    if (!hold.owns_lock()) return alone();
    shared->pool_of(threads).run(count, body);
}

}  // namespace fewbit
