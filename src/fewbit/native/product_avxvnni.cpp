// AVX2 with AVX-VNNI: client processors without AVX-512.
#include <immintrin.h>

#include <utility>

#include "product.hpp"
#include "rotate.hpp"

namespace fewbit {
namespace {

#include "lanes.hpp"
#include "packed_product.hpp"
#include "product_ymm.hpp"

struct Dots {
    static constexpr bool kWholeBytes = true;

    static __m256i accumulate(__m256i sums, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(sums, u, s); }
};

}  // namespace

constexpr ProductKernels kAvxVnniProduct = {0, nullptr, panel_kernels<Narrow<Dots>>(),
                                        panel_kernels<Lanes<Dots>>(Lanes<Dots>::pack), INT64_MAX, Peak<Dots>::kernel};

}  // namespace fewbit
