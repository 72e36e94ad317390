// Times ggml's products of one matrix on the CPU and prints one JSON object; peers.py builds and runs it.
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <strings.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int64_t kDistinctRows = 64;    // quantized once and repeated: the speed does not depend on the codes
constexpr double kTargetSeconds = 0.05;  // of one repeat
constexpr int kWarmCalls = 3;
constexpr double kTolerance = 0.05;      // of the result, 8-bit activations against exact ones

struct Job {
    ggml_type type;
    int64_t rows, cols, tokens;
    int threads, repeats;
    bool repack;  // interleave the rows of the weights as llama.cpp does when it loads them
};

struct Times {
    int calls;  // in each repeat
    std::vector<double> wall, cpu;
};

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "vec_dot: %s\n", what.c_str());
    std::exit(1);
}

ggml_type type_of(const char* name) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const char* known = ggml_type_name(static_cast<ggml_type>(type));
        if (known && strcasecmp(known, name) == 0) return static_cast<ggml_type>(type);
    }
    fail(std::string("ggml has no type ") + name);
}

std::vector<float> gaussian(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = normal(generator);
    return values;
}

// A buffer of this type rewrites the weights stored in it in the order of ggml's fastest kernels.
ggml_backend_buffer_type_t repacking_buffer_type() {
    ggml_backend_dev_t device = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts"));
    for (ggml_backend_buffer_type_t* type = extra ? extra(device) : nullptr; type && *type; ++type)
        if (std::strcmp(ggml_backend_buft_name(*type), "CPU_REPACK") == 0) return *type;
    fail("this build of ggml does not repack");
}

class Weights {
public:
    explicit Weights(const Job& job) : row_bytes_(ggml_row_size(job.type, job.cols)) {
        const size_t tensors = static_cast<size_t>(job.rows / kDistinctRows + 2);
        context_.reset(ggml_init({tensors * ggml_tensor_overhead(), nullptr, true}));
        tensor_ = ggml_new_tensor_2d(context_.get(), job.type, job.cols, job.rows);
        const auto kind = job.repack ? repacking_buffer_type() : ggml_backend_cpu_buffer_type();
        buffer_.reset(ggml_backend_buft_alloc_buffer(kind, ggml_nbytes(tensor_)));
        if (!buffer_) fail("no memory for the weights");
        char* base = static_cast<char*>(ggml_backend_buffer_get_base(buffer_.get()));
        ggml_backend_tensor_alloc(buffer_.get(), tensor_, base);
        if (job.repack && !tensor_->extra) fail("no repacked kernel for this type and shape");
        codes_.resize(row_bytes_ * kDistinctRows);
        const std::vector<float> values = gaussian(kDistinctRows * job.cols, 1);
        ggml_quantize_chunk(job.type, values.data(), codes_.data(), 0, kDistinctRows, job.cols, nullptr);
        // Repacking asks for a whole tensor, so every stretch of rows is a tensor of its own for as long as it is set.
        for (int64_t row = 0; row < job.rows; row += kDistinctRows) {
            const int64_t rows = std::min(kDistinctRows, job.rows - row);
            ggml_tensor* part = ggml_new_tensor_2d(context_.get(), job.type, job.cols, rows);
            ggml_backend_tensor_alloc(buffer_.get(), part, base + row * static_cast<int64_t>(row_bytes_));
            ggml_backend_tensor_set(part, codes_.data(), 0, row_bytes_ * static_cast<size_t>(rows));
        }
    }

    ggml_tensor* tensor() const { return tensor_; }
    const char* row(int64_t index) const { return static_cast<const char*>(tensor_->data) + index * row_bytes_; }

    // Root mean square of the error of `y`, the products with `x`, relative to exact products.
    double error(const float* x, const float* y) const {
        std::vector<float> weights(static_cast<size_t>(tensor_->ne[0]));
        double wrong = 0, whole = 0;
        for (int64_t row = 0; row < std::min(kDistinctRows, tensor_->ne[1]); ++row) {
            const uint8_t* codes = codes_.data() + row * static_cast<int64_t>(row_bytes_);
            ggml_get_type_traits(tensor_->type)->to_float(codes, weights.data(), tensor_->ne[0]);
            double exact = 0;
            for (int64_t k = 0; k < tensor_->ne[0]; ++k) exact += static_cast<double>(weights[k]) * x[k];
            wrong += (y[row] - exact) * (y[row] - exact);
            whole += exact * exact;
        }
        return std::sqrt(wrong / whole);
    }

private:
    size_t row_bytes_;
    ggml_context_ptr context_;
    ggml_backend_buffer_ptr buffer_;
    ggml_tensor* tensor_ = nullptr;
    std::vector<uint8_t> codes_;  // of the distinct rows, as quantized
};

double wall_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double cpu_seconds() {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

Times measure(int repeats, const std::function<void()>& work) {
    // The first call finds cold caches, and with two threads any call may wait for a thread to get its core.
    double fastest = kTargetSeconds;
    for (int warm = 0; warm < kWarmCalls; ++warm) {
        const double start = wall_seconds();
        work();
        fastest = std::min(fastest, wall_seconds() - start);
    }
    Times times{static_cast<int>(kTargetSeconds / fastest), {}, {}};
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const double start = wall_seconds(), used = cpu_seconds();
        for (int call = 0; call < times.calls; ++call) work();
        times.cpu.push_back(cpu_seconds() - used);
        times.wall.push_back(wall_seconds() - start);
    }
    return times;
}

void check(double error) {
    if (!(error < kTolerance)) fail("the product is wrong: relative error " + std::to_string(error));
}

// Row by row, with activations that are quantized already.
Times time_vec_dot(const Job& job, const Weights& weights) {
    if (job.tokens != 1 || job.threads != 1) fail("vec_dot takes one token and one thread");
    const ggml_type_traits_cpu* traits = ggml_get_type_traits_cpu(job.type);
    const std::vector<float> x = gaussian(job.cols, 2);
    std::vector<float> y(static_cast<size_t>(job.rows));
    std::vector<char> codes(ggml_row_size(traits->vec_dot_type, job.cols));
    ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(x.data(), codes.data(), job.cols);
    const int cols = static_cast<int>(job.cols);
    const Times times = measure(job.repeats, [&] {
        for (int64_t row = 0; row < job.rows; ++row)
            traits->vec_dot(cols, &y[static_cast<size_t>(row)], 0, weights.row(row), 0, codes.data(), 0, 1);
    });
    check(weights.error(x.data(), y.data()));
    return times;
}

// A graph of one product, which includes quantizing the activations.
Times time_mul_mat(const Job& job, const Weights& weights) {
    const size_t floats = static_cast<size_t>(job.tokens * (job.cols + job.rows));
    const size_t overhead = ggml_graph_overhead() + 8 * ggml_tensor_overhead();
    const ggml_context_ptr context(ggml_init({floats * sizeof(float) + overhead, nullptr, false}));
    ggml_tensor* inputs = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, job.cols, job.tokens);
    const std::vector<float> x = gaussian(job.cols * job.tokens, 2);
    std::copy(x.begin(), x.end(), static_cast<float*>(inputs->data));
    ggml_tensor* product = ggml_mul_mat(context.get(), weights.tensor(), inputs);
    ggml_cgraph* graph = ggml_new_graph(context.get());
    ggml_build_forward_expand(graph, product);

    ggml_threadpool_params params = ggml_threadpool_params_default(job.threads);
    ggml_threadpool* pool = ggml_threadpool_new(&params);
    ggml_cplan plan = ggml_graph_plan(graph, job.threads, pool);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();
    const Times times = measure(job.repeats, [&] {
        if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) fail("the graph did not run");
    });
    ggml_threadpool_free(pool);
    const float* y = static_cast<const float*>(product->data);
    check(weights.error(x.data() + (job.tokens - 1) * job.cols, y + (job.tokens - 1) * job.rows));
    return times;
}

void quiet(ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

std::string features() {
    const auto list = reinterpret_cast<ggml_backend_get_features_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_cpu_reg(), "ggml_backend_get_features"));
    std::string found;
    for (const ggml_backend_feature* one = list(ggml_backend_cpu_reg()); one->name; ++one)
        found += (found.empty() ? "\"" : ", \"") + std::string(one->name) + "\"";
    return found;
}

std::string json(const std::vector<double>& numbers) {
    std::string text;
    for (const double number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
    return "[" + text + "]";
}

std::string json(const Times& times) {
    return "{\"calls\": " + std::to_string(times.calls) + ", \"wall_seconds\": " + json(times.wall) +
           ", \"cpu_seconds\": " + json(times.cpu) + "}";
}

}  // namespace

int main(int count, char** words) {
    if (count < 8) fail("usage: vec_dot TYPE ROWS COLS TOKENS THREADS REPEATS vec_dot|mul_mat... or repacked");
    const auto number = [&](int index) { return std::max(1LL, std::atoll(words[index])); };
    const std::vector<std::string> paths(words + 7, words + count);
    const bool repack = paths == std::vector<std::string>{"repacked"};
    const Job job{type_of(words[1]), number(2), number(3), number(4), static_cast<int>(number(5)),
                  static_cast<int>(number(6)), repack};
    if (job.cols % ggml_blck_size(job.type)) fail("the columns are not a multiple of the type's block");
    ggml_log_set(quiet, nullptr);
    ggml_cpu_init();
    const Weights weights(job);
    std::string found;
    for (const std::string& path : paths) {
        if (!repack && path != "vec_dot" && path != "mul_mat") fail("no path " + path + " beside another");
        const Times times = path == "vec_dot" ? time_vec_dot(job, weights) : time_mul_mat(job, weights);
        found += (found.empty() ? "\"" : ", \"") + path + "\": " + json(times);
    }
    std::printf("{\"bytes\": %zu, \"features\": [%s], \"times\": {%s}}\n", ggml_nbytes(weights.tensor()),
                features().c_str(), found.c_str());
    return 0;
}
