// The Python face of X'X, and whether the machine has the instructions for it.
#include "gram.hpp"

#include "arguments.hpp"
#include "cpu.hpp"

using namespace nb::literals;

namespace fewbit {

#ifdef FEWBIT_HAVE_BF16
void add_gram_bf16(const GramJob& job);
#endif

bool has_gram() {
#ifdef FEWBIT_HAVE_BF16
    return has_avx512_bf16();
#else
    return false;
#endif
}

void add_gram(const GramJob& job) {
#ifdef FEWBIT_HAVE_BF16
    if (has_gram()) return add_gram_bf16(job);
#endif
    throw std::runtime_error("this processor, or this build, has no products of bfloat16");
}

void bind_gram(nb::module_& m) {
    m.def("has_gram", &has_gram, "Whether add_gram is there.");
    m.def("add_gram", [](const Array<const float, 2>& x, const Array<float, 2>& sums) {
        const GramJob job{x.data(), sums.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1))};
        require_shape("sums", sums, job.cols, job.cols);
        nb::gil_scoped_release release;
        add_gram(job);
    }, "x"_a.noconvert(), "sums"_a.noconvert(),
       "Add X'X of x float32 [T, K], rounded to bfloat16, to sums float32 [K, K], on and above the diagonal (and in the "
       "squares of 32 that it cuts); RuntimeError without has_gram().");
}

}  // namespace fewbit
