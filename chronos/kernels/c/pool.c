/* Threads that share out the blocks of products, and never wait for one that sleeps.
 *
 * Whoever calls takes blocks too, in turns with the others, by one counter. When none is left to
 * take, it does not wait until the others have finished theirs, as a barrier would: a thread that
 * the system has put to sleep holds its block for milliseconds. The caller computes such blocks
 * again, and of two results for a block, which have the same bits, the first is kept. A thread that
 * was left behind finishes for nothing: it computes into memory of its own and writes nowhere, but
 * it may still read. So `chronos_multiply` says how many are behind, and the memory of a product
 * may only be freed once there are none (`chronos_behind`).
 */
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

enum { MOST_THREADS = 64, MOST_PRODUCTS = 64, MOST_BLOCKS = 1 << 16, NONE_LEFT = 1 << 30 };
enum { SPIN_NS = 50000 };

static Kernels cpu;

static struct {
    /* Job number in the upper half, next block in the lower. */
    _Atomic uint64_t ticket;
    _Atomic int inside, sleepers;
    int count, blocks;
    Product products[MOST_PRODUCTS];
    int begins[MOST_PRODUCTS + 1];
    /* Of each block the job that wrote it last: 2 * job while it writes, 2 * job + 1 when done. */
    _Atomic uint64_t state[MOST_BLOCKS];
} job;

static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int workers; /* started */

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t current(void) { return atomic_load(&job.ticket) >> 32; }

static void compute(const Product *p, int64_t row, Sums *out)
{
    if (p->wide)
        cpu.wide(p, row, out->wide);
    else
        cpu.block[p->matrix.order](p, row, out->narrow);
}

static void write_out(const Product *p, int64_t row, const Sums *out)
{
    int64_t rows = p->matrix.rows, count = rows - row < BLOCK ? rows - row : BLOCK;
    size_t size = p->wide ? sizeof(float) : sizeof(uint16_t);
    for (int64_t i = 0; i < p->count; i++)
        memcpy((char *)p->y + (size_t)(i * rows + row) * size,
               (const char *)out + (size_t)(i * BLOCK) * size, (size_t)count * size);
}

/* Compute a block of a job and keep it if nobody was earlier. Nothing where the job is over. */
static void compute_block(uint64_t number, int b)
{
    Sums out;
    int i = 0;
    uint64_t before = atomic_load(&job.state[b]);
    while (i + 1 < job.count && job.begins[i + 1] <= b)
        i++;
    Product p = job.products[i];
    int64_t row = (int64_t)(b - job.begins[i]) * BLOCK;
    atomic_thread_fence(memory_order_seq_cst);
    if (current() != number || before >> 1 == number)
        return; /* what was read may be of two jobs */
    compute(&p, row, &out);
    if (atomic_compare_exchange_strong(&job.state[b], &before, 2 * number)) {
        write_out(&p, row, &out);
        atomic_store(&job.state[b], 2 * number + 1);
    }
}

/* Take blocks until none is left; the number of the job they were of. taken: how many. */
static uint64_t take_blocks(int *taken)
{
    for (;;) {
        uint64_t ticket = atomic_fetch_add(&job.ticket, 1), number = ticket >> 32;
        int b = (int)(ticket & 0xffffffff);
        if (b >= job.blocks || current() != number)
            return number;
        compute_block(number, b);
        ++*taken;
    }
}

static void *work(void *arg)
{
    uint64_t seen = 0;
    int taken = 0;
    (void)arg;
    for (;;) {
        int64_t until = now() + SPIN_NS;
        while (current() == seen && now() < until)
            for (int i = 0; i < 16; i++)
                relax();
        if (current() == seen) {
            pthread_mutex_lock(&lock);
            atomic_fetch_add(&job.sleepers, 1);
            while (current() == seen)
                pthread_cond_wait(&wake, &lock);
            atomic_fetch_sub(&job.sleepers, 1);
            pthread_mutex_unlock(&lock);
        }
        atomic_fetch_add(&job.inside, 1);
        seen = take_blocks(&taken);
        atomic_fetch_sub(&job.inside, 1);
    }
    return NULL;
}

/* A child of fork has none of the threads, and whatever locks they held. */
static void forget(void)
{
    workers = 0;
    atomic_store(&job.inside, 0);
    atomic_store(&job.sleepers, 0);
    pthread_mutex_init(&one_caller, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
}

static void start_workers(int wanted)
{
    for (; workers < wanted && workers < MOST_THREADS; workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL))
            return;
        pthread_detach(thread);
    }
}

static void run_alone(const Product *products, int count)
{
    Sums out;
    for (int i = 0; i < count; i++)
        for (int64_t row = 0; row < products[i].matrix.rows; row += BLOCK) {
            compute(&products[i], row, &out);
            write_out(&products[i], row, &out);
        }
}

static void run_job(const Product *products, int count, int blocks)
{
    uint64_t number = current() + 1;
    /* First the number, so that whoever still reads the job before sees that it is over. */
    atomic_store(&job.ticket, number << 32 | NONE_LEFT);
    job.blocks = 0;
    atomic_thread_fence(memory_order_seq_cst);
    memcpy(job.products, products, (size_t)count * sizeof *products);
    job.count = count, job.begins[0] = 0;
    for (int i = 0; i < count; i++)
        job.begins[i + 1] =
            job.begins[i] + (int)((products[i].matrix.rows + BLOCK - 1) / BLOCK);
    job.blocks = blocks;
    atomic_store(&job.ticket, ++number << 32);
    if (atomic_load(&job.sleepers)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
    }
    int taken = 0;
    int64_t begin = now();
    take_blocks(&taken);
    /* As long as two blocks take: who has not finished by then sleeps. */
    int64_t end = now(), until = end + 2 * (end - begin) / (taken + 1);
    for (int b = 0; b < blocks; b++)
        while (atomic_load(&job.state[b]) != 2 * number + 1) {
            if (now() < until)
                relax();
            else if (atomic_load(&job.state[b]) == 2 * number)
                sched_yield(); /* being copied */
            else
                compute_block(number, b);
        }
}

/* Compute products; their number of rows of x is 1 to MOST_ROWS. threads: how many may take part.
 * Returns how many threads are behind, or -1 for what cannot be computed here. */
int chronos_multiply(const Product *products, int count, int threads)
{
    int64_t blocks = 0;
    if (count < 1 || count > MOST_PRODUCTS)
        return -1;
    for (int i = 0; i < count; i++) {
        int32_t order = products[i].matrix.order;
        int known = order >= 0 && order < ORDERS;
        if (products[i].wide ? !cpu.wide : !known || !cpu.block[order])
            return -1;
        blocks += (products[i].matrix.rows + BLOCK - 1) / BLOCK;
    }
    /* Of two callers one computes alone, as do small products. */
    if (threads < 2 || blocks < 4 || blocks > MOST_BLOCKS || pthread_mutex_trylock(&one_caller)) {
        run_alone(products, count);
        return 0;
    }
    start_workers(threads - 1);
    run_job(products, count, (int)blocks);
    int behind = atomic_load(&job.inside);
    pthread_mutex_unlock(&one_caller);
    return behind;
}

/* y [count, rows] = x [count, columns] times a transposed matrix of numbers of 16 or 32 bits, in
 * float32; else as `chronos_multiply`. */
int chronos_multiply_wide(const void *weight, int bits, int64_t rows, int64_t columns,
                          const float *x, float *y, int count, int threads)
{
    Matrix m = {.format = bits == 16 ? BF16 : FLOAT32, .bits = bits, .rows = rows,
                .columns = columns, .values = weight};
    Product p = {.matrix = m, .x = x, .y = y, .count = count, .wide = 1};
    return chronos_multiply(&p, 1, threads);
}

/* How many threads may still read the memory of products that are computed. */
int chronos_behind(void) { return atomic_load(&job.inside); }

/* The whole matrix as bfloat16 [N, K]. */
void chronos_dequantise(const Matrix *m, uint16_t *out) { cpu.decode(m, 0, m->rows, out); }

static void decode_plainly(const Matrix *m, int64_t row, int64_t rows, uint16_t *out)
{
    chronos_decode(m, row, rows, 0, m->columns, out, m->columns);
}

/* Returns the orders there are products in, a bit for each, and behind them one for wide products;
 * matrices are dequantised on every CPU. -1 where the caller's products are not as large as these:
 * one of the two is of another version. */
int chronos_open(int product_bytes)
{
    static int opened, orders;
    if (product_bytes != (int)sizeof(Product))
        return -1;
    if (opened++)
        return orders;
    pthread_atfork(NULL, NULL, forget);
    cpu.decode = decode_plainly;
    chronos_avx2(&cpu);
    chronos_avx512(&cpu);
    chronos_neon(&cpu);
    chronos_wide(&cpu);
    orders = (cpu.wide != NULL) << ORDERS;
    for (int order = 0; order < ORDERS; order++)
        orders |= (cpu.block[order] != NULL) << order;
    return orders;
}
