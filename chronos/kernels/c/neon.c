/* Numbers by NEON, for ATen's orders of sums (order.h): rows of a packed matrix are decoded into
 * bfloat16 where they are needed next. As avx2.c, with the instructions of ARM.
 */
#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#include <arm_neon.h>

#define TARGET
#define LANES 4
#define FMA(a, b, c) ((Floats)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define FMA4(a, b, c) ((Four)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define WIDEN(from, low, high)                            \
    do {                                                  \
        uint16x8_t eight = vld1q_u16(from);               \
        low = (Four)vshll_n_u16(vget_low_u16(eight), 16); \
        high = (Four)vshll_high_n_u16(eight, 16);         \
    } while (0)
#define INLINE VALUE TARGET

#include "values.h"

/* Sixteen values of bfloat16 by their code: low bytes, high bytes. */
typedef struct {
    uint8x16_t low, high;
} Table;

INLINE Table table_of(const uint8_t both[2][16])
{
    return (Table){vld1q_u8(both[0]), vld1q_u8(both[1])};
}

/* Rounded to bfloat16, in the upper halves; the lower ones are not zero. */
INLINE uint32x4_t round_bf16(float32x4_t values)
{
    uint32x4_t bits = vreinterpretq_u32_f32(values);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}

INLINE uint16x8_t to_bf16s(float32x4_t low, float32x4_t high)
{
    return vshrn_high_n_u32(vshrn_n_u32(round_bf16(low), 16), round_bf16(high), 16);
}

INLINE float32x4_t round_scale(int32_t type, float32x4_t values)
{
    if (type == SCALE_BF16)
        return vreinterpretq_f32_u32(vandq_u32(round_bf16(values), vdupq_n_u32(0xffff0000)));
    if (type == SCALE_F16)
        return vcvt_f32_f16(vcvt_f16_f32(values));
    return values;
}

/* What integer codes stand for, in float32 that bfloat16 rounds as the format does. */
INLINE float32x4_t of_integers(const Matrix *m, int format, float32x4_t codes, Group group)
{
    float32x4_t scale = vdupq_n_f32(group.scale), zero = vdupq_n_f32(group.zero);
    if (format == AFFINE)
        codes = vaddq_f32(round_scale(m->scale_type, vmulq_f32(codes, scale)), zero);
    else
        codes = vmulq_f32(vsubq_f32(codes, zero), scale);
    return m->scale_type == SCALE_F16 ? round_scale(SCALE_F16, codes) : codes;
}

INLINE Table sixteen_values(const Matrix *m, int format, Group group)
{
    static const float counted[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uint16x8_t words[2];
    for (int h = 0; h < 2; h++) {
        float32x4_t half[2];
        for (int i = 0; i < 2; i++) {
            if (format == FP4)
                half[i] = vmulq_f32(vld1q_f32(E2M1 + 8 * h + 4 * i), vdupq_n_f32(group.scale));
            else
                half[i] = of_integers(m, format, vld1q_f32(counted + 8 * h + 4 * i), group);
        }
        words[h] = to_bf16s(half[0], half[1]);
    }
    uint8x16_t first = vreinterpretq_u8_u16(words[0]), second = vreinterpretq_u8_u16(words[1]);
    return (Table){vuzp1q_u8(first, second), vuzp2q_u8(first, second)};
}

/* 32 columns: both codes of a byte, and of each the two bytes of its value, are stored by turns. */
INLINE void look_up(const uint8_t *codes, Table table, uint16_t *out)
{
    uint8x16_t both = vld1q_u8(codes);
    uint8x16_t low = vandq_u8(both, vdupq_n_u8(15)), high = vshrq_n_u8(both, 4);
    uint8x16x4_t bytes = {{vqtbl1q_u8(table.low, low), vqtbl1q_u8(table.high, low),
                           vqtbl1q_u8(table.low, high), vqtbl1q_u8(table.high, high)}};
    vst4q_u8((uint8_t *)out, bytes);
}

INLINE uint16x8_t scaled(uint16x8_t words, float scale)
{
    float32x4_t low = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16));
    float32x4_t high = vreinterpretq_f32_u32(vshll_high_n_u16(words, 16));
    return to_bf16s(vmulq_n_f32(low, scale), vmulq_n_f32(high, scale));
}

/* 32 codes of E4M3: exponent and mantissa are moved to where bfloat16 has them, but for numbers
 * below 2^-6, of which there are eight, and for what is no number. */
INLINE void e4m3(const uint8_t *codes, float scale, uint16_t *out)
{
    static const uint8_t tiny_low[16] = {0, 0, 0x80, 0xc0, 0, 0x20, 0x40, 0x60};
    static const uint8_t tiny_high[16] = {0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c};
    for (int i = 0; i < 32; i += 16) {
        uint8x16_t code = vld1q_u8(codes + i), size = vandq_u8(code, vdupq_n_u8(127));
        uint8x16_t low = vshlq_n_u8(code, 4);
        uint8x16_t high = vaddq_u8(vshrq_n_u8(size, 4), vdupq_n_u8(60)); /* exponents by 120 */
        uint8x16_t tiny = vcltq_u8(size, vdupq_n_u8(8));
        uint8x16_t none = vceqq_u8(size, vdupq_n_u8(127));
        low = vbslq_u8(tiny, vqtbl1q_u8(vld1q_u8(tiny_low), size), low);
        high = vbslq_u8(tiny, vqtbl1q_u8(vld1q_u8(tiny_high), size), high);
        high = vorrq_u8(high, vandq_u8(none, vdupq_n_u8(127)));
        high = vorrq_u8(high, vbicq_u8(code, vdupq_n_u8(127)));
        vst1q_u16(out + i, scaled(vreinterpretq_u16_u8(vzip1q_u8(low, high)), scale));
        vst1q_u16(out + i + 8, scaled(vreinterpretq_u16_u8(vzip2q_u8(low, high)), scale));
    }
}

INLINE void integers(const Matrix *m, int format, const uint8_t *codes, Group group, uint16_t *out)
{
    for (int i = 0; i < 32; i += 8) {
        uint16x8_t words = vmovl_u8(vld1_u8(codes + i));
        float32x4_t low = vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
        float32x4_t high = vcvtq_f32_u32(vmovl_high_u16(words));
        low = of_integers(m, format, low, group), high = of_integers(m, format, high, group);
        vst1q_u16(out + i, to_bf16s(low, high));
    }
}

#include "rows.h"

#include "order.h"

void chronos_neon(Kernels *kernels)
{
    set_mxfp4();
    kernels->block[DOTS] = dots, kernels->block[FOURS] = fours;
    kernels->decode = decode;
}

#else
#include "kernels.h"

void chronos_neon(Kernels *kernels)
{
    (void)kernels;
}
#endif
