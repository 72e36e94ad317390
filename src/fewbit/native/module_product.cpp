// The Python face of the products: checks every argument, releases the interpreter lock, runs the kernels.
#include "arguments.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
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

// Memory that begins where a line of the cache begins.
struct alignas(64) Line {
    int8_t bytes[64];
};

std::unique_ptr<Line[]> lines(int64_t bytes) {
    return std::unique_ptr<Line[]>(new Line[static_cast<size_t>((bytes + 63) / 64)]);
}

// Scratch for as many threads as work on a product.
class Scratches {
public:
    Scratches(int threads, int64_t scales_each, size_t more_each)
        : scratches_(new ProductScratch[static_cast<size_t>(threads)]),
          scales_(static_cast<size_t>(threads * scales_each)),
          more_(lines(threads * static_cast<int64_t>(more_each))) {
        for (int i = 0; i < threads; ++i) {
            scratches_[static_cast<size_t>(i)].scales = scales_.data() + i * scales_each;
            scratches_[static_cast<size_t>(i)].more = more_.get() + static_cast<size_t>(i) * more_each / sizeof(Line);
        }
    }

    ProductScratch& operator[](int worker) { return scratches_[static_cast<size_t>(worker)]; }

private:
    std::unique_ptr<ProductScratch[]> scratches_;
    std::vector<uint16_t> scales_;
    std::unique_ptr<Line[]> more_;
};

// Where the jobs' units of work (row groups or panels) begin when they are counted through.
class Units {
public:
    Units(const std::vector<ProductJob>& jobs, int panel) : jobs_(jobs) {
        for (const ProductJob& job : jobs) ends_.push_back(count() + (row_groups(job.rows) + panel - 1) / panel);
    }

    int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

    template <class Body>
    void at(int64_t unit, const Body& body) const {
        size_t i = 0;
        while (unit >= ends_[i]) ++i;
        body(jobs_[i], unit - (i == 0 ? 0 : ends_[i - 1]));
    }

private:
    const std::vector<ProductJob>& jobs_;
    std::vector<int64_t> ends_;
};

// Panels of a unit of work: several where the kernels gain from that, if every thread gets enough units all the same.
int panels_for(const PanelKernels& use, int64_t rows, int threads) {
    const int64_t panels = rows / (use.panel * kTileRows) / (threads * kPiecesPerThread);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(panels, use.panels)));
}

// Packs the inputs that all jobs share; the packed bytes live as long as what is returned.
std::unique_ptr<Line[]> pack(std::vector<ProductJob>& jobs, const PanelKernels& use, int threads, int64_t rows) {
    const int64_t tokens = jobs[0].tokens, cols = jobs[0].cols, blocks = (tokens + use.block - 1) / use.block;
    std::unique_ptr<Line[]> packed = lines(blocks * use.block * (use.bytes * cols + 4 * (cols / jobs[0].group)));
    for (ProductJob& job : jobs) {
        job.packed = packed[0].bytes;
        job.panels = panels_for(use, rows, threads);
    }
    run(threads_for(tokens * cols, kTokenWork), blocks, [&](int64_t block, int) { use.pack(jobs[0], block); });
    return packed;
}

// Products of one input with one or several matrices, their row groups shared out among the threads.
void multiply(std::vector<ProductJob> jobs) {
    const int64_t tokens = jobs[0].tokens, cols = jobs[0].cols;
    if (tokens == 0) return;
    const ProductKernels* all = kernels().product;
    const ProductKernels& use = jobs[0].group % all->columns == 0 ? *all : *all->otherwise;
    int64_t rows = 0;
    bool in_lanes = tokens <= use.most_in_lanes;
    for (const ProductJob& job : jobs) {
        rows += job.rows;
        in_lanes = in_lanes && job.code == Code::lanes && job.lane_groups == use.lanes.panel;
    }
    const int threads = threads_for(tokens * rows * cols, kWorkOfAThread);
    const PanelKernels& panels = in_lanes ? use.lanes : use.panels;
    const bool few = !in_lanes && tokens <= use.few;
    const int64_t scales = cols / jobs[0].group * std::max(kMaxPanel, kMaxLaneGroups) * kTileRows;
    Scratches scratch(threads, scales, few ? 0 : panels.scratch);
    std::unique_ptr<Line[]> packed;
    if (!few) packed = pack(jobs, panels, threads, rows);
    const Units units(jobs, few ? 1 : panels.panel * jobs[0].panels);
    run(threads, units.count(), [&](int64_t unit, int worker) {
        units.at(unit, [&](const ProductJob& job, int64_t index) {
            (few ? use.multiply_few : panels.multiply)(job, index, scratch[worker]);
        });
    });
}

Code code_of(const std::string& name) {
    if (name == "lanes") return Code::lanes;
    if (name == "nibbles") return Code::nibbles;
    require(name == "trellis", "the code must be trellis, lanes or nibbles, not " + name);
    return Code::trellis;
}

// A packed matrix as Python gives it: its parts, checked once and kept alive.
class Matrix {
public:
    Matrix(Array<const uint8_t, 2> codes, Array<const uint16_t, 2> scales, float scale,
           std::optional<Array<const int8_t, 1>> tables, std::optional<Array<const float, 1>> bias, int64_t cols,
           int bits, const std::string& code)
        : codes_(std::move(codes)), scales_(std::move(scales)), tables_(std::move(tables)), bias_(std::move(bias)) {
        require_bits(bits);
        require(cols > 0, "a matrix has at least one column");
        const int64_t groups = static_cast<int64_t>(scales_.shape(1));
        job_.rows = static_cast<int64_t>(scales_.shape(0));
        job_.code = code_of(code);
        job_.cols = cols;
        job_.lane_groups = static_cast<int>(static_cast<int64_t>(codes_.shape(1)) / std::max<int64_t>(1, 2 * bits * cols));
        const int lanes = job_.lane_groups;
        require(groups > 0 && job_.cols % groups == 0, "scales must be [N, K / group]");
        const int64_t group = job_.cols / groups;
        require_group(group);
        require(group % 32 == 0, "a scale group is a multiple of 32 columns here, not " + std::to_string(group));
        if (job_.code == Code::lanes) {
            require(lanes == 2 || lanes == kMaxLaneGroups, "lanes hold 2 or 4 row groups, not " + std::to_string(lanes));
            require(group % kLaneCols == 0, "lanes need scale groups that are a multiple of 64 columns");
        } else {
            require(lanes == 1, "codes must be [ceil(N / 16), " + std::to_string(2 * bits * cols) + "]");
        }
        require_shape("codes", codes_, (row_groups(job_.rows) + lanes - 1) / lanes, 2 * bits * cols * lanes);
        require(job_.code == Code::nibbles ? bits == 4 : tables_.has_value(),
                job_.code == Code::nibbles ? "nibbles have 4 bits" : "the trellis needs its tables");
        if (tables_) require_tables(*tables_);
        if (bias_) require_length("bias", *bias_, job_.rows);
        job_.codes = codes_.data();
        job_.scales = scales_.data();
        job_.scale = scale;
        job_.tables = tables_ ? tables_->data() : nullptr;
        job_.bias = bias_ ? bias_->data() : nullptr;
        job_.group = static_cast<int>(group);
        job_.bits = bits;
    }

    int64_t rows() const { return job_.rows; }
    int64_t cols() const { return job_.cols; }
    int group() const { return job_.group; }

    // The job without its inputs, for an output of `tokens` tokens.
    ProductJob job(const Floats& out, int64_t tokens) const {
        require(static_cast<int64_t>(out.shape(0)) == tokens && static_cast<int64_t>(out.shape(1)) == job_.rows,
                "out must be [" + std::to_string(tokens) + ", " + std::to_string(job_.rows) + "]");
        ProductJob job = job_;
        job.bf16 = is_bf16("out", out);
        job.out = out.data();
        job.tokens = tokens;
        return job;
    }

    // The same for an output float [tokens, rows] of our own.
    ProductJob job(float* out, int64_t tokens) const {
        ProductJob job = job_;
        job.out = out;
        job.tokens = tokens;
        return job;
    }

private:
    Array<const uint8_t, 2> codes_;
    Array<const uint16_t, 2> scales_;
    std::optional<Array<const int8_t, 1>> tables_;
    std::optional<Array<const float, 1>> bias_;
    ProductJob job_{};
};

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
    nb::gil_scoped_release release;
    multiply({job});
}

using Shift = std::optional<Array<const float, 1>>;

// Inputs quantized within a call.
struct Quantized {
    std::unique_ptr<int8_t[]> q;
    std::unique_ptr<float[]> scale;
    std::unique_ptr<int32_t[]> sums;

    Quantized(int64_t tokens, int64_t cols, int64_t groups)
        : q(new int8_t[static_cast<size_t>(tokens * cols)]),
          scale(new float[static_cast<size_t>(tokens * groups)]),
          sums(new int32_t[static_cast<size_t>(tokens * groups)]) {}
};

void set_inputs(ProductJob& job, const Quantized& inputs) {
    job.q = inputs.q.get();
    job.input_scale = inputs.scale.get();
    job.sums = inputs.sums.get();
}

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

void quantize(RotateJob job, int64_t tokens, const Quantized& to) {
    job.q = to.q.get();
    job.scale = to.scale.get();
    job.sums = to.sums.get();
    rotate(job, tokens);
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
    const Quantized inputs(tokens, cols, cols / group);
    quantize(rotation, tokens, inputs);
    for (ProductJob& job : jobs) set_inputs(job, inputs);
    multiply(std::move(jobs));
}

// Token by token, `first` entries of a followed by `second` ones of b.
template <class T>
void join(const T* a, int64_t first, const T* b, int64_t second, int64_t tokens, T* out) {
    for (int64_t t = 0; t < tokens; ++t, out += first + second) {
        std::copy(a + t * first, a + (t + 1) * first, out);
        std::copy(b + t * second, b + (t + 1) * second, out + first);
    }
}

// A twin layer: the inputs are quantized once, the low-rank part's product is quantized where it lies in cache and
// becomes further inputs of one product with both components side by side.
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
    const Quantized inputs(tokens, cols, cols / group), middle(tokens, rank, rank / group);
    const Quantized joined(tokens, all, all / group);
    quantize(rotation, tokens, inputs);
    const std::unique_ptr<float[]> h(new float[static_cast<size_t>(tokens * rank)]);
    ProductJob first = down.job(h.get(), tokens);
    set_inputs(first, inputs);
    multiply({first});
    RotateJob plain{};
    plain.x = h.get();
    plain.cols = rank;
    plain.block = 1;
    plain.group = group;
    plain.bits = act_bits;
    quantize(plain, tokens, middle);
    join(inputs.q.get(), cols, middle.q.get(), rank, tokens, joined.q.get());
    join(inputs.scale.get(), cols / group, middle.scale.get(), rank / group, tokens, joined.scale.get());
    join(inputs.sums.get(), cols / group, middle.sums.get(), rank / group, tokens, joined.sums.get());
    set_inputs(second, joined);
    multiply({second});
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
}

}  // namespace fewbit
