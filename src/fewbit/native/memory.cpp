// Passes over the memory of weights, with all threads.
#include "memory.hpp"

#include <atomic>
#include <cstring>

#include "product.hpp"
#include "threads.hpp"

namespace fewbit {
namespace {

constexpr int64_t kPiece = int64_t{1} << 20;      // bytes that a thread copies at a time

}  // namespace

void copy_bytes(const uint8_t* from, uint8_t* to, int64_t bytes) {
    parallel_for(num_threads(), (bytes + kPiece - 1) / kPiece, [&](int64_t piece, int) {
        const int64_t begin = piece * kPiece, left = bytes - begin;
        std::memcpy(to + begin, from + begin, static_cast<size_t>(left < kPiece ? left : kPiece));
    });
}

uint64_t read_bytes(const uint8_t* from, int64_t bytes) {
    constexpr int64_t line = 64, ahead = 4096;
    std::atomic<uint64_t> all{0};
    parallel_for(num_threads(), (bytes + kPiece - 1) / kPiece, [&](int64_t piece, int) {
        const int64_t begin = piece * kPiece, end = begin + kPiece < bytes ? begin + kPiece : bytes;
        uint64_t found[8] = {};
        for (int64_t at = begin; at + line <= end; at += line) {
            __builtin_prefetch(from + at + ahead);
            uint64_t words[8];
            std::memcpy(words, from + at, sizeof words);
            for (int i = 0; i < 8; ++i) found[i] ^= words[i];
        }
        for (const uint64_t part : found) all.fetch_xor(part, std::memory_order_relaxed);
    });
    return all.load();
}

void trellis_to_lanes(const LanesJob& job) {
    const int bytes = 8 * job.bits, stride = job.lane_groups * kLaneChunks;
    const int64_t units = job.size / (bytes * kLaneChunks);
    parallel_for(num_threads(), (job.rows + job.lane_groups - 1) / job.lane_groups, [&](int64_t panel, int) {
        for (int lane = 0; lane < job.lane_groups; ++lane) {
            const int64_t row = panel * job.lane_groups + lane;
            const uint8_t* in = job.from + row * job.size;
            uint8_t* out = job.to + panel * job.lane_groups * job.size + lane * kLaneChunks;
            for (int64_t unit = 0; unit < units; ++unit, in += bytes * kLaneChunks)
                for (int byte = 0; byte < bytes; ++byte, out += stride)
                    for (int chunk = 0; chunk < kLaneChunks; ++chunk)
                        out[chunk] = row < job.rows ? in[chunk * bytes + byte] : 0;
        }
    });
}

}  // namespace fewbit
