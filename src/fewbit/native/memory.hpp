// Memory for weights: large pages where the system has them, and one parallel pass that fills it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit {

// At least `bytes` bytes, to be freed with std::free; throws std::bad_alloc.
uint8_t* allocate_huge(size_t bytes);

void copy_bytes(const uint8_t* from, uint8_t* to, int64_t bytes);

// Trellis codes [row_groups, 2 bits cols] as lanes [ceil(row_groups / 2), 4 bits cols]: see ops/layouts.py.
void trellis_to_lanes(const uint8_t* from, uint8_t* to, int64_t row_groups, int64_t cols, int bits);

}  // namespace fewbit
