// Memory that does not come from malloc: large pages that weights share, and reserved pages that cost nothing unused.
//
// A huge page of its own would waste a megabyte for every tensor, half of a small model. So tensors stand one behind
// the other in regions: stretches of addresses that only take memory where somebody wrote.
#include "arena.hpp"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#define FEWBIT_PAGES
#include <pthread.h>
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define FEWBIT_POISONS
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FEWBIT_POISONS
#endif
#endif
#ifdef FEWBIT_POISONS
#include <sanitizer/asan_interface.h>
#endif

namespace fewbit {
namespace {

constexpr size_t kHugePage = size_t{2} << 20, kPage = 4096, kLine = 64;
constexpr size_t kRegion = size_t{64} << 20;      // addresses; what is not written to takes no memory
constexpr size_t kTrim = size_t{16} << 20;        // bytes taken between two looks at what malloc holds on to
constexpr size_t kSmall = size_t{64} << 10;       // below, a line of the cache is alignment enough

#ifdef FEWBIT_POISONS
constexpr size_t kGap = kLine;                    // behind every tensor, so that reading past its end is noticed
void poison(const uint8_t* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
void unpoison(const uint8_t* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
constexpr size_t kGap = 0;
void poison(const uint8_t*, size_t) {}
void unpoison(const uint8_t*, size_t) {}
#endif

size_t down(size_t bytes, size_t unit) { return bytes / unit * unit; }
size_t up(size_t bytes, size_t unit) { return down(bytes + unit - 1, unit); }

#ifdef FEWBIT_PAGES
void* map_pages(size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
}
#endif

// `bytes` addresses that begin where a huge page does.
uint8_t* map_region(size_t bytes) {
#ifdef FEWBIT_PAGES
    uint8_t* all = static_cast<uint8_t*>(map_pages(bytes + kHugePage));
    const size_t before = up(reinterpret_cast<size_t>(all), kHugePage) - reinterpret_cast<size_t>(all);
    if (before) munmap(all, before);
    if (before < kHugePage) munmap(all + before + bytes, kHugePage - before);
    uint8_t* memory = all + before;
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);        // advice only: where the system refuses, small pages do
#endif
#else
    uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(kPage, bytes));
    if (!memory) throw std::bad_alloc();
#endif
    poison(memory, bytes);
    return memory;
}

void unmap_region(uint8_t* memory, size_t bytes) {
    unpoison(memory, bytes);
#ifdef FEWBIT_PAGES
    munmap(memory, bytes);
#else
    std::free(memory);
#endif
}

// What was read before it was placed here came from malloc, and glibc keeps it, in holes that the next tensor does not
// fit into by a few bytes: as much again as half a model.
void trim_heap() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// Tensors and the gaps between them, by their offsets; gaps never touch each other.
class Region {
public:
    explicit Region(size_t bytes) : bytes_(bytes), memory_(map_region(bytes)) { gaps_[0] = bytes; }
    ~Region() { unmap_region(memory_, bytes_); }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    const uint8_t* begin() const { return memory_; }
    bool empty() const { return used_.empty(); }

    // Null where no gap is large enough.
    uint8_t* take(size_t bytes, size_t unit) {
        for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
            const size_t first = gap->first, last = first + gap->second, at = up(first, unit);
            if (at + bytes + kGap > last) continue;
            const size_t end = at + up(bytes + kGap, kLine);
            used_.emplace(at, end - at);
            if (end < last) gaps_.emplace(end, last - end);
            if (at > first) gap->second = at - first;
            else gaps_.erase(gap);
            unpoison(memory_ + at, bytes);
            return memory_ + at;
        }
        return nullptr;
    }

    void give_back(size_t at) {
        const auto tensor = used_.find(at);
        size_t first = at, last = at + tensor->second;
        const size_t whole_first = down(first, kHugePage), whole_last = up(last, kHugePage);
        used_.erase(tensor);
        poison(memory_ + first, last - first);
        auto next = gaps_.lower_bound(first);
        if (next != gaps_.begin() && std::prev(next)->first + std::prev(next)->second == first)
            first = std::prev(next)->first;
        if (next != gaps_.end() && next->first == last) {
            last += next->second;
            gaps_.erase(next);
        }
        gaps_[first] = last - first;
        // Huge pages that only this tensor still stood in.
        forget(std::max(whole_first, up(first, kHugePage)), std::min(whole_last, down(last, kHugePage)));
    }

private:
    void forget(size_t first, size_t last) {
#if defined(FEWBIT_PAGES) && defined(MADV_DONTNEED)
        if (first < last) madvise(memory_ + first, last - first, MADV_DONTNEED);
#else
        static_cast<void>(first), static_cast<void>(last);
#endif
    }

    size_t bytes_;
    uint8_t* memory_;
    std::map<size_t, size_t> gaps_, used_;
};

class Arena {
public:
    uint8_t* take(size_t bytes) {
        const size_t unit = bytes < kSmall ? kLine : kPage;
        const std::lock_guard<std::mutex> hold(use);
        taken_ += bytes;
        if (taken_ > kTrim) {
            trim_heap();
            taken_ = 0;
        }
        for (auto& region : regions_)
            if (uint8_t* memory = region.second->take(bytes, unit)) return memory;
        auto fresh = std::make_unique<Region>(std::max(kRegion, up(bytes + kGap, kHugePage)));
        Region& region = *fresh;
        regions_.emplace(region.begin(), std::move(fresh));
        return region.take(bytes, unit);
    }

    void give_back(const uint8_t* memory) {
        const std::lock_guard<std::mutex> hold(use);
        const auto found = std::prev(regions_.upper_bound(memory));
        found->second->give_back(static_cast<size_t>(memory - found->first));
        if (found->second->empty()) regions_.erase(found);
    }

    std::mutex use;                               // of everything here

private:
    std::map<const uint8_t*, std::unique_ptr<Region>> regions_;
    size_t taken_ = 0;
};

// Never freed: tensors may outlive whatever runs at exit.
Arena& arena() {
    static Arena* const one = new Arena;
    return *one;
}

#ifdef FEWBIT_PAGES
// A fork in one thread must not find another one in the middle of a change.
const int fork_handler = pthread_atfork([] { arena().use.lock(); }, [] { arena().use.unlock(); },
                                        [] { arena().use.unlock(); });
#endif

}  // namespace

uint8_t* allocate_huge(size_t bytes) { return arena().take(bytes ? bytes : 1); }

void free_huge(uint8_t* memory) noexcept {
    if (memory) arena().give_back(memory);
}

void* reserve_pages(size_t bytes) {
#ifdef FEWBIT_PAGES
    void* memory = map_pages(bytes);
#ifdef MADV_NOHUGEPAGE
    madvise(memory, bytes, MADV_NOHUGEPAGE);
#endif
#else
    void* memory = std::calloc(bytes, 1);
    if (!memory) throw std::bad_alloc();
#endif
    return memory;
}

void release_pages(void* memory, size_t bytes) noexcept {
#ifdef FEWBIT_PAGES
    munmap(memory, bytes);
#else
    static_cast<void>(bytes);
    std::free(memory);
#endif
}

}  // namespace fewbit
