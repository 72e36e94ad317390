// Runs the compiled AMX kernel on a machine without AMX: every tile instruction traps, and the handler computes what it
// would have done. Products must equal those of the portable kernel bit for bit. Where there is AMX nothing traps.
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "product.hpp"

namespace fewbit {
// The AMX unit takes what it does not replace from these.
const Kernels kAvx512Kernels{};
const ProductKernels kAvx512Product{};
}  // namespace fewbit

namespace {

using namespace fewbit;

struct Tile {
    int8_t bytes[16][64];
};

Tile tiles[8];
bool configured = false;
long trapped = 0;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "amx_traps: %s\n", what);
    std::_Exit(1);
}

// Palette 1, eight tiles of 16 rows x 64 bytes, the rest zero: the only configuration that the kernel may use.
void configure(const uint8_t* from) {
    uint8_t expected[64] = {1};
    for (int i = 0; i < 8; ++i) {
        expected[16 + 2 * i] = 64;
        expected[48 + i] = 16;
    }
    if (std::memcmp(from, expected, 64) != 0) fail("unexpected configuration");
    std::memset(tiles, 0, sizeof tiles);
    configured = true;
}

void multiply_tiles(Tile& sum, const Tile& a, const Tile& b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            uint32_t total;
            std::memcpy(&total, &sum.bytes[m][4 * n], 4);
            for (int k = 0; k < 16; ++k)
                for (int i = 0; i < 4; ++i)
                    total += static_cast<uint32_t>(a.bytes[m][4 * k + i] * b.bytes[k][4 * n + i]);
            std::memcpy(&sum.bytes[m][4 * n], &total, 4);
        }
}

// An instruction of VEX map 2: prefix (0 none, 1 66, 2 F3, 3 F2), opcode, operands.
struct Instruction {
    int prefix, opcode, mod, reg, rm, third, length;
    int8_t* address = nullptr;
    int64_t stride = 0;

    Instruction(const uint8_t* at, const greg_t* gregs) {
        static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        if (at[0] != 0xc4 || (at[1] & 31) != 2) fail("an instruction that is not AMX's");
        const int x = ~at[1] >> 6 & 1, b = ~at[1] >> 5 & 1;
        third = ~at[2] >> 3 & 15;
        prefix = at[2] & 3;
        opcode = at[3];
        mod = at[4] >> 6;
        reg = at[4] >> 3 & 7;
        rm = at[4] & 7;
        length = 5;
        if (mod == 3) return;
        int base = rm;
        if (rm == 4) {
            const int sib = at[length++], index = (sib >> 3 & 7) | x << 3;
            base = sib & 7;
            if (index != 4) stride = static_cast<int64_t>(gregs[order[index]]) << (sib >> 6);
        }
        int32_t offset = 0;
        if (mod == 0 && base == 5) fail("an address without a base register");
        if (mod == 1) offset = static_cast<int8_t>(at[length]);
        if (mod == 2) std::memcpy(&offset, at + length, 4);
        length += mod == 1 ? 1 : mod == 2 ? 4 : 0;
        address = reinterpret_cast<int8_t*>(gregs[order[base | b << 3]]) + offset;
    }

    bool is(int wanted_prefix, int wanted_opcode, bool memory) const {
        return prefix == wanted_prefix && opcode == wanted_opcode && (mod != 3) == memory;
    }
};

void handle(int, siginfo_t*, void* context) {
    greg_t* gregs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const Instruction op(reinterpret_cast<const uint8_t*>(gregs[REG_RIP]), gregs);
    if (op.is(0, 0x49, true)) {
        configure(reinterpret_cast<const uint8_t*>(op.address));
    } else if (!configured) {
        fail("tiles are used without a configuration");
    } else if (op.is(0, 0x49, false)) {
        configured = false;  // tilerelease
    } else if (op.is(3, 0x49, false)) {
        std::memset(&tiles[op.reg], 0, sizeof(Tile));
    } else if (op.is(3, 0x4b, true)) {
        for (int row = 0; row < 16; ++row) std::memcpy(tiles[op.reg].bytes[row], op.address + row * op.stride, 64);
    } else if (op.is(2, 0x4b, true)) {
        for (int row = 0; row < 16; ++row) std::memcpy(op.address + row * op.stride, tiles[op.reg].bytes[row], 64);
    } else if (op.is(3, 0x5e, false)) {
        multiply_tiles(tiles[op.reg], tiles[op.rm], tiles[op.third]);
    } else {
        fail("an instruction that the kernel does not need");
    }
    gregs[REG_RIP] += op.length;
    ++trapped;
}

uint32_t next_random() {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}

template <class T>
T* aligned(std::vector<uint8_t>& memory, size_t count) {
    memory.assign(count * sizeof(T) + 64, 0);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// The product of `job` with these kernels, everything set up as module_product.cpp does it.
std::vector<uint32_t> product(ProductJob job, const PanelKernels& use, int panels) {
    const int64_t groups = job.cols / job.group, blocks = (job.tokens + use.block - 1) / use.block;
    std::vector<uint8_t> packed, small, more;
    std::vector<uint16_t> scales(static_cast<size_t>(groups * kMaxPanel * kTileRows));
    std::vector<uint32_t> out(static_cast<size_t>(job.tokens * job.rows));
    job.packed = aligned<int8_t>(packed, static_cast<size_t>(blocks * use.block * (use.bytes * job.cols + 4 * groups)));
    job.panels = panels;
    job.out = out.data();
    ProductScratch& scratch = *aligned<ProductScratch>(small, 1);
    scratch.scales = scales.data();
    scratch.more = aligned<uint8_t>(more, use.scratch);
    for (int64_t block = 0; block < blocks; ++block) use.pack(job, block);
    const int64_t rows = use.panel * panels * kTileRows;
    for (int64_t unit = 0; unit < (job.rows + rows - 1) / rows; ++unit) use.multiply(job, unit, scratch);
    return out;
}

void compare(int64_t tokens, int64_t rows, int64_t cols, int group, int bits, Code code, int panels) {
    const int64_t groups = cols / group, row_groups = (rows + kTileRows - 1) / kTileRows;
    std::vector<int8_t> q(static_cast<size_t>(tokens * cols));
    std::vector<float> input_scale(static_cast<size_t>(tokens * groups)), bias(static_cast<size_t>(rows));
    std::vector<int32_t> sums(static_cast<size_t>(tokens * groups));
    std::vector<uint8_t> codes(static_cast<size_t>(row_groups * 2 * bits * cols));
    std::vector<uint16_t> scales(static_cast<size_t>(rows * groups));
    int8_t tables[40];
    for (int8_t& x : tables) x = static_cast<int8_t>(next_random() % 63 - 31);
    for (int8_t& x : q) x = static_cast<int8_t>(next_random() % 255 - 127);
    for (float& x : input_scale) x = 1.0f / static_cast<float>(next_random() % 1000 + 1);
    for (float& x : bias) x = static_cast<float>(next_random() % 1000) - 500.0f;
    for (uint8_t& x : codes) x = static_cast<uint8_t>(next_random());
    for (uint16_t& x : scales) x = static_cast<uint16_t>(next_random() % 0x3c00 | next_random() % 2 << 15);
    for (size_t i = 0; i < sums.size(); ++i)
        for (int k = 0; k < group; ++k) sums[i] += q[i * static_cast<size_t>(group) + static_cast<size_t>(k)];
    ProductJob job{};
    job.q = q.data();
    job.input_scale = input_scale.data();
    job.sums = sums.data();
    job.codes = codes.data();
    job.scales = scales.data();
    job.scale = 0.37f;
    job.tables = tables;
    job.bias = bias.data();
    job.tokens = tokens;
    job.rows = rows;
    job.cols = job.stride = cols;
    job.group = group;
    job.bits = bits;
    job.code = code;
    if (product(job, amx_kernels().product->panels, panels) == product(job, kPortableProduct.panels, 1)) return;
    std::fprintf(stderr, "amx_traps: %ld tokens, %ld rows, %ld columns in groups of %d, %d bits: results differ\n",
                 static_cast<long>(tokens), static_cast<long>(rows), static_cast<long>(cols), group, bits);
    std::_Exit(1);
}

}  // namespace

int main() {
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
    const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    int products = 0;
    for (const int group : {64, 128, 192, 256})
        for (const int64_t tokens : {9, 16, 31, 33, 64, 100})
            for (const int bits : {2, 3, 4, 0}) {
                const Code code = bits ? Code::trellis : Code::nibbles;
                compare(tokens, 17 + 8 * tokens % 100, 3 * group, group, bits ? bits : 4, code, 1 + products % 3);
                ++products;
            }
    compare(513, 65, 256, 256, 3, Code::trellis, 2);
    compare(70, 300, 2304, 256, 3, Code::trellis, 8);
    compare(40, 40, 2496, 192, 4, Code::nibbles, 8);
    const char* note = granted ? ", tiles granted" : "";
    std::printf("%d products equal, %ld instructions emulated%s\n", products + 3, trapped, note);
    return trapped == 0 && !granted;
}
