/* Products as oneDNN's bfloat16 kernels for AVX-512 compute them for one row, to the last bit.
 *
 * The order of a sum, as found by masking terms of the library's own product: pairs of columns by
 * VDPBF16PS into an accumulator that is fresh every 512 columns; accumulators are added in order.
 * Whether the library at hand does the same is tried before any of this is used. Each row of x has
 * sums of its own, so its bits do not depend on how many rows are computed at once.
 *
 * Sixteen rows of the matrix are computed side by side, one in each lane: their codes are decoded
 * row by row and transposed, 16 bytes at a time, into a panel of pairs of columns.
 */
#include "values.h"

#include <stddef.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi")))
#define INLINE static inline __attribute__((always_inline)) AVX512

enum { LANES = 16, SIDES = BLOCK / LANES, CHUNK = 128, AHEAD = 256, FRESH = 512 };

typedef uint32_t __attribute__((aligned(2), may_alias)) Pair; /* of neighbouring bfloat16 */

static uint8_t e4m3_low[128], e4m3_high[128]; /* bytes of E4M3's magnitudes as bfloat16 */
static uint16_t fp4_values[32];               /* twice */
static uint64_t fp4_places[4][8];             /* where a byte's codes lie, for each byte of a word */
static uint16_t woven[32];                    /* 0, 16, 1, 17, ...: two halves, by turns */

INLINE __m512 widened(__m256i values)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

/* Rounded to bfloat16, denormal numbers too, which conversions of the CPU make zero. */
INLINE __m512 round_bf16(__m512 values)
{
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE __m512 round_scale(int32_t type, __m512 values)
{
    if (type == SCALE_BF16)
        return round_bf16(values);
    if (type == SCALE_F16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    return values;
}

/* What integer codes stand for, in float32 that bfloat16 rounds as the format does. */
INLINE __m512 of_integers(const Matrix *m, int format, __m512 codes, __m512 scale, __m512 zero)
{
    if (format == AFFINE) {
        __m512 scaled = round_scale(m->scale_type, _mm512_mul_ps(codes, scale));
        codes = _mm512_add_ps(scaled, zero);
    } else {
        codes = _mm512_mul_ps(_mm512_sub_ps(codes, zero), scale);
    }
    return m->scale_type == SCALE_F16 ? round_scale(SCALE_F16, codes) : codes;
}

/* As `number` has them. */
INLINE __m512 load_floats(__mmask16 there, const float *from)
{
    __m512 values = _mm512_maskz_loadu_ps(there, from);
    __mmask16 none = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(values, none, _mm512_set1_ps(__builtin_nanf("")));
}

/* Scales and zeros, in float32, of the groups of a row from group g on; up to sixteen. */
INLINE void load_groups(const Matrix *m, int format, int64_t row, int64_t g, int64_t count,
                        float scale[16], float zero[16])
{
    const __mmask16 there = (__mmask16)((1u << count) - 1);
    const int64_t at = (m->down == 1 ? row : row / m->down) * m->groups + g;
    if (m->scales_lie) {
        for (int64_t i = 0; i < count; i++) {
            Group group = group_of(m, format, row, g + i);
            scale[i] = group.scale, zero[i] = group.zero;
        }
        return;
    }
    const uint16_t *halves = (const uint16_t *)m->scales + at;
    __m512 scales;
    switch (m->scale_type) {
    case SCALE_F32: scales = load_floats(there, (const float *)m->scales + at); break;
    case SCALE_BF16: scales = widened(_mm256_maskz_loadu_epi16(there, halves)); break;
    case SCALE_F16: scales = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, halves)); break;
    case SCALE_E8M0: {
        const uint8_t *from = (const uint8_t *)m->scales + at;
        __m512i exponents = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, from));
        __mmask16 least = _mm512_cmpeq_epi32_mask(exponents, _mm512_setzero_si512());
        exponents = _mm512_slli_epi32(exponents, 23);
        exponents = _mm512_mask_mov_epi32(exponents, least, _mm512_set1_epi32(1 << 22));
        scales = _mm512_castsi512_ps(exponents);
        break;
    }
    default:
        for (int64_t i = 0; i < count; i++)
            scale[i] = from_e4m3(((const uint8_t *)m->scales)[at + i]);
        scales = _mm512_maskz_loadu_ps(there, scale);
    }
    if (m->divisor)
        scales = _mm512_div_ps(scales, _mm512_set1_ps(*m->divisor));
    _mm512_storeu_ps(scale, scales);
    if (format == AFFINE) {
        const uint16_t *biases = (const uint16_t *)m->zeros + at;
        if (m->scale_type == SCALE_F32)
            _mm512_storeu_ps(zero, load_floats(there, (const float *)m->zeros + at));
        else if (m->scale_type == SCALE_BF16)
            _mm512_storeu_ps(zero, widened(_mm256_maskz_loadu_epi16(there, biases)));
        else
            _mm512_storeu_ps(zero, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, biases)));
    } else if (format == INTEGER && m->zeros) {
        const int each = 32 / m->bits;
        const uint32_t *words = (const uint32_t *)m->zeros + row / each * m->groups + g;
        __m512i codes = _mm512_srlv_epi32(_mm512_maskz_loadu_epi32(there, words),
                                          _mm512_set1_epi32((int)(row % each) * m->bits));
        codes = _mm512_and_si512(codes, _mm512_set1_epi32((1 << m->bits) - 1));
        _mm512_storeu_ps(zero, _mm512_cvtepi32_ps(codes));
    } else {
        _mm512_storeu_ps(zero, _mm512_set1_ps((float)(1 << (m->bits - 1))));
    }
}

/* Two vectors to bfloat16, low half first. kept: denormal numbers stay, which VDPBF16PS takes for
 * zeros anyway. */
INLINE __m512i to_bf16s(__m512 low, __m512 high, int kept)
{
    if (!kept)
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    __m512i a = _mm512_srli_epi32(_mm512_castps_si512(round_bf16(low)), 16);
    __m512i b = _mm512_srli_epi32(_mm512_castps_si512(round_bf16(high)), 16);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)),
                              _mm512_cvtepi32_epi16(b), 1);
}

/* The 32 columns of four bits at `codes`: each code is looked up in its row's sixteen values. The
 * lookup minds five bits of each word, of which the fifth makes no difference. */
INLINE __m512i look_up(const uint8_t *codes, __m512i table)
{
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    return _mm512_permutexvar_epi16(_mm512_or_si512(both, _mm512_slli_epi32(both, 12)), table);
}

INLINE __m512i sixteen_values(const Matrix *m, int format, float scale, float zero)
{
    const __m512 counted = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 scales = _mm512_set1_ps(scale), values;
    if (format == FP4)
        values = _mm512_mul_ps(_mm512_loadu_ps(E2M1), scales);
    else
        values = of_integers(m, format, counted, scales, _mm512_set1_ps(zero));
    return to_bf16s(values, values, 1);
}

INLINE __m512i integers(const Matrix *m, int format, const uint8_t *codes, float scale, float zero,
                        int kept)
{
    __m512 half[2];
    for (int h = 0; h < 2; h++) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + 16 * h));
        __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        half[h] = of_integers(m, format, numbers, _mm512_set1_ps(scale), _mm512_set1_ps(zero));
    }
    return to_bf16s(half[0], half[1], kept);
}

/* E4M3 has few magnitudes: their bfloat16 is looked up by halves, then multiplied. */
INLINE __m512i e4m3(const uint8_t *codes, float scale, int kept)
{
    const __m512i low0 = _mm512_loadu_si512(e4m3_low), low1 = _mm512_loadu_si512(e4m3_low + 64);
    const __m512i high0 = _mm512_loadu_si512(e4m3_high), high1 = _mm512_loadu_si512(e4m3_high + 64);
    /* Each code twice: as the low and as the high byte of its value. */
    __m512i twice = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    twice = _mm512_or_si512(twice, _mm512_slli_epi16(twice, 8));
    __m512i low = _mm512_permutex2var_epi8(low0, twice, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, twice, high1);
    __m512i value = _mm512_mask_mov_epi8(low, 0xaaaaaaaaaaaaaaaa, high);
    value = _mm512_ternarylogic_epi32(value, twice, _mm512_set1_epi16((short)0x8000), 0xf8);
    __m512 scales = _mm512_set1_ps(scale);
    __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(value, 16));
    __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(value, _mm512_set1_epi32((int)0xffff0000)));
    value = to_bf16s(_mm512_mul_ps(even, scales), _mm512_mul_ps(odd, scales), kept);
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(woven), value);
}

/* Columns k to k + count of a row, both multiples of 32, as are groups. format and bits are
 * constants wherever this is used. */
INLINE void decode_as(const Matrix *m, int format, int bits, int64_t row, int64_t k, int64_t count,
                      uint16_t *out, int kept)
{
    const uint8_t *codes = m->values + (row * m->columns + k) * bits / 8;
    float scale[16], zero[16];
    int64_t g = k / m->across, end = k + count, loaded = 0, i = 0;
    __m512i table = _mm512_setzero_si512();
    for (; k < end; g++, i++) {
        int64_t stop = (g + 1) * m->across < end ? (g + 1) * m->across : end;
        if (i == loaded) {
            loaded = (end - 1) / m->across + 1 - g, loaded = loaded < 16 ? loaded : 16, i = 0;
            load_groups(m, format, row, g, loaded, scale, zero);
        }
        if (bits == 4)
            table = sixteen_values(m, format, scale[i], zero[i]);
        for (; k < stop; k += 32, codes += 4 * bits, out += 32) {
            __m512i values;
            if (bits == 4)
                values = look_up(codes, table);
            else if (format == FP8)
                values = e4m3(codes, scale[i], kept);
            else
                values = integers(m, format, codes, scale[i], zero[i], kept);
            _mm512_storeu_si512(out, values);
        }
    }
}

INLINE void decode_lying(const Matrix *m, int64_t row, int64_t k, int64_t count, uint16_t *out,
                       int kept)
{
    switch (m->across % 32 && m->across < m->columns ? -1 : m->format << 4 | m->bits) {
    case FP4 << 4 | 4: decode_as(m, FP4, 4, row, k, count, out, kept); break;
    case FP8 << 4 | 8: decode_as(m, FP8, 8, row, k, count, out, kept); break;
    case AFFINE << 4 | 4: decode_as(m, AFFINE, 4, row, k, count, out, kept); break;
    case AFFINE << 4 | 8: decode_as(m, AFFINE, 8, row, k, count, out, kept); break;
    case INTEGER << 4 | 4: decode_as(m, INTEGER, 4, row, k, count, out, kept); break;
    case INTEGER << 4 | 8: decode_as(m, INTEGER, 8, row, k, count, out, kept); break;
    default: chronos_decode(m, row, 1, k, count, out, 0);
    }
}

INLINE void decode_row(const Matrix *m, int64_t row, int64_t k, int64_t count, uint16_t *out,
                       int kept)
{
    if (!m->codes_lie) {
        decode_lying(m, row, k, count, out, kept);
        return;
    }
    uint32_t codes[GATHERED / 4];
    for (int64_t some; count; k += some, count -= some, out += some) {
        some = count < GATHERED ? count : GATHERED;
        Matrix part = gathered(m, row, k, some, codes);
        decode_lying(&part, row, k, some, out, kept);
    }
}

static AVX512 void decode(const Matrix *m, int64_t row, int64_t rows, uint16_t *out)
{
    for (int64_t r = 0; r < rows; r++)
        decode_row(m, row + r, 0, m->columns, out + r * m->columns, 1);
}

/* Sixteen rows of up to 64 bytes to sixteen columns of 32 bits: out[d] has bytes 4 d to 4 d + 3 of
 * each row. stride: bytes from row to row; rows beyond `rows` are the last one again. */
INLINE void transpose(const uint8_t *from, int64_t stride, int64_t rows, int64_t bytes,
                      __m512i out[LANES])
{
    const __mmask64 there = bytes < 64 ? (1ull << bytes) - 1 : ~0ull;
    __m512i quad[4][4]; /* lane i of quad[q][j]: bytes 16 i + 4 j of rows 4 q to 4 q + 3 */
    for (int q = 0; q < 4; q++) {
        __m512i row[4];
        for (int r = 0; r < 4; r++) {
            int64_t n = 4 * q + r < rows ? 4 * q + r : rows - 1;
            row[r] = _mm512_maskz_loadu_epi8(there, from + n * stride);
        }
        __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpacklo_epi32(row[2], row[3]);
        __m512i c = _mm512_unpackhi_epi32(row[0], row[1]), d = _mm512_unpackhi_epi32(row[2], row[3]);
        quad[q][0] = _mm512_unpacklo_epi64(a, b), quad[q][1] = _mm512_unpackhi_epi64(a, b);
        quad[q][2] = _mm512_unpacklo_epi64(c, d), quad[q][3] = _mm512_unpackhi_epi64(c, d);
    }
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(quad[0][j], quad[1][j], 0x44);
        __m512i b = _mm512_shuffle_i32x4(quad[0][j], quad[1][j], 0xee);
        __m512i c = _mm512_shuffle_i32x4(quad[2][j], quad[3][j], 0x44);
        __m512i d = _mm512_shuffle_i32x4(quad[2][j], quad[3][j], 0xee);
        out[j] = _mm512_shuffle_i32x4(a, c, 0x88), out[4 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        out[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88), out[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* 128 columns of sixteen rows of FP4 with scales that are powers of two, of 32 columns each: the
 * codes are transposed as they are, and a scale is added to the exponent of what is not zero.
 * Returns whether all scales were such that this is right. */
INLINE int fill_mx(const Matrix *m, int64_t row, int64_t rows, int64_t k, int64_t count,
                   __m512i *panel)
{
    const uint8_t *scales = (const uint8_t *)m->scales + row * m->groups + k / 32;
    __m512i codes[LANES], exponents;
    uint32_t four[LANES];
    for (int r = 0; r < LANES; r++) {
        four[r] = 0x7f7f7f7f;
        memcpy(&four[r], scales + (r < rows ? r : rows - 1) * m->groups, (size_t)count / 32);
    }
    exponents = _mm512_loadu_si512(four);
    /* 3 to 252: no value leaves bfloat16's normal numbers. */
    if (_mm512_cmpgt_epu8_mask(_mm512_sub_epi8(exponents, _mm512_set1_epi8(3)),
                               _mm512_set1_epi8((char)249)))
        return 0;
    transpose(m->values + (row * m->columns + k) / 2, m->columns / 2, rows, count / 2, codes);
    /* Of each byte of a word its low four bits at 0 and its high four bits at 16. */
    const __m512i magnitude = _mm512_set1_epi16(7), values = _mm512_loadu_si512(fp4_values);
    const __m512i bias = _mm512_set1_epi16(127 << 7);
    for (int g = 0; g < count / 32; g++) {
        __m512i scale = _mm512_and_si512(_mm512_srlv_epi32(exponents, _mm512_set1_epi32(8 * g)),
                                         _mm512_set1_epi32(255));
        scale = _mm512_or_si512(_mm512_slli_epi32(scale, 7), _mm512_slli_epi32(scale, 23));
        scale = _mm512_sub_epi16(scale, bias);
        for (int d = 0; d < 4; d++)
            for (int b = 0; b < 4; b++) {
                __m512i code = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(fp4_places[b]),
                                                            codes[4 * g + d]);
                __m512i value = _mm512_permutexvar_epi16(code, values);
                __mmask32 some = _mm512_test_epi16_mask(code, magnitude);
                *panel++ = _mm512_mask_add_epi16(value, some, value, scale);
            }
    }
    return 1;
}

INLINE void fill(const Matrix *m, int64_t row, int64_t rows, int64_t k, int64_t count,
                 __m512i *panel)
{
    uint16_t decoded[LANES][CHUNK];
    if (m->format == BF16) {
        const uint8_t *from = m->values + 2 * (row * m->columns + k);
        for (int64_t i = 0; i < 2 * count; i += 64)
            transpose(from + i, 2 * m->columns, rows, 2 * count - i, panel + i / 4);
        return;
    }
    if (m->format == FP4 && m->scale_type == SCALE_E8M0 && m->across == 32 &&
        fill_mx(m, row, rows, k, count, panel))
        return;
    for (int64_t r = 0; r < rows && r < LANES; r++)
        decode_row(m, row + r, k, count, decoded[r], 0);
    for (int64_t i = 0; i < count; i += 32)
        transpose((const uint8_t *)&decoded[0][i], sizeof decoded[0], rows, 64, panel + i / 2);
}

/* count is a constant wherever this is used. */
INLINE void dot(__m512i panel[SIDES][CHUNK / 2], int64_t pairs, const uint16_t *x, int64_t stride,
                int count, __m512 sums[][SIDES])
{
    __m512 sum[4][SIDES];
    for (int i = 0; i < count; i++)
        for (int s = 0; s < SIDES; s++)
            sum[i][s] = sums[i][s];
    for (int64_t p = 0; p < pairs; p++)
        for (int i = 0; i < count; i++) {
            __m512bh two = (__m512bh)_mm512_set1_epi32((int)*(const Pair *)(x + i * stride + 2 * p));
            for (int s = 0; s < SIDES; s++)
                sum[i][s] = _mm512_dpbf16_ps(sum[i][s], two, (__m512bh)panel[s][p]);
        }
    for (int i = 0; i < count; i++)
        for (int s = 0; s < SIDES; s++)
            sums[i][s] = sum[i][s];
}

/* The processor sees no pattern in so many rows at once. Behind the last column: the next block. */
INLINE void prefetch(const Matrix *m, int64_t row, int64_t rows, int64_t k)
{
    if (k >= m->columns)
        row += BLOCK, k -= (m->columns + CHUNK - 1) / CHUNK * CHUNK;
    if (row + rows > m->rows || k >= m->columns)
        return;
    int64_t stride = m->columns * m->bits / 8, bytes = CHUNK * m->bits / 8;
    const uint8_t *from = m->values + row * stride + k * m->bits / 8;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < bytes; i += 64)
            _mm_prefetch((const char *)(from + r * stride + i), _MM_HINT_T0);
}

static AVX512 void block(const Product *p, int64_t row, uint16_t out[MOST_ROWS][BLOCK])
{
    const Matrix *m = &p->matrix;
    const int count = (int)p->count;
    __m512 total[MOST_ROWS][SIDES], sums[MOST_ROWS][SIDES];
    __m512i panel[SIDES][CHUNK / 2];
    int64_t rows = m->rows - row < BLOCK ? m->rows - row : BLOCK;
    for (int64_t k = 0; k < m->columns; k += CHUNK) {
        int64_t columns = m->columns - k < CHUNK ? m->columns - k : CHUNK;
        prefetch(m, row, rows, k + AHEAD);
        for (int64_t s = 0; s < SIDES && s * LANES < rows; s++)
            fill(m, row + s * LANES, rows - s * LANES, k, columns, panel[s]);
        if (k % FRESH == 0)
            memset(sums, 0, sizeof sums);
        for (int i = 0; i < count; i += 4) {
            const uint16_t *x = (const uint16_t *)p->x + i * m->columns + k;
            switch (count - i) {
            case 1: dot(panel, columns / 2, x, m->columns, 1, sums + i); break;
            case 2: dot(panel, columns / 2, x, m->columns, 2, sums + i); break;
            case 3: dot(panel, columns / 2, x, m->columns, 3, sums + i); break;
            default: dot(panel, columns / 2, x, m->columns, 4, sums + i); break;
            }
        }
        if (k % FRESH == FRESH - CHUNK || k + CHUNK >= m->columns)
            for (int i = 0; i < count; i++)
                for (int s = 0; s < SIDES; s++)
                    total[i][s] = k < FRESH ? sums[i][s] : _mm512_add_ps(total[i][s], sums[i][s]);
    }
    for (int i = 0; i < count; i++)
        for (int s = 0; s < SIDES; s++) {
            __m512 y = total[i][s];
            if (p->bias && s * LANES < rows) {
                __mmask16 there = (__mmask16)((1u << (rows - s * LANES < LANES ? rows - s * LANES : LANES)) - 1);
                __m256i bias = _mm256_maskz_loadu_epi16(there, p->bias + row + s * LANES);
                y = _mm512_add_ps(y, widened(bias));
            }
            _mm256_storeu_si256((__m256i *)(out[i] + s * LANES), (__m256i)_mm512_cvtneps_pbh(y));
        }
}

void chronos_avx512(Kernels *kernels)
{
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")))
        return;
    for (uint32_t code = 0; code < 128; code++) {
        uint16_t value = to_bf16(from_e4m3(code));
        e4m3_low[code] = (uint8_t)value, e4m3_high[code] = (uint8_t)(value >> 8);
    }
    for (int b = 0; b < 4; b++) /* from word to word of a pair of words: 32 bits */
        for (int q = 0; q < 8; q++)
            fp4_places[b][q] = 0x2020202000000000ull + 0x0000000000040000ull * 0x100000001ull +
                               0x0101010101010101ull * (uint64_t)(8 * b);
    for (uint16_t i = 0; i < 32; i++)
        fp4_values[i] = to_bf16(E2M1[i & 15]), woven[i] = (uint16_t)(i / 2 + 16 * (i & 1));
    kernels->block[PAIRS] = block;
    kernels->decode = decode;
}

#else
void chronos_avx512(Kernels *kernels)
{
    (void)kernels;
}
#endif
