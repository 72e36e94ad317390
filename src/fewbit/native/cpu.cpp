// Which instruction sets this build has and this machine can run.
#include "cpu.hpp"

#include <atomic>
#include <stdexcept>

#if defined(FEWBIT_HAVE_AVX2) || defined(FEWBIT_HAVE_AVX512)
#include <cpuid.h>
#endif

namespace fewbit {
namespace {

#if defined(FEWBIT_HAVE_AVX2) || defined(FEWBIT_HAVE_AVX512)
// The register states that the operating system saves (XCR0), 0 where it saves none.
uint64_t saved_states() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

struct Features {
    unsigned ebx = 0, ecx = 0;
    bool half_floats, vnni;                       // vnni: on 256 bits without AVX-512
    uint64_t states = saved_states();

    Features() {
        unsigned a, b, c, d;
        half_floats = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
        if (!__get_cpuid_count(7, 0, &a, &ebx, &ecx, &d)) ebx = ecx = 0;
        vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
    }

    bool has(unsigned in_ebx, unsigned in_ecx, uint64_t in_states) const {
        return (ebx & in_ebx) == in_ebx && (ecx & in_ecx) == in_ecx && (states & in_states) == in_states;
    }
};
#endif

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found{&kPortableKernels};
#if defined(FEWBIT_HAVE_AVX2) || defined(FEWBIT_HAVE_AVX512)
    const Features cpu;
    constexpr uint64_t ymm = 0x6, zmm = 0xe6;
#endif
#ifdef FEWBIT_HAVE_AVX2
    if (cpu.has(bit_AVX2, 0, ymm) && cpu.half_floats) found.push_back(&kAvx2Kernels);
#endif
#ifdef FEWBIT_HAVE_AVXVNNI
    if (cpu.has(bit_AVX2, 0, ymm) && cpu.half_floats && cpu.vnni) found.push_back(&kAvxVnniKernels);
#endif
#ifdef FEWBIT_HAVE_AVX512
    constexpr unsigned in_ebx = bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    if (cpu.has(in_ebx, bit_AVX512VBMI | bit_AVX512VNNI, zmm)) found.push_back(&kAvx512Kernels);
#endif
    return found;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : usable()) names.emplace_back(kernels->name);
    return names;
}

const Kernels& kernels() {
    const Kernels* current = selected.load();
    if (!current) selected.store(current = usable().back());
    return *current;
}

void select_isa(const std::string& name) {
    std::string known;
    for (const Kernels* candidate : usable()) {
        if (name == candidate->name) return selected.store(candidate);
        known += (known.empty() ? "" : ", ") + std::string(candidate->name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available here; this machine and build have " +
                                known);
}

}  // namespace fewbit
