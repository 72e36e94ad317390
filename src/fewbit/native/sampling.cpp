// Draws tokens from logits in a few passes over them. Where settings leave tokens out, those near the likeliest one are
// picked first, and nearly always nothing else is looked at again; the border of top_p is found by adding up probability
// by distance from the likeliest, so that no more than one bin of tokens is ever sorted.
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
constexpr int64_t kGrain = 1 << 18;  // logits that are worth waking threads for
constexpr float kReaches[] = {6.0f, 14.0f, std::numeric_limits<float>::infinity()};  // in units of the exponent

// Kept from call to call: a draw allocates nothing once its thread has seen the vocabulary.
struct Scratch {
    std::vector<float> weights, saved;
    std::vector<double> blocks;
    std::vector<int32_t> picked, pool, order;
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
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000u + 127u) << 23;
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

// One row while it is drawn. Tokens stand in the order of likelihood, of equal ones the lower id first.
class Row {
public:
    Row(const float* logits, int64_t vocabulary, float best, const SampleSettings& settings, Scratch& scratch)
        : logits_(logits), vocabulary_(vocabulary), best_(best), settings_(settings), scratch_(scratch),
          inverse_(static_cast<float>(1.0 / settings.temperature)),
          floor_(settings.min_p > 0 ? std::log(settings.min_p) : -std::numeric_limits<double>::infinity()) {}

    int32_t draw() {
        const bool ranked = settings_.top_k > 0 && settings_.top_k < static_cast<double>(vocabulary_);
        const bool massed = settings_.top_p < 1;
        if (!ranked && !massed && settings_.min_p == 0) return draw_from_all();
        const size_t rank = ranked ? static_cast<size_t>(settings_.top_k) : 0;
        double target = massed && !ranked ? settings_.top_p * weigh_all() : 0;
        collect(rank, target);
        if (ranked) keep_rank(rank);
        if (massed) {
            if (ranked) target = settings_.top_p * pool_mass();
            keep_mass(target);
        }
        return draw_from_pool();
    }

private:
    float weight(float logit) const { return exp_negative((logit - best_) * inverse_); }

    bool before(int32_t a, int32_t b) const {
        return logits_[a] > logits_[b] || (logits_[a] == logits_[b] && a < b);
    }

    // The weights of all tokens, added up in blocks; returns the whole sum.
    double weigh_all() {
        std::vector<float>& weights = scratch_.weights;
        std::vector<double>& blocks = scratch_.blocks;
        weights.resize(static_cast<size_t>(vocabulary_));
        blocks.resize(static_cast<size_t>((vocabulary_ + kBlock - 1) / kBlock));
        for (int64_t i = 0; i < vocabulary_; ++i) weights[i] = exp_negative((logits_[i] - best_) * inverse_);
        double total = 0;
        for (size_t b = 0; b < blocks.size(); ++b) total += blocks[b] = block_sum(static_cast<int64_t>(b));
        return total;
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

    int32_t draw_from_all() {
        double target = settings_.uniform * weigh_all();
        const std::vector<float>& weights = scratch_.weights;
        const std::vector<double>& blocks = scratch_.blocks;
        int64_t b = 0;
        for (; b + 1 < static_cast<int64_t>(blocks.size()) && blocks[b] <= target; ++b) target -= blocks[b];
        // The differences round: where they lead past the end, the last token with any weight is meant.
        int64_t found = -1;
        for (int64_t i = b * kBlock; i < std::min(vocabulary_, (b + 1) * kBlock); ++i) {
            if (weights[i] > 0) found = i;
            if (weights[i] > target) break;
            target -= weights[i];
        }
        for (int64_t i = b * kBlock; found < 0; --i)
            if (weights[i] > 0) found = i;
        return static_cast<int32_t>(found);
    }

    // The pool: all tokens within a distance that surely holds `rank` tokens, or the weight `mass`, or all above min_p.
    void collect(size_t rank, double mass) {
        // A low temperature makes all tokens but a few unlikely, and ranks them as before.
        const float unit = static_cast<float>(rank ? std::max(1.0, settings_.temperature) : settings_.temperature);
        for (const float reach : kReaches) {
            pick(best_ - reach * unit);
            if (rank ? scratch_.pool.size() >= rank : mass > 0 ? pool_mass() >= mass : floor_ > -reach) return;
        }
    }

    void pick(float low) {
        std::vector<int32_t>& picked = scratch_.picked;
        picked.resize(static_cast<size_t>(vocabulary_) + 1);
        size_t count = 0;
        for (int32_t i = 0; i < vocabulary_; ++i) {
            picked[count] = i;
            count += logits_[i] >= low;
        }
        scratch_.pool.assign(picked.begin(), picked.begin() + static_cast<int64_t>(count));
    }

    double pool_mass() const {
        double sum = 0;
        for (const int32_t token : scratch_.pool) sum += weight(logits_[token]);
        return sum;
    }

    void keep_until(int32_t last) {
        std::vector<int32_t>& pool = scratch_.pool;
        pool.erase(std::remove_if(pool.begin(), pool.end(), [&](int32_t token) { return before(last, token); }), pool.end());
    }

    void keep_rank(size_t rank) {
        if (rank >= scratch_.pool.size()) return;
        std::vector<int32_t>& order = scratch_.order;
        order = scratch_.pool;
        std::nth_element(order.begin(), order.begin() + (rank - 1), order.end(),
                         [this](int32_t a, int32_t b) { return before(a, b); });
        keep_until(order[rank - 1]);
    }

    int bin(float logit) const {
        const float place = (best_ - logit) * inverse_ * kBinsPerUnit;
        return place < kBins - 1 ? static_cast<int>(place) : kBins - 1;
    }

    void keep_mass(double target) {
        std::fill_n(scratch_.mass, kBins, 0.0);
        int last_bin = 0;
        for (const int32_t token : scratch_.pool) {
            const int b = bin(logits_[token]);
            scratch_.mass[b] += weight(logits_[token]);
            last_bin = std::max(last_bin, b);
        }
        int border = 0;
        for (; border < last_bin && scratch_.mass[border] < target; ++border) target -= scratch_.mass[border];
        std::vector<int32_t>& order = scratch_.order;
        order.clear();
        for (const int32_t token : scratch_.pool)
            if (bin(logits_[token]) == border) order.push_back(token);
        if (order.empty()) return;  // rounding led past the last token
        std::sort(order.begin(), order.end(), [this](int32_t a, int32_t b) { return before(a, b); });
        size_t last = 0;
        for (; last + 1 < order.size(); ++last)
            if ((target -= weight(logits_[order[last]])) <= 0) break;
        keep_until(order[last]);
    }

    int32_t draw_from_pool() {
        std::vector<int32_t>& pool = scratch_.pool;
        const auto below = [this](int32_t token) {
            return (static_cast<double>(logits_[token]) - best_) / settings_.temperature < floor_;
        };
        if (settings_.min_p > 0) pool.erase(std::remove_if(pool.begin(), pool.end(), below), pool.end());
        const double target = settings_.uniform * pool_mass();
        double sum = 0;
        int32_t found = pool.front();
        for (const int32_t token : pool) {
            const float own = weight(logits_[token]);
            if (own > 0) found = token;
            if ((sum += own) > target) break;
        }
        return found;
    }

    const float* logits_;
    const int64_t vocabulary_;
    const float best_;
    const SampleSettings& settings_;
    Scratch& scratch_;
    const float inverse_;
    const double floor_;
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
    const int all = job.threads ? job.threads : num_threads();
    parallel_for(job.rows * job.vocabulary < kGrain ? 1 : all, job.rows, [&](int64_t row, int) {
        thread_local Scratch scratch;
        const int64_t start = row ? job.ends[row - 1] : 0;
        job.tokens[row] = sample_row(job.logits + row * job.vocabulary, job.vocabulary, job.settings[row],
                                     job.seen + start, job.ends[row] - start, scratch);
    });
}

}  // namespace fewbit
