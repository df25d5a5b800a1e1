/* One product and one dequantised matrix, from stdin to stdout: how kernels for another CPU are run
 * under an emulator. tests/native/test_torch_cpus.py writes what is read here. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>

int chronos_open(void);
int chronos_multiply(const Product *products, int count, int threads);
void chronos_dequantise(const Matrix *m, uint16_t *out);

static void *take(void)
{
    int64_t size;
    if (fread(&size, sizeof size, 1, stdin) != 1)
        exit(2);
    void *bytes = size ? malloc((size_t)size) : NULL;
    if (size && fread(bytes, 1, (size_t)size, stdin) != (size_t)size)
        exit(2);
    return bytes;
}

int main(void)
{
    int64_t *n = take();
    int32_t order = (int32_t)n[8];
    Matrix m = {(int32_t)n[0], (int32_t)n[1], (int32_t)n[2], n[3], n[4], n[5], n[6], n[7]};
    m.values = take(), m.scales = take(), m.zeros = take(), m.divisor = take();
    m.order = order, m.codes_lie = (int32_t)n[9], m.scales_lie = (int32_t)n[10];
    m.more = (int32_t)n[11];
    Product p = {.matrix = m, .x = take(), .count = n[12]};
    p.y = calloc((size_t)(p.count * m.rows), 2);
    uint16_t *plain = malloc((size_t)(n[3] * n[4]) * 2);
    if (!(chronos_open() >> order & 1) || chronos_multiply(&p, 1, 2))
        return 3;
    chronos_dequantise(&m, plain);
    fwrite(p.y, 2, (size_t)(p.count * m.rows), stdout);
    fwrite(plain, 2, (size_t)(n[3] * n[4]), stdout);
    return 0;
}
