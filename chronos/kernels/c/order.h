/* Products in the two orders of ATen's own bfloat16 products, which torch has where oneDNN has none:
 * included by the file of a CPU, which defines LANES (floats of a vector), TARGET, FMA of vectors,
 * FMA4 of four lanes, WIDEN (eight bfloat16 to twice four floats), INLINE, and decode_row (rows.h).
 *
 * DOTS, of a matrix whose rows lie one behind the other (ATen's native/cpu/
 * ReducedPrecisionFloatGemvFastPathKernel.cpp): eight vectors of sums take the columns by turns, and
 * are added by halves. FOURS, of one whose columns do (native/cpu/BlasKernel.cpp): four sums do.
 * Products of two bfloat16 are exact in float32, so fused or not makes no difference. Each row of x
 * has sums of its own, so its bits do not depend on how many rows are computed at once.
 */
#include "values.h"

enum {
    STEP = 8 * LANES, /* columns that the eight sums of DOTS take in a turn */
    PIECE = 1024,     /* columns of a row that are decoded at once */
    HELD = 4096,      /* numbers of x that are held in float32: they stay in the first cache */
    AHEAD = 2,        /* rows from what is computed to what is asked of the memory */
    ABREAST = 8,      /* rows of the matrix that FOURS computes at once */
};

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef float Four __attribute__((vector_size(16)));

/* Of neighbouring bfloat16 those at even and at odd places. The order of lanes is theirs until
 * sums are added across. */
INLINE Floats evens(Words two) { return (Floats)(two << 16); }
INLINE Floats odds(Words two) { return (Floats)(two & 0xffff0000); }

/* Where a row's columns are in bfloat16; decoded to `to` where they are not yet. */
INLINE const uint16_t *numbers(const Matrix *m, int64_t row, int64_t k, int64_t count, uint16_t *to)
{
    if (m->format == BF16)
        return (const uint16_t *)m->values + row * m->columns + k;
    decode_row(m, row, k, count, to);
    return to;
}

/* Parts of several rows, one after the other, are no pattern to a processor: they are asked for. */
INLINE void prefetch(const Matrix *m, int64_t row, int64_t k, int64_t count)
{
    if (row >= m->rows)
        return;
    const uint8_t *from = m->values + (row * m->columns + k) * m->bits / 8;
    for (int64_t i = 0; i < count * m->bits / 8; i += 64)
        __builtin_prefetch(from + i);
}

/* count is a constant wherever this is used. sums[i][2 p], [2 p + 1]: of vector pair p, evens and
 * odds. So many pairs at once that sums depend on each other late and registers suffice. */
INLINE void dot(const uint16_t *w, int64_t columns, const float *x, int64_t stride, int count,
                Floats sums[][8])
{
    const int pairs = count == 1 ? 4 : count == 2 ? 2 : 1;
    for (int from = 0; from < 4; from += pairs) {
        Floats even[4][4], odd[4][4];
        for (int i = 0; i < count; i++)
            for (int p = 0; p < pairs; p++)
                even[i][p] = sums[i][2 * (from + p)], odd[i][p] = sums[i][2 * (from + p) + 1];
        for (int64_t k = 2 * LANES * from; k < columns; k += STEP)
            for (int p = 0; p < pairs; p++) {
                const float *at = x + k + 2 * LANES * p;
                Words two = *(const Words *)(w + k + 2 * LANES * p);
                for (int i = 0; i < count; i++, at += stride) {
                    even[i][p] = FMA(*(const Floats *)at, evens(two), even[i][p]);
                    odd[i][p] = FMA(*(const Floats *)(at + LANES), odds(two), odd[i][p]);
                }
            }
        for (int i = 0; i < count; i++)
            for (int p = 0; p < pairs; p++)
                sums[i][2 * (from + p)] = even[i][p], sums[i][2 * (from + p) + 1] = odd[i][p];
    }
}

INLINE float across(const float lanes[LANES])
{
    float sum[LANES];
    memcpy(sum, lanes, sizeof sum);
#if defined(__aarch64__)
    for (int n = LANES / 2; n; n /= 2) /* as FADDP, by neighbours */
        for (int i = 0; i < n; i++)
            sum[i] = sum[2 * i] + sum[2 * i + 1];
#else
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            sum[i] += sum[n + i];
#endif
    return sum[0];
}

/* The sum of a row, from its eight sums and from the columns behind the last whole turn. */
INLINE float sum_up(const Floats sums[8], const uint16_t *w, const uint16_t *x, int64_t rest)
{
    Floats even = (sums[0] + sums[4]) + (sums[2] + sums[6]);
    Floats odd = (sums[1] + sums[5]) + (sums[3] + sums[7]);
    float lanes[LANES], last[LANES] = {0};
    for (int i = 0; i < LANES / 2; i++) {
        lanes[2 * i] = even[i] + even[LANES / 2 + i];
        lanes[2 * i + 1] = odd[i] + odd[LANES / 2 + i];
    }
    for (int64_t k = 0; k < rest; k += LANES)
        for (int i = 0; i < LANES; i++)
            last[i] = __builtin_fmaf(from_bf16(x[k + i]), from_bf16(w[k + i]), last[i]);
    return across(lanes) + across(last);
}

INLINE void finish(const Product *p, int64_t row, float sum, uint16_t *out)
{
    *out = to_bf16(p->bias ? sum + from_bf16(p->bias[row]) : sum);
}

static TARGET void dots(const Product *p, int64_t row, uint16_t out[MOST_ROWS][BLOCK])
{
    const Matrix *m = &p->matrix;
    const int count = (int)p->count;
    const int64_t rows = m->rows - row < BLOCK ? m->rows - row : BLOCK, columns = m->columns;
    const int64_t whole = columns / STEP * STEP, most = HELD / count / STEP * STEP;
    Floats sums[BLOCK][MOST_ROWS][8];
    float x[HELD];
    uint16_t decoded[PIECE];
    for (int64_t n = 0; n < rows; n++)
        memset(sums[n], 0, (size_t)count * sizeof sums[n][0]);
    for (int64_t from = 0; from < whole; from += most) {
        int64_t held = whole - from < most ? whole - from : most;
        for (int i = 0; i < count; i++)
            for (int64_t k = 0; k < held; k += 2 * LANES) {
                Words two = *(const Words *)((const uint16_t *)p->x + i * columns + from + k);
                *(Floats *)(x + i * held + k) = evens(two);
                *(Floats *)(x + i * held + k + LANES) = odds(two);
            }
        for (int64_t n = 0; n < rows; n++)
            for (int64_t k = 0; k < held; k += PIECE) {
                int64_t wide = held - k < PIECE ? held - k : PIECE;
                prefetch(m, row + n + AHEAD, from + k, wide);
                const uint16_t *w = numbers(m, row + n, from + k, wide, decoded);
                for (int i = 0; i < count; i += 4) {
                    const float *at = x + i * held + k;
                    switch (count - i) {
                    case 1: dot(w, wide, at, held, 1, sums[n] + i); break;
                    case 2: dot(w, wide, at, held, 2, sums[n] + i); break;
                    case 3: dot(w, wide, at, held, 3, sums[n] + i); break;
                    default: dot(w, wide, at, held, 4, sums[n] + i); break;
                    }
                }
            }
    }
    for (int64_t n = 0; n < rows; n++) {
        int64_t rest = columns - whole;
        const uint16_t *w = rest ? numbers(m, row + n, whole, rest, decoded) : NULL;
        for (int i = 0; i < count; i++) {
            const uint16_t *last = (const uint16_t *)p->x + i * columns + whole;
            finish(p, row + n, sum_up(sums[n][i], w, last, rest), &out[i][n]);
        }
    }
}

/* count and rows are constants wherever this is used. */
INLINE void four(const uint16_t *w[ABREAST], int rows, int64_t columns, const uint16_t *x,
                 int64_t stride, int count, Four sums[][MOST_ROWS])
{
    Four sum[ABREAST][2];
    for (int n = 0; n < rows; n++)
        for (int i = 0; i < count; i++)
            sum[n][i] = sums[n][i];
    for (int64_t k = 0; k < columns; k += 8) {
        Four first[2], second[2], low, high;
        for (int i = 0; i < count; i++)
            WIDEN(x + i * stride + k, first[i], second[i]);
        for (int n = 0; n < rows; n++) {
            WIDEN(w[n] + k, low, high);
            for (int i = 0; i < count; i++) {
                sum[n][i] = FMA4(first[i], low, sum[n][i]);
                sum[n][i] = FMA4(second[i], high, sum[n][i]);
            }
        }
    }
    for (int n = 0; n < rows; n++)
        for (int i = 0; i < count; i++)
            sums[n][i] = sum[n][i];
}

static TARGET void fours(const Product *p, int64_t row, uint16_t out[MOST_ROWS][BLOCK])
{
    const Matrix *m = &p->matrix;
    const int count = (int)p->count;
    const int64_t rows = m->rows - row < BLOCK ? m->rows - row : BLOCK, columns = m->columns;
    uint16_t decoded[ABREAST][PIECE / 2];
    for (int64_t from = 0; from < rows; from += ABREAST) {
        Four sums[ABREAST][MOST_ROWS] = {{{0}}};
        for (int64_t k = 0; k < columns; k += PIECE / 2) {
            int64_t wide = columns - k < PIECE / 2 ? columns - k : PIECE / 2;
            const uint16_t *w[ABREAST];
            for (int n = 0; n < ABREAST; n++) { /* rows beyond the last are the last one again */
                int64_t at = from + n < rows ? from + n : rows - 1;
                w[n] = from + n < rows || !n ? numbers(m, row + at, k, wide, decoded[n]) : w[n - 1];
            }
            for (int i = 0; i < count; i += 2) {
                const uint16_t *x = (const uint16_t *)p->x + i * columns + k;
                if (count - i == 1) {
                    four(w, ABREAST, wide, x, columns, 1, (Four(*)[MOST_ROWS])&sums[0][i]);
                    continue;
                }
                for (int n = 0; n < ABREAST; n += 4)
                    four(w + n, 4, wide, x, columns, 2, (Four(*)[MOST_ROWS])&sums[n][i]);
            }
        }
        for (int64_t n = from; n < rows && n < from + ABREAST; n++)
            for (int i = 0; i < count; i++) {
                Four s = sums[n - from][i];
                finish(p, row + n, ((s[0] + s[1]) + s[2]) + s[3], &out[i][n]);
            }
    }
}
