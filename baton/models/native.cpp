// The CPU's inner loops where torch's cost more than memory does: products, norms, rotary embedding,
// activations, paged attention, and whole layers of these. Compiled on first use by native.py, called through ctypes.
// torch's own operators do the same wherever this file cannot be compiled.
//
// Every output value is one fixed chain of operations that no batch mate, chunk or thread takes part in:
// lanes never mix rows, sums add up in one order, tiles of keys start at multiples of TILE in the
// sequence's own positions. -ffp-contract=off keeps a loop's vector body and its tail equal.
//
// A TEAM function is entered by all threads of a team; they divide its rows, columns or heads among them
// and leave it together.
//
// Products read weights where oneDNN packed them, [N / 64][K / P][64][P] (P is 2 for bfloat16, 1 for float32),
// and add up in oneDNN's order, so a row has the same bits from either.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifndef __AVX512BF16__
#error "needs AVX512-BF16"
#endif

using i64 = int64_t;

#define TEAM static

struct bf16 {
    uint16_t bits;
};

static inline float wide(float x) { return x; }
static inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T> static inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(x != x ? 0x7fc0 : rounded)};
}

static inline __m512 load16(const float *p) { return _mm512_loadu_ps(p); }
static inline __m512 load16(const bf16 *p) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline void store16(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
static inline void store16(bf16 *p, __m512 x) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
}

// e^x for x <= 0 or so: Cody-Waite reduction and a degree 6 polynomial, within 2 ulp.
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.3f)), _mm512_set1_ps(-87.3f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.38888889e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.33333333e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16666667e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.66666667e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// 2^x for x <= 0 or so, within 4 ulp; 0 for -infinity where `seen` leaves a lane out.
static inline __m512 exp2_16(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.339086336e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.676031918e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550357114e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402210749e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931471880e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

static inline __m512 tanh16(__m512 x) {
    // 1 - 2 / (e^2x + 1); exp16 clamps where the result is 1 or -1 anyway.
    __m512 e = exp16(_mm512_add_ps(x, x));
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

// ---- products ----------------------------------------------------------------------------------------

static inline __m512 multiply_add(__m512 sum, const bf16 *x, const bf16 *w) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(w));
}
static inline __m512 multiply_add(__m512 sum, const float *x, const float *w) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*x), _mm512_loadu_ps(w), sum);
}

template <class T> constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;

constexpr i64 AHEAD = 4096; // bytes of weights fetched in advance
constexpr i64 MOST = 6;     // rows whose sums fit the registers

// Weights to fetch while computing: `lines` cache lines of every 256 bytes (one step).
struct Fetch {
    const char *from;
    int lines;
};

// ROWS rows of x times one panel of 64 outputs. Every `chunk` inputs are added up apart, then to the sum.
template <class T, int ROWS>
static void panel(const T *x, i64 k, i64 chunk, const T *w, const T *bias, T *y, i64 n, Fetch fetch) {
    constexpr int P = PAIR<T>;
    float total[ROWS][64];
    for (i64 start = 0; start < k; start += chunk) {
        __m512 sum[ROWS][4];
        for (auto &row : sum)
            for (auto &part : row) part = _mm512_setzero_ps();
        for (i64 at = start, end = std::min(k, start + chunk); at < end; at += P, w += 64 * P) {
            for (int line = 0; line < fetch.lines; line++)
                _mm_prefetch(fetch.from + 64 * line, _MM_HINT_T1);
            fetch.from += 256;
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
                for (int part = 0; part < 4; part++)
                    sum[row][part] = multiply_add(sum[row][part], x + row * k + at, w + part * 16 * P);
        }
        for (int row = 0; row < ROWS; row++)
            for (int part = 0; part < 4; part++) {
                float *sums = total[row] + part * 16;
                if (start > 0) sum[row][part] = _mm512_add_ps(sum[row][part], _mm512_loadu_ps(sums));
                _mm512_storeu_ps(sums, sum[row][part]);
            }
    }
    for (int row = 0; row < ROWS; row++)
        for (int part = 0; part < 4; part++) {
            __m512 value = _mm512_loadu_ps(total[row] + part * 16);
            if (bias) value = _mm512_add_ps(value, load16(bias + part * 16));
            store16(y + row * n + part * 16, value);
        }
}

template <class T>
TEAM void product(const T *x, i64 m, i64 k, i64 chunk, const T *w, i64 n, const T *bias, T *y) {
    static constexpr decltype(&panel<T, 1>) by_rows[] = {panel<T, 1>, panel<T, 2>, panel<T, 3>,
                                                         panel<T, 4>, panel<T, 5>, panel<T, 6>};
    const i64 passes = (m + MOST - 1) / MOST;
    // One pass fetches a little ahead of itself; of several, the first ones fetch the next panel.
    const int lines = passes == 1 ? 4 : passes < 4 ? 2 : 1;
    const i64 ahead = passes == 1 ? AHEAD : 64 * k * i64(sizeof(T));
#pragma omp for schedule(static)
    for (i64 at = 0; at < n / 64; at++) {
        const T *weights = w + at * 64 * k, *b = bias ? bias + at * 64 : nullptr;
        for (i64 row = 0, pass = 0; pass < passes; pass++) {
            i64 some = (m - row + passes - pass - 1) / (passes - pass);
            Fetch fetch{(const char *)weights + ahead + pass * lines * 64, pass * lines < 4 ? lines : 0};
            by_rows[some - 1](x + row * k, k, chunk, weights, b, y + row * n + at * 64, n, fetch);
            row += some;
        }
    }
}

// ---- element by element ------------------------------------------------------------------------------

static inline __mmask16 lanes(i64 count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }
static inline __m512 load_some(const float *p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
static inline __m512 load_some(const bf16 *p, __mmask16 m) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
static inline void store_some(float *p, __mmask16 m, __m512 x) { _mm512_mask_storeu_ps(p, m, x); }
static inline void store_some(bf16 *p, __mmask16 m, __m512 x) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x));
}
static inline __m512 rounded(__m512 x, float) { return x; }
static inline __m512 rounded(__m512 x, bf16) {
    __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// One row, y may be x. round_first: round x / rms(x) to T before the weight (Llama); else multiply first (Gemma).
template <class T>
static void norm_row(const T *x, i64 size, const float *weight, float eps, bool round_first, T *y) {
    __m512 sum = _mm512_setzero_ps();
    for (i64 at = 0; at < size; at += 16) {
        __m512 value = load_some(x + at, lanes(size - at));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(size) + eps);
    for (i64 at = 0; at < size; at += 16) {
        __mmask16 m = lanes(size - at);
        __m512 value = _mm512_mul_ps(load_some(x + at, m), _mm512_set1_ps(scale));
        if (round_first) value = rounded(value, T{});
        store_some(y + at, m, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(m, weight + at)));
    }
}

template <class T>
TEAM void norm(const T *x, i64 rows, i64 groups, i64 size, i64 row_stride, i64 group_stride, const float *weight,
               float eps, bool round_first, T *y) {
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row++)
        for (i64 group = 0; group < groups; group++)
            norm_row(x + row * row_stride + group * group_stride, size, weight, eps, round_first,
                     y + (row * groups + group) * size);
}

enum Activation { SILU = 0, GELU_TANH = 1 };

static inline __m512 activate(__m512 x, i64 kind) {
    __m512 one = _mm512_set1_ps(1.0f);
    if (kind == SILU) {
        __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
        return _mm512_div_ps(x, _mm512_add_ps(one, e));
    }
    __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
    __m512 t = tanh16(_mm512_mul_ps(inner, _mm512_set1_ps(0.79788456f)));
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), x), _mm512_add_ps(one, t));
}

template <class T> TEAM void gate(const T *x, i64 rows, i64 size, i64 kind, T *y) {
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row++) {
        const T *gates = x + row * 2 * size, *ups = gates + size;
        for (i64 at = 0; at < size; at += 16) {
            __mmask16 m = lanes(size - at);
            __m512 open = rounded(activate(load_some(gates + at, m), kind), T{});
            store_some(y + row * size + at, m, _mm512_mul_ps(open, load_some(ups + at, m)));
        }
    }
}

template <class T> static void add_row(T *x, const T *y, i64 size) {
    for (i64 at = 0; at < size; at += 16) {
        __mmask16 m = lanes(size - at);
        store_some(x + at, m, _mm512_add_ps(load_some(x + at, m), load_some(y + at, m)));
    }
}

template <class T> TEAM void add(T *x, const T *y, i64 rows, i64 size) {
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row++) add_row(x + row * size, y + row * size, size);
}

// Turns the leading 2 * half dimensions of one head in place.
template <class T> static void rotate_head(T *first, const float *cosines, const float *sines, i64 half) {
    T *second = first + half;
    for (i64 at = 0; at < half; at += 16) {
        __mmask16 m = lanes(half - at);
        __m512 cos = _mm512_maskz_loadu_ps(m, cosines + at), sin = _mm512_maskz_loadu_ps(m, sines + at);
        __m512 a = load_some(first + at, m), b = load_some(second + at, m);
        __m512 bs = _mm512_mul_ps(b, sin), as = _mm512_mul_ps(a, sin);
        store_some(first + at, m, _mm512_fmsub_ps(a, cos, bs));
        store_some(second + at, m, _mm512_fmadd_ps(b, cos, as));
    }
}

// x is [rows, heads, dim], row_stride apart; cosines and sines are [rows, half].
template <class T>
TEAM void rotate(T *x, i64 rows, i64 heads, i64 dim, i64 row_stride, const float *cosines, const float *sines,
                 i64 half) {
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row++)
        for (i64 head = 0; head < heads; head++)
            rotate_head(x + row * row_stride + head * dim, cosines + row * half, sines + row * half, half);
}

// ---- paged attention ---------------------------------------------------------------------------------

constexpr i64 TILE = 64;        // keys visited together
constexpr i64 QUERY_ROWS = 128; // (query, head) rows that share one visit of a tile

// What native.py passes; keep the two in step.
struct Attention {
    void *pool;            // [blocks, layers, 2, kv_heads, block_size, dim]
    i64 block_stride, layer_offset, block_size;
    i64 heads, kv_heads, dim;
    i64 window;            // 0: none
    float scale, softcap;  // softcap 0: none
    const void *q, *k, *v; // row_stride apart; q, k, v of the new tokens
    i64 q_stride, k_stride, v_stride;
    void *out;             // [tokens, heads * dim]
    i64 sequences;
    const i64 *first_rows;   // [sequences + 1]: each sequence's first token in the batch
    const i64 *contexts;     // [sequences]
    const i64 *first_blocks; // [sequences]: where its table starts in `blocks`
    const i64 *blocks;
    i64 pieces;              // how many (sequence, first query) there are
    const i64 *piece_sequence, *piece_query;
    i64 piece_queries;       // queries of a piece at most
};

static inline void transpose16(const void *const rows[16], i64 column, int32_t *out) {
    // out[16 * j + i] = dword `column + j` of row i
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512((const int32_t *)rows[i] + column);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(out + 16 * i, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(out + 16 * (i + 4), _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(out + 16 * (i + 8), _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_si512(out + 16 * (i + 12), _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

// One thread's room for a tile and for the rows that visit it.
template <class T> struct Scratch {
    i64 steps, columns;           // dwords of a key; dim rounded up to whole registers
    std::vector<int32_t> keys;    // [TILE / 16][steps][16]: dword `step` of 16 keys
    std::vector<T> values;        // [TILE / P][columns][P]
    std::vector<T> queries;       // [QUERY_ROWS][steps * P]
    std::vector<T> likely;        // [QUERY_ROWS][TILE]
    std::vector<float> total;     // [QUERY_ROWS][columns]
    std::vector<float> top, weight, keep;

    // The calling thread's own, kept from call to call.
    static Scratch &own(i64 dim) {
        static thread_local std::unique_ptr<Scratch> kept;
        static thread_local i64 kept_dim = 0;
        if (kept_dim != dim) kept.reset(new Scratch(dim)), kept_dim = dim;
        return *kept;
    }

    explicit Scratch(i64 dim)
        : steps((dim + PAIR<T> - 1) / PAIR<T>), columns((dim + 15) / 16 * 16), keys(TILE * steps),
          values(TILE * columns), queries(QUERY_ROWS * steps * PAIR<T>), likely(QUERY_ROWS * TILE),
          total(QUERY_ROWS * columns), top(QUERY_ROWS), weight(QUERY_ROWS), keep(QUERY_ROWS) {}
};

static inline void interleave(const float *const *values, i64 dim, float *out) {
    std::memcpy(out, values[0], dim * sizeof(float));
}
static inline void interleave(const bf16 *const *values, i64 dim, bf16 *out) {
    const uint16_t *even = (const uint16_t *)values[0], *odd = (const uint16_t *)values[1];
    uint32_t *pairs = (uint32_t *)out;
    for (i64 at = 0; at < dim; at++) pairs[at] = even[at] | uint32_t(odd[at]) << 16;
}

template <class T>
static void load_tile(const Attention &a, Scratch<T> &s, const i64 *table, i64 start, i64 count, i64 head) {
    constexpr int P = PAIR<T>;
    const T *keys[TILE], *values[TILE];
    const int shift = __builtin_ctzll(a.block_size); // a power of two
    for (i64 key = 0; key < TILE; key++) {
        i64 position = start + std::min(key, count - 1); // what lies beyond is hidden: any key will do
        const T *block = (const T *)a.pool + table[position >> shift] * a.block_stride + a.layer_offset;
        keys[key] = block + (head * a.block_size + (position & (a.block_size - 1))) * a.dim;
        values[key] = keys[key] + a.kv_heads * a.block_size * a.dim;
    }
    for (i64 group = 0; group < (count + 15) / 16; group++) {
        int32_t *out = s.keys.data() + group * s.steps * 16;
        if (a.dim % (16 * P) == 0) {
            for (i64 step = 0; step < s.steps; step += 16)
                transpose16((const void *const *)(keys + group * 16), step, out + step * 16);
        } else {
            for (i64 lane = 0; lane < 16; lane++)
                for (i64 step = 0; step < s.steps; step++) {
                    T pair[P] = {};
                    for (i64 p = 0; p < std::min<i64>(P, a.dim - step * P); p++)
                        pair[p] = keys[group * 16 + lane][step * P + p];
                    std::memcpy(out + step * 16 + lane, pair, 4);
                }
        }
    }
    for (i64 key = 0; key < (count + 15) / 16 * 16; key += P) {
        T *out = s.values.data() + key * s.columns;
        interleave(values + key, a.dim, out);
    }
}

// ROWS rows against the loaded tile's keys, GROUPS times 16 of them from `group` on.
template <class T, int ROWS, int GROUPS>
static inline void score_groups(const Scratch<T> &s, const T *q, i64 group, float (*scores)[TILE]) {
    constexpr int P = PAIR<T>;
    const T *keys = (const T *)(s.keys.data() + group * s.steps * 16);
    __m512 sum[ROWS][GROUPS];
    for (auto &row : sum)
        for (auto &each : row) each = _mm512_setzero_ps();
    for (i64 step = 0; step < s.steps; step++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++)
                sum[r][g] = multiply_add(sum[r][g], q + (r * s.steps + step) * P, keys + (g * s.steps + step) * 16 * P);
    for (int r = 0; r < ROWS; r++)
        for (int g = 0; g < GROUPS; g++) _mm512_storeu_ps(scores[r] + (group + g) * 16, sum[r][g]);
}

template <class T, int ROWS>
static void score(const Scratch<T> &s, i64 row, i64 groups, float (*scores)[TILE]) {
    const T *q = s.queries.data() + row * s.steps * PAIR<T>;
    i64 group = 0;
    for (; group + 2 <= groups; group += 2) score_groups<T, ROWS, 2>(s, q, group, scores);
    if (group < groups) score_groups<T, ROWS, 1>(s, q, group, scores);
}

// ROWS rows of likely times PARTS times 16 columns of the loaded tile's values, onto the totals scaled by `keep`.
template <class T, int ROWS, int PARTS> static inline void mix_columns(Scratch<T> &s, i64 row, i64 at, i64 groups) {
    constexpr int P = PAIR<T>;
    const T *likely = s.likely.data() + row * TILE;
    float *total = s.total.data() + row * s.columns + at;
    __m512 sum[ROWS][PARTS];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PARTS; p++)
            sum[r][p] = _mm512_mul_ps(_mm512_loadu_ps(total + r * s.columns + p * 16), _mm512_set1_ps(s.keep[row + r]));
    const T *values = s.values.data() + at * P;
    for (i64 key = 0; key < groups * 16; key += P)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++)
                sum[r][p] = multiply_add(sum[r][p], likely + r * TILE + key, values + key * s.columns + p * 16 * P);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PARTS; p++) _mm512_storeu_ps(total + r * s.columns + p * 16, sum[r][p]);
}

template <class T, int ROWS> static void mix(Scratch<T> &s, i64 row, i64 groups) {
    i64 at = 0;
    for (; at + 32 <= s.columns; at += 32) mix_columns<T, ROWS, 2>(s, row, at, groups);
    if (at < s.columns) mix_columns<T, ROWS, 1>(s, row, at, groups);
}

// Row `row` sees keys from .. to - 1 of the tile: softmax weights so far. Scores count in powers of two.
template <class T>
static void weigh(const Attention &a, Scratch<T> &s, i64 row, i64 from, i64 to, i64 groups, float *scores) {
    const float log2e = 1.44269504f;
    __m512 value[TILE / 16];
    __m512 best = _mm512_set1_ps(s.top[row]);
    bool all = from <= 0 && to >= groups * 16;
    for (i64 group = 0; group < groups; group++) {
        __m512 x = _mm512_loadu_ps(scores + group * 16);
        if (a.softcap != 0) {
            __m512 cap = _mm512_set1_ps(a.softcap);
            x = tanh16(_mm512_div_ps(_mm512_mul_ps(x, _mm512_set1_ps(a.scale)), cap));
            x = _mm512_mul_ps(x, _mm512_set1_ps(a.softcap * log2e));
        } else
            x = _mm512_mul_ps(x, _mm512_set1_ps(a.scale * log2e));
        if (!all) {
            __m512i number = _mm512_add_epi32(_mm512_set1_epi32(int(group * 16)),
                                              _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            __mmask16 seen = _mm512_cmpge_epi32_mask(number, _mm512_set1_epi32(int(from))) &
                             _mm512_cmplt_epi32_mask(number, _mm512_set1_epi32(int(to)));
            x = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), x);
        }
        value[group] = x;
        best = _mm512_max_ps(best, x);
    }
    float top = _mm512_reduce_max_ps(best);
    __m512 sum = _mm512_setzero_ps();
    for (i64 group = 0; group < groups; group++) {
        __m512 p = exp2_16(_mm512_sub_ps(value[group], _mm512_set1_ps(top)));
        if (!all) p = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value[group], _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ), p);
        sum = _mm512_add_ps(sum, p);
        store16(s.likely.data() + row * TILE + group * 16, p);
    }
    float before = s.top[row] == -INFINITY ? 0.0f
                                           : _mm512_cvtss_f32(exp2_16(_mm512_set1_ps(s.top[row] - top)));
    s.keep[row] = before;
    s.weight[row] = s.weight[row] * before + _mm512_reduce_add_ps(sum);
    s.top[row] = top;
}

// Queries first .. last - 1 of one sequence, the heads that share key head `head`.
template <class T> static void piece(const Attention &a, Scratch<T> &s, i64 number, i64 head) {
    constexpr int P = PAIR<T>;
    i64 sequence = a.piece_sequence[number], share = a.heads / a.kv_heads;
    i64 new_tokens = a.first_rows[sequence + 1] - a.first_rows[sequence];
    i64 first = a.piece_query[number], queries = std::min(a.piece_queries, new_tokens - first);
    i64 position = a.contexts[sequence] - new_tokens + first, token = a.first_rows[sequence] + first;
    const i64 *table = a.blocks + a.first_blocks[sequence];
    i64 rows = queries * share;
    std::fill_n(s.queries.begin(), rows * s.steps * P, T{});
    for (i64 row = 0; row < rows; row++)
        std::memcpy(s.queries.data() + row * s.steps * P,
                    (const T *)a.q + (token + row / share) * a.q_stride + (head * share + row % share) * a.dim,
                    a.dim * sizeof(T));
    std::fill_n(s.total.begin(), rows * s.columns, 0.0f);
    std::fill_n(s.weight.begin(), rows, 0.0f);
    std::fill_n(s.top.begin(), rows, -INFINITY);
    i64 oldest = a.window ? std::max<i64>(0, position - a.window + 1) : 0;
    for (i64 start = oldest / TILE * TILE; start < position + queries; start += TILE) {
        i64 count = std::min(TILE, position + queries - start), groups = (count + 15) / 16;
        load_tile(a, s, table, start, count, head);
        // Leading rows may see none of this tile, and under a window trailing ones neither.
        i64 from_query = std::max<i64>(0, start - position), to_query = queries;
        if (a.window) to_query = std::min(queries, start + TILE + a.window - 1 - position);
        for (i64 row = from_query * share; row < to_query * share;) {
            i64 left = to_query * share - row, some = left >= 8 ? 8 : left >= 4 ? 4 : 1;
            float scores[8][TILE];
            if (some == 8) score<T, 8>(s, row, groups, scores);
            else if (some == 4) score<T, 4>(s, row, groups, scores);
            else score<T, 1>(s, row, groups, scores);
            for (i64 r = 0; r < some; r++) {
                i64 at = position + (row + r) / share;
                i64 from = a.window ? std::max<i64>(0, at - a.window + 1 - start) : 0;
                weigh(a, s, row + r, from, std::min(count, at + 1 - start), groups, scores[r]);
            }
            if (some == 8) mix<T, 8>(s, row, groups);
            else if (some == 4) mix<T, 4>(s, row, groups);
            else mix<T, 1>(s, row, groups);
            row += some;
        }
    }
    for (i64 row = 0; row < rows; row++) {
        T *out = (T *)a.out + ((token + row / share) * a.heads + head * share + row % share) * a.dim;
        __m512 weight = _mm512_set1_ps(s.weight[row]);
        for (i64 at = 0; at < a.dim; at += 16)
            store_some(out + at, lanes(a.dim - at),
                       _mm512_div_ps(_mm512_loadu_ps(s.total.data() + row * s.columns + at), weight));
    }
}

template <class T> static void store_new(const Attention &a, i64 sequence, i64 at) {
    i64 row = a.first_rows[sequence] + at;
    i64 position = a.contexts[sequence] - (a.first_rows[sequence + 1] - a.first_rows[sequence]) + at;
    i64 block = a.blocks[a.first_blocks[sequence] + position / a.block_size];
    T *keys = (T *)a.pool + block * a.block_stride + a.layer_offset + position % a.block_size * a.dim;
    T *values = keys + a.kv_heads * a.block_size * a.dim;
    for (i64 head = 0; head < a.kv_heads; head++) {
        std::memcpy(keys + head * a.block_size * a.dim, (const T *)a.k + row * a.k_stride + head * a.dim,
                    a.dim * sizeof(T));
        // An overflow in one request must stay its own: hidden keys weigh 0, and 0 * inf is NaN.
        const T *v = (const T *)a.v + row * a.v_stride + head * a.dim;
        for (i64 i = 0; i < a.dim; i++)
            values[head * a.block_size * a.dim + i] = std::isfinite(wide(v[i])) ? v[i] : narrow<T>(0.0f);
    }
}

template <class T> TEAM void attend(const Attention &a) {
    for (i64 sequence = 0; sequence < a.sequences; sequence++) {
        i64 tokens = a.first_rows[sequence + 1] - a.first_rows[sequence];
#pragma omp for schedule(static) nowait
        for (i64 at = 0; at < tokens; at++) store_new<T>(a, sequence, at);
    }
#pragma omp barrier
    Scratch<T> &scratch = Scratch<T>::own(a.dim);
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < a.pieces * a.kv_heads; task++)
        piece(a, scratch, a.pieces - 1 - task / a.kv_heads, task % a.kv_heads);
}

// ---- whole layers ------------------------------------------------------------------------------------

// What stack.py passes; keep the two in step.
struct Norm {
    const float *weight; // null: no norm here
    float eps;
    int round_first;
};
struct Product {
    const void *panels, *bias;
    i64 in, out, chunk;
};
struct Turn {
    const float *cosines, *sines; // [rows, half]
    i64 half;
};
struct Layer {
    Norm before_attention, query, key, after_attention, before_mlp, after_mlp;
    Product qkv, out, gate_up, down;
    i64 activation, window;
    float scale, softcap;
    i64 turn; // which of the step's
};
struct Step {
    void *x;                                   // [rows, size], changed in place
    void *normed, *qkv, *mixed, *back, *wide, *gated; // room for a step's rows
    i64 rows, size;
    const Turn *turns;
    i64 layer_values;                          // distance of layers in a block of the pool
};

template <class T> static void norm_in_place(T *x, i64 size, const Norm &n) {
    if (n.weight) norm_row(x, size, n.weight, n.eps, n.round_first, x);
}

template <class T> TEAM void multiply(const Product &p, const void *x, i64 rows, void *y) {
    product((const T *)x, rows, p.in, p.chunk, (const T *)p.panels, p.out, (const T *)p.bias, (T *)y);
}

// x += norm(back), then normed = next(x) where there is a next part.
template <class T> TEAM void add_and_norm(const Step &s, const Norm &after, const Norm *next) {
#pragma omp for schedule(static)
    for (i64 row = 0; row < s.rows; row++) {
        T *x = (T *)s.x + row * s.size, *back = (T *)s.back + row * s.size;
        norm_in_place(back, s.size, after);
        add_row(x, back, s.size);
        if (next) norm_row(x, s.size, next->weight, next->eps, next->round_first, (T *)s.normed + row * s.size);
    }
}

template <class T> TEAM void stack(const Layer *layers, i64 count, const Step &s, Attention a) {
    const i64 turning = a.heads + a.kv_heads, stride = (turning + a.kv_heads) * a.dim;
    T *qkv = (T *)s.qkv;
    a.q = qkv, a.k = qkv + a.heads * a.dim, a.v = qkv + turning * a.dim, a.out = s.mixed;
    a.q_stride = a.k_stride = a.v_stride = stride;
    const Norm &first = layers[0].before_attention;
    norm((const T *)s.x, s.rows, 1, s.size, s.size, 0, first.weight, first.eps, first.round_first, (T *)s.normed);
    for (i64 number = 0; number < count; number++) {
        const Layer &layer = layers[number];
        const Turn &turn = s.turns[layer.turn];
        multiply<T>(layer.qkv, s.normed, s.rows, qkv);
#pragma omp for schedule(static)
        for (i64 row = 0; row < s.rows; row++)
            for (i64 head = 0; head < turning; head++) {
                T *x = qkv + row * stride + head * a.dim;
                norm_in_place(x, a.dim, head < a.heads ? layer.query : layer.key);
                rotate_head(x, turn.cosines + row * turn.half, turn.sines + row * turn.half, turn.half);
            }
        a.layer_offset = number * s.layer_values;
        a.window = layer.window, a.scale = layer.scale, a.softcap = layer.softcap;
        attend<T>(a);
        multiply<T>(layer.out, s.mixed, s.rows, s.back);
        add_and_norm<T>(s, layer.after_attention, &layer.before_mlp);
        multiply<T>(layer.gate_up, s.normed, s.rows, s.wide);
        gate((const T *)s.wide, s.rows, layer.down.in, layer.activation, (T *)s.gated);
        multiply<T>(layer.down, s.gated, s.rows, s.back);
        add_and_norm<T>(s, layer.after_mlp, number + 1 < count ? &layers[number + 1].before_attention : nullptr);
    }
}

// ---- what native.py binds: each function once per element type, with a team of so many threads --------

#define FOR_TYPE(name, T)                                                                                      \
    extern "C" void linear_##name(const T *x, i64 m, i64 k, i64 chunk, const T *w, i64 n, const T *bias, T *y, \
                                  int threads) {                                                               \
        _Pragma("omp parallel num_threads(threads)") product<T>(x, m, k, chunk, w, n, bias, y);                \
    }                                                                                                          \
    extern "C" void norm_##name(const T *x, i64 rows, i64 groups, i64 size, i64 row_stride, i64 group_stride,  \
                                const float *weight, float eps, int round_first, T *y, int threads) {          \
        _Pragma("omp parallel num_threads(threads) if (rows > 8)")                                             \
            norm<T>(x, rows, groups, size, row_stride, group_stride, weight, eps, round_first, y);             \
    }                                                                                                          \
    extern "C" void gate_##name(const T *x, i64 rows, i64 size, i64 kind, T *y, int threads) {                 \
        _Pragma("omp parallel num_threads(threads) if (rows > 4)") gate<T>(x, rows, size, kind, y);            \
    }                                                                                                          \
    extern "C" void add_##name(T *x, const T *y, i64 rows, i64 size, int threads) {                            \
        _Pragma("omp parallel num_threads(threads) if (rows > 8)") add<T>(x, y, rows, size);                   \
    }                                                                                                          \
    extern "C" void rotate_##name(T *x, i64 rows, i64 heads, i64 dim, i64 row_stride, const float *cos,        \
                                  const float *sin, i64 half, int threads) {                                   \
        _Pragma("omp parallel num_threads(threads) if (rows > 8)")                                             \
            rotate<T>(x, rows, heads, dim, row_stride, cos, sin, half);                                        \
    }                                                                                                          \
    extern "C" void attend_##name(const Attention *a, int threads) {                                           \
        _Pragma("omp parallel num_threads(threads)") attend<T>(*a);                                            \
    }                                                                                                          \
    extern "C" void stack_##name(const Layer *layers, i64 count, const Step *step, const Attention *a,         \
                                 int threads) {                                                                \
        _Pragma("omp parallel num_threads(threads)") stack<T>(layers, count, *step, *a);                       \
    }

FOR_TYPE(float32, float)
FOR_TYPE(bfloat16, bf16)
