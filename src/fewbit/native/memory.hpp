// Passes over the memory of weights, with all threads.
#pragma once

#include <cstdint>

namespace fewbit {

void copy_bytes(const uint8_t* from, uint8_t* to, int64_t bytes);

// Reads whole cache lines with all threads and does next to nothing with them: the exclusive or of their words.
uint64_t read_bytes(const uint8_t* from, int64_t bytes);

// Trellis codes [rows, size], a row group each, to lanes [ceil(rows / lane_groups), lane_groups * size]: see lanes.hpp.
struct LanesJob {
    const uint8_t* from;
    uint8_t* to;
    int64_t rows, size;
    int bits, lane_groups;
};
void trellis_to_lanes(const LanesJob& job);

}  // namespace fewbit
