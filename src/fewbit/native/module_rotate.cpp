// The Python face of quantizing inputs: checks every argument, releases the interpreter lock, runs the kernels.
#include "arguments.hpp"

#include <nanobind/stl/string.h>

#include "cpu.hpp"
#include "rotate.hpp"
#include "threads.hpp"

using namespace nb::literals;

namespace fewbit {

void require_rotation(int64_t cols, const std::optional<Signs>& signs, int block, int group) {
    require(block == 1 || block == 32 || block == 64 || block == 128 || block == 256,
            "the block must be 32, 64, 128 or 256, or 1 for no rotation, not " + std::to_string(block));
    require(group >= 32 && group <= kMaxGroup && group % 32 == 0,
            "a scale group is a multiple of 32 up to 256 columns, not " + std::to_string(group));
    require(group % block == 0 || block % group == 0, "the scale group must be a multiple of the block or divide it");
    require(cols % group == 0 && cols % block == 0, "the block and the scale group must divide the inputs");
    require(block > 1 || !signs, "signs must be None where nothing is rotated");
    if (signs) require_length("signs", *signs, (cols + 7) / 8);
}

void rotate(const RotateJob& job, int64_t tokens) {
    const Kernels& use = kernels();
    const int threads = threads_for(tokens * job.cols, kTokenWork);
    run(threads, tokens, [&](int64_t token, int) { use.rotate_quantize(job, token); });
}

namespace {

using Quantized = Array<int8_t, 2>;
using Scales = Array<float, 2>;
using Sums = Array<int32_t, 2>;
using Shift = std::optional<Array<const float, 1>>;

// A job without a prologue, checked.
RotateJob job_of(const char* name, const Floats& x, const std::optional<Signs>& signs, int block, int group, int bits,
                 const Quantized& q, const Scales& scale, const Sums& sums, const Shift& shift) {
    const int64_t tokens = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
    RotateJob job{};
    job.x = x.data();
    job.bf16 = is_bf16(name, x);
    require_rotation(cols, signs, block, group);
    require(bits == 8 || bits == 4, "inputs are quantized to 8 or 4 bits, not " + std::to_string(bits));
    require_shape("q", q, tokens, cols);
    require_shape("scale", scale, tokens, cols / group);
    require_shape("sums", sums, tokens, cols / group);
    job.signs = signs ? signs->data() : nullptr;
    job.q = q.data();
    job.scale = scale.data();
    job.sums = sums.data();
    job.cols = job.stride = cols;
    job.block = block;
    job.group = group;
    job.bits = bits;
    if (shift) require_length("shift", *shift, cols);
    job.shift = shift ? shift->data() : nullptr;
    return job;
}

void rotate_quantize(const Floats& x, const std::optional<Signs>& signs, int block, int group, int bits,
                     const Quantized& q, const Scales& scale, const Sums& sums, const Shift& shift) {
    const RotateJob job = job_of("x", x, signs, block, group, bits, q, scale, sums, shift);
    nb::gil_scoped_release release;
    rotate(job, static_cast<int64_t>(x.shape(0)));
}

void rms_norm_rotate_quantize(const Floats& x, const Array<const float, 1>& weight, float eps,
                              const std::optional<Signs>& signs, int block, int group, int bits, const Quantized& q,
                              const Scales& scale, const Sums& sums, const Shift& shift) {
    RotateJob job = job_of("x", x, signs, block, group, bits, q, scale, sums, shift);
    require_length("weight", weight, job.cols);
    job.prologue = Prologue::rms_norm;
    job.weight = weight.data();
    job.eps = eps;
    nb::gil_scoped_release release;
    rotate(job, static_cast<int64_t>(x.shape(0)));
}

void gated_rotate_quantize(const Floats& gate, const Floats& up, const std::string& activation,
                           const std::optional<Signs>& signs, int block, int group, int bits, const Quantized& q,
                           const Scales& scale, const Sums& sums, const Shift& shift) {
    RotateJob job = job_of("gate", gate, signs, block, group, bits, q, scale, sums, shift);
    require(is_bf16("up", up) == job.bf16 && up.shape(0) == gate.shape(0) && up.shape(1) == gate.shape(1),
            "up must have the shape and the type of gate");
    require(activation == "silu" || activation == "gelu_tanh",
            "the activation must be silu or gelu_tanh, not '" + activation + "'");
    job.prologue = activation == "silu" ? Prologue::silu : Prologue::gelu_tanh;
    job.up = up.data();
    nb::gil_scoped_release release;
    rotate(job, static_cast<int64_t>(gate.shape(0)));
}

}  // namespace

void bind_rotate(nb::module_& m) {
    m.def("rotate_quantize", &rotate_quantize, "x"_a.noconvert(), "signs"_a.noconvert().none(), "block"_a, "group"_a,
          "bits"_a, "q"_a.noconvert(), "scale"_a.noconvert(), "sums"_a.noconvert(),
          "shift"_a.noconvert() = nb::none(),
          "Rotate x float32 or bfloat16 bits [T, K], less shift float32 [K], and quantize it to q int8 [T, K], scale and "
          "sums [T, K / group].");
    m.def("rms_norm_rotate_quantize", &rms_norm_rotate_quantize, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a,
          "signs"_a.noconvert().none(), "block"_a, "group"_a, "bits"_a, "q"_a.noconvert(), "scale"_a.noconvert(),
          "sums"_a.noconvert(), "shift"_a.noconvert() = nb::none(),
          "rotate_quantize of x / sqrt(mean(x^2) + eps) * weight, weight float32 [K].");
    m.def("gated_rotate_quantize", &gated_rotate_quantize, "gate"_a.noconvert(), "up"_a.noconvert(), "activation"_a,
          "signs"_a.noconvert().none(), "block"_a, "group"_a, "bits"_a, "q"_a.noconvert(), "scale"_a.noconvert(),
          "sums"_a.noconvert(), "shift"_a.noconvert() = nb::none(),
          "rotate_quantize of activation(gate) * up, the activation silu or gelu_tanh.");
}

}  // namespace fewbit
