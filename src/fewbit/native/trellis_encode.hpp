// Viterbi search and error feedback, written once over a small vector type that each unit provides.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.
//
// A state holds the last 12 bits with the newest symbol lowest, s = (previous << k | symbol) & 4095; its
// context is what the next symbol keeps of it, the low 12 - k bits. Costs are unsigned 16-bit numbers with
// saturating addition, so every unit and the torch reference take exactly the same decisions:
//
//   d[s]     = (diff * diff + 2^14) >> 15,  diff = saturate16(x - levels[s])
//   best'[p] = min over h of best[h Q + (p >> k)] + d[h P + p],   P = 4096 >> k contexts, Q = P >> k
//
// Ties go to the lowest h, and where a path ends to the lowest context. After every fourth step the
// minimum is subtracted; 65535 means unreachable and stays. The costs of all steps are kept and the way
// back searches the few predecessors again: cheaper than recording 4096 decisions per step.

constexpr uint16_t kUnreachable = 65535;
constexpr uint16_t kNoContext = 65535;

inline uint32_t step_cost(uint16_t before, int16_t x, int16_t level) {
    int diff = static_cast<int>(x) - level;
    diff = diff > 32767 ? 32767 : diff < -32768 ? -32768 : diff;
    const uint32_t cost = before + static_cast<uint32_t>((diff * diff + (1 << 14)) >> 15);
    return cost > kUnreachable ? kUnreachable : cost;
}

template <class V, int K>
inline void viterbi_step(const uint16_t* from, uint16_t* to, const int16_t* levels, int16_t x) {
    constexpr int P = kStates >> K, Q = P >> K, H = 1 << K;
    const auto value = V::broadcast(x);
    for (int p = 0; p < P; p += V::lanes) {
        const uint16_t* source = from + (p >> K);
        auto best = V::add(V::template expand<K>(source), V::distance(value, levels + p));
#pragma GCC unroll 16
        for (int h = 1; h < H; ++h) {
            const auto cost = V::add(V::template expand<K>(source + h * Q), V::distance(value, levels + h * P + p));
            best = V::min(best, cost);
        }
        V::store(to + p, best);
    }
}

// The search over one tile and, where another tile follows, its first kLook weights: without them the tile
// would end in whatever context suits it best and the next one would pay for that (8 % more error at 3 bits).
template <class V, int K>
struct Search {
    static constexpr int P = kStates >> K, Q = P >> K, H = 1 << K;

    static void start(Workspace& work, uint32_t state) {
        for (int p = 0; p < P; ++p) work.history[p] = kUnreachable;
        work.history[state & (P - 1)] = 0;
        for (int t = 0; t < kTile + kLook; ++t) work.path[t] = kNoContext;
    }

    static void advance(const int16_t* levels, int begin, int end, Workspace& work) {
        for (int t = begin; t < end; ++t) {
            uint16_t* to = work.history + (t + 1) * P;
            viterbi_step<V, K>(to - P, to, levels, work.x[t]);
            if ((t & 3) == 3) V::template subtract_minimum<P>(to);
        }
    }

    // Symbols of the cheapest path to step `end`; stops where it meets the path that was traced before.
    static void trace(const int16_t* levels, int end, Workspace& work) {
        const uint16_t* last = work.history + end * P;
        uint32_t p = 0;
        for (int q = 1; q < P; ++q) p = last[q] < last[p] ? q : p;
        for (int t = end - 1; t >= 0 && work.path[t] != p; --t) {
            const uint16_t* from = work.history + t * P;
            uint32_t choice = 0, best = ~0u;
            for (int h = 0; h < H; ++h) {
                const uint32_t cost = step_cost(from[h * Q + (p >> K)], work.x[t], levels[h * P + p]);
                choice = cost < best ? h : choice;
                best = cost < best ? cost : best;
            }
            work.path[t] = static_cast<uint16_t>(p);
            work.symbols[t] = static_cast<uint8_t>(p & (H - 1));
            p = choice * Q + (p >> K);
        }
    }
};

template <class V, int K>
void encode_stream_bits(const StreamJob& job, int64_t index, Workspace& work) {
    const int16_t* x = job.x + index * job.steps;
    uint8_t* symbols = job.symbols + index * job.steps;
    uint32_t state = 0;
    for (int64_t first = 0; first < job.steps; first += kTile) {
        const int steps = first + kTile < job.steps ? kTile + kLook : kTile;
        for (int t = 0; t < steps; ++t) work.x[t] = x[first + t];
        Search<V, K>::start(work, state);
        Search<V, K>::advance(job.levels, 0, steps, work);
        Search<V, K>::trace(job.levels, steps, work);
        for (int t = 0; t < kTile; ++t) {
            symbols[first + t] = work.symbols[t];
            state = (state << K | work.symbols[t]) & (kStates - 1);
        }
    }
}

template <class V>
void encode_stream(const StreamJob& job, int64_t index, Workspace& work) {
    switch (job.bits) {
        case 2: return encode_stream_bits<V, 2>(job, index, work);
        case 3: return encode_stream_bits<V, 3>(job, index, work);
        default: return encode_stream_bits<V, 4>(job, index, work);
    }
}

// Place in the stream of a tile's row and column.
inline int tile_step(int row, int col) { return (col >> 2) * kChunk + row * 4 + (col & 3); }

inline void pack_symbols(const uint8_t* symbols, int bits, uint8_t* out) {
    for (int t = 0; t < kTile; t += 8, out += bits) {
        uint32_t word = 0;
        for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(symbols[t + i]) << (bits * i);
        for (int byte = 0; byte < bits; ++byte) out[byte] = static_cast<uint8_t>(word >> (8 * byte));
    }
}

// Solve E U_tt = difference in place for the tile at column `first`; [column][row]. Here and below products
// and differences are rounded one by one and in this order in every unit and in the torch reference.
inline void solve_tile(const float* factor, int group, int first, float (*difference)[kTileRows]) {
    for (int j = 0; j < kTileCols; ++j) {
        for (int i = 0; i < j; ++i) {
            const float u = factor[(first + i) * group + first + j];
            for (int r = 0; r < kTileRows; ++r) difference[j][r] -= difference[i][r] * u;
        }
        const float pivot = factor[(first + j) * group + first + j];
        for (int r = 0; r < kTileRows; ++r) difference[j][r] /= pivot;
    }
}

// What row r has left in `count` columns from `begin` after the error of the tile at `first` is taken off.
template <int Count>
inline void fed_back(const EncodeJob& job, const float (*error)[kTileRows], int first, int begin, int r,
                     const float* rest, float* out) {
    float sum[Count];
    for (int c = 0; c < Count; ++c) sum[c] = rest[r * job.group + begin + c];
    for (int i = 0; i < kTileCols; ++i) {
        const float* u = job.factor + (first + i) * job.group + begin;
        const float e = error[i][r];
        for (int c = 0; c < Count; ++c) sum[c] -= e * u[c];
    }
    for (int c = 0; c < Count; ++c) out[c] = sum[c];
}

inline int16_t to_fixed(float value, float inverse) {
    float v = value * inverse;
    v = v > 32767.0f ? 32767.0f : v < -32767.0f ? -32767.0f : v;
    return static_cast<int16_t>(__builtin_lrintf(v));
}

// One row group's rows, clipped to the matrix, and what stands for the rows that pad it.
struct RowGroup {
    const EncodeJob& job;
    int64_t row;
    int rows;
    float scale[kTileRows], inverse[kTileRows];

    RowGroup(const EncodeJob& from, int64_t index) : job(from), row(index * kTileRows) {
        rows = job.rows - row < kTileRows ? static_cast<int>(job.rows - row) : kTileRows;
        for (int r = 0; r < kTileRows; ++r) {
            scale[r] = r < rows ? job.scales[row + r] : 0.0f;
            inverse[r] = r < rows ? job.inverse[row + r] : 0.0f;
        }
    }
};

// Values [column][row] of the symbols in `work`, from the state before the tile.
template <int K>
uint32_t tile_values(const RowGroup& rows, const Workspace& work, uint32_t state, float (*values)[kTileRows]) {
    for (int t = 0; t < kTile; ++t) {
        state = (state << K | work.symbols[t]) & (kStates - 1);
        const int r = (t & (kChunk - 1)) >> 2, c = (t / kChunk) * 4 + (t & 3);
        values[c][r] = static_cast<float>(rows.job.levels[state]) * (1.0f / kLevelsPerUnit) * rows.scale[r];
    }
    return state;
}

inline void tile_difference(const RowGroup& rows, const Workspace& work, int first, const float (*values)[kTileRows],
                            float (*difference)[kTileRows]) {
    for (int c = 0; c < kTileCols; ++c)
        for (int r = 0; r < kTileRows; ++r)
            difference[c][r] = work.rest[r * rows.job.group + first + c] - values[c][r];
}

// Fixed-point targets of the weights after the tile. With error feedback they depend on the tile's own
// symbols: those of the path that is cheapest so far, which in these rows no later weight will change.
template <class V, int K>
void look_ahead(const RowGroup& rows, int first, uint32_t state, Workspace& work) {
    const EncodeJob& job = rows.job;
    alignas(64) float values[kTileCols][kTileRows], error[kTileCols][kTileRows];
    if (job.factor) {
        Search<V, K>::trace(job.levels, kTile, work);
        tile_values<K>(rows, work, state, values);
        tile_difference(rows, work, first, values, error);
        solve_tile(job.factor, job.group, first, error);
    }
    for (int r = 0; r < kLook / 4; ++r) {
        const int begin = first + kTileCols;
        float next[4];
        for (int c = 0; c < 4; ++c) next[c] = work.rest[r * job.group + begin + c];
        if (job.factor) fed_back<4>(job, error, first, begin, r, work.rest, next);
        for (int c = 0; c < 4; ++c) work.x[kTile + 4 * r + c] = to_fixed(next[c], rows.inverse[r]);
    }
}

// One tile of `out U = rest`: solve, store in `out [rows, group]` and take it from the columns still to come.
inline void eliminate_tile(const RowGroup& rows, int first, float (*difference)[kTileRows], Workspace& work,
                           float* out) {
    const int group = rows.job.group;
    solve_tile(rows.job.factor, group, first, difference);
    for (int begin = first + kTileCols; begin < group; begin += kTileCols)
        for (int r = 0; r < kTileRows; ++r)
            fed_back<kTileCols>(rows.job, difference, first, begin, r, work.rest, work.rest + r * group + begin);
    for (int r = 0; r < rows.rows; ++r)
        for (int c = 0; c < kTileCols; ++c) out[(rows.row + r) * group + first + c] = difference[c][r];
}

inline void finish_tile(const RowGroup& rows, int first, const float (*values)[kTileRows], Workspace& work) {
    const EncodeJob& job = rows.job;
    for (int r = 0; r < rows.rows; ++r)
        for (int c = 0; c < kTileCols; ++c) job.values[(rows.row + r) * job.group + first + c] = values[c][r];
    if (!job.factor) return;
    alignas(64) float difference[kTileCols][kTileRows];
    tile_difference(rows, work, first, values, difference);
    eliminate_tile(rows, first, difference, work, job.error);
}

inline void load_rest(const RowGroup& rows, const float* from, Workspace& work) {
    const int group = rows.job.group;
    for (int i = 0; i < kTileRows * group; ++i)
        work.rest[i] = i < rows.rows * group ? from[rows.row * group + i] : 0.0f;
}

// F with F U = values: what a change of scale does to the error.
inline void weigh_values(const RowGroup& rows, Workspace& work) {
    const EncodeJob& job = rows.job;
    load_rest(rows, job.values, work);
    for (int first = 0; first < job.group; first += kTileCols) {
        alignas(64) float tile[kTileCols][kTileRows];
        for (int c = 0; c < kTileCols; ++c)
            for (int r = 0; r < kTileRows; ++r) tile[c][r] = work.rest[r * job.group + first + c];
        eliminate_tile(rows, first, tile, work, job.weighted);
    }
}

template <class V, int K>
void encode_row_group_bits(const EncodeJob& job, int64_t index, Workspace& work) {
    const RowGroup rows(job, index);
    load_rest(rows, job.weight, work);
    uint8_t* codes = job.codes + index * 2 * K * job.group;
    uint32_t state = 0;
    for (int first = 0; first < job.group; first += kTileCols) {
        for (int r = 0; r < kTileRows; ++r)
            for (int c = 0; c < kTileCols; ++c)
                work.x[tile_step(r, c)] = to_fixed(work.rest[r * job.group + first + c], rows.inverse[r]);
        Search<V, K>::start(work, state);
        Search<V, K>::advance(job.levels, 0, kTile, work);
        int end = kTile;
        if (first + kTileCols < job.group) {
            look_ahead<V, K>(rows, first, state, work);
            end += kLook;
            Search<V, K>::advance(job.levels, kTile, end, work);
        }
        Search<V, K>::trace(job.levels, end, work);
        pack_symbols(work.symbols, K, codes + first * 2 * K);
        alignas(64) float values[kTileCols][kTileRows];
        state = tile_values<K>(rows, work, state, values);
        finish_tile(rows, first, values, work);
    }
    if (job.factor) weigh_values(rows, work);
}

template <class V>
void encode_row_group(const EncodeJob& job, int64_t index, Workspace& work) {
    switch (job.bits) {
        case 2: return encode_row_group_bits<V, 2>(job, index, work);
        case 3: return encode_row_group_bits<V, 3>(job, index, work);
        default: return encode_row_group_bits<V, 4>(job, index, work);
    }
}
