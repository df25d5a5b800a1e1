/* Products of float32 rows with matrices of bfloat16 or float32: Chronos' own models on a CPU.
 *
 * No other library's bits are wanted here, so the order of a sum is the one that is fast: a vector
 * of partial sums, added up at the end. What is promised is that a row's bits are its own, however
 * many rows are computed at once. Each instruction set has its own order.
 */
#include "values.h"

#define UNROLLED _Pragma("GCC unroll 8")

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx2,fma,avx512f")))
#define INLINE static inline __attribute__((always_inline))

INLINE AVX2 float sum_of_8(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE AVX512 float sum_of_16(__m512 v)
{
    __m256d high = _mm512_extractf64x4_pd(_mm512_castps_pd(v), 1);
    return sum_of_8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(high)));
}

#define NAME wide_avx512
#define TARGET AVX512
#define VECTOR __m512
#define LANES 16
#define ZERO _mm512_setzero_ps
#define LOAD(p) _mm512_loadu_ps(p)
#define WIDEN(p)                                                                                   \
    _mm512_castsi512_ps(_mm512_slli_epi32(                                                         \
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define FMA _mm512_fmadd_ps
#define SUM sum_of_16
#define REGISTERS 32
#include "wide_block.h"

#define NAME wide_avx2
#define TARGET AVX2
#define VECTOR __m256
#define LANES 8
#define ZERO _mm256_setzero_ps
#define LOAD(p) _mm256_loadu_ps(p)
#define WIDEN(p)                                                                                   \
    _mm256_castsi256_ps(                                                                           \
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define FMA _mm256_fmadd_ps
#define SUM sum_of_8
#define REGISTERS 16
#include "wide_block.h"

void chronos_wide(Kernels *kernels)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        kernels->wide = wide_avx512;
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        kernels->wide = wide_avx2;
}

#elif defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>

#define NAME wide_neon
#define TARGET
#define VECTOR float32x4_t
#define LANES 4
#define ZERO() vdupq_n_f32(0)
#define LOAD(p) vld1q_f32(p)
#define WIDEN(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define SUM vaddvq_f32
#define REGISTERS 32
#include "wide_block.h"

void chronos_wide(Kernels *kernels) { kernels->wide = wide_neon; }

#else
void chronos_wide(Kernels *kernels) { (void)kernels; }
#endif
