// Decoding with AVX-512 VBMI, scaling and writing of sums: what the vector and the tile products share.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.

constexpr int kUnsigned = 128;                    // vpdpbusd takes one unsigned factor: weights + kUnsigned

// Sixteen rows' integer sums, scaled and added to their totals.
inline __m512 add_scaled(__m512 total, __m512i dots, __m512 weight_scale, float input_scale) {
    const __m512 both = _mm512_mul_ps(weight_scale, _mm512_set1_ps(input_scale));
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(dots), both));
}

inline __m512 load_scales(const uint16_t* halves, float scale) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
    return _mm512_mul_ps(_mm512_cvtph_ps(bits), _mm512_set1_ps(scale));
}

// One row group's results for a token, as write_rows writes them.
inline void write_sums(const ProductJob& job, int64_t token, int64_t row_group, __m512 sums) {
    const int64_t row = row_group * kTileRows, at = token * job.rows + row;
    const __mmask16 rows = static_cast<__mmask16>(job.rows - row < kTileRows ? (1u << (job.rows - row)) - 1 : 0xffffu);
    if (job.bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(rows, job.bias + row));
    if (!job.bf16) return _mm512_mask_storeu_ps(static_cast<float*>(job.out) + at, rows, sums);
    const __m512i bits = _mm512_castps_si512(sums);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half_more = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
    const __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(half_more, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(job.out) + at, rows, _mm512_cvtepi32_epi16(half));
}

// Where entry i of a table finds its parts in 16 bytes: B and C stand one behind the other.
struct TableOrder {
    alignas(64) uint8_t b[64] = {}, c[64] = {}, d[64] = {};
    constexpr TableOrder() {
        for (int i = 0; i < 64; ++i) {
            b[i] = static_cast<uint8_t>(i >> 4);
            c[i] = static_cast<uint8_t>(4 + (i & 3));
            d[i] = static_cast<uint8_t>(i >> 2);
        }
    }
};

alignas(64) constexpr TableOrder kTableOrder;

// The two 64-entry tables, A + B by a window's six older bits and C + D + origin by its newer ones.
struct SplitTables {
    __m512i low, high;

    SplitTables(const int8_t* tables, int origin) {
        const __m512i a = broadcast16(tables);
        __m512i d = broadcast16(tables + 24);
        long long both;
        __builtin_memcpy(&both, tables + 16, 8);
        const __m512i b_c = _mm512_set1_epi64(both);
        d = _mm512_shuffle_epi8(d, _mm512_load_si512(kTableOrder.d));
        low = _mm512_add_epi8(a, _mm512_shuffle_epi8(b_c, _mm512_load_si512(kTableOrder.b)));
        high = _mm512_add_epi8(_mm512_shuffle_epi8(b_c, _mm512_load_si512(kTableOrder.c)), d);
        high = _mm512_add_epi8(high, _mm512_set1_epi8(static_cast<char>(origin)));
    }

private:
    static __m512i broadcast16(const int8_t* from) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
};

// Trellis weights: the two tables and where the windows of 64 weights stand.
template <int K, int Origin = kUnsigned>
struct TrellisChunks {
    static constexpr int kBytes = 8 * K;          // of a chunk
    static constexpr int kOrigin = Origin;        // chunks are weights + kOrigin
    __m512i low, high, gather, low_shift, high_shift;

    explicit TrellisChunks(const int8_t* tables) {
        alignas(64) uint8_t bytes[64], shift[64];
        const SplitTables split(tables, kOrigin);
        for (int i = 0; i < 64; ++i) {
            // Seen from two bytes before the chunk, weight i of eight has its window at bit k + 4 + k i.
            bytes[i] = static_cast<uint8_t>(K * (i >> 3) + (i & 7));
            shift[i] = static_cast<uint8_t>(K + 4 + K * (i & 7));
        }
        low = split.low;
        high = split.high;
        gather = _mm512_load_si512(bytes);
        low_shift = _mm512_load_si512(shift);
        high_shift = _mm512_add_epi8(low_shift, _mm512_set1_epi8(6));
    }

    // Chunk i of a step, 16 rows x 4 columns; the bytes before it count as zero at the start of a group.
    __m512i chunk(const uint8_t* codes, int i, bool start) const {
        codes += i * kBytes;
        __m512i stream;
        if constexpr (K == 4) {
            stream = start ? _mm512_maskz_loadu_epi8(~3ull, codes - 2) : _mm512_loadu_si512(codes - 2);
        } else {
            const __m256i half = start ? _mm256_maskz_loadu_epi8(~3u, codes - 2)
                                       : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes - 2));
            stream = _mm512_castsi256_si512(half);
        }
        stream = _mm512_permutexvar_epi8(gather, stream);
        const __m512i a = _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(low_shift, stream), low);
        const __m512i b = _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(high_shift, stream), high);
        return _mm512_add_epi8(a, b);
    }

    void decode(const uint8_t* codes, int chunks, uint8_t* out) const {
        _mm512_store_si512(out, chunk(codes, 0, true));
        for (int c = 1; c < chunks; ++c) _mm512_store_si512(out + c * kChunk, chunk(codes, c, false));
    }
};

// Two chunks in the low and the high halves of 64 bytes, each weight plus 8.
struct NibbleChunks {
    static constexpr int kBytes = 32;
    static constexpr int kOrigin = 8;

    explicit NibbleChunks(const int8_t*) {}

    __m512i chunk(const uint8_t* codes, int i, bool) const {
        const __m512i pair = _mm512_loadu_si512(codes + i / 2 * kChunk);
        return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(pair, 4) : pair, _mm512_set1_epi8(15));
    }

    void decode(const uint8_t* codes, int chunks, uint8_t* out) const {
        const __m512i shift = _mm512_set1_epi8(kUnsigned - kOrigin);
        for (int c = 0; c < chunks; ++c)
            _mm512_store_si512(out + c * kChunk, _mm512_add_epi8(chunk(codes, c, false), shift));
    }
};
