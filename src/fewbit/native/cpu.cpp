// Which instruction sets this build has and this machine can run.
#include "cpu.hpp"

#include <atomic>
#include <stdexcept>

#include "floats.hpp"

#if defined(FEWBIT_HAVE_AVX2) || defined(FEWBIT_HAVE_AVX512)
#include <cpuid.h>
#endif
#if defined(FEWBIT_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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
    unsigned ebx = 0, ecx = 0, edx = 0;
    bool half_floats, vnni, bf16;                 // half_floats: and fused multiply-add; vnni: on 256 bits
    uint64_t states = saved_states();

    Features() {
        unsigned a, b, c, d;
        half_floats = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && (c & bit_FMA);
        if (!__get_cpuid_count(7, 0, &a, &ebx, &ecx, &edx)) ebx = ecx = edx = 0;
        if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) a = 0;
        vnni = a & 1 << 4;
        bf16 = a & 1 << 5;
#ifdef FEWBIT_EMULATED                            // a build for tests: but for tiles, AVX2 is all it needs
        ebx = ecx = ~0u;
        states = ~uint64_t{0};
        vnni = bf16 = true;
#endif
    }

    bool has(unsigned in_ebx, unsigned in_ecx, uint64_t in_states) const {
        return (ebx & in_ebx) == in_ebx && (ecx & in_ecx) == in_ecx && (states & in_states) == in_states;
    }
};
#endif

#ifdef FEWBIT_HAVE_AMX
// Linux gives a process tiles when it asks for them, which is for good and covers all its threads.
bool has_amx(const Features& cpu) {
#ifdef __linux__
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
    constexpr uint64_t tile_states = uint64_t{3} << 17;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    if ((cpu.edx & (tile | int8)) != (tile | int8) || (cpu.states & tile_states) != tile_states) return false;
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    static_cast<void>(cpu);
    return false;
#endif
}
#endif

std::vector<const Kernels*> find_usable() {
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
    const bool avx512 = cpu.has(in_ebx, bit_AVX512VBMI | bit_AVX512VNNI, zmm);
    if (avx512) found.push_back(&kAvx512Kernels);
#endif
#ifdef FEWBIT_HAVE_AMX
    if (avx512 && has_amx(cpu)) found.push_back(&amx_kernels());
#endif
    return found;
}

const std::vector<const Kernels*>& usable() {
    static const std::vector<const Kernels*> found = find_usable();
    return found;
}

// Kernels that compute what others do with instructions that this machine may lack, slowly.
std::vector<const Kernels*> emulated() {
    std::vector<const Kernels*> found;
#ifdef FEWBIT_HAVE_AMX
    for (const Kernels* candidate : usable())
        if (candidate == &kAvx512Kernels) found.push_back(&emulated_amx_kernels());
#endif
    return found;
}

std::vector<std::string> names_of(const std::vector<const Kernels*>& all) {
    std::vector<std::string> names;
    for (const Kernels* kernels : all) names.emplace_back(kernels->name);
    return names;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

std::vector<std::string> available_isas() { return names_of(usable()); }

std::vector<std::string> emulated_isas() { return names_of(emulated()); }

const Kernels& kernels() {
    const Kernels* current = selected.load();
    if (!current) selected.store(current = usable().back());
    return *current;
}

const FloatKernels& float_kernels() {
    const Kernels* use = &kernels();
    if (use == &kPortableKernels) return kPortableFloats;
#ifdef FEWBIT_HAVE_AVX2
    if (use == &kAvx2Kernels) return kAvx2Floats;
#endif
#ifdef FEWBIT_HAVE_AVXVNNI
    if (use == &kAvxVnniKernels) return kAvx2Floats;
#endif
#ifdef FEWBIT_HAVE_AVX512
    return kAvx512Floats;
#else
    return kPortableFloats;
#endif
}

bool has_avx512_bf16() {
#ifdef FEWBIT_HAVE_BF16
    const Features cpu;
    return cpu.bf16 && cpu.has(bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ, 0, 0xe6);
#else
    return false;
#endif
}

void select_isa(const std::string& name) {
    std::string known;
    for (const Kernels* candidate : usable()) {
        if (name == candidate->name) return selected.store(candidate);
        known += (known.empty() ? "" : ", ") + std::string(candidate->name);
    }
    for (const Kernels* candidate : emulated())
        if (name == candidate->name) return selected.store(candidate);
    throw std::invalid_argument("instruction set '" + name + "' is not available here; this machine and build have " +
                                known);
}

}  // namespace fewbit
