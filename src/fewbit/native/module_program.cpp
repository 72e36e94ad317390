// The Python face of programs: checks every argument, keeps what steps point to alive, releases the interpreter lock.
#include "arguments.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <any>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "matrix.hpp"
#include "program.hpp"
#include "steps.hpp"

using namespace nb::literals;

namespace fewbit {
namespace {

using Vector = Array<const float, 1>;
using Table = Array<const float, 2>;
using Panels = Array<const uint16_t, 3>;         // of dense matrices: see DenseJob
using Integers = Array<const int32_t, 1>;
using Matrices = std::vector<const Matrix*>;

constexpr int64_t kEverything = int64_t{1} << 40; // the window of a layer that sees all positions

CacheType cache_of(const std::string& name) {
    if (name == "bf16") return CacheType::bf16;
    if (name == "int8") return CacheType::int8;
    require(name == "float32", "the cache must be bf16, int8 or float32, not '" + name + "'");
    return CacheType::float32;
}

Prologue activation_of(const std::string& name) {
    require(name == "silu" || name == "gelu_tanh", "the activation must be silu or gelu_tanh, not '" + name + "'");
    return name == "silu" ? Prologue::silu : Prologue::gelu_tanh;
}

class PyProgram {
public:
    PyProgram(int64_t block, int64_t slots, int64_t context, int64_t layers, int heads, int kv_heads, int dim,
              const std::string& cache, int64_t vocabulary, int threads) {
        require(block >= 1 && slots >= 1 && context >= 1 && layers >= 1 && vocabulary >= 1 && threads >= 0,
                "sizes must be positive");
        require(heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0 && heads / kv_heads <= kQueryRows,
                "the heads must be a multiple of the key heads, at most 32 of one key head");
        require(dim >= kHeadUnit && dim <= kMaxHead && dim % kHeadUnit == 0,
                "the size of a head must be a multiple of 16 up to 256, not " + std::to_string(dim));
        const ProgramShape shape{block, slots, context, layers, heads, kv_heads, dim, cache_of(cache), vocabulary, threads};
        program_ = std::make_unique<Program>(shape);
        target_ = &program_->steps();
    }

    int buffer(int64_t cols) {
        require(cols >= 1, "a buffer has at least one column");
        return program_->add_buffer(cols);
    }

    void embed_dense(const Panels& table, int64_t rows, float multiplier, int out) {
        const int64_t cols = static_cast<int64_t>(table.shape(1));
        require_panels(table, rows);
        require_rows(rows);
        require_buffer(out, cols);
        keep(table);
        add<EmbedDense>(table.data(), cols, multiplier, out);
    }

    void embed_packed(const Matrix& table, const std::optional<Signs>& signs, int block, float multiplier, int out) {
        require_rows(table.rows());
        require_buffer(out, table.cols());
        require_rotation(table.cols(), signs, block, table.group());
        const ProductJob job = table.job(static_cast<float*>(nullptr), 0);
        require(job.code != Code::nibbles, "rows are looked up in a trellis only");
        keep(table);
        keep(signs);
        add<EmbedPacked>(job, signs ? signs->data() : nullptr, block, multiplier, out);
    }

    // Inputs of packed matrices with scale groups of `group`.
    void set_inputs(int input, int block, int group, int act_bits, const std::optional<Signs>& signs,
                    const std::optional<Vector>& shift) {
        const int64_t cols = cols_of(input);
        require_rotation(cols, signs, block, group);
        require(act_bits == 8 || act_bits == 4, "activations have 8 or 4 bits, not " + std::to_string(act_bits));
        if (shift) require_length("shift", *shift, cols);
        inputs_ = LinearInputs{};
        inputs_.buffer = input;
        inputs_.rotation.signs = signs ? signs->data() : nullptr;
        inputs_.rotation.cols = cols;
        inputs_.rotation.block = block;
        inputs_.rotation.group = group;
        inputs_.rotation.bits = act_bits;
        inputs_.rotation.shift = shift ? shift->data() : nullptr;
        keep(signs);
        keep(shift);
    }

    void after_norm(const Vector& weight, float eps) {
        require_length("weight", weight, inputs_.rotation.cols);
        inputs_.rotation.prologue = Prologue::rms_norm;
        inputs_.rotation.weight = weight.data();
        inputs_.rotation.eps = eps;
        keep(weight);
    }

    void after_gate(int up, const std::string& activation) {
        require_buffer(up, inputs_.rotation.cols);
        inputs_.rotation.prologue = activation_of(activation);
        inputs_.up = up;
    }

    void linears(const Matrices& matrices, const std::vector<int>& outs) {
        add<Linears>(*program_, inputs_, jobs_of(matrices, inputs_.rotation.cols, outs), outs);
    }

    void twin_linears(const Matrices& down, const Matrices& both, const std::vector<int>& outs) {
        const int64_t cols = inputs_.rotation.cols, group = inputs_.rotation.group;
        require(!down.empty() && down.size() == both.size() && down.size() == outs.size(),
                "every matrix needs its output, and one matrix there must be");
        std::vector<ProductJob> first, second;
        for (size_t i = 0; i < down.size(); ++i) {
            const Matrix &a = checked(down[i], cols), &b = checked(both[i], cols + down[i]->rows());
            require(a.rows() % group == 0, "the scale group must divide the rank");
            require_buffer(outs[i], b.rows());
            first.push_back(a.job(static_cast<float*>(nullptr), 0));
            second.push_back(b.job(static_cast<float*>(nullptr), 0));
        }
        add<TwinLinears>(*program_, inputs_, std::move(first), std::move(second), outs);
    }

    void dense_linears(int input, const std::vector<Panels>& weights, const std::vector<int64_t>& sizes,
                       const std::vector<std::optional<Vector>>& biases, const std::vector<int>& outs) {
        require(weights.size() == outs.size() && sizes.size() == outs.size() && biases.size() == outs.size(),
                "every matrix needs its number of rows, its bias and its output");
        std::vector<DenseJob> jobs;
        for (size_t i = 0; i < weights.size(); ++i) {
            const int64_t rows = sizes[i], cols = static_cast<int64_t>(weights[i].shape(1));
            require_panels(weights[i], rows);
            require_buffer(input, cols);
            require_buffer(outs[i], rows);
            if (biases[i]) require_length("bias", *biases[i], rows);
            jobs.push_back({nullptr, weights[i].data(), biases[i] ? biases[i]->data() : nullptr, nullptr, 0, rows, cols});
            keep(weights[i]);
            keep(biases[i]);
        }
        add<DenseLinears>(input, std::move(jobs), outs);
    }

    void norm(int input, const Vector& weight, float eps, int out, bool added) {
        const int64_t cols = cols_of(input);
        require_length("weight", weight, cols);
        require_buffer(out, cols);
        require(out != kLogits, "a norm writes to a buffer");
        keep(weight);
        add<Norm>(*program_, input, weight.data(), eps, cols, out, added);
    }

    void add_to(int x, int y) {
        require_buffer(y, cols_of(x));
        add<Add>(x, y, cols_of(x));
    }

    void gate(int gate, int up, const std::string& activation, int out) {
        const int64_t cols = cols_of(gate);
        require_buffer(up, cols);
        require_buffer(out, cols);
        add<Gate>(gate, up, activation_of(activation), cols, out);
    }

    void rope(int64_t layer, int q, int k, int v, const std::optional<Vector>& q_norm, const std::optional<Vector>& k_norm,
              float eps, float scale, const Table& cosines, const Table& sines) {
        const ProgramShape& shape = program_->shape();
        require_layer(layer);
        require_buffer(q, static_cast<int64_t>(shape.heads) * shape.dim);
        require_buffer(k, static_cast<int64_t>(shape.kv_heads) * shape.dim);
        require_buffer(v, static_cast<int64_t>(shape.kv_heads) * shape.dim);
        if (q_norm) require_length("q_norm", *q_norm, shape.dim);
        if (k_norm) require_length("k_norm", *k_norm, shape.dim);
        require_shape("cosines", cosines, shape.context, shape.dim / 2);
        require_shape("sines", sines, shape.context, shape.dim / 2);
        const RopeInputs inputs{q, k, v, q_norm ? q_norm->data() : nullptr, k_norm ? k_norm->data() : nullptr,
                                eps, scale, cosines.data(), sines.data()};
        keep(q_norm);
        keep(k_norm);
        keep(cosines);
        keep(sines);
        add<Rope>(layer, inputs);
    }

    void attention(int64_t layer, int q, int out, std::optional<int64_t> window) {
        const ProgramShape& shape = program_->shape();
        require_layer(layer);
        require_buffer(q, static_cast<int64_t>(shape.heads) * shape.dim);
        require_buffer(out, static_cast<int64_t>(shape.heads) * shape.dim);
        require(!window || *window >= 1, "a window is at least 1");
        add<Attention>(layer, q, out, window ? *window : kEverything);
    }

    void experts(int input, int logits, int gathered, int result, int out, int chosen, bool normalized) {
        const int64_t cols = cols_of(input), count = cols_of(logits);
        for (const int buffer : {gathered, result, out}) require_buffer(buffer, cols);
        require(chosen >= 1 && chosen <= count, "a token has at least one expert, and at most all of them");
        require(experts_ == nullptr, "experts have no experts");
        experts_ = &add<Experts>(*program_, ExpertsInputs{input, logits, gathered, result, out, cols, count, chosen, normalized});
    }

    void expert(std::optional<int64_t> index) {
        require(experts_ != nullptr, "there are no experts to describe");
        if (!index) {
            experts_ = nullptr;
            target_ = &program_->steps();
            return;
        }
        require(in_range(*index, experts_->count()), "there is no expert " + std::to_string(*index));
        target_ = &experts_->steps(*index);
    }

    void select(int input, int out) {
        require_buffer(out, cols_of(input));
        add<Select>(input, out, cols_of(input));
    }

    void run(const Integers& tokens, const Integers& positions, const Integers& slots, const Integers& wanted,
             const Array<float, 2>& logits) {
        const ProgramShape& shape = program_->shape();
        const int64_t count = static_cast<int64_t>(tokens.shape(0)), some = static_cast<int64_t>(wanted.shape(0));
        require(count <= shape.block, "a forward takes at most " + std::to_string(shape.block) + " tokens, not " +
                                          std::to_string(count));
        require_length("positions", positions, count);
        require_length("slots", slots, count);
        require_shape("logits", logits, some, shape.vocabulary);
        for (int64_t i = 0; i < count; ++i) {
            require(in_range(tokens.data()[i], shape.vocabulary), "token " + std::to_string(tokens.data()[i]) + " is not in the vocabulary");
            require(in_range(positions.data()[i], shape.context),
                    "position " + std::to_string(positions.data()[i]) + " is outside of the context of " +
                        std::to_string(shape.context));
            require(in_range(slots.data()[i], shape.slots), "there is no slot " + std::to_string(slots.data()[i]));
            require(i == 0 || slots.data()[i] != slots.data()[i - 1] || positions.data()[i] > positions.data()[i - 1],
                    "positions of a slot must ascend");
        }
        for (int64_t i = 0; i < some; ++i)
            require(in_range(wanted.data()[i], count) && (i == 0 || wanted.data()[i] > wanted.data()[i - 1]),
                    "wanted must be ascending indices of tokens");
        nb::gil_scoped_release release;
        program_->run(tokens.data(), positions.data(), slots.data(), count, wanted.data(), some, logits.data());
    }

    void copy(int64_t source, int64_t target, int64_t length) {
        const ProgramShape& shape = program_->shape();
        require(in_range(source, shape.slots) && in_range(target, shape.slots), "there is no such slot");
        require(length >= 0 && length <= shape.context, "the length must be within the context");
        nb::gil_scoped_release release;
        program_->copy(source, target, length);
    }

private:
    template <class S, class... Arguments>
    S& add(Arguments&&... arguments) {
        target_->push_back(std::make_unique<S>(std::forward<Arguments>(arguments)...));
        return static_cast<S&>(*target_->back());
    }

    template <class T>
    void keep(const T& object) {
        kept_.emplace_back(object);
    }

    static bool in_range(int64_t value, int64_t end) { return value >= 0 && value < end; }

    int64_t cols_of(int index) const {
        require(in_range(index, program_->buffers()), "there is no buffer " + std::to_string(index));
        return program_->buffer_cols(index);
    }

    void require_buffer(int index, int64_t cols) const {
        const int64_t found = index == kLogits ? program_->shape().vocabulary : cols_of(index);
        require(found == cols, "buffer " + std::to_string(index) + " has " + std::to_string(found) + " columns, not " +
                                   std::to_string(cols));
    }

    void require_layer(int64_t layer) const {
        require(in_range(layer, program_->shape().layers), "there is no layer " + std::to_string(layer));
    }

    static void require_panels(const Panels& panels, int64_t rows) {
        require(rows >= 1 && static_cast<int64_t>(panels.shape(0)) == (rows + kDenseRows - 1) / kDenseRows &&
                    panels.shape(2) == kDenseRows,
                "a dense matrix must be [ceil(N / 32), K, 32]");
    }

    void require_rows(int64_t rows) const {
        require(rows >= program_->shape().vocabulary, "the table must have a row for every token");
    }

    const Matrix& checked(const Matrix* matrix, int64_t cols) {
        require(matrix != nullptr, "a matrix is missing");
        require(matrix->cols() == cols && matrix->group() == inputs_.rotation.group,
                "matrices of one step share their inputs and their scale groups");
        keep(*matrix);
        return *matrix;
    }

    std::vector<ProductJob> jobs_of(const Matrices& matrices, int64_t cols, const std::vector<int>& outs) {
        require(!matrices.empty() && matrices.size() == outs.size(), "every matrix needs its output");
        std::vector<ProductJob> jobs;
        for (size_t i = 0; i < matrices.size(); ++i) {
            const Matrix& matrix = checked(matrices[i], cols);
            require_buffer(outs[i], matrix.rows());
            jobs.push_back(matrix.job(static_cast<float*>(nullptr), 0));
        }
        return jobs;
    }

    std::unique_ptr<Program> program_;
    StepList* target_;                            // what steps are added to: the program's, or an expert's
    Experts* experts_ = nullptr;
    LinearInputs inputs_{};
    std::vector<std::any> kept_;
};

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<PyProgram>(m, "Program", "A model as a list of steps over buffers, with a cache of keys and values.")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int, int, int, const std::string&, int64_t, int>(), "block"_a,
             "slots"_a, "context"_a, "layers"_a, "heads"_a, "kv_heads"_a, "dim"_a, "cache"_a, "vocabulary"_a, "threads"_a)
        .def("buffer", &PyProgram::buffer, "cols"_a, "A new buffer [block, cols]; its index. Index -1 is the logits.")
        .def("embed_dense", &PyProgram::embed_dense, "table"_a.noconvert(), "rows"_a, "multiplier"_a, "out"_a)
        .def("embed_packed", &PyProgram::embed_packed, "table"_a, "signs"_a.noconvert().none(), "block"_a, "multiplier"_a,
             "out"_a)
        .def("set_inputs", &PyProgram::set_inputs, "input"_a, "block"_a, "group"_a, "act_bits"_a,
             "signs"_a.noconvert().none(), "shift"_a.noconvert().none(),
             "What the packed matrices of the next steps read, rotated and quantized.")
        .def("after_norm", &PyProgram::after_norm, "weight"_a.noconvert(), "eps"_a, "An RMSNorm before that.")
        .def("after_gate", &PyProgram::after_gate, "up"_a, "activation"_a, "activation(inputs) * up before that.")
        .def("linears", &PyProgram::linears, "matrices"_a, "outs"_a)
        .def("twin_linears", &PyProgram::twin_linears, "down"_a, "both"_a, "outs"_a)
        .def("dense_linears", &PyProgram::dense_linears, "input"_a, "weights"_a, "rows"_a, "biases"_a, "outs"_a)
        .def("norm", &PyProgram::norm, "input"_a, "weight"_a.noconvert(), "eps"_a, "out"_a, "added"_a)
        .def("add", &PyProgram::add_to, "x"_a, "y"_a)
        .def("gate", &PyProgram::gate, "gate"_a, "up"_a, "activation"_a, "out"_a)
        .def("rope", &PyProgram::rope, "layer"_a, "q"_a, "k"_a, "v"_a, "q_norm"_a.noconvert().none(),
             "k_norm"_a.noconvert().none(), "eps"_a, "scale"_a, "cosines"_a.noconvert(), "sines"_a.noconvert())
        .def("attention", &PyProgram::attention, "layer"_a, "q"_a, "out"_a, "window"_a.none())
        .def("experts", &PyProgram::experts, "input"_a, "logits"_a, "gathered"_a, "result"_a, "out"_a, "chosen"_a,
             "normalized"_a, "A mixture of experts, whose steps `expert` introduces.")
        .def("expert", &PyProgram::expert, "index"_a.none(),
             "The next steps are that expert's; None: those of the program again.")
        .def("select", &PyProgram::select, "input"_a, "out"_a)
        .def("run", &PyProgram::run, "tokens"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
             "wanted"_a.noconvert(), "logits"_a.noconvert(), "Run all steps; fills logits float32 [W, vocabulary].")
        .def("copy", &PyProgram::copy, "source"_a, "target"_a, "length"_a);
}

}  // namespace fewbit
