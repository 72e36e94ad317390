// Quantizes rows with ggml and decodes its blocks again; quantizers.py builds this as a library and loads it.
#include <ggml.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kRowsAtOnce = 16;

// ggml ends the process where it is asked for what it cannot do.
bool possible(int type, int64_t cols, const float* importance) {
    if (type < 0 || type >= GGML_TYPE_COUNT) return false;
    const auto kind = static_cast<ggml_type>(type);
    if (ggml_blck_size(kind) == 0 || cols % ggml_blck_size(kind) || !ggml_get_type_traits(kind)->to_float) return false;
    return importance || !ggml_quantize_requires_imatrix(kind);
}

}  // namespace

// `rows` and `decoded` are [count, cols], `importance` is [cols] or null, `blocks` has room for all that ggml writes.
// Returns the bytes of the blocks, or 0 where the type is unknown or does not fit, or ggml finds its blocks damaged.
extern "C" size_t quantize_rows(int type, const float* rows, int64_t count, int64_t cols, const float* importance,
                                int threads, char* blocks, float* decoded) {
    if (!possible(type, cols, importance)) return 0;
    const auto kind = static_cast<ggml_type>(type);
    const size_t row_bytes = ggml_row_size(kind, cols);
    ggml_quantize_init(kind);
    std::atomic<int64_t> next{0};
    std::atomic<bool> valid{true};
    const auto work = [&] {
        for (int64_t row; (row = next.fetch_add(kRowsAtOnce)) < count;) {
            const int64_t some = std::min(kRowsAtOnce, count - row);
            char* out = blocks + static_cast<size_t>(row) * row_bytes;
            const size_t bytes = ggml_quantize_chunk(kind, rows + row * cols, out, 0, some, cols, importance);
            if (!ggml_validate_row_data(kind, out, bytes)) valid = false;
            ggml_get_type_traits(kind)->to_float(out, decoded + row * cols, some * cols);
        }
    };
    std::vector<std::thread> helpers;
    for (int helper = 1; helper < threads; ++helper) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
    return valid ? static_cast<size_t>(count) * row_bytes : 0;
}
