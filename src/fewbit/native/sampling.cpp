// Draws tokens from logits in a few passes over them: what lies outside top_k and top_p is found by counting tokens (and
// adding up probability) by their distance from the likeliest, so that no more than one bin of them is ever sorted.
#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "threads.hpp"

namespace fewbit {
namespace {

constexpr int kLanes = 16;        // independent sums and maxima, for vector registers of any width
constexpr int64_t kBlock = 256;   // tokens whose weights are added up together
constexpr int kBins = 2048;       // the last one takes everything farther away
constexpr float kBinsPerUnit = 64.0f;
constexpr int64_t kGrain = 1 << 18;

// Kept from call to call: a draw allocates nothing once its thread has seen the vocabulary.
struct Scratch {
    std::vector<float> weights, saved;
    std::vector<double> blocks;
    std::vector<int32_t> ids;
    int32_t count[kBins];
    double mass[kBins];
};

// exp(x) for x <= 0 to about 2e-7; 0 below -87.
inline float exp_negative(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest whole number
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000 + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

struct Best {
    float value;
    bool finite;
};

Best find_best(const float* x, int64_t count) {
    float lanes[kLanes];
    int32_t bad[kLanes] = {};
    for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
            const float value = x[i + lane];
            lanes[lane] = value > lanes[lane] ? value : lanes[lane];
            bad[lane] |= value != value;
        }
    for (; i < count; ++i) {
        lanes[0] = std::max(lanes[0], x[i]);
        bad[0] |= x[i] != x[i];
    }
    Best best{lanes[0], true};
    for (int lane = 0; lane < kLanes; ++lane) {
        best.value = std::max(best.value, lanes[lane]);
        best.finite = best.finite && !bad[lane];
    }
    best.finite = best.finite && std::isfinite(best.value);
    return best;
}

// One row while it is drawn: a token's distance is how far its logit lies below the best one.
class Row {
public:
    Row(const float* logits, int64_t vocabulary, float best, const SampleSettings& settings, Scratch& scratch)
        : logits_(logits), vocabulary_(vocabulary), best_(best), settings_(settings), scratch_(scratch),
          inverse_(static_cast<float>(1.0 / settings.temperature)),
          floor_(settings.min_p > 0 ? std::log(settings.min_p) : -std::numeric_limits<double>::infinity()) {}

    int32_t draw() {
        const bool k = settings_.top_k > 0 && settings_.top_k < static_cast<double>(vocabulary_);
        const bool p = settings_.top_p < 1;
        if (!k && !p && settings_.min_p == 0) return draw_from_all();
        if (k || p) {
            count_bins(p);
            if (k) cut_at_rank(static_cast<int64_t>(settings_.top_k));
            if (p) cut_at_mass();
        }
        return draw_from_kept();
    }

private:
    float weight(float logit) const { return exp_negative((logit - best_) * inverse_); }

    int bin(float logit) const {
        const float place = (best_ - logit) * scale_;
        return place < kBins - 1 ? static_cast<int>(place) : kBins - 1;
    }

    bool before(int32_t a, int32_t b) const {
        return logits_[a] > logits_[b] || (logits_[a] == logits_[b] && a < b);
    }

    bool kept(int32_t token) const { return last_ < 0 || !before(last_, token); }

    int32_t draw_from_all() {
        std::vector<float>& weights = scratch_.weights;
        std::vector<double>& blocks = scratch_.blocks;
        const int64_t count = (vocabulary_ + kBlock - 1) / kBlock;
        weights.resize(static_cast<size_t>(vocabulary_));
        blocks.resize(static_cast<size_t>(count));
        for (int64_t i = 0; i < vocabulary_; ++i) weights[i] = exp_negative((logits_[i] - best_) * inverse_);
        double total = 0;
        for (int64_t b = 0; b < count; ++b) total += blocks[b] = block_sum(b);
        double target = settings_.uniform * total;
        int64_t b = 0;
        for (; b + 1 < count && blocks[b] <= target; ++b) target -= blocks[b];
        // The loop's differences round: where they lead past the end, the last token with any weight is meant.
        int64_t found = -1;
        for (int64_t i = b * kBlock; i < std::min(vocabulary_, (b + 1) * kBlock); ++i) {
            if (weights[i] > 0) found = i;
            if (weights[i] > target) break;
            target -= weights[i];
        }
        while (found < 0) found = last_weight(--b);
        return static_cast<int32_t>(found);
    }

    double block_sum(int64_t block) const {
        const float* from = scratch_.weights.data() + block * kBlock;
        const int64_t count = std::min(kBlock, vocabulary_ - block * kBlock);
        double lanes[8] = {};
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            for (int lane = 0; lane < 8; ++lane) lanes[lane] += from[i + lane];
        for (; i < count; ++i) lanes[0] += from[i];
        double sum = 0;
        for (const double lane : lanes) sum += lane;
        return sum;
    }

    void count_bins(bool with_mass) {
        std::fill_n(scratch_.count, kBins, 0);
        scale_ = kBinsPerUnit / static_cast<float>(std::max(1.0, settings_.temperature));
        for (int64_t i = 0; i < vocabulary_; ++i) ++scratch_.count[bin(logits_[i])];
        if (!with_mass) return;
        std::fill_n(scratch_.mass, kBins, 0.0);
        scratch_.weights.resize(static_cast<size_t>(vocabulary_));
        for (int64_t i = 0; i < vocabulary_; ++i) scratch_.weights[i] = weight(logits_[i]);
        for (int64_t i = 0; i < vocabulary_; ++i) scratch_.mass[bin(logits_[i])] += scratch_.weights[i];
    }

    // Tokens of one bin that are kept so far.
    std::vector<int32_t>& gather(int wanted) {
        scratch_.ids.clear();
        for (int32_t i = 0; i < vocabulary_; ++i)
            if (bin(logits_[i]) == wanted && kept(i)) scratch_.ids.push_back(i);
        return scratch_.ids;
    }

    void cut_at_rank(int64_t rank) {
        int b = 0;
        for (; scratch_.count[b] < rank; ++b) rank -= scratch_.count[b];
        std::vector<int32_t>& ids = gather(b);
        std::nth_element(ids.begin(), ids.begin() + (rank - 1), ids.end(),
                         [this](int32_t x, int32_t y) { return before(x, y); });
        last_ = ids[static_cast<size_t>(rank - 1)];
        last_bin_ = b;
        if (settings_.top_p < 1) {
            double mass = 0;
            for (int64_t i = 0; i < rank; ++i) mass += scratch_.weights[ids[i]];
            scratch_.mass[b] = mass;
        }
    }

    void cut_at_mass() {
        double total = 0;
        for (int b = 0; b <= last_bin_; ++b) total += scratch_.mass[b];
        double target = settings_.top_p * total;
        int b = 0;
        for (; b < last_bin_ && scratch_.mass[b] < target; ++b) target -= scratch_.mass[b];
        while (b > 0 && scratch_.count[b] == 0) --b;
        std::vector<int32_t>& ids = gather(b);
        std::sort(ids.begin(), ids.end(), [this](int32_t x, int32_t y) { return before(x, y); });
        for (const int32_t token : ids) {
            last_ = token;
            target -= scratch_.weights[token];
            if (target <= 0) break;
        }
    }

    int32_t draw_from_kept() {
        std::vector<int32_t>& ids = scratch_.ids;
        std::vector<float>& weights = scratch_.weights;
        ids.clear();
        weights.clear();
        double total = 0;
        for (int32_t i = 0; i < vocabulary_; ++i) {
            if (!kept(i)) continue;
            const double exponent = (static_cast<double>(logits_[i]) - best_) / settings_.temperature;
            if (exponent < floor_) continue;
            ids.push_back(i);
            weights.push_back(weight(logits_[i]));
            total += weights.back();
        }
        const double target = settings_.uniform * total;
        double sum = 0;
        for (size_t i = 0; i + 1 < ids.size(); ++i)
            if ((sum += weights[i]) > target) return ids[i];
        return ids.back();
    }

    int64_t last_weight(int64_t block) const {
        int64_t i = std::min(vocabulary_, (block + 1) * kBlock) - 1;
        while (i > block * kBlock && scratch_.weights[i] == 0) --i;
        return scratch_.weights[i] > 0 ? i : -1;
    }

    const float* logits_;
    const int64_t vocabulary_;
    const float best_;
    const SampleSettings& settings_;
    Scratch& scratch_;
    const float inverse_;
    const double floor_;
    float scale_ = 0;
    int32_t last_ = -1;  // the least likely token that is kept; -1: all are
    int last_bin_ = kBins - 1;
};

int32_t sample_row(float* logits, int64_t vocabulary, const SampleSettings& settings, const int32_t* seen,
                   int64_t seen_count, Scratch& scratch) {
    const bool penalized = settings.penalty != 1;
    if (penalized) {
        const float penalty = static_cast<float>(settings.penalty);
        scratch.saved.resize(static_cast<size_t>(seen_count));
        for (int64_t i = 0; i < seen_count; ++i) {
            float& logit = logits[seen[i]];
            scratch.saved[i] = logit;
            logit = logit > 0 ? logit / penalty : logit * penalty;
        }
    }
    const Best best = find_best(logits, vocabulary);
    int32_t token = -1;
    if (best.finite && settings.temperature > 0)
        token = Row(logits, vocabulary, best.value, settings, scratch).draw();
    else if (best.finite)
        token = static_cast<int32_t>(std::find(logits, logits + vocabulary, best.value) - logits);
    if (penalized)
        for (int64_t i = 0; i < seen_count; ++i) logits[seen[i]] = scratch.saved[i];
    return token;
}

}  // namespace

void sample(const SampleJob& job) {
    parallel_for(threads_for(job.rows * job.vocabulary, kGrain), job.rows, [&](int64_t row, int) {
        thread_local Scratch scratch;
        const int64_t start = row ? job.ends[row - 1] : 0;
        job.tokens[row] = sample_row(job.logits + row * job.vocabulary, job.vocabulary, job.settings[row],
                                     job.seen + start, job.ends[row] - start, scratch);
    });
}

}  // namespace fewbit
