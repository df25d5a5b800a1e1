/* Numbers by AVX2, for ATen's orders of sums (order.h): rows of a packed matrix are decoded into
 * bfloat16 where they are needed next.
 */
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define FMA(a, b, c) ((Floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FMA4(a, b, c) ((Four)_mm_fmadd_ps((__m128)(a), (__m128)(b), (__m128)(c)))
#define WIDEN(from, low, high)                                         \
    do {                                                               \
        __m128i eight = _mm_loadu_si128((const __m128i *)(from));      \
        low = (Four)_mm_unpacklo_epi16(_mm_setzero_si128(), eight);    \
        high = (Four)_mm_unpackhi_epi16(_mm_setzero_si128(), eight);   \
    } while (0)
#define INLINE VALUE TARGET

#include "values.h"

/* Sixteen values of bfloat16 by their code: low bytes, high bytes, both twice. */
typedef struct {
    __m256i low, high;
} Table;

/* Rounded to bfloat16, in the upper halves; the lower ones are not zero. */
INLINE __m256i round_bf16(__m256 values)
{
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

INLINE __m256 round_scale(int32_t type, __m256 values)
{
    if (type == SCALE_BF16)
        return _mm256_castsi256_ps(
            _mm256_and_si256(round_bf16(values), _mm256_set1_epi32((int)0xffff0000)));
    if (type == SCALE_F16)
        return _mm256_cvtph_ps(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    return values;
}

/* What integer codes stand for, in float32 that bfloat16 rounds as the format does. */
INLINE __m256 of_integers(const Matrix *m, int format, __m256 codes, Group group)
{
    __m256 scale = _mm256_set1_ps(group.scale), zero = _mm256_set1_ps(group.zero);
    if (format == AFFINE)
        codes = _mm256_add_ps(round_scale(m->scale_type, _mm256_mul_ps(codes, scale)), zero);
    else
        codes = _mm256_mul_ps(_mm256_sub_ps(codes, zero), scale);
    return m->scale_type == SCALE_F16 ? round_scale(SCALE_F16, codes) : codes;
}

INLINE Table sixteen_values(const Matrix *m, int format, Group group)
{
    /* Codes in such an order that packing them puts them in theirs. */
    const __m256 first = _mm256_setr_ps(0, 1, 2, 3, 8, 9, 10, 11);
    const __m256 second = _mm256_setr_ps(4, 5, 6, 7, 12, 13, 14, 15);
    __m256 a, b;
    if (format == FP4) {
        __m256 scale = _mm256_set1_ps(group.scale);
        a = _mm256_mul_ps(_mm256_setr_ps(0, .5f, 1, 1.5f, -0.0f, -.5f, -1, -1.5f), scale);
        b = _mm256_mul_ps(_mm256_setr_ps(2, 3, 4, 6, -2, -3, -4, -6), scale);
    } else {
        a = of_integers(m, format, first, group), b = of_integers(m, format, second, group);
    }
    __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(round_bf16(a), 16),
                                        _mm256_srli_epi32(round_bf16(b), 16));
    words = _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)),
                                _mm256_srli_epi16(words, 8));
    return (Table){_mm256_permute4x64_epi64(words, 0x88), _mm256_permute4x64_epi64(words, 0xdd)};
}

INLINE __m256i twice(const uint8_t *sixteen)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)sixteen));
}

INLINE Table table_of(const uint8_t both[2][16])
{
    return (Table){twice(both[0]), twice(both[1])};
}

/* Numbers 0 to 7 and 16 to 23, numbers 8 to 15 and 24 to 31. */
INLINE void store(__m256i a, __m256i b, uint16_t *out)
{
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(a));
    _mm_storeu_si128((__m128i *)(out + 8), _mm256_castsi256_si128(b));
    _mm_storeu_si128((__m128i *)(out + 16), _mm256_extracti128_si256(a, 1));
    _mm_storeu_si128((__m128i *)(out + 24), _mm256_extracti128_si256(b, 1));
}

INLINE void look_up(const uint8_t *codes, Table table, uint16_t *out)
{
    __m128i both = _mm_loadu_si128((const __m128i *)codes), nibble = _mm_set1_epi8(15);
    __m128i low = _mm_and_si128(both, nibble), high = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
    __m256i code = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
    __m256i lower = _mm256_shuffle_epi8(table.low, code);
    __m256i upper = _mm256_shuffle_epi8(table.high, code);
    store(_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper), out);
}

INLINE __m256i scaled(__m256i words, __m256 scale)
{
    __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
    return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(_mm256_mul_ps(even, scale)), 16),
                              round_bf16(_mm256_mul_ps(odd, scale)), 0xaa);
}

/* 32 codes of E4M3: exponent and mantissa are moved to where bfloat16 has them, but for numbers
 * below 2^-6, of which there are eight, and for what is no number. */
INLINE void e4m3(const uint8_t *codes, float scale, uint16_t *out)
{
    const __m256i tiny_low = _mm256_setr_epi64x(0x60402000c0800000, 0, 0x60402000c0800000, 0);
    const __m256i tiny_high = _mm256_setr_epi64x(0x3c3c3c3c3b3b3b00, 0, 0x3c3c3c3c3b3b3b00, 0);
    __m256i code = _mm256_loadu_si256((const __m256i *)codes);
    __m256i size = _mm256_and_si256(code, _mm256_set1_epi8(127));
    __m256i low = _mm256_and_si256(_mm256_slli_epi16(code, 4), _mm256_set1_epi8((char)0xf0));
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(code, 4), _mm256_set1_epi8(7));
    __m256i tiny = _mm256_cmpgt_epi8(_mm256_set1_epi8(8), size);
    __m256i none = _mm256_cmpeq_epi8(size, _mm256_set1_epi8(127));
    high = _mm256_add_epi8(high, _mm256_set1_epi8(60)); /* exponents by 120 */
    low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(tiny_low, size), tiny);
    high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(tiny_high, size), tiny);
    high = _mm256_or_si256(high, _mm256_and_si256(none, _mm256_set1_epi8(127)));
    high = _mm256_or_si256(high, _mm256_andnot_si256(_mm256_set1_epi8(127), code));
    __m256 scales = _mm256_set1_ps(scale);
    store(scaled(_mm256_unpacklo_epi8(low, high), scales),
          scaled(_mm256_unpackhi_epi8(low, high), scales), out);
}

INLINE void integers(const Matrix *m, int format, const uint8_t *codes, Group group, uint16_t *out)
{
    for (int i = 0; i < 32; i += 16) {
        __m256i half[2];
        for (int h = 0; h < 2; h++) {
            __m128i eight = _mm_loadl_epi64((const __m128i *)(codes + i + 8 * h));
            __m256 numbers = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
            half[h] = round_bf16(of_integers(m, format, numbers, group));
        }
        __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(half[0], 16),
                                            _mm256_srli_epi32(half[1], 16));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute4x64_epi64(words, 0xd8));
    }
}

#include "rows.h"

#include "order.h"

void chronos_avx2(Kernels *kernels)
{
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
          __builtin_cpu_supports("f16c")))
        return;
    set_mxfp4();
    kernels->block[DOTS] = dots, kernels->block[FOURS] = fours;
    kernels->decode = decode;
}

#else
#include "kernels.h"

void chronos_avx2(Kernels *kernels)
{
    (void)kernels;
}
#endif
