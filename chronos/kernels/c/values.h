/* Numbers of a checkpoint, read one at a time: what decode.c and the kernels of a CPU share. */
#ifndef CHRONOS_VALUES_H
#define CHRONOS_VALUES_H

#include "kernels.h"

#include <string.h>

/* In line wherever it is used: kernels are compiled for other instructions than the rest. */
#define VALUE static inline __attribute__((always_inline))

static const float E2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

VALUE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

VALUE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

VALUE float from_bf16(uint16_t value) { return float_of((uint32_t)value << 16); }

/* To the nearest, ties to even. */
VALUE uint16_t to_bf16(float value)
{
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

VALUE float from_f16(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, exponent = value >> 10 & 31;
    uint32_t mantissa = value & 1023;
    if (exponent == 0) {
        float tiny = (float)mantissa * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    if (exponent == 31)
        return float_of(sign | 0x7f800000 | mantissa << 13);
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

/* The nearest number that float16 has. */
VALUE float round_f16(float value)
{
    uint32_t bits = bits_of(value), size = bits & 0x7fffffff;
    if (size >= 0x7f800000)
        return value;
    if (size >= 0x477ff000) /* 65,520 */
        return float_of((bits & 0x80000000) | 0x7f800000);
    if (size < 0x38800000) { /* below 2^-14 they are multiples of 2^-24, as floats at 0.5 are */
        float near = (float_of(size) + 0.5f) - 0.5f;
        return float_of(bits_of(near) | (bits & 0x80000000));
    }
    return float_of((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

VALUE float from_e4m3(uint32_t code)
{
    uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
    float size;
    if ((code & 127) == 127)
        return float_of(0x7fc00000);
    size = exponent ? float_of((exponent + 120) << 23 | mantissa << 20) : (float)mantissa * 0x1p-9f;
    return code & 128 ? -size : size;
}

VALUE float rounded(int32_t type, float value)
{
    if (type == SCALE_BF16)
        return from_bf16(to_bf16(value));
    return type == SCALE_F16 ? round_f16(value) : value;
}

/* Number `at` of an array of scales. What is no number has few bits, so that rounding it leaves it so. */
VALUE float number(const void *array, int32_t type, int64_t at)
{
    switch (type) {
    case SCALE_BF16: return from_bf16(((const uint16_t *)array)[at]);
    case SCALE_F16: return from_f16(((const uint16_t *)array)[at]);
    case SCALE_E4M3: return from_e4m3(((const uint8_t *)array)[at]);
    case SCALE_E8M0: {
        uint32_t exponent = ((const uint8_t *)array)[at];
        return float_of(exponent ? exponent << 23 : 1u << 22);
    }
    default: {
        float value = ((const float *)array)[at];
        return value == value ? value : float_of(0x7fc00000);
    }
    }
}

/* What the codes of a row in one group of `across` columns have in common. */
typedef struct {
    float scale, zero;
} Group;

/* Where in a word of AWQ's the code of a row lies. */
VALUE int awq_place(int64_t row) { return (int)(4 * (row & 1) + (row & 7) / 2); }

VALUE Group group_of(const Matrix *m, int format, int64_t row, int64_t g)
{
    int64_t at = (m->down == 1 ? row : row / m->down) * m->groups + g;
    if (m->scales_lie)
        at = g * m->rows + row;
    Group found = {number(m->scales, m->scale_type, at), (float)(1 << (m->bits - 1))};
    if (m->divisor)
        found.scale /= *m->divisor;
    if (format == AFFINE) {
        found.zero = number(m->zeros, m->scale_type, at);
    } else if (format == INTEGER && m->zeros) {
        int64_t each = 32 / m->bits, place = row % each;
        int64_t word = row / each * m->groups + g;
        if (m->scales_lie)
            word = g * (m->rows / each) + row / each;
        if (m->scales_lie == AWQ)
            place = awq_place(row);
        uint32_t codes = ((const uint32_t *)m->zeros)[word] >> (place * m->bits);
        found.zero = (float)((codes & ((1u << m->bits) - 1)) + (uint32_t)m->more);
    }
    return found;
}

enum { GATHERED = 1024 };

/* The same matrix with up to GATHERED columns of a row in `codes`, one behind the other; count is a
 * multiple of eight. */
VALUE Matrix gathered(const Matrix *m, int64_t row, int64_t k, int64_t count,
                      uint32_t codes[GATHERED / 4])
{
    const uint32_t *words = (const uint32_t *)m->values;
    Matrix part = *m;
    if (m->codes_lie == AWQ) {
        words += k * (m->rows / 8) + row / 8;
        for (int64_t i = 0; i < count / 8; i++) {
            uint32_t word = 0;
            for (int j = 0; j < 8; j++, words += m->rows / 8)
                word |= (*words >> 4 * awq_place(row) & 15) << 4 * j;
            codes[i] = word;
        }
    } else {
        const int64_t each = 32 / m->bits;
        words += k / each * m->rows + row;
        for (int64_t i = 0; i < count / each; i++)
            codes[i] = words[i * m->rows];
    }
    part.values = (const uint8_t *)codes - (row * m->columns + k) * m->bits / 8;
    part.codes_lie = BY_ROW;
    return part;
}

#endif
