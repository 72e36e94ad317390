// The Python face of the memory for weights.
#include "arguments.hpp"

#include <cstdlib>

#include "cpu.hpp"
#include "memory.hpp"
#include "product.hpp"

using namespace nb::literals;

namespace fewbit {
namespace {

using Bytes = nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Bytes huge_bytes(int64_t count) {
    require(count > 0, "the number of bytes must be positive, not " + std::to_string(count));
    uint8_t* memory = allocate_huge(static_cast<size_t>(count));
    const size_t shape[1] = {static_cast<size_t>(count)};
    return Bytes(memory, 1, shape, nb::capsule(memory, [](void* p) noexcept { std::free(p); }));
}

void place(const Array<const uint8_t, 2>& codes, const Array<uint8_t, 2>& out, int lane_bits) {
    const int64_t rows = static_cast<int64_t>(codes.shape(0)), size = static_cast<int64_t>(codes.shape(1));
    if (lane_bits == 0) {
        require_shape("out", out, rows, size);
    } else {
        require_bits(lane_bits);
        require(size % (2 * lane_bits * kLaneCols) == 0, "lanes need a multiple of 64 columns");
        require_shape("out", out, (rows + 1) / 2, 2 * size);
    }
    nb::gil_scoped_release release;
    if (lane_bits == 0) copy_bytes(codes.data(), out.data(), rows * size);
    else trellis_to_lanes(codes.data(), out.data(), rows, size / (2 * lane_bits), lane_bits);
}

}  // namespace

void bind_memory(nb::module_& m) {
    m.def("huge_bytes", &huge_bytes, "count"_a, "A new uint8 tensor of `count` bytes, in huge pages where there are any.");
    m.def("place", &place, "codes"_a.noconvert(), "out"_a.noconvert(), "lane_bits"_a,
          "Copy codes uint8 [R, B] into out with all threads: as they are (lane_bits 0) or as lanes of 2, 3 or 4 bits.");
    m.def("has_lanes", [] { return kernels().product->lanes.multiply != nullptr; },
          "Whether the instruction set in use multiplies trellis codes in lanes.");
}

}  // namespace fewbit
