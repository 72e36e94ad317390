// Products on 256-bit registers, with or without VNNI: 32 weights per register, decoded by 16-entry byte shuffles.
// Include inside an anonymous namespace only: every unit compiles its own copy with its own flags.

inline __m256i repeat(const int8_t* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
}

constexpr int kNear = 1536, kFar = 12288;         // bytes ahead to prefetch into the nearest cache and the next

// Eight rows' integer sums, scaled and added to their totals.
inline void add_scaled(float* total, __m256i dots, __m256 weight_scale, float input_scale) {
    const __m256 both = _mm256_mul_ps(weight_scale, _mm256_set1_ps(input_scale));
    _mm256_storeu_ps(total, _mm256_add_ps(_mm256_loadu_ps(total), _mm256_mul_ps(_mm256_cvtepi32_ps(dots), both)));
}

inline __m256 load_scales(const uint16_t* halves, float scale) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves));
    return _mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(scale));
}

// The canonical layouts. Dots::accumulate(sums, u, s) adds four products of unsigned and signed bytes to each sum;
// u is at most 127 unless Dots::kWholeBytes.
template <class Dots>
struct Narrow {
    static constexpr Code kCode = Code::trellis;
    static constexpr int kBlock = 4, kPanel = 1, kPacked = 1;

    // Three 16-entry tables: A of the window's bits 0-3, B + C of 4-7, D of 8-11.
    template <int K>
    struct Trellis {
        static constexpr int kBack = K == 4 ? 1 : 2;  // an older weight's upper bits hold A's
        __m256i a, bc, d, even_pick, odd_pick, even_shift, odd_shift;

        explicit Trellis(const int8_t* tables) {
            int8_t middle[16];
            for (int i = 0; i < 16; ++i) middle[i] = static_cast<int8_t>(tables[16 + (i & 3)] + tables[20 + (i >> 2)]);
            a = repeat(tables);
            bc = repeat(middle);
            d = repeat(tables + 24);
            alignas(16) int8_t pick[2][16];
            alignas(16) int16_t shift[2][8];
            for (int i = 0; i < 16; ++i) {
                // Seen from two bytes before 16 weights, the last 8 bits of window i begin at bit 8 + k + k i;
                // a 16-bit product with 2^(8 - rest) brings them to the top of their two bytes.
                const int bit = 8 + K + K * i;
                pick[i & 1][i & ~1] = static_cast<int8_t>(bit >> 3);
                pick[i & 1][i | 1] = static_cast<int8_t>((bit >> 3) + 1);
                shift[i & 1][i >> 1] = static_cast<int16_t>(1 << (8 - (bit & 7)));
            }
            even_pick = repeat(pick[0]);
            odd_pick = repeat(pick[1]);
            even_shift = repeat(reinterpret_cast<const int8_t*>(shift[0]));
            odd_shift = repeat(reinterpret_cast<const int8_t*>(shift[1]));
        }

        // The last 8 bits of 32 windows.
        __m256i recent(const uint8_t* codes, bool start) const {
            __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes - 2));
            if (start) first = _mm_and_si128(first, _mm_setr_epi32(static_cast<int>(0xffff0000u), -1, -1, -1));
            const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes - 2 + 2 * K));
            const __m256i stream = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
            const __m256i even = _mm256_mullo_epi16(_mm256_shuffle_epi8(stream, even_pick), even_shift);
            const __m256i odd = _mm256_mullo_epi16(_mm256_shuffle_epi8(stream, odd_pick), odd_shift);
            const __m256i top = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
            return _mm256_or_si256(_mm256_srli_epi16(even, 8), _mm256_and_si256(odd, top));
        }

        // 32 weights from their windows' last bits and those of the 32 weights before.
        __m256i values(__m256i now, __m256i before) const {
            const __m256i nibble = _mm256_set1_epi8(15);
            const __m256i across = _mm256_permute2x128_si256(before, now, 0x21);
            __m256i oldest = _mm256_alignr_epi8(now, across, 16 - kBack);
            if constexpr (K == 3) oldest = _mm256_srli_epi16(oldest, 2);
            const __m256i from_a = _mm256_shuffle_epi8(a, _mm256_and_si256(oldest, nibble));
            const __m256i from_bc = _mm256_shuffle_epi8(bc, _mm256_and_si256(now, nibble));
            const __m256i from_d = _mm256_shuffle_epi8(d, _mm256_and_si256(_mm256_srli_epi16(now, 4), nibble));
            return _mm256_add_epi8(_mm256_add_epi8(from_a, from_bc), from_d);
        }

        void decode(const uint8_t* codes, int chunks, uint8_t* out) const {
            __m256i before = _mm256_setzero_si256();
            for (int half = 0; half < 2 * chunks; ++half, codes += 4 * K, out += 32) {
                if (half % 4 == 0) {
                    _mm_prefetch(reinterpret_cast<const char*>(codes + kFar), _MM_HINT_T1);
                    _mm_prefetch(reinterpret_cast<const char*>(codes + kNear), _MM_HINT_T0);
                }
                const __m256i now = recent(codes, half == 0);
                _mm256_store_si256(reinterpret_cast<__m256i*>(out), values(now, before));
                before = now;
            }
        }
    };

    // Two chunks in the low and the high halves of 64 bytes, each weight plus 8.
    struct Nibbles {
        explicit Nibbles(const int8_t*) {}

        void decode(const uint8_t* codes, int chunks, uint8_t* out) const {
            const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
            for (int c = 0; c < chunks; c += 2, out += 2 * kChunk) {
                _mm_prefetch(reinterpret_cast<const char*>(codes + kFar), _MM_HINT_T1);
                _mm_prefetch(reinterpret_cast<const char*>(codes + kNear), _MM_HINT_T0);
                for (int half = 0; half < 2; ++half, codes += 32) {
                    const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
                    __m256i* to = reinterpret_cast<__m256i*>(out + 32 * half);
                    const __m256i low = _mm256_and_si256(pair, nibble);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(pair, 4), nibble);
                    _mm256_store_si256(to, _mm256_sub_epi8(low, eight));
                    _mm256_store_si256(to + 2, _mm256_sub_epi8(high, eight));
                }
            }
        }
    };

    static void write(const ProductJob& job, int64_t token, int64_t row_group, const float* total) {
        write_rows(job, token, row_group, total);
    }

    template <class Decoder>
    static void decode(const ProductJob& job, int64_t row_group, int count, int64_t g, const Decoder& decoder,
                       ProductScratch& scratch) {
        decode_row_groups(job, row_group, count, g, decoder, scratch);
    }

    template <int T>
    static void tile(const ProductJob& job, const Tile& tile) {
        const int64_t groups = job.stride / job.group, first = tile.token * groups + tile.g;
        __m256i a[T], b[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) a[t] = b[t] = _mm256_setzero_si256();
        const __m256i* weights = reinterpret_cast<const __m256i*>(tile.weights);
        const int8_t* inputs = tile.packed;
        for (int c = 0; c < job.group / 4; ++c, weights += 2, inputs += 4 * T) {
            const __m256i wa = _mm256_load_si256(weights), wb = _mm256_load_si256(weights + 1);
            const __m256i ma = _mm256_abs_epi8(wa), mb = _mm256_abs_epi8(wb);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                int word;
                __builtin_memcpy(&word, inputs + 4 * t, 4);
                const __m256i x = _mm256_set1_epi32(word);
                a[t] = Dots::accumulate(a[t], ma, _mm256_sign_epi8(x, wa));
                b[t] = Dots::accumulate(b[t], mb, _mm256_sign_epi8(x, wb));
            }
        }
        const __m256 scale_a = load_scales(tile.scales, job.scale), scale_b = load_scales(tile.scales + 8, job.scale);
        float* total = tile.total;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t, total += kTileRows) {
            const float input_scale = job.input_scale[first + t * groups];
            add_scaled(total, a[t], scale_a, input_scale);
            add_scaled(total + 8, b[t], scale_b, input_scale);
        }
    }
};

// The products alone: as many chains as there are registers for, since each waits for its last product.
template <class Dots>
struct Peak {
    static constexpr int kChains = 12;

    static void multiply(int64_t steps) {
        __m256i sums[kChains], u = _mm256_set1_epi8(1), s = _mm256_set1_epi8(1);
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) renew(sums[i] = _mm256_setzero_si256());
        for (; steps > 0; --steps)
#pragma GCC unroll 12
            for (int i = 0; i < kChains; ++i) {
                renew(s);
                sums[i] = Dots::accumulate(sums[i], u, s);
            }
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) renew(sums[i]);
    }

    static constexpr PeakKernel kernel = {2 * 32 * kChains, multiply};

private:
    // For all that the compiler knows, x is another one now: no product of it is the same as before, and none is idle.
    static void renew(__m256i& x) { __asm__ volatile("" : "+x"(x)); }
};

// The trellis in lanes (lanes.hpp), two row groups side by side.
template <class Dots>
struct Lanes {
    static constexpr Code kCode = Code::lanes;
    static constexpr int kBlock = 4, kPanel = 2;
    static constexpr int kPacked = 2;             // bytes per input: itself and its magnitude
    static constexpr int kStreams = 32;
    static constexpr int kOrigin = Dots::kWholeBytes ? 128 : 0;  // decoded bytes are weights + kOrigin

    template <int K>
    struct Trellis {
        __m256i a, bc, d;

        explicit Trellis(const int8_t* tables) {
            int8_t middle[16], last[16];
            for (int i = 0; i < 16; ++i) {
                middle[i] = static_cast<int8_t>(tables[16 + (i & 3)] + tables[20 + (i >> 2)]);
                last[i] = static_cast<int8_t>(tables[24 + i] + kOrigin);
            }
            a = repeat(tables);
            bc = repeat(middle);
            d = repeat(last);
        }

        // Four bits of every stream from bit `At` of the bytes in `b`.
        template <int At>
        static __m256i nibble(const __m256i* b) {
            constexpr int shift = At % 8;
            const __m256i low = _mm256_set1_epi8(15), high = _mm256_set1_epi8(static_cast<char>(0xf0));
            const __m256i* at = b + At / 8;
            if constexpr (shift == 0) return _mm256_and_si256(*at, low);
            if constexpr (shift > 0 && shift <= 4) return _mm256_and_si256(_mm256_srli_epi16(*at, shift), low);
            // The upper half of one byte and the lower half of the next.
            const __m256i across = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(at[0], 4), low),
                                                   _mm256_and_si256(_mm256_slli_epi16(at[1], 4), high));
            return _mm256_and_si256(_mm256_srli_epi16(across, shift - 4), low);
        }

        // Weight I of eight; the streams' bytes for these weights begin at b[2].
        template <int I>
        __m256i weight(const __m256i* b) const {
            constexpr int end = 16 + K * (I + 1);
            const __m256i from_a = _mm256_shuffle_epi8(a, nibble<end - 12>(b));
            const __m256i from_bc = _mm256_shuffle_epi8(bc, nibble<end - 8>(b));
            return _mm256_add_epi8(_mm256_add_epi8(from_a, from_bc), _mm256_shuffle_epi8(d, nibble<end - 4>(b)));
        }

        template <int... I>
        void weights(const __m256i* b, __m256i* out, std::integer_sequence<int, I...>) const {
            (_mm256_store_si256(out + I, weight<I>(b)), ...);
        }

        // One scale group of two row groups to bytes [unit][64 steps][32 streams]; step s is row s / 4, column s % 4.
        void decode(const uint8_t* codes, int units, uint8_t* to) const {
            __m256i* out = reinterpret_cast<__m256i*>(to);
            __m256i last[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            for (int unit = 0; unit < units; ++unit, codes += kStreams * 8 * K) {
                const __m256i* from = reinterpret_cast<const __m256i*>(codes);
                for (int line = 0; line < 4 * K; ++line) {
                    _mm_prefetch(reinterpret_cast<const char*>(codes + kFar + 64 * line), _MM_HINT_T1);
                    _mm_prefetch(reinterpret_cast<const char*>(codes + kNear + 64 * line), _MM_HINT_T0);
                }
                __m256i b[2 + K];
                for (int i = 0; i < 2; ++i) {     // each stream follows the one in the lane before it
                    const __m256i end = _mm256_loadu_si256(from + 8 * K - 2 + i);
                    b[K + i] = _mm256_alignr_epi8(end, last[i], 15);
                    last[i] = end;
                }
                for (int block = 0; block < 8; ++block, from += K, out += 8) {
                    b[0] = b[K];
                    b[1] = b[K + 1];
                    for (int i = 0; i < K; ++i) b[2 + i] = _mm256_loadu_si256(from + i);
                    weights(b, out, std::make_integer_sequence<int, 8>());
                }
            }
        }
    };

    // Inputs of a block of T tokens as [unit][T][4 columns][16 lanes, then their magnitudes].
    static void pack(const ProductJob& job, int64_t block) {
        const int64_t first = block * kBlock;
        const int64_t count = job.tokens - first < kBlock ? job.tokens - first : kBlock;
        int8_t* out = job.packed + first * job.cols * kPacked;
        for (int64_t unit = 0; unit < job.cols / kLaneCols; ++unit)
            for (int64_t t = 0; t < count; ++t, out += kLaneCols * kPacked)
                pack_unit(job.q + (first + t) * job.stride + unit * kLaneCols, out);
    }

    static void pack_unit(const int8_t* q, int8_t* out) {
        const __m128i by_column = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m128i* from = reinterpret_cast<const __m128i*>(q);
        __m128i v[4];
        for (int i = 0; i < 4; ++i) v[i] = _mm_shuffle_epi8(_mm_loadu_si128(from + i), by_column);
        const __m128i ab = _mm_unpacklo_epi32(v[0], v[1]), cd = _mm_unpacklo_epi32(v[2], v[3]);
        const __m128i ef = _mm_unpackhi_epi32(v[0], v[1]), gh = _mm_unpackhi_epi32(v[2], v[3]);
        const __m128i columns[4] = {_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd),
                                    _mm_unpacklo_epi64(ef, gh), _mm_unpackhi_epi64(ef, gh)};
        __m128i* to = reinterpret_cast<__m128i*>(out);
        for (int c = 0; c < 4; ++c) {
            _mm_storeu_si128(to + 2 * c, columns[c]);
            _mm_storeu_si128(to + 2 * c + 1, _mm_abs_epi8(columns[c]));
        }
    }

    static void write(const ProductJob& job, int64_t token, int64_t row_group, const float* total) {
        write_rows(job, token, row_group, total);
    }

    template <class Decoder>
    static void decode(const ProductJob& job, int64_t row_group, int, int64_t g, const Decoder& decoder,
                       ProductScratch& scratch) {
        const int64_t column = 2 * job.bits * kPanel;
        const uint8_t* codes = job.codes + (row_group / kPanel * job.cols + g * job.group) * column;
        decoder.decode(codes, job.group / kLaneCols, scratch.weights);
    }

    // Rows' sums over the four columns of a unit: lanes of each half add up to the sums of its row group.
    static __m256i row_sums(__m256i sums, const __m256i* weights, const __m128i* inputs) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const __m256i w = _mm256_load_si256(weights + c), x = _mm256_broadcastsi128_si256(inputs[2 * c]);
            if constexpr (Dots::kWholeBytes) {
                sums = Dots::accumulate(sums, w, x);
            } else {  // magnitude and sign apart, because pairs of larger unsigned bytes could saturate
                const __m256i magnitude = _mm256_broadcastsi128_si256(inputs[2 * c + 1]);
                sums = Dots::accumulate(sums, magnitude, _mm256_sign_epi8(w, x));
            }
        }
        return sums;
    }

    // Sums of sixteen rows in two row groups, [16][2][4 lanes], to rows 0-7 and 8-15 of the first and the second.
    static void add_lanes(const __m256i* sums, __m256i origin, __m256i (&rows)[4]) {
        __m256i four[4];
        for (int i = 0; i < 4; ++i, sums += 4) {
            const __m256i low = _mm256_hadd_epi32(sums[0], sums[1]), high = _mm256_hadd_epi32(sums[2], sums[3]);
            four[i] = _mm256_sub_epi32(_mm256_hadd_epi32(low, high), origin);
        }
        rows[0] = _mm256_permute2x128_si256(four[0], four[1], 0x20);
        rows[1] = _mm256_permute2x128_si256(four[2], four[3], 0x20);
        rows[2] = _mm256_permute2x128_si256(four[0], four[1], 0x31);
        rows[3] = _mm256_permute2x128_si256(four[2], four[3], 0x31);
    }

    template <int T>
    static void tile(const ProductJob& job, const Tile& tile) {
        const int64_t groups = job.stride / job.group, first = tile.token * groups + tile.g;
        __m256i sums[T][kTileRows];
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < kTileRows; ++r) sums[t][r] = _mm256_setzero_si256();
        const __m256i* weights = reinterpret_cast<const __m256i*>(tile.weights);
        const __m128i* inputs = reinterpret_cast<const __m128i*>(tile.packed);
        for (int unit = 0; unit < job.group / kLaneCols; ++unit, inputs += 8 * T)
            for (int r = 0; r < kTileRows; ++r, weights += 4)
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) sums[t][r] = row_sums(sums[t][r], weights, inputs + 8 * t);
        float* total = tile.total;
        for (int t = 0; t < T; ++t) {
            const int32_t origin = kOrigin * job.sums[first + t * groups];
            __m256i rows[4];
            add_lanes(sums[t], _mm256_set1_epi32(origin), rows);
            for (int i = 0; i < 4; ++i, total += 8)
                add_scaled(total, rows[i], load_scales(tile.scales + 8 * i, job.scale), job.input_scale[first + t * groups]);
        }
    }
};
