// AVX2 (and F16C).
#include <immintrin.h>

#include <utility>

#include "product.hpp"

namespace fewbit {
namespace {

#include "lanes.hpp"
#include "packed_product.hpp"
#include "product_ymm.hpp"

struct Dots {
    static constexpr bool kWholeBytes = false;

    static __m256i accumulate(__m256i sums, __m256i u, __m256i s) {
        const __m256i pairs = _mm256_maddubs_epi16(u, s);
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

}  // namespace

constexpr ProductKernels kAvx2Product = {0, nullptr, panel_kernels<Narrow<Dots>>(),
                                     panel_kernels<Lanes<Dots>>(Lanes<Dots>::pack), INT64_MAX, Peak<Dots>::kernel};

}  // namespace fewbit
