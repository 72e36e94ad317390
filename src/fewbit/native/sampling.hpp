// Draws tokens from logits; fewbit/runtime/sampling.py holds the specification.
#pragma once

#include <cstdint>

namespace fewbit {

// As rows of SamplingParams.row: top_k is a whole number.
struct SampleSettings {
    double temperature, top_k, top_p, min_p, penalty, uniform;
};

// Rows of logits [rows, vocabulary]; those of seen tokens are changed while a row is drawn, and put back. `ends` are the
// ends of each row's run in `seen`. A row whose logits are not finite gets token -1.
struct SampleJob {
    float* logits;
    const SampleSettings* settings;
    const int32_t* seen;
    const int64_t* ends;
    int32_t* tokens;
    int64_t rows, vocabulary;
    int threads;  // 0: as many as usual
};

void sample(const SampleJob& job);

}  // namespace fewbit
