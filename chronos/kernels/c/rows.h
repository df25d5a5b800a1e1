/* Rows of a packed matrix as bfloat16, group of columns by group: included by the file of a CPU, which
 * defines TARGET and INLINE and has the instructions: a Table of sixteen values, what makes one
 * (`table_of`, `sixteen_values`), and what decodes 32 columns (`look_up`, `e4m3`, `integers`).
 */
#include "values.h"

static uint8_t mxfp4[256][2][16]; /* of each scale the low bytes of its sixteen values, and the high */

static void set_mxfp4(void)
{
    for (int scale = 0; scale < 256; scale++)
        for (int code = 0; code < 16; code++) {
            uint8_t one = (uint8_t)scale;
            uint16_t value = to_bf16(E2M1[code] * number(&one, SCALE_E8M0, 0));
            mxfp4[scale][0][code] = (uint8_t)value, mxfp4[scale][1][code] = (uint8_t)(value >> 8);
        }
}

/* Columns k to k + count of a row, both multiples of 32, as are groups. format and bits are
 * constants wherever this is used. */
INLINE void decode_as(const Matrix *m, int format, int bits, int64_t row, int64_t k, int64_t count,
                      uint16_t *out)
{
    const uint8_t *codes = m->values + (row * m->columns + k) * bits / 8;
    const int mx = format == FP4 && m->scale_type == SCALE_E8M0 && m->down == 1 && !m->divisor;
    int64_t end = k + count;
    for (int64_t g = k / m->across; k < end; g++) {
        int64_t stop = (g + 1) * m->across < end ? (g + 1) * m->across : end;
        Table table = table_of(mxfp4[0]);
        Group group = {0, 0};
        if (mx) {
            uint8_t scale = ((const uint8_t *)m->scales)[row * m->groups + g];
            table = table_of(mxfp4[scale]);
        } else {
            group = group_of(m, format, row, g);
            if (bits == 4)
                table = sixteen_values(m, format, group);
        }
        for (; k < stop; k += 32, codes += 4 * bits, out += 32) {
            if (bits == 4)
                look_up(codes, table, out);
            else if (format == FP8)
                e4m3(codes, group.scale, out);
            else
                integers(m, format, codes, group, out);
        }
    }
}

static TARGET void decode_row(const Matrix *m, int64_t row, int64_t k, int64_t count, uint16_t *out)
{
    if (m->codes_lie) {
        uint32_t codes[GATHERED / 4];
        for (int64_t some; count; k += some, count -= some, out += some) {
            some = count < GATHERED ? count : GATHERED;
            Matrix part = gathered(m, row, k, some, codes);
            decode_row(&part, row, k, some, out);
        }
        return;
    }
    switch (m->across % 32 && m->across < m->columns ? -1 : m->format << 4 | m->bits) {
    case FP4 << 4 | 4: decode_as(m, FP4, 4, row, k, count, out); break;
    case FP8 << 4 | 8: decode_as(m, FP8, 8, row, k, count, out); break;
    case AFFINE << 4 | 4: decode_as(m, AFFINE, 4, row, k, count, out); break;
    case AFFINE << 4 | 8: decode_as(m, AFFINE, 8, row, k, count, out); break;
    case INTEGER << 4 | 4: decode_as(m, INTEGER, 4, row, k, count, out); break;
    case INTEGER << 4 | 8: decode_as(m, INTEGER, 8, row, k, count, out); break;
    default: chronos_decode(m, row, 1, k, count, out, 0);
    }
}

static TARGET void decode(const Matrix *m, int64_t row, int64_t rows, uint16_t *out)
{
    for (int64_t r = 0; r < rows; r++)
        decode_row(m, row + r, 0, m->columns, out + r * m->columns);
}
