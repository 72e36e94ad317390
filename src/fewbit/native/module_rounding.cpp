// The Python face of rounding to integers: checks every argument, releases the interpreter lock, runs the kernels.
#include "arguments.hpp"

#include "cpu.hpp"
#include "floats.hpp"
#include "threads.hpp"

using namespace nb::literals;

namespace fewbit {
namespace {

using Values = Array<const float, 2>;
using Vector = Array<const float, 1>;

constexpr int64_t kRowWork = 1 << 15;             // values worth waking another thread for

// A job over rows of values, checked.
GroupJob group_job(const Values& x, int group, int bits, const Array<float, 2>& out) {
    const int64_t rows = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
    require_rotation(cols, std::nullopt, 1, group);
    require(bits == 8 || bits == 4, "values are rounded to 8 or 4 bits, not " + std::to_string(bits));
    require_shape("out", out, rows, cols);
    const GroupJob job{x.data(), nullptr, out.data(), cols, group, 127.0f, -127.0f, 127.0f};
    return bits == 8 ? job : GroupJob{x.data(), nullptr, out.data(), cols, group, -8.0f, -8.0f, 7.0f};
}

void round_groups(const Values& x, int group, int bits, const Array<float, 2>& out) {
    const GroupJob job = group_job(x, group, bits, out);
    const int64_t rows = static_cast<int64_t>(x.shape(0));
    nb::gil_scoped_release release;
    const FloatKernels& use = float_kernels();
    run(threads_for(rows * job.cols, kRowWork), rows, [&](int64_t row, int) { use.round_groups(job, row); });
}

void round_groups_back(const Values& x, const Values& gradient, int group, int bits, const Array<float, 2>& out) {
    GroupJob job = group_job(x, group, bits, out);
    const int64_t rows = static_cast<int64_t>(x.shape(0));
    require_shape("gradient", gradient, rows, job.cols);
    job.gradient = gradient.data();
    nb::gil_scoped_release release;
    const FloatKernels& use = float_kernels();
    run(threads_for(rows * job.cols, kRowWork), rows, [&](int64_t row, int) { use.round_groups_back(job, row); });
}

void require_range(int low, int high) {
    require(-128 <= low && low < high && high <= 127, "integers have to fit into 8 bits");
}

void best_scales(const Values& weight, const Vector& clips, int low, int high, const Array<float, 1>& scales) {
    const int64_t rows = static_cast<int64_t>(weight.shape(0)), group = static_cast<int64_t>(weight.shape(1));
    require_rotation(group, std::nullopt, 1, static_cast<int>(group));
    require_range(low, high);
    require_length("scales", scales, rows);
    const ScaleJob job{weight.data(), clips.data(), scales.data(), static_cast<int>(group),
                       static_cast<int>(clips.shape(0)), static_cast<float>(low), static_cast<float>(low),
                       static_cast<float>(high)};
    nb::gil_scoped_release release;
    const FloatKernels& use = float_kernels();
    run(threads_for(rows * group * job.count, kRowWork), rows, [&](int64_t row, int) { use.best_scale(job, row); });
}

void round_columns(const Values& weight, const Vector& steps, int low, int high, const std::optional<Values>& factor,
                   const Array<int8_t, 2>& codes, const Array<float, 2>& values,
                   const std::optional<Array<float, 2>>& error) {
    const int64_t rows = static_cast<int64_t>(weight.shape(0)), group = static_cast<int64_t>(weight.shape(1));
    require(group >= 1 && group <= kMaxGroup, "a group has 1 to 256 columns, not " + std::to_string(group));
    require_range(low, high);
    require_length("steps", steps, rows);
    require_shape("codes", codes, rows, group);
    require_shape("values", values, rows, group);
    require(factor.has_value() == error.has_value(), "factor and error are given together or not at all");
    if (factor) {
        require_shape("factor", *factor, group, group);
        require_shape("error", *error, rows, group);
    }
    const ColumnsJob job{weight.data(), steps.data(), factor ? factor->data() : nullptr, codes.data(), values.data(),
                         error ? error->data() : nullptr, rows, static_cast<int>(group), static_cast<float>(low),
                         static_cast<float>(high)};
    nb::gil_scoped_release release;
    const FloatKernels& use = float_kernels();
    const int64_t blocks = (rows + kRoundedRows - 1) / kRoundedRows;
    run(threads_for(rows * group * (factor ? group : 1), kRowWork), blocks,
        [&](int64_t block, int) { use.round_columns(job, block); });
}

}  // namespace

void bind_rounding(nb::module_& m) {
    m.def("round_groups", &round_groups, "x"_a.noconvert(), "group"_a, "bits"_a, "out"_a.noconvert(),
          "Fill out [T, K] with what rotate_quantize's integers and scales of x float32 [T, K], not rotated, stand for.");
    m.def("round_groups_back", &round_groups_back, "x"_a.noconvert(), "gradient"_a.noconvert(), "group"_a, "bits"_a,
          "out"_a.noconvert(),
          "Fill out [T, K] with a gradient's way back through round_groups, the integers held still and each scale "
          "moving with the value that sets it.");
    m.def("best_scales", &best_scales, "weight"_a.noconvert(), "clips"_a.noconvert(), "low"_a, "high"_a,
          "scales"_a.noconvert(),
          "Fill scales [N] with those that lose least when weight float32 [N, G] is rounded to integers low..high, among "
          "clips float32 [C] of the one that makes the value of the largest magnitude low.");
    m.def("round_columns", &round_columns, "weight"_a.noconvert(), "steps"_a.noconvert(), "low"_a, "high"_a,
          "factor"_a.noconvert().none(), "codes"_a.noconvert(), "values"_a.noconvert(), "error"_a.noconvert().none(),
          "Round one scale group weight float32 [N, G] to codes int8 of steps float32 [N], column by column with error "
          "feedback by a factor U [G, G]; fills codes, values and, with U, error (error U = weight - values).");
}

}  // namespace fewbit
