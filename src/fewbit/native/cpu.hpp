// Which instruction sets this build has and this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fewbit {

// Names, plainest first; the last one is the default.
std::vector<std::string> available_isas();

// Names of emulated ones, for tests of code that this machine cannot run; never the default.
std::vector<std::string> emulated_isas();

// The kernels in use.
const Kernels& kernels();

// Whether this machine has AVX-512's products of bfloat16, whatever kernels are in use.
bool has_avx512_bf16();

// Use the kernels of that name from now on; throws std::invalid_argument if this machine or build lacks them.
void select_isa(const std::string& name);

}  // namespace fewbit
