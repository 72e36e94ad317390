// Trellis codes in lanes (Code::lanes). The bytes of several row groups are transposed: for every 64 columns the 16
// chunks of each row group stand side by side as streams of 8 k bytes, byte 0 of all streams first, then byte 1 and so
// on. A kernel that holds one byte of every stream in a register finds a window's older bits in the registers before,
// and no byte has to move from lane to lane. Include inside an anonymous namespace only.

typedef uint8_t Sixteen __attribute__((vector_size(16)));

// The bytes of a and b in turn: of their first halves, or of their second ones.
inline Sixteen interleave_low(Sixteen a, Sixteen b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
    return __builtin_shuffle(a, b, Sixteen{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}

inline Sixteen interleave_high(Sixteen a, Sixteen b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    return __builtin_shuffle(a, b, Sixteen{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// Eight bytes of each of sixteen chunks: from rows of one byte of every chunk to runs of eight bytes of one chunk.
inline void gather_eight(const uint8_t* from, int from_stride, uint8_t* out, int out_stride) {
    Sixteen rows[8], next[8];
    for (int i = 0; i < 8; ++i) __builtin_memcpy(&rows[i], from + i * from_stride, 16);
    for (int stage = 0; stage < 3; ++stage) {     // each pairs the first half of the rows with the second
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = interleave_low(rows[i], rows[i + 4]);
            next[2 * i + 1] = interleave_high(rows[i], rows[i + 4]);
        }
        for (int i = 0; i < 8; ++i) rows[i] = next[i];
    }
    for (int i = 0; i < 8; ++i)
        for (int half = 0; half < 2; ++half)
            __builtin_memcpy(out + (2 * i + half) * out_stride, reinterpret_cast<const uint8_t*>(&rows[i]) + 8 * half, 8);
}

// One row group in scale group g, put back into the order of the stream.
inline void from_lanes(const ProductJob& job, int64_t row_group, int64_t g, uint8_t* out) {
    const int bytes = 8 * job.bits, stride = job.lane_groups * kLaneChunks;
    const int64_t panel = row_group / job.lane_groups, column = 2 * job.bits * job.lane_groups;
    const uint8_t* from = job.codes + (panel * job.cols + g * job.group) * column;
    from += row_group % job.lane_groups * kLaneChunks;
    for (int unit = 0; unit < job.group / kLaneCols; ++unit, from += bytes * stride, out += bytes * kLaneChunks)
        for (int byte = 0; byte < bytes; byte += 8) gather_eight(from + byte * stride, stride, out + byte, bytes);
}
