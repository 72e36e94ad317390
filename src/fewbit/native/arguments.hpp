// Arguments as they come from Python, and the checks that they all go through before a kernel sees them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace nb = nanobind;

namespace fewbit {

template <class T, int Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

// A matrix of 4-byte floats, or of 16-bit ones given as uint16.
using Floats = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Signs = Array<const uint8_t, 1>;

inline void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

template <class T>
void require_shape(const char* name, const nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>& array,
                   int64_t rows, int64_t cols) {
    require(static_cast<int64_t>(array.shape(0)) == rows && static_cast<int64_t>(array.shape(1)) == cols,
            std::string(name) + " must be [" + std::to_string(rows) + ", " + std::to_string(cols) + "], not [" +
                std::to_string(array.shape(0)) + ", " + std::to_string(array.shape(1)) + "]");
}

template <class T>
void require_length(const char* name, const nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>& array,
                    int64_t length) {
    require(static_cast<int64_t>(array.shape(0)) == length,
            std::string(name) + " must have " + std::to_string(length) + " entries, not " +
                std::to_string(array.shape(0)));
}

inline void require_bits(int bits) {
    require(bits >= 2 && bits <= 4, "the trellis has 2, 3 or 4 bits, not " + std::to_string(bits));
}

inline void require_group(int64_t group) {
    require(group >= kTileCols && group <= kMaxGroup && group % kTileCols == 0,
            "a scale group is a multiple of 16 up to 256 columns, not " + std::to_string(group));
}

inline bool is_bf16(const char* name, const Floats& array) {
    const bool half = array.dtype() == nb::dtype<uint16_t>();
    require(half || array.dtype() == nb::dtype<float>(), std::string(name) + " must be float32 or 16 bits as uint16");
    return half;
}

inline int64_t row_groups(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Inputs of `cols` columns, rotated in blocks and quantized in groups.
void require_rotation(int64_t cols, const std::optional<Signs>& signs, int block, int group);

// Parts of the module.
void bind_rotate(nb::module_& m);
void bind_rounding(nb::module_& m);
void bind_product(nb::module_& m);
void bind_memory(nb::module_& m);
void bind_gram(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_program(nb::module_& m);

}  // namespace fewbit
