/* One CPU's products of float32 rows, written for vectors of LANES numbers. wide.c includes this
 * once for each kind of vector it has:
 *
 *   NAME, TARGET          of the function, and which instructions it may use
 *   VECTOR, LANES         a vector of so many floats
 *   ZERO, LOAD, WIDEN     none; from floats; from bfloat16
 *   FMA(a, b, c), SUM     a * b + c rounded once; all lanes, in an order that is always the same
 *   REGISTERS             how many vectors it holds
 */
/* Rows of the matrix that are computed side by side, by rows of x: as many sums as fit. */
#if REGISTERS == 32
#define ROWS_1 8
#define ROWS_2 8
#define ROWS_3 4
#define ROWS_4 4
#define ROWS_5 4
#define ROWS_6 4
#define ROWS_7 2
#define ROWS_8 2
#else
#define ROWS_1 8
#define ROWS_2 4
#define ROWS_3 2
#define ROWS_4 2
#define ROWS_5 2
#define ROWS_6 2
#define ROWS_7 1
#define ROWS_8 1
#endif
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define OF_ROWS static inline __attribute__((always_inline)) TARGET

/* `rows` rows of the matrix times `count` rows of x, both constants wherever this is used. Each
 * sum has lanes of its own and takes its columns from the first to the last, so its bits are the
 * same whatever is computed beside it. */
OF_ROWS void PASTE(NAME, rows)(const uint8_t *weight, int bits, int64_t columns, const float *x,
                               const int rows, const int count, float (*sums)[BLOCK])
{
    const int64_t stride = columns * bits / 8, whole = columns / LANES * LANES;
    VECTOR sum[8][MOST_ROWS];
    UNROLLED for (int n = 0; n < rows; n++)
        UNROLLED for (int i = 0; i < count; i++)
            sum[n][i] = ZERO();
    for (int64_t k = 0; k < whole; k += LANES) {
        VECTOR some[MOST_ROWS];
        UNROLLED for (int i = 0; i < count; i++)
            some[i] = LOAD(x + i * columns + k);
        UNROLLED for (int n = 0; n < rows; n++) {
            const uint8_t *from = weight + n * stride + k * bits / 8;
            if (k * bits % 512 == 0) /* a cache line of the rows behind these */
                __builtin_prefetch(from + rows * stride);
            VECTOR one = bits == 16 ? WIDEN((const uint16_t *)from) : LOAD((const float *)from);
            UNROLLED for (int i = 0; i < count; i++)
                sum[n][i] = FMA(one, some[i], sum[n][i]);
        }
    }
    if (whole < columns) {
        const size_t left = (size_t)(columns - whole);
        float some[LANES] = {0};
        union { float wide[LANES]; uint16_t narrow[LANES]; } last = {{0}};
        for (int i = 0; i < count; i++) {
            memcpy(some, x + i * columns + whole, 4 * left);
            for (int n = 0; n < rows; n++) {
                memcpy(&last, weight + n * stride + whole * bits / 8, left * bits / 8);
                VECTOR one = bits == 16 ? WIDEN(last.narrow) : LOAD(last.wide);
                sum[n][i] = FMA(one, LOAD(some), sum[n][i]);
            }
        }
    }
    for (int n = 0; n < rows; n++)
        for (int i = 0; i < count; i++)
            sums[i][n] = SUM(sum[n][i]);
}

/* One instance for each number of rows of x and each kind of weight, and which of them it is. */
#define CASE(bits_, count_, rows_)                                                                 \
    case bits_ << 4 | count_:                                                                      \
        for (; n + rows_ <= rows; n += rows_)                                                      \
            PASTE(NAME, rows)(from + n * stride, bits_, m->columns, x, rows_, count_, at(n));      \
        for (; n < rows; n++)                                                                      \
            PASTE(NAME, rows)(from + n * stride, bits_, m->columns, x, 1, count_, at(n));          \
        break;
#define CASES(bits)                                                                                \
    CASE(bits, 1, ROWS_1) CASE(bits, 2, ROWS_2) CASE(bits, 3, ROWS_3) CASE(bits, 4, ROWS_4)        \
    CASE(bits, 5, ROWS_5) CASE(bits, 6, ROWS_6) CASE(bits, 7, ROWS_7) CASE(bits, 8, ROWS_8)
#define at(n) (float (*)[BLOCK])(&sums[0][n])

static TARGET void NAME(const Product *p, int64_t row, float sums[MOST_ROWS][BLOCK])
{
    const Matrix *m = &p->matrix;
    const float *x = p->x;
    const int64_t stride = m->columns * m->bits / 8;
    const uint8_t *from = m->values + row * stride;
    int64_t rows = m->rows - row < BLOCK ? m->rows - row : BLOCK, n = 0;
    switch (m->bits << 4 | (int)p->count) { CASES(16) CASES(32) }
}

#undef at
#undef CASES
#undef CASE
#undef OF_ROWS
#undef PASTE
#undef PASTE_
#undef NAME
#undef TARGET
#undef VECTOR
#undef LANES
#undef ZERO
#undef LOAD
#undef WIDEN
#undef FMA
#undef SUM
#undef REGISTERS
#undef ROWS_1
#undef ROWS_2
#undef ROWS_3
#undef ROWS_4
#undef ROWS_5
#undef ROWS_6
#undef ROWS_7
#undef ROWS_8
