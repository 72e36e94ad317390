// One pool of worker threads, made when first needed and again in a forked child.
#include "threads.hpp"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace fewbit {
namespace {

int usable_cores() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? static_cast<int>(count) : 1;
}

class Pool {
public:
    explicit Pool(int threads) {
        for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { serve(worker); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    void run(int64_t count, const std::function<void(int64_t, int)>& body) {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            body_ = &body;
            count_ = count;
            next_.store(0, std::memory_order_relaxed);
            busy_ = static_cast<int>(workers_.size());
            ++round_;
        }
        wake_.notify_all();
        work(0);
        std::unique_lock<std::mutex> hold(mutex_);
        done_.wait(hold, [this] { return busy_ == 0; });
    }

private:
    void work(int worker) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*body_)(i, worker);
    }

    void serve(int worker) {
        uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> hold(mutex_);
                wake_.wait(hold, [&] { return stop_ || round_ != seen; });
                if (stop_) return;
                seen = round_;
            }
            work(worker);
            std::lock_guard<std::mutex> hold(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t, int)>* body_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t count_ = 0;
    uint64_t round_ = 0;
    int busy_ = 0;
    bool stop_ = false;
};

struct Shared {
    std::mutex use;           // held while a caller runs the pool
    Pool* pool = nullptr;     // never freed at exit: workers may be waiting in it
    std::atomic<int> wanted{0};
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

}  // namespace

int num_threads() {
    const int wanted = shared->wanted.load();
    return wanted ? wanted : usable_cores();
}

void set_num_threads(int count) { shared->wanted.store(count); }

void parallel_for(int threads, int64_t count, const std::function<void(int64_t, int)>& body) {
    std::unique_lock<std::mutex> hold(shared->use, std::try_to_lock);
    if (threads == 1 || count <= 1 || !hold.owns_lock()) {
        for (int64_t i = 0; i < count; ++i) body(i, 0);
        return;
    }
    if (shared->pool && shared->pool->size() != threads) {
        delete shared->pool;
        shared->pool = nullptr;
    }
    if (!shared->pool) shared->pool = new Pool(threads);
    shared->pool->run(count, body);
}

}  // namespace fewbit
