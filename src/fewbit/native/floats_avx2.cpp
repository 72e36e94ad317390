// AVX2 with fused multiply-add: eight floats per register.
#include "floats.hpp"

#include <type_traits>

namespace fewbit {
namespace {

constexpr int kLanes = 8;

#include "float_vectors.hpp"
#include "float_kernels.hpp"
#include "attention.hpp"
#include "group_rounding.hpp"
#include "column_rounding.hpp"
#include "float_table.hpp"

}  // namespace

constexpr FloatKernels kAvx2Floats = float_kernels_of<Vectors>();

}  // namespace fewbit
