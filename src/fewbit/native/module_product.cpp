// The Python face of the products: checks every argument, releases the interpreter lock, runs the kernels.
#include "arguments.hpp"

#include <nanobind/stl/vector.h>

#include <optional>
#include <vector>

#include "matrix.hpp"
#include "product_run.hpp"
#include "rotate.hpp"

using namespace nb::literals;

namespace fewbit {
namespace {

constexpr int64_t kMostOperations = int64_t{1} << 50;

void packed_linear(const Array<const int8_t, 2>& q, const Array<const float, 2>& input_scale,
                   const Array<const int32_t, 2>& sums, const Matrix& matrix, const Floats& out) {
    const int64_t tokens = static_cast<int64_t>(q.shape(0)), cols = matrix.cols();
    ProductJob job = matrix.job(out, tokens);
    require_shape("q", q, tokens, cols);
    require_shape("scale", input_scale, tokens, cols / job.group);
    require_shape("sums", sums, tokens, cols / job.group);
    job.q = q.data();
    job.input_scale = input_scale.data();
    job.sums = sums.data();
    job.stride = cols;
    nb::gil_scoped_release release;
    ProductMemory memory;
    multiply(&job, 1, memory);
}

using Shift = std::optional<Array<const float, 1>>;

// The rotation of inputs x, to be quantized in groups of `group`.
RotateJob rotation_of(const Floats& x, const std::optional<Signs>& signs, int block, int group, int act_bits,
                      const Shift& shift) {
    require_rotation(static_cast<int64_t>(x.shape(1)), signs, block, group);
    require(act_bits == 8 || act_bits == 4, "activations have 8 or 4 bits, not " + std::to_string(act_bits));
    RotateJob job{};
    job.x = x.data();
    job.bf16 = is_bf16("x", x);
    job.signs = signs ? signs->data() : nullptr;
    job.cols = static_cast<int64_t>(x.shape(1));
    job.block = block;
    job.group = group;
    job.bits = act_bits;
    if (shift) require_length("shift", *shift, job.cols);
    job.shift = shift ? shift->data() : nullptr;
    return job;
}

// Both steps in one call, for every matrix that reads the same inputs.
void linear(const Floats& x, const std::optional<Signs>& signs, int block, int act_bits,
            const std::vector<const Matrix*>& matrices, const std::vector<Floats>& outs, const Shift& shift) {
    const int64_t tokens = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
    require(!matrices.empty() && matrices.size() == outs.size(), "every matrix needs its output");
    require(matrices[0] != nullptr, "a matrix is missing");
    const int group = matrices[0]->group();
    const RotateJob rotation = rotation_of(x, signs, block, group, act_bits, shift);
    std::vector<ProductJob> jobs;
    for (size_t i = 0; i < matrices.size(); ++i) {
        require(matrices[i] != nullptr, "a matrix is missing");
        require(matrices[i]->cols() == cols && matrices[i]->group() == group,
                "matrices of one call share their inputs and their scale groups");
        jobs.push_back(matrices[i]->job(outs[i], tokens));
    }
    nb::gil_scoped_release release;
    QuantizedInputs inputs;
    inputs.at_least(tokens, cols, group);
    inputs.quantize(rotation, tokens);
    for (ProductJob& job : jobs) inputs.set(job);
    ProductMemory memory;
    multiply(jobs.data(), static_cast<int>(jobs.size()), memory);
}

// A twin layer: the inputs are quantized once, and the low-rank part's product is quantized to beside them, as further
// inputs of one product with both components side by side.
void twin_linear(const Floats& x, const std::optional<Signs>& signs, int block, int act_bits, const Matrix& down,
                 const Matrix& both, const Floats& out, const Shift& shift) {
    const int64_t tokens = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
    const int64_t rank = down.rows(), all = both.cols();
    const int group = down.group();
    require(down.cols() == cols && all == cols + rank && both.group() == group && rank % group == 0,
            "a twin layer has matrices [r, K] and [N, K + r] with the same scale groups, which divide r");
    const RotateJob rotation = rotation_of(x, signs, block, group, act_bits, shift);
    ProductJob second = both.job(out, tokens);
    nb::gil_scoped_release release;
    QuantizedInputs inputs;
    inputs.at_least(tokens, all, group);
    inputs.quantize(rotation, tokens);
    Buffer<float> h;
    ProductJob first = down.job(h.at_least(static_cast<size_t>(tokens * rank)), tokens);
    inputs.set(first);
    ProductMemory memory;
    multiply(&first, 1, memory);
    RotateJob plain{};
    plain.x = h.data();
    plain.cols = rank;
    plain.block = 1;
    plain.group = group;
    plain.bits = act_bits;
    inputs.quantize(plain, tokens, cols);
    inputs.set(second);
    multiply(&second, 1, memory);
}

}  // namespace

void bind_product(nb::module_& m) {
    nb::class_<Matrix>(m, "Matrix", "The parts of a packed matrix [N, K], checked and kept alive.")
        .def(nb::init<Array<const uint8_t, 2>, Array<const uint16_t, 2>, float, std::optional<Array<const int8_t, 1>>,
                      std::optional<Array<const float, 1>>, int64_t, int, const std::string&>(),
             "codes"_a.noconvert(), "scales"_a.noconvert(), "tensor_scale"_a, "tables"_a.noconvert().none(),
             "bias"_a.noconvert().none(), "cols"_a, "bits"_a, "code"_a);
    m.def("packed_linear", &packed_linear, "q"_a.noconvert(), "scale"_a.noconvert(), "sums"_a.noconvert(), "matrix"_a,
          "out"_a.noconvert(),
          "Fill out float32 or bfloat16 bits [T, N] with the product of quantized inputs and a packed matrix.");
    m.def("linear", &linear, "x"_a.noconvert(), "signs"_a.noconvert().none(), "block"_a, "act_bits"_a, "matrices"_a,
          "outs"_a, "shift"_a.noconvert() = nb::none(),
          "rotate_quantize of x float32 or bfloat16 bits [T, K], then packed_linear with every matrix.");
    m.def("twin_linear", &twin_linear, "x"_a.noconvert(), "signs"_a.noconvert().none(), "block"_a, "act_bits"_a,
          "down"_a, "both"_a, "out"_a.noconvert(), "shift"_a.noconvert() = nb::none(),
          "rotate_quantize of x, its product h with `down` quantized, then the product of [x, h] with `both`.");
    m.def("multiply_registers", [](int64_t operations) {
        require(operations >= 1 && operations <= kMostOperations,
                "operations must be 1 to 2^50, not " + std::to_string(operations));
        nb::gil_scoped_release release;
        return multiply_registers(operations);
    }, "operations"_a,
          "Multiply and add 8-bit integers on registers with all threads, to measure how fast that is: at least so many "
          "operations, a multiplication and its addition being two. Gives how many.");
}

}  // namespace fewbit
