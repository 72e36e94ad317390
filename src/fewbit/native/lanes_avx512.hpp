// Products of a few tokens with trellis weights in lanes (lanes.hpp), four row groups side by side in 512 bits.
// Include inside an anonymous namespace only.
//
// A weight is low[6 older bits of its window] + high[6 newer bits], and a byte permutation ignores the upper two bits
// of its indices. For 3 bits the older bits of a weight are the newer ones of the weight two steps back, so that each
// step cuts out one field of 6 bits, with shifts alone.
struct LaneProduct {
    static constexpr int kTokens = 8, kPanel = 4;
    static constexpr int kSteps = kLaneCols;      // of a unit: row s / 4, column s % 4
    static constexpr int kNear = 2048, kFar = 16384;

    template <int K>
    struct Decoder {
        static constexpr int kept = K == 4 ? 0 : 6 / K;  // steps that a field serves again after

        __m512i low, high;

        explicit Decoder(const int8_t* tables) {
            const SplitTables split(tables, kUnsigned);
            low = split.low;
            high = split.high;
        }

        // Six bits of every stream from bit `At` of the bytes in b, with anything above them.
        template <int At>
        static __m512i field(const __m512i* b) {
            constexpr int shift = At % 8;
            const __m512i* at = b + At / 8;
            if constexpr (shift == 0) return *at;
            if constexpr (shift > 0 && shift <= 2) return _mm512_srli_epi16(*at, shift);
            const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << (8 - shift)) - 1));
            return _mm512_ternarylogic_epi64(mask, _mm512_srli_epi16(at[0], shift), _mm512_slli_epi16(at[1], 8 - shift),
                                             0xca);
        }

        template <int I>
        __m512i older(const __m512i* b, const __m512i* before) const {
            if constexpr (I < kept) return before[I];
            return field<16 + K * (I + 1) - 12>(b);
        }

        // Eight steps whose bytes begin at b[2]; `before` holds the fields of the last `kept` steps.
        template <int... I>
        void steps(const __m512i* b, __m512i (&before)[3], __m512i (&w)[8], std::integer_sequence<int, I...>) const {
            ((w[I] = _mm512_add_epi8(_mm512_permutexvar_epi8(older<I>(b, before), low),
                                     _mm512_permutexvar_epi8(field<16 + K * (I + 1) - 6>(b), high))),
             ...);
            if constexpr (kept >= 2) {
                before[kept - 1] = field<16 + K * 8 - 6>(b);
                before[kept - 2] = field<16 + K * 7 - 6>(b);
            }
            if constexpr (kept == 3) before[0] = field<16 + K * 6 - 6>(b);
        }

        // The fields before the first step of a unit, from the streams' older bytes b[0], b[1].
        void begin(const __m512i* b, __m512i (&before)[3]) const {
            if constexpr (kept >= 1) before[0] = field<16 + K - 12>(b);
            if constexpr (kept >= 2) before[1] = field<16 + 2 * K - 12>(b);
            if constexpr (kept >= 3) before[2] = field<16 + 3 * K - 12>(b);
        }
    };

    // Tokens as [unit][T][4 columns][16 lanes].
    static void pack(const ProductJob& job, int64_t block) {
        const int64_t first = block * kTokens;
        const int64_t count = job.tokens - first < kTokens ? job.tokens - first : kTokens;
        int8_t* out = job.packed + first * job.cols;
        const __m512i by_column = column_order();
        for (int64_t unit = 0; unit < job.cols / kLaneCols; ++unit)
            for (int64_t t = 0; t < count; ++t, out += kLaneCols) {
                const __m512i q = _mm512_loadu_si512(job.q + (first + t) * job.stride + unit * kLaneCols);
                _mm512_storeu_si512(out, _mm512_permutexvar_epi8(by_column, q));
            }
    }

    static __m512i column_order() {
        alignas(64) uint8_t order[64];
        for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(4 * (i & 15) + (i >> 4));
        return _mm512_load_si512(order);
    }

    // Adds one unit's products to sums[token][row], each lane of a row group with its own part of the columns. The first
    // unit of a scale group begins them: to write and read zeros is a twelfth of the work for eight tokens.
    template <int K, int T, bool First>
    static void unit(const Decoder<K>& decoder, const uint8_t* codes, const int8_t* inputs, __m512i (&last)[2],
                     __m512i (&sums)[T][kTileRows]) {
        const uint8_t* end = codes + kLaneCols * (8 * K - 2);
        __m512i b[2 + K], before[3], w[8];
        for (int i = 0; i < 2; ++i) {             // each stream follows the one in the lane before it
            const __m512i bytes = _mm512_loadu_si512(end + i * 64);
            b[K + i] = _mm512_alignr_epi8(bytes, last[i], 15);
            last[i] = bytes;
        }
        decoder.begin(b + K, before);
#pragma GCC unroll 1
        for (int block = 0; block < 8; ++block, codes += 64 * K) {
#pragma GCC unroll 4
            for (int line = 0; line < K; ++line) {
                _mm_prefetch(reinterpret_cast<const char*>(codes + kFar + 64 * line), _MM_HINT_T1);
                _mm_prefetch(reinterpret_cast<const char*>(codes + kNear + 64 * line), _MM_HINT_T0);
            }
            b[0] = b[K];
            b[1] = b[K + 1];
#pragma GCC unroll 4
            for (int i = 0; i < K; ++i) b[2 + i] = _mm512_loadu_si512(codes + 64 * i);
            decoder.steps(b, before, w, std::make_integer_sequence<int, 8>());
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                __m512i first = First ? _mm512_setzero_si512() : sums[t][2 * block];
                __m512i second = First ? _mm512_setzero_si512() : sums[t][2 * block + 1];
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) {
                    const __m128i lanes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(inputs + t * kLaneCols) + c);
                    const __m512i x = _mm512_broadcast_i32x4(lanes);
                    first = _mm512_dpbusd_epi32(first, w[c], x);
                    second = _mm512_dpbusd_epi32(second, w[4 + c], x);
                }
                sums[t][2 * block] = first;
                sums[t][2 * block + 1] = second;
            }
        }
    }

    // Sums of sixteen rows in four row groups, [16][4][4 lanes], to one register of sixteen rows each.
    static void add_lanes(const __m512i* sums, __m512i (&rows)[4]) {
        __m512i four[4];                          // [row group][rows 4 i, ..., 4 i + 3]
        for (int i = 0; i < 4; ++i, sums += 4) {
            const __m512i a = add_halves(sums[0], sums[1]), b = add_halves(sums[2], sums[3]);
            four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        }
        const __m512i a = _mm512_shuffle_i32x4(four[0], four[1], 0x44), b = _mm512_shuffle_i32x4(four[2], four[3], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(four[0], four[1], 0xee), d = _mm512_shuffle_i32x4(four[2], four[3], 0xee);
        rows[0] = _mm512_shuffle_i32x4(a, b, 0x88);
        rows[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
        rows[2] = _mm512_shuffle_i32x4(c, d, 0x88);
        rows[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }

    static __m512i add_halves(__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }

    template <int K, int T>
    static void multiply_tokens(const ProductJob& job, int64_t panel, ProductScratch& scratch) {
        const int64_t groups = job.cols / job.group, stride = job.stride / job.group, units = job.group / kLaneCols;
        const int64_t row_group = panel * kPanel, unit_bytes = 64 * 8 * K;
        const Decoder<K> decoder(job.tables);
        panel_scales(job, row_group, kPanel, scratch.scales);
        float* total = scratch.total;             // [T][64]
        for (int i = 0; i < T * 4; ++i) _mm512_storeu_ps(total + 16 * i, _mm512_setzero_ps());
        const uint8_t* codes = job.codes + panel * (job.cols / kLaneCols) * unit_bytes;
        const int8_t* inputs = job.packed;
        for (int64_t g = 0; g < groups; ++g) {
            __m512i sums[T][kTileRows], last[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            unit<K, T, true>(decoder, codes, inputs, last, sums);
            for (int64_t u = 1; u < units; ++u)
                unit<K, T, false>(decoder, codes + u * unit_bytes, inputs + u * T * kLaneCols, last, sums);
            codes += units * unit_bytes;
            inputs += units * T * kLaneCols;
            for (int t = 0; t < T; ++t) {
                const int64_t at = t * stride + g;
                const __m512i origin = _mm512_set1_epi32(kUnsigned * job.sums[at]);
                __m512i rows[4];
                add_lanes(sums[t], rows);
                for (int p = 0; p < 4; ++p) {
                    float* to = total + t * 64 + p * kTileRows;
                    const __m512 scale = load_scales(scratch.scales + g * 64 + p * kTileRows, job.scale);
                    const __m512i dots = _mm512_sub_epi32(rows[p], origin);
                    _mm512_storeu_ps(to, add_scaled(_mm512_loadu_ps(to), dots, scale, job.input_scale[at]));
                }
            }
        }
        const int64_t left = (job.rows + kTileRows - 1) / kTileRows - row_group;
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < (left < kPanel ? left : kPanel); ++p)
                write_sums(job, t, row_group + p, _mm512_loadu_ps(total + t * 64 + p * kTileRows));
    }

    template <int K, int T = kTokens>
    static void multiply_bits(const ProductJob& job, int64_t panel, ProductScratch& scratch) {
        if constexpr (T > 1) {
            if (job.tokens < T) return multiply_bits<K, T - 1>(job, panel, scratch);
        }
        multiply_tokens<K, T>(job, panel, scratch);
    }

    static void multiply(const ProductJob& job, int64_t panel, ProductScratch& scratch) {
        switch (job.bits) {
            case 2: return multiply_bits<2>(job, panel, scratch);
            case 3: return multiply_bits<3>(job, panel, scratch);
            default: return multiply_bits<4>(job, panel, scratch);
        }
    }
};
