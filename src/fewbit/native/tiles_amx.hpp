// The tile registers of AMX, eight of 16 rows x 64 bytes, and the five operations that a product needs: once as the
// instructions, once as plain C++ that computes the same.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.

constexpr int kTileBytes = 1024;

// The instructions are written in assembly because the compilers' intrinsics do not say which memory they read and
// write: GCC 12 drops stores to a configuration, and may move stores to a tile behind its load. A thread holds its
// tiles while an object lives: releasing them spares the system from saving 8 KB at every switch of threads.
class HardwareTiles {
public:
    HardwareTiles() {
        const Configuration all;
        __asm__ volatile("ldtilecfg %0" ::"m"(all));
    }

    ~HardwareTiles() { __asm__ volatile("tilerelease"); }

    HardwareTiles(const HardwareTiles&) = delete;
    HardwareTiles& operator=(const HardwareTiles&) = delete;

    template <int N>
    void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(N));
    }

    // A tile of 16 x 64 bytes in one piece.
    template <int N>
    void load(const int8_t* from) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{64}), "i"(N),
                         "m"(*reinterpret_cast<const Bytes*>(from)));
    }

    // Sum[t][r] += the products of row t of Inputs with the four bytes of r in every row of Weights.
    template <int Sum, int Inputs, int Weights>
    void multiply() {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Inputs), "i"(Weights));
    }

    // Sixteen rows of 16 sums, `Stride` sums apart.
    template <int N, int Stride>
    void store(int32_t* to) {
        __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)"
                         : "=m"(*reinterpret_cast<Sums<Stride>*>(to))
                         : "r"(to), "r"(int64_t{4 * Stride}), "i"(N));
    }

private:
    using Bytes = int8_t[kTileBytes];

    template <int Stride>
    using Sums = int32_t[15 * Stride + 16];

    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Configuration) == 64, "the instruction reads 64 bytes");
};

// For tests on machines without AMX.
class EmulatedTiles {
public:
    template <int N>
    void zero() {
        __builtin_memset(tiles_[N], 0, kTileBytes);
    }

    template <int N>
    void load(const int8_t* from) {
        __builtin_memcpy(tiles_[N], from, kTileBytes);
    }

    template <int Sum, int Inputs, int Weights>
    void multiply() {
        for (int t = 0; t < 16; ++t)
            for (int k = 0; k < 16; ++k)
                for (int r = 0; r < 16; ++r) {
                    int32_t four = 0;
                    for (int i = 0; i < 4; ++i) four += byte(Inputs, t, 4 * k + i) * byte(Weights, k, 4 * r + i);
                    tiles_[Sum][t * 16 + r] += static_cast<uint32_t>(four);
                }
    }

    template <int N, int Stride>
    void store(int32_t* to) {
        for (int row = 0; row < 16; ++row) __builtin_memcpy(to + row * Stride, tiles_[N] + row * 16, 64);
    }

private:
    int byte(int tile, int row, int column) const {
        return reinterpret_cast<const int8_t*>(tiles_[tile])[64 * row + column];
    }

    alignas(64) uint32_t tiles_[8][kTileBytes / 4];
};
