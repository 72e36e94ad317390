// The Python face of the memory for weights.
#include "arguments.hpp"

#include "arena.hpp"
#include "cpu.hpp"
#include "memory.hpp"
#include "product.hpp"

using namespace nb::literals;

namespace fewbit {
namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Bytes huge_bytes(int64_t count) {
    require(count > 0, "the number of bytes must be positive, not " + std::to_string(count));
    uint8_t* memory = allocate_huge(static_cast<size_t>(count));
    const size_t shape[1] = {static_cast<size_t>(count)};
    return Bytes(memory, 1, shape, nb::capsule(memory, [](void* p) noexcept { free_huge(static_cast<uint8_t*>(p)); }));
}

void place(const Array<const uint8_t, 2>& codes, const Array<uint8_t, 2>& out, int bits, int lane_groups) {
    const int64_t rows = static_cast<int64_t>(codes.shape(0)), size = static_cast<int64_t>(codes.shape(1));
    require_bits(bits);
    require(lane_groups >= 1 && lane_groups <= kMaxLaneGroups, "lanes hold at most 4 row groups");
    require(lane_groups == 1 || size % (2 * bits * kLaneCols) == 0, "lanes need a multiple of 64 columns");
    require_shape("out", out, (rows + lane_groups - 1) / lane_groups, lane_groups * size);
    nb::gil_scoped_release release;
    if (lane_groups == 1) copy_bytes(codes.data(), out.data(), rows * size);
    else trellis_to_lanes({codes.data(), out.data(), rows, size, bits, lane_groups});
}

}  // namespace

void bind_memory(nb::module_& m) {
    m.def("huge_bytes", &huge_bytes, "count"_a, "A new uint8 array of `count` bytes, in huge pages where there are any.");
    m.def("place", &place, "codes"_a.noconvert(), "out"_a.noconvert(), "bits"_a, "lane_groups"_a,
          "Copy codes uint8 [R, B] into out with all threads: as they are (lane_groups 1) or as lanes of 2 or 4 row groups.");
    m.def("read_bytes", [](const Array<const uint8_t, 1>& buffer) {
        nb::gil_scoped_release release;
        return read_bytes(buffer.data(), static_cast<int64_t>(buffer.shape(0)));
    }, "buffer"_a.noconvert(), "Read a uint8 array with all threads, to measure how fast memory can be read.");
    m.def("lane_groups", [] { return kernels().product->lanes.multiply ? kernels().product->lanes.panel : 1; },
          "Row groups side by side in the lanes that the instruction set in use multiplies fastest; 1: no lanes.");
}

}  // namespace fewbit
