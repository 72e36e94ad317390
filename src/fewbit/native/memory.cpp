// Memory for weights: large pages where the system has them, and one parallel pass that fills it.
#include "memory.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.hpp"
#include "threads.hpp"

namespace fewbit {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int64_t kPiece = int64_t{1} << 20;      // bytes that a thread copies at a time

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

uint8_t* allocate_huge(size_t bytes) {
    // Small tensors do not deserve a page of their own.
    const size_t unit = bytes >= kHugePage ? kHugePage : 64;
    void* memory = std::aligned_alloc(unit, rounded(bytes ? bytes : 1, unit));
    if (!memory) throw std::bad_alloc();
#ifdef __linux__
    // Advice only: where the system refuses, small pages do, some 15 % slower.
    if (unit == kHugePage) madvise(memory, rounded(bytes, unit), MADV_HUGEPAGE);
#endif
    return static_cast<uint8_t*>(memory);
}

void copy_bytes(const uint8_t* from, uint8_t* to, int64_t bytes) {
    parallel_for(num_threads(), (bytes + kPiece - 1) / kPiece, [&](int64_t piece, int) {
        const int64_t begin = piece * kPiece, left = bytes - begin;
        std::memcpy(to + begin, from + begin, static_cast<size_t>(left < kPiece ? left : kPiece));
    });
}

void trellis_to_lanes(const uint8_t* from, uint8_t* to, int64_t row_groups, int64_t cols, int bits) {
    constexpr int chunks = 16;                    // of a row group in 64 columns
    const int64_t size = 2 * bits * cols, unit_bytes = chunks * 8 * bits;
    parallel_for(num_threads(), (row_groups + 1) / 2, [&](int64_t pair, int) {
        for (int half = 0; half < 2; ++half) {
            const int64_t row_group = 2 * pair + half;
            for (int64_t unit = 0; unit < size / unit_bytes; ++unit) {
                uint8_t* out = to + (pair * size + unit * unit_bytes) * 2 + half * chunks;
                const uint8_t* in = from + row_group * size + unit * unit_bytes;
                for (int byte = 0; byte < 8 * bits; ++byte, out += 2 * chunks)
                    for (int chunk = 0; chunk < chunks; ++chunk)
                        out[chunk] = row_group < row_groups ? in[chunk * 8 * bits + byte] : 0;
            }
        }
    });
}

}  // namespace fewbit
