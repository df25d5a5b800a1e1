/* Products of a few rows with packed matrices, and the matrices as bfloat16.
 *
 * A matrix [N, K] (rows out, columns in) is described, not owned: its bytes are a checkpoint's.
 * Whoever makes a description has compared sizes with memory; here nothing is checked again.
 */
#ifndef CHRONOS_KERNELS_H
#define CHRONOS_KERNELS_H

#include <stdint.h>

/* How codes lie, and what they stand for. The numbers are known to library.py. */
enum {
    BF16 = 0,    /* numbers themselves, row by row */
    FP4 = 1,     /* E2M1 times a scale */
    FP8 = 2,     /* E4M3 times a scale */
    AFFINE = 3,  /* integers: round(code * scale) + bias */
    INTEGER = 4, /* integers: (code - zero) * scale; 0 is half of the codes where zeros is NULL */
    FLOAT32 = 5, /* numbers themselves; only for rows that are float32 too */
};
/* How what belongs to a row of a matrix lies. */
enum {
    BY_ROW = 0, /* one row behind the other */
    GPTQ = 1,   /* words of codes of a row, or its scales, lie a row of the matrix apart */
    AWQ = 2,    /* as GPTQ; words have codes of eight rows, those of even ones first */
};
/* Orders in which the terms of a sum are added; each gives it other bits. */
enum {
    PAIRS = 0, /* oneDNN's, of VDPBF16PS: avx512.c */
    DOTS = 1,  /* ATen's, of rows that lie one behind the other: order.h */
    FOURS = 2, /* ATen's, of columns that do */
    ORDERS = 3,
};
enum { SCALE_F32 = 0, SCALE_BF16 = 1, SCALE_F16 = 2, SCALE_E8M0 = 3, SCALE_E4M3 = 4 };

typedef struct {
    int32_t format, bits;
    int32_t scale_type;
    int64_t rows, columns;
    int64_t down, across; /* rows and columns that share a scale */
    int64_t groups;       /* of columns */
    const uint8_t *values;
    const void *scales;
    const void *zeros;    /* biases of AFFINE; of INTEGER words of codes along the rows */
    const float *divisor; /* of all scales; NULL for none */
    int32_t order;        /* of the sums of its products */
    int32_t codes_lie, scales_lie;
    int32_t more;         /* what is added to codes of zeros */
} Matrix;

/* y [count, N] = x [count, K] times the transposed matrix, in bfloat16, with bias [N] or NULL added
 * before the result is rounded; or, `wide`, in float32, of a matrix that is BF16 or FLOAT32. */
typedef struct {
    Matrix matrix;
    const void *x;
    const uint16_t *bias;
    void *y;
    int64_t count;
    int64_t wide;
} Product;

enum { BLOCK = 32, MOST_ROWS = 8 }; /* rows of a matrix that are computed at once, and of x */

/* Results of a block of rows of a matrix, by rows of x. */
typedef union {
    uint16_t narrow[MOST_ROWS][BLOCK];
    float wide[MOST_ROWS][BLOCK];
} Sums;

/* Rows and columns of a matrix as bfloat16, to rows of `stride` numbers. Columns begin and end
 * at multiples of eight. */
void chronos_decode(const Matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                    uint16_t *out, int64_t stride);

/* sums[i][j] = bfloat16 of row i of x times row `row` + j of the matrix, for a block of rows. */
typedef void Block(const Product *p, int64_t row, uint16_t sums[MOST_ROWS][BLOCK]);

/* What a CPU has. */
typedef struct {
    Block *block[ORDERS]; /* NULL where it has not the instructions */
    /* The same of products that are `wide`. */
    void (*wide)(const Product *p, int64_t row, float sums[MOST_ROWS][BLOCK]);
    /* Whole rows as bfloat16, one behind the other. */
    void (*decode)(const Matrix *m, int64_t row, int64_t rows, uint16_t *out);
} Kernels;

/* Set what this CPU has. */
void chronos_avx2(Kernels *kernels);
void chronos_avx512(Kernels *kernels);
void chronos_neon(Kernels *kernels);

/* Sets `wide`, where this CPU has vectors for it. */
void chronos_wide(Kernels *kernels);

#endif
