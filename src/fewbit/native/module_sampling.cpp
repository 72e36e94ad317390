// The Python face of sampling.
#include "arguments.hpp"

#include <cmath>

#include "sampling.hpp"

using namespace nb::literals;

namespace fewbit {
namespace {

constexpr int64_t kSettings = sizeof(SampleSettings) / sizeof(double);

void sample_rows(const Array<float, 2>& logits, const Array<const double, 2>& settings,
                 const Array<const int32_t, 1>& seen, const Array<const int64_t, 1>& ends,
                 const Array<int32_t, 1>& tokens, int threads) {
    const int64_t rows = static_cast<int64_t>(logits.shape(0)), vocabulary = static_cast<int64_t>(logits.shape(1));
    require(vocabulary >= 1 && vocabulary <= INT32_MAX, "the vocabulary must have 1 to 2^31 - 1 tokens");
    require_shape("settings", settings, rows, kSettings);
    require(threads >= 0, "the number of threads must not be negative");
    require_length("ends", ends, rows);
    require_length("tokens", tokens, rows);
    const auto* each = reinterpret_cast<const SampleSettings*>(settings.data());
    int64_t start = 0;
    for (int64_t row = 0; row < rows; ++row) {
        require(ends.data()[row] >= start && ends.data()[row] <= static_cast<int64_t>(seen.shape(0)),
                "ends must ascend and stay within seen");
        start = ends.data()[row];
        const SampleSettings& s = each[row];
        // 1 / temperature is taken in float32.
        const bool warm = s.temperature == 0 || (s.temperature >= 1e-30 && s.temperature <= 1e30);
        require(warm && s.top_k >= 0 && s.top_k == std::floor(s.top_k) && s.top_p > 0 && s.min_p >= 0 && s.min_p <= 1 &&
                    s.penalty > 0 && std::isfinite(s.penalty) && s.uniform >= 0 && s.uniform < 1,
                "settings of row " + std::to_string(row) + " are out of range");
    }
    for (size_t i = 0; i < seen.shape(0); ++i)
        require(seen.data()[i] >= 0 && seen.data()[i] < vocabulary, "a seen token is outside the vocabulary");
    nb::gil_scoped_release release;
    sample({logits.data(), each, seen.data(), ends.data(), tokens.data(), rows, vocabulary, threads});
}

}  // namespace

void bind_sampling(nb::module_& m) {
    m.def("sample", &sample_rows, "logits"_a.noconvert(), "settings"_a.noconvert(), "seen"_a.noconvert(),
          "ends"_a.noconvert(), "tokens"_a.noconvert(), "threads"_a,
          "Draw a token from every row of logits float32 [W, V] into tokens int32 [W], by settings float64 [W, 6] "
          "(temperature, top_k, top_p, min_p, repetition_penalty, random number in [0, 1)) and seen int32 [S], each "
          "row's distinct earlier tokens up to ends int64 [W]; -1 where logits are not finite. threads 0: all.");
}

}  // namespace fewbit
