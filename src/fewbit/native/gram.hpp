// Sums of products of inputs with themselves, X'X, from bfloat16 factors with float32 sums: what Hessians are made of.
//
// For processors with the AVX-512 instructions for bfloat16: they multiply twice as fast with it as with float32.
#pragma once

#include <cstdint>

namespace fewbit {

// sums += X'X on and above the diagonal, and in the squares of kGramPanel that it cuts; what lies below them stays.
struct GramJob {
    const float* x;                               // [tokens, cols]
    float* sums;                                  // [cols, cols]
    int64_t tokens, cols;
};

constexpr int kGramPanel = 32;                    // columns that are packed side by side

// Whether this build has the kernel and this machine can run it.
bool has_gram();

// Rounds x to bfloat16, to nearest even, and adds its products with all threads; the result does not depend on how
// many there are. Throws std::bad_alloc where there is no memory for the rounded copy.
void add_gram(const GramJob& job);

}  // namespace fewbit
