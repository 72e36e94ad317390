// Uses the pool of threads from many threads at once, in sessions, with changing sizes and in a forked child, and checks
// every sum. Built with ThreadSanitizer, which ends the program with an error where two threads race.
//
// Usage: threads [race | fork | limited], where `race` makes a mistake that has to be noticed. ThreadSanitizer has no
// threads after a fork and takes much memory, so `fork` and `limited` are for a program that is built without it.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "threads.hpp"

namespace {

using namespace fewbit;

constexpr int64_t kCount = 257;

// A result per index, so that nothing is written by two threads; the sum is known.
bool adds_up(int threads) {
    std::vector<int64_t> found(kCount, 0);
    parallel_for(threads, kCount, [&](int64_t i, int worker) { found[static_cast<size_t>(i)] = i + 0 * worker; });
    int64_t sum = 0;
    for (const int64_t value : found) sum += value;
    return sum == kCount * (kCount - 1) / 2;
}

// Every worker adds to a place of its own: no two may have the same number.
bool workers_are_apart(int threads) {
    std::vector<int64_t> own(static_cast<size_t>(threads), 0);
    run(threads, kCount, [&](int64_t, int worker) { ++own[static_cast<size_t>(worker)]; });
    int64_t sum = 0;
    for (const int64_t value : own) sum += value;
    return sum == kCount;
}

// What a body throws reaches the caller, once; the pool serves on.
bool throws(int threads) {
    try {
        parallel_for(threads, kCount, [](int64_t i, int) {
            if (i % 50 == 49) throw std::bad_alloc();
        });
    } catch (const std::bad_alloc&) {
        return adds_up(threads);
    }
    return false;
}

bool session(int threads) {
    const Session first(threads);
    bool fine = in_session() && num_threads() == threads && throws(threads);
    for (int i = 0; i < 20; ++i) fine = adds_up(threads) && fine;
    const Session nested(1);
    return num_threads() == threads && workers_are_apart(threads) && fine;
}

// What one of many callers does.
bool caller(int number) {
    bool fine = true;
    for (int i = 0; i < 40; ++i) {
        const int threads = 1 + (number + i) % 4;
        if (number == 0 && i % 8 == 0) set_num_threads(threads);
        fine = adds_up(threads) && workers_are_apart(threads) && throws(threads) && fine;
        if (i % 5 == number % 5) fine = session(threads) && fine;
    }
    return fine;
}

bool callers(int count) {
    std::vector<std::thread> threads;
    std::vector<uint8_t> fine(static_cast<size_t>(count), 0);
    for (int i = 0; i < count; ++i) threads.emplace_back([&, i] { fine[static_cast<size_t>(i)] = caller(i); });
    for (std::thread& thread : threads) thread.join();
    for (const uint8_t one : fine)
        if (!one) return false;
    return true;
}

// A child gets a pool of its own, whatever the parent's was doing.
bool forked() {
    const pid_t child = fork();
    if (child == 0) _exit(adds_up(3) && session(2) ? 0 : 1);
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Every thread of the pool takes one index and waits for the others; nobody else may use the pool meanwhile. Arrivals are
// counted without order, so that a body is not protected by them.
template <class Body>
void together(int threads, const Body& body) {
    std::atomic<int> arrived{0};
    parallel_for(threads, threads, [&](int64_t i, int) {
        arrived.fetch_add(1, std::memory_order_relaxed);
        while (arrived.load(std::memory_order_relaxed) < threads) std::this_thread::yield();
        body(i);
    });
}

bool all_take_part(int threads) {
    bool fine = true;
    for (int round = 0; round < 50; ++round) {
        std::vector<int64_t> found(static_cast<size_t>(threads), 0);
        together(threads, [&](int64_t i) { found[static_cast<size_t>(i)] = i + round; });
        for (int i = 0; i < threads; ++i) fine = found[static_cast<size_t>(i)] == i + round && fine;
    }
    return fine;
}

bool race() {
    int64_t sum = 0;
    together(4, [&](int64_t i) { sum += i + 1; });
    return sum != 0;
}

// Where the system gives few threads or none, those that there are do the work.
bool limited() {
    long pages = 0;
    if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
        if (std::fscanf(file, "%ld", &pages) != 1) pages = 0;
        std::fclose(file);
    }
    const rlim_t most = static_cast<rlim_t>(pages) * static_cast<rlim_t>(sysconf(_SC_PAGESIZE)) + (40 << 20);
    const rlimit limit = {most, most};
    return pages && setrlimit(RLIMIT_AS, &limit) == 0 && adds_up(64) && session(64) && adds_up(64);
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && std::strcmp(arguments[1], "limited") == 0) return limited() ? 0 : 1;
    if (count > 1 && std::strcmp(arguments[1], "race") == 0) return race() ? 0 : 1;
    const bool child = count > 1 && std::strcmp(arguments[1], "fork") == 0;
    const bool alone = all_take_part(4) && adds_up(4) && session(3), many = callers(6), after = child && forked();
    std::printf("alone %d, callers %d, forked %d\n", alone, many, after);
    return alone && many && after == child ? 0 : 1;
}
