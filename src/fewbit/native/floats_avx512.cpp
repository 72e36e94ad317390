// AVX-512: sixteen floats per register.
#include <immintrin.h>

#include <type_traits>

#include "floats.hpp"

namespace fewbit {
namespace {

constexpr int kLanes = 16;

#include "float_vectors.hpp"
#include "float_kernels.hpp"
#include "attention.hpp"
#include "group_rounding.hpp"
#include "column_rounding.hpp"
#include "float_table.hpp"

}  // namespace

constexpr FloatKernels kAvx512Floats = float_kernels_of<Vectors>();

}  // namespace fewbit
