// Plain C++ for every machine: compilers turn four floats into whatever vectors they have.
#include "floats.hpp"

#include <type_traits>

namespace fewbit {
namespace {

constexpr int kLanes = 4;

#include "float_vectors.hpp"
#include "float_kernels.hpp"
#include "attention.hpp"
#include "group_rounding.hpp"
#include "column_rounding.hpp"
#include "float_table.hpp"

}  // namespace

constexpr FloatKernels kPortableFloats = float_kernels_of<Vectors>();

}  // namespace fewbit
