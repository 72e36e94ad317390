// Memory that does not come from malloc: large pages that weights share, and reserved pages that cost nothing unused.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbit {

// At least `bytes` bytes for a weight, side by side with others in huge pages where the system has them. Begins where a
// line of the cache does, and where a page of 4 KB does unless it is small. Throws std::bad_alloc; safe among threads.
uint8_t* allocate_huge(size_t bytes);

// Gives the system back every page that nothing else stands in; null is fine.
void free_huge(uint8_t* memory) noexcept;

// Zeros that take no memory before they are written to, in small pages; throws std::bad_alloc.
void* reserve_pages(size_t bytes);
void release_pages(void* memory, size_t bytes) noexcept;

}  // namespace fewbit
