// Codes to weights with one 4096-entry table: the plain way, used where no wide byte permutation exists.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.

template <int K>
void decode_row_group_plain(const DecodeJob& job, int64_t index) {
    const int64_t row = index * kTileRows;
    const int rows = job.rows - row < kTileRows ? static_cast<int>(job.rows - row) : kTileRows;
    const int64_t groups = job.cols / job.group;
    const uint8_t* codes = job.codes + index * 2 * K * job.cols;
    uint32_t window = 0;
    for (int64_t col = 0; col < job.cols; col += 4) {
        if (col % job.group == 0) window = 0;
        float tile[kChunk];
        for (int t = 0; t < kChunk; t += 8, codes += K) {
            uint32_t word = 0;
            for (int byte = 0; byte < K; ++byte) word |= static_cast<uint32_t>(codes[byte]) << (8 * byte);
            for (int i = 0; i < 8; ++i, word >>= K) {
                window = window >> K | (word & ((1 << K) - 1)) << (kWindow - K);
                tile[t + i] = static_cast<float>(job.values[window]);
            }
        }
        for (int r = 0; r < rows; ++r) {
            const float scale = job.scales[(row + r) * groups + col / job.group];
            for (int c = 0; c < 4; ++c) job.out[(row + r) * job.cols + col + c] = tile[r * 4 + c] * scale;
        }
    }
}

inline void decode_row_group(const DecodeJob& job, int64_t index) {
    switch (job.bits) {
        case 2: return decode_row_group_plain<2>(job, index);
        case 3: return decode_row_group_plain<3>(job, index);
        default: return decode_row_group_plain<4>(job, index);
    }
}
