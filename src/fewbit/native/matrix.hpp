// A packed matrix as Python gives it: its parts, checked once and kept alive.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "arguments.hpp"
#include "product.hpp"

namespace fewbit {

// Every sum of one entry of each table fits into a byte exactly if the extremes do.
inline void require_tables(const Array<const int8_t, 1>& tables) {
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

inline Code code_of(const std::string& name) {
    if (name == "lanes") return Code::lanes;
    if (name == "nibbles") return Code::nibbles;
    require(name == "trellis", "the code must be trellis, lanes or nibbles, not " + name);
    return Code::trellis;
}

constexpr int64_t kMostCols = int64_t{1} << 31;

class Matrix {
public:
    Matrix(Array<const uint8_t, 2> codes, Array<const uint16_t, 2> scales, float scale,
           std::optional<Array<const int8_t, 1>> tables, std::optional<Array<const float, 1>> bias, int64_t cols,
           int bits, const std::string& code)
        : codes_(std::move(codes)), scales_(std::move(scales)), tables_(std::move(tables)), bias_(std::move(bias)) {
        require_bits(bits);
        // Beyond, sizes of codes would overflow.
        require(cols > 0 && cols <= kMostCols, "a matrix has from 1 to " + std::to_string(kMostCols) + " columns");
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

}  // namespace fewbit
