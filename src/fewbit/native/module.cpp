// The Python face of the native code: checks every argument, releases the interpreter lock, runs the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>

#include "arguments.hpp"
#include "cpu.hpp"
#include "threads.hpp"

using namespace nb::literals;

namespace fewbit {
namespace {

// Value of every window: A of bits 0-3, B of 4-5, C of 6-7, D of 8-11.
struct Windows {
    int8_t values[kStates];

    explicit Windows(const int8_t* tables) {
        for (int w = 0; w < kStates; ++w) {
            const int sum = tables[w & 15] + tables[16 + (w >> 4 & 3)] + tables[20 + (w >> 6 & 3)] + tables[24 + (w >> 8)];
            require(sum >= -127 && sum <= 127, "the tables' sums must stay within +-127");
            values[w] = static_cast<int8_t>(sum);
        }
    }
};

// A state holds the window's symbols in the opposite order, the newest lowest.
int state_of_window(int window, int bits) {
    int state = 0;
    for (int shift = 0; shift < kWindow; shift += bits) state = state << bits | (window >> shift & ((1 << bits) - 1));
    return state;
}

void encode_streams(const Array<const int16_t, 2>& x, const Array<const int16_t, 1>& levels, int bits,
                    const Array<uint8_t, 2>& symbols) {
    require_bits(bits);
    require(x.shape(1) % kTile == 0, "streams must be multiples of 256 long, not " + std::to_string(x.shape(1)));
    require_length("levels", levels, kStates);
    require_shape("symbols", symbols, static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)));
    nb::gil_scoped_release release;
    alignas(64) int16_t by_state[kStates];
    for (int w = 0; w < kStates; ++w) by_state[state_of_window(w, bits)] = levels.data()[w];
    const StreamJob job{x.data(), by_state, symbols.data(), static_cast<int64_t>(x.shape(1)), bits};
    const Kernels& use = kernels();
    const int threads = num_threads();
    const std::unique_ptr<Workspace[]> work(new Workspace[static_cast<size_t>(threads)]);
    parallel_for(threads, static_cast<int64_t>(x.shape(0)),
                 [&](int64_t index, int worker) { use.encode_stream(job, index, work[worker]); });
}

void encode_group(const Array<const float, 2>& weight, const Array<const float, 1>& scales,
                  const Array<const float, 1>& inverse, const Array<const int8_t, 1>& tables, int bits,
                  const std::optional<Array<const float, 2>>& factor, const Array<uint8_t, 2>& codes,
                  const Array<float, 2>& values, const std::optional<Array<float, 2>>& error,
                  const std::optional<Array<float, 2>>& weighted) {
    const int64_t rows = static_cast<int64_t>(weight.shape(0)), group = static_cast<int64_t>(weight.shape(1));
    require_bits(bits);
    require_group(group);
    require_length("scales", scales, rows);
    require_length("inverse", inverse, rows);
    require_length("tables", tables, 40);
    require_shape("codes", codes, row_groups(rows), 2 * bits * group);
    require_shape("values", values, rows, group);
    require(factor.has_value() == error.has_value() && factor.has_value() == weighted.has_value(),
            "factor, error and weighted are given together or not at all");
    if (factor) {
        require_shape("factor", *factor, group, group);
        require_shape("error", *error, rows, group);
        require_shape("weighted", *weighted, rows, group);
    }
    nb::gil_scoped_release release;
    const Windows windows(tables.data());
    alignas(64) int16_t levels[kStates];
    for (int w = 0; w < kStates; ++w)
        levels[state_of_window(w, bits)] = static_cast<int16_t>(windows.values[w] * kLevelsPerUnit);
    const EncodeJob job{weight.data(),
                        scales.data(),
                        inverse.data(),
                        factor ? factor->data() : nullptr,
                        levels,
                        codes.data(),
                        values.data(),
                        error ? error->data() : nullptr,
                        weighted ? weighted->data() : nullptr,
                        rows,
                        static_cast<int>(group),
                        bits};
    const Kernels& use = kernels();
    const int threads = num_threads();
    const std::unique_ptr<Workspace[]> work(new Workspace[static_cast<size_t>(threads)]);
    parallel_for(threads, row_groups(rows),
                 [&](int64_t index, int worker) { use.encode_row_group(job, index, work[worker]); });
}

void dequantize(const Array<const uint8_t, 2>& codes, const Array<const float, 2>& scales,
                const Array<const int8_t, 1>& tables, int bits, int group, const Array<float, 2>& out) {
    const int64_t rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1));
    require_bits(bits);
    require_group(group);
    require(cols % group == 0, std::to_string(cols) + " columns are not a multiple of the group " +
                                   std::to_string(group));
    require_shape("codes", codes, row_groups(rows), 2 * bits * cols);
    require_shape("scales", scales, rows, cols / group);
    require_length("tables", tables, 40);
    nb::gil_scoped_release release;
    const Windows windows(tables.data());
    const DecodeJob job{codes.data(), scales.data(), windows.values, out.data(), rows, cols, group, bits};
    const Kernels& use = kernels();
    parallel_for(num_threads(), row_groups(rows), [&](int64_t index, int) { use.decode_row_group(job, index); });
}

void set_threads(int count) {
    require(count >= 1 && count <= 4096, "the number of threads must be 1 to 4096, not " + std::to_string(count));
    set_num_threads(count);
}

}  // namespace
}  // namespace fewbit

NB_MODULE(_native, m) {
    using namespace fewbit;
    m.doc() = "Native kernels of fewbit; use them through fewbit.ops.extension.";
    m.def("isa", [] { return std::string(kernels().name); }, "Name of the instruction set in use.");
    m.def("available_isas", &available_isas, "Instruction sets of this build that this machine runs, plainest first.");
    m.def("emulated_isas", &emulated_isas, "Emulated instruction sets, slow and for tests: select_isa takes them, too.");
    m.def("select_isa", &select_isa, "name"_a, "Use that instruction set from now on; ValueError if it is not there.");
    m.def("num_threads", &num_threads, "Threads that a call uses: the cores this process may run on, unless set.");
    m.def("set_num_threads", &set_threads, "count"_a, "Set the number of threads of later calls.");
    m.def("trellis_encode_streams", &encode_streams, "x"_a.noconvert(), "levels"_a.noconvert(), "bits"_a,
          "symbols"_a.noconvert(),
          "Encode sequences x int16 [S, T] against levels int16 [4096] (by window) into symbols uint8 [S, T].");
    m.def("trellis_encode_group", &encode_group, "weight"_a.noconvert(), "scales"_a.noconvert(),
          "inverse"_a.noconvert(), "tables"_a.noconvert(), "bits"_a, "factor"_a.noconvert().none(),
          "codes"_a.noconvert(), "values"_a.noconvert(), "error"_a.noconvert().none(),
          "weighted"_a.noconvert().none(),
          "Encode one scale group weight float32 [N, G]; fills codes and values and, with a factor U, error "
          "(error U = weight - values) and weighted (weighted U = values).");
    m.def("trellis_dequantize", &dequantize, "codes"_a.noconvert(), "scales"_a.noconvert(), "tables"_a.noconvert(),
          "bits"_a, "group"_a, "out"_a.noconvert(), "Fill out float32 [N, K] with the weights that codes stand for.");
    bind_rotate(m);
    bind_rounding(m);
    bind_product(m);
    bind_memory(m);
    bind_gram(m);
    bind_sampling(m);
    bind_program(m);
}
