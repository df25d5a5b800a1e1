/* Quantised matrices as bfloat16, in plain C: what every CPU can do.
 *
 * Each value is computed in float32 and rounded as the library whose format it is rounds it; the
 * same formulas, in torch, are backends/torch/quantised.py. Formats: OCP Microscaling (MX) 1.0,
 * "OCP 8-bit Floating Point" 1.0 (E4M3), MLX's affine, compressed-tensors.
 */
#include "values.h"

static inline uint16_t value_of(const Matrix *m, Group group, uint32_t code)
{
    switch (m->format) {
    case FP4: return to_bf16(E2M1[code] * group.scale);
    case FP8: return to_bf16(from_e4m3(code) * group.scale);
    case AFFINE: {
        float scaled = rounded(m->scale_type, (float)code * group.scale);
        return to_bf16(rounded(m->scale_type, scaled + group.zero));
    }
    default: return to_bf16(rounded(m->scale_type, ((float)code - group.zero) * group.scale));
    }
}

static inline uint32_t code_of(const Matrix *m, int64_t row, int64_t column)
{
    int64_t at = row * m->columns + column;
    return m->bits == 8 ? m->values[at] : m->values[at / 2] >> (4 * (at & 1)) & 15;
}

/* One row, of columns that share a scale. */
static void decode_group(const Matrix *m, int64_t row, int64_t column, int64_t count, uint16_t *out)
{
    Group group = group_of(m, m->format, row, column / m->across);
    uint16_t values[256];
    if (m->bits == 8 && count < 128) {
        for (int64_t i = 0; i < count; i++)
            out[i] = value_of(m, group, code_of(m, row, column + i));
        return;
    }
    for (uint32_t code = 0; code < 1u << m->bits; code++)
        values[code] = value_of(m, group, code);
    for (int64_t i = 0; i < count; i++)
        out[i] = values[code_of(m, row, column + i)];
}

void chronos_decode(const Matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                    uint16_t *out, int64_t stride)
{
    for (int64_t n = row; n < row + rows; n++, out += stride) {
        if (m->format == BF16) {
            memcpy(out, m->values + 2 * (n * m->columns + column), 2 * (size_t)columns);
            continue;
        }
        for (int64_t k = column, end; k < column + columns; k = end) {
            uint32_t codes[GATHERED / 4];
            Matrix part;
            end = (k / m->across + 1) * m->across;
            if (end > column + columns)
                end = column + columns;
            if (m->codes_lie && end > k + GATHERED)
                end = k + GATHERED;
            if (m->codes_lie)
                part = gathered(m, n, k, end - k, codes);
            decode_group(m->codes_lie ? &part : m, n, k, end - k, out + k - column);
        }
    }
}
