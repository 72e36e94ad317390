// Products of quantized inputs with packed weights: what does not depend on the instruction set.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.
//
// A unit provides V with
//   kCode                     Code::trellis for all canonical codes, or Code::lanes
//   kBlock, kPanel            tokens and row groups of one register tile
//   kPacked                   bytes of a packed input
//   Trellis<K>, Nibbles       decoders, made from the job's tables; decode(codes, chunks, out) turns one row group in
//                             one scale group into bytes [chunk][16 rows][4 columns]; it may read kSlack bytes around
//                             the codes
//   decode(...)               a panel of row groups in one scale group; decode_row_groups will do
//   tile<T>(...)              the integer sums of T tokens with a panel's bytes, scaled and added to `total`
//   write(...)                a row group's totals of one token to the output; write_rows will do

// Calls body with the decoder that the job's codes need.
template <class V, class Body>
inline void with_decoder(const ProductJob& job, const Body& body) {
    if constexpr (V::kCode == Code::trellis) {
        if (job.code == Code::nibbles) return body(typename V::Nibbles(job.tables));
    }
    switch (job.bits) {
        case 2: return body(typename V::template Trellis<2>(job.tables));
        case 3: return body(typename V::template Trellis<3>(job.tables));
        default: return body(typename V::template Trellis<4>(job.tables));
    }
}

// Codes of a row group in scale group g: copied where reading around them would leave the tensor, and put in order
// where they stand in lanes.
inline const uint8_t* group_codes(const ProductJob& job, int64_t row_group, int64_t g, uint8_t* edge) {
    if (job.code == Code::lanes) {
        from_lanes(job, row_group, g, edge + kSlack);
        return edge + kSlack;
    }
    const int64_t row_groups = (job.rows + kTileRows - 1) / kTileRows, groups = job.cols / job.group;
    const int64_t column = 2 * job.bits;
    const uint8_t* codes = job.codes + (row_group * job.cols + g * job.group) * column;
    const int64_t index = row_group * groups + g, last = row_groups * groups - 1;
    // Groups are at least kSlack bytes, so only the first and the last have less than that around them.
    if (index != 0 && index != last) return codes;
    __builtin_memcpy(edge + kSlack, codes, static_cast<size_t>(column * job.group));
    return edge + kSlack;
}

typedef uint16_t EightHalves __attribute__((vector_size(16)));

inline EightHalves interleave(EightHalves a, EightHalves b, bool high) {
#ifdef __clang__
    return high ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return high ? __builtin_shuffle(a, b, EightHalves{4, 12, 5, 13, 6, 14, 7, 15})
                : __builtin_shuffle(a, b, EightHalves{0, 8, 1, 9, 2, 10, 3, 11});
#endif
}

// Eight rows of eight halves, `stride` apart, turned into `count` columns of eight, `width` apart.
inline void transpose_halves(const uint16_t* from, int64_t stride, uint16_t* out, int width, int64_t count) {
    EightHalves rows[8], next[8];
    for (int i = 0; i < 8; ++i) __builtin_memcpy(&rows[i], from + i * stride, 16);
    for (int stage = 0; stage < 3; ++stage) {     // each pairs the first half of the rows with the second
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = interleave(rows[i], rows[i + 4], false);
            next[2 * i + 1] = interleave(rows[i], rows[i + 4], true);
        }
        for (int i = 0; i < 8; ++i) rows[i] = next[i];
    }
    for (int64_t g = 0; g < count; ++g) __builtin_memcpy(out + g * width, &rows[g], 16);
}

// Scales [group][row group of the panel][16] of the rows from `row_group`, zero where there are no rows. Those of the
// next panel are asked for at the same time.
inline void panel_scales(const ProductJob& job, int64_t row_group, int panel, uint16_t* out) {
    const int64_t groups = job.cols / job.group, first = row_group * kTileRows, total = job.rows * groups;
    const int width = panel * kTileRows;
    const uint16_t* from = job.scales + first * groups;
    for (int64_t line = 0; line < width * groups; line += 32) __builtin_prefetch(from + width * groups + line);
    for (int r = 0; r < width; r += 8) {
        for (int64_t g = 0; g < groups; g += 8) {
            const int64_t count = groups - g < 8 ? groups - g : 8;
            // The last of the eight rows may be read past its end as long as that is within the tensor.
            if ((first + r + 7) * groups + g + 8 <= total) {
                transpose_halves(from + r * groups + g, groups, out + g * width + r, width, count);
                continue;
            }
            for (int row = r; row < r + 8; ++row)
                for (int64_t i = g; i < g + count; ++i)
                    out[i * width + row] = first + row < job.rows ? from[row * groups + i] : 0;
        }
    }
}

// One row group's results for a token, with the bias, in the type of the output.
inline void write_rows(const ProductJob& job, int64_t token, int64_t row_group, const float* total) {
    const int64_t row = row_group * kTileRows;
    const int rows = job.rows - row < kTileRows ? static_cast<int>(job.rows - row) : kTileRows;
    float y[kTileRows];
    for (int r = 0; r < kTileRows; ++r) y[r] = total[r];
    if (job.bias)
        for (int r = 0; r < rows; ++r) y[r] += job.bias[row + r];
    if (!job.bf16) {
        float* out = static_cast<float*>(job.out) + token * job.rows + row;
        if (rows == kTileRows) __builtin_memcpy(out, y, sizeof y);
        else __builtin_memcpy(out, y, static_cast<size_t>(rows) * 4);
        return;
    }
    uint16_t half[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
        uint32_t bits;
        __builtin_memcpy(&bits, &y[r], 4);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        half[r] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
    uint16_t* out = static_cast<uint16_t*>(job.out) + token * job.rows + row;
    if (rows == kTileRows) __builtin_memcpy(out, half, sizeof half);
    else __builtin_memcpy(out, half, static_cast<size_t>(rows) * 2);
}

// Block of T tokens as [chunk][T][4 columns], so that a register tile reads one stream.
template <class V>
void pack_tokens(const ProductJob& job, int64_t block) {
    const int64_t first = block * V::kBlock;
    const int64_t count = job.tokens - first < V::kBlock ? job.tokens - first : V::kBlock;
    int8_t* out = job.packed + first * job.cols;
    for (int64_t t = 0; t < count; ++t) {
        const int8_t* from = job.q + (first + t) * job.stride;
        for (int64_t c = 0; c < job.cols / 4; ++c) __builtin_memcpy(out + (c * count + t) * 4, from + c * 4, 4);
    }
}

// What a register tile works on: scale group g of one panel with the tokens from `token`.
struct Tile {
    const uint8_t* weights;                       // [panel][kGroupWeights]
    const int8_t* packed;                         // [chunk][T][4]
    const uint16_t* scales;                       // [panel][16]
    float* total;                                 // [T][panel][16]
    int64_t token, g;
};

// The row groups of a panel one by one, each into kGroupWeights bytes.
template <class Decoder>
inline void decode_row_groups(const ProductJob& job, int64_t row_group, int count, int64_t g, const Decoder& decoder,
                              ProductScratch& scratch) {
    for (int p = 0; p < count; ++p)
        decoder.decode(group_codes(job, row_group + p, g, scratch.edge), job.group / 4, scratch.weights + p * kGroupWeights);
}

template <class V, int T = V::kBlock>
inline void multiply_tile(const ProductJob& job, const Tile& tile, int64_t tokens) {
    if constexpr (T > 1) {
        if (tokens < T) return multiply_tile<V, T - 1>(job, tile, tokens);
    }
    V::template tile<T>(job, tile);
}

template <class V, class Decoder>
void multiply_panel(const ProductJob& job, int64_t panel, const Decoder& decoder, ProductScratch& scratch) {
    const int64_t row_groups = (job.rows + kTileRows - 1) / kTileRows, groups = job.cols / job.group;
    const int64_t row_group = panel * V::kPanel;
    const int count = row_groups - row_group < V::kPanel ? static_cast<int>(row_groups - row_group) : V::kPanel;
    constexpr int width = V::kPanel * kTileRows;
    panel_scales(job, row_group, V::kPanel, scratch.scales);
    for (int64_t begin = 0; begin < job.tokens; begin += kTokenTile) {
        const int64_t end = job.tokens - begin < kTokenTile ? job.tokens : begin + kTokenTile;
        __builtin_memset(scratch.total, 0, static_cast<size_t>((end - begin) * width) * sizeof(float));
        for (int64_t g = 0; g < groups; ++g) {
            V::decode(job, row_group, count, g, decoder, scratch);
            for (int64_t token = begin; token < end; token += V::kBlock) {
                const int64_t left = job.tokens - token, tokens = left < V::kBlock ? left : V::kBlock;
                const Tile tile{scratch.weights,
                                job.packed + (token * job.cols + g * job.group * tokens) * V::kPacked,
                                scratch.scales + g * width,
                                scratch.total + (token - begin) * width,
                                token,
                                g};
                multiply_tile<V>(job, tile, tokens);
            }
        }
        for (int64_t token = begin; token < end; ++token)
            for (int p = 0; p < count; ++p)
                V::write(job, token, row_group + p, scratch.total + (token - begin) * width + p * kTileRows);
    }
}

template <class V>
void multiply(const ProductJob& job, int64_t panel, ProductScratch& scratch) {
    with_decoder<V>(job, [&](const auto& decoder) { multiply_panel<V>(job, panel, decoder, scratch); });
}

// What V offers as kernels, with its own way of packing or the common one.
template <class V>
constexpr PanelKernels panel_kernels(void (*pack)(const ProductJob&, int64_t) = pack_tokens<V>) {
    return {V::kBlock, V::kPacked, V::kPanel, pack, multiply<V>};
}
