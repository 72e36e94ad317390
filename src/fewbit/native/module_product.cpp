// The Python face of the products: checks every argument, releases the interpreter lock, runs the kernels.
#include "arguments.hpp"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "cpu.hpp"
#include "product.hpp"
#include "rotate.hpp"
#include "threads.hpp"

using namespace nb::literals;

namespace fewbit {
namespace {

constexpr int64_t kWorkOfAThread = 1 << 19;       // products worth waking another thread for

// Every sum of one entry of each table fits into a byte exactly if the extremes do.
void require_tables(const Array<const int8_t, 1>& tables) {
    require_length("tables", tables, 40);
    int least = 0, most = 0;
    const int8_t* from = tables.data();
    for (const int count : {16, 4, 4, 16}) {
        least += *std::min_element(from, from + count);
        most += *std::max_element(from, from + count);
        from += count;
    }
    require(least >= -127 && most <= 127, "the tables' sums must stay within +-127");
}

// Scratch for as many threads as work on a product.
class Scratches {
public:
    Scratches(int threads, int64_t scales_each)
        : scratches_(new ProductScratch[static_cast<size_t>(threads)]),
          scales_(static_cast<size_t>(threads * scales_each)) {
        for (int i = 0; i < threads; ++i) scratches_[static_cast<size_t>(i)].scales = scales_.data() + i * scales_each;
    }

    ProductScratch& operator[](int worker) { return scratches_[static_cast<size_t>(worker)]; }

private:
    std::unique_ptr<ProductScratch[]> scratches_;
    std::vector<uint16_t> scales_;
};

void multiply(ProductJob job) {
    if (job.tokens == 0) return;
    const ProductKernels& use = *kernels().product;
    const int64_t groups = row_groups(job.rows);
    const int threads = threads_for(job.tokens * job.rows * job.cols, kWorkOfAThread);
    Scratches scratch(threads, job.cols / job.group * kMaxPanel * kTileRows);
    if (job.tokens <= use.few)
        return run(threads, groups, [&](int64_t index, int worker) { use.multiply_few(job, index, scratch[worker]); });
    const std::unique_ptr<int8_t[]> packed(new int8_t[static_cast<size_t>(job.tokens * job.cols)]);
    job.packed = packed.get();
    run(threads_for(job.tokens * job.cols, kTokenWork), (job.tokens + use.block - 1) / use.block,
        [&](int64_t block, int) { use.pack(job, block); });
    run(threads, (groups + use.panel - 1) / use.panel,
        [&](int64_t panel, int worker) { use.multiply(job, panel, scratch[worker]); });
}

// The weights' part of a job, checked against inputs of `cols` columns and an output for `tokens` tokens.
ProductJob weights_of(const Array<const uint8_t, 2>& codes, const Array<const uint16_t, 2>& scales, float scale,
                      const Array<const int8_t, 1>& tables, const std::optional<Array<const float, 1>>& bias, int bits,
                      const Floats& out, int64_t tokens, int64_t cols) {
    const int64_t rows = static_cast<int64_t>(scales.shape(0)), groups = static_cast<int64_t>(scales.shape(1));
    ProductJob job{};
    job.bf16 = is_bf16("out", out);
    require_bits(bits);
    require(groups > 0 && cols % groups == 0, "scales must be [N, K / group]");
    const int64_t group = cols / groups;
    require_group(group);
    require(group % 32 == 0, "a scale group is a multiple of 32 columns here, not " + std::to_string(group));
    require_shape("codes", codes, row_groups(rows), 2 * bits * cols);
    require_tables(tables);
    if (bias) require_length("bias", *bias, rows);
    require(static_cast<int64_t>(out.shape(0)) == tokens && static_cast<int64_t>(out.shape(1)) == rows,
            "out must be [" + std::to_string(tokens) + ", " + std::to_string(rows) + "]");
    job.codes = codes.data();
    job.scales = scales.data();
    job.scale = scale;
    job.tables = tables.data();
    job.bias = bias ? bias->data() : nullptr;
    job.out = out.data();
    job.tokens = tokens;
    job.rows = rows;
    job.cols = cols;
    job.group = static_cast<int>(group);
    job.bits = bits;
    return job;
}

void trellis_linear(const Array<const int8_t, 2>& q, const Array<const float, 2>& input_scale,
                    const Array<const int32_t, 2>& sums, const Array<const uint8_t, 2>& codes,
                    const Array<const uint16_t, 2>& scales, float scale, const Array<const int8_t, 1>& tables,
                    const std::optional<Array<const float, 1>>& bias, int bits, const Floats& out) {
    const int64_t tokens = static_cast<int64_t>(q.shape(0)), cols = static_cast<int64_t>(q.shape(1));
    ProductJob job = weights_of(codes, scales, scale, tables, bias, bits, out, tokens, cols);
    require_shape("scale", input_scale, tokens, cols / job.group);
    require_shape("sums", sums, tokens, cols / job.group);
    job.q = q.data();
    job.input_scale = input_scale.data();
    job.sums = sums.data();
    nb::gil_scoped_release release;
    multiply(job);
}

// Both steps in one call: what a linear layer does for every token.
void linear(const Floats& x, const std::optional<Signs>& signs, int block, const Array<const uint8_t, 2>& codes,
            const Array<const uint16_t, 2>& scales, float scale, const Array<const int8_t, 1>& tables,
            const std::optional<Array<const float, 1>>& bias, int bits, const Floats& out) {
    const int64_t tokens = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
    const bool bf16 = is_bf16("x", x);
    ProductJob job = weights_of(codes, scales, scale, tables, bias, bits, out, tokens, cols);
    require_rotation(cols, signs, block, job.group);
    nb::gil_scoped_release release;
    const size_t groups = static_cast<size_t>(tokens * (cols / job.group));
    const std::unique_ptr<int8_t[]> q(new int8_t[static_cast<size_t>(tokens * cols)]);
    const std::unique_ptr<float[]> input_scale(new float[groups]);
    const std::unique_ptr<int32_t[]> sums(new int32_t[groups]);
    rotate({x.data(), bf16, signs ? signs->data() : nullptr, q.get(), input_scale.get(), sums.get(), cols, block,
            job.group},
           tokens);
    job.q = q.get();
    job.input_scale = input_scale.get();
    job.sums = sums.get();
    multiply(job);
}

}  // namespace

void bind_product(nb::module_& m) {
    m.def("trellis_linear", &trellis_linear, "q"_a.noconvert(), "scale"_a.noconvert(), "sums"_a.noconvert(),
          "codes"_a.noconvert(), "scales"_a.noconvert(), "tensor_scale"_a, "tables"_a.noconvert(),
          "bias"_a.noconvert().none(), "bits"_a, "out"_a.noconvert(),
          "Fill out float32 or bfloat16 bits [T, N] with the product of quantized inputs and trellis weights.");
    m.def("linear", &linear, "x"_a.noconvert(), "signs"_a.noconvert().none(), "block"_a, "codes"_a.noconvert(),
          "scales"_a.noconvert(), "tensor_scale"_a, "tables"_a.noconvert(), "bias"_a.noconvert().none(), "bits"_a,
          "out"_a.noconvert(), "rotate_quantize, then trellis_linear, for x float32 or bfloat16 bits [T, K].");
}

}  // namespace fewbit
