/* Vectors of WIDTH floats, and functions of them: what the kernels are made of. Included by _cpu_level.h. */

typedef float ID(vf) __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ID(vi) __attribute__((vector_size(4 * WIDTH)));
typedef uint64_t ID(vl) __attribute__((vector_size(4 * WIDTH)));
#define VF ID(vf)
#define VI ID(vi)
#define VL ID(vl)
#define BLOCK (4 * WIDTH)
#define INLINE static inline __attribute__((always_inline))
/* Sums of long rows are taken in spans of this many columns: one long chain of additions would lose three digits. */
#define SPAN (16 * BLOCK)

INLINE VF ID(load)(const float *p)
{
    VF v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void ID(store)(float *p, VF v) { memcpy(p, &v, sizeof v); }

INLINE VF ID(all)(float x) { return x - (VF){0}; }

INLINE VF ID(where)(VI mask, VF yes, VF no) { return (VF)((mask & (VI)yes) | (~mask & (VI)no)); }

INLINE float ID(sum)(VF v) { return SUM_LANES(v); }

/* The sum of four running sums, which start again from 0. */
INLINE VF ID(take_sum)(VF running[4])
{
    VF total = (running[0] + running[1]) + (running[2] + running[3]);
    for (int k = 0; k < 4; k++)
        running[k] = (VF){0};
    return total;
}

INLINE float ID(largest)(VF v)
{
    float best = v[0];
    for (int i = 1; i < WIDTH; i++)
        best = v[i] > best ? v[i] : best;
    return best;
}

/* Functions work on four vectors, step by step on all of them: one chain of dependent operations would keep the
 * processor waiting, and it does not look far enough ahead to find the next. Polynomials are split in even and odd powers
 * for the same reason. */
#define EACH UNROLL_4 for (int k = 0; k < 4; k++)

/* log2(1 + f) / f, times `unit`, for sqrt(1/2) - 1 <= f < sqrt(2) - 1: relative error 3e-7 (minimax, own fit). */
INLINE void ID(log2_ratio)(const VF f[4], VF q[4], float unit)
{
    VF square[4], odd[4];
    EACH square[k] = f[k] * f[k];
    EACH odd[k] = square[k] * (-1.458116621e-01f * unit) - 2.488768697e-01f * unit;
    EACH q[k] = square[k] * (2.340423614e-01f * unit) + 2.870987058e-01f * unit;
    EACH odd[k] = odd[k] * square[k] - 3.602396250e-01f * unit;
    EACH q[k] = q[k] * square[k] + 4.809232354e-01f * unit;
    EACH odd[k] = odd[k] * square[k] - 7.213528156e-01f * unit;
    EACH q[k] = q[k] * square[k] + 1.442694902e+00f * unit;
    EACH q[k] = odd[k] * f[k] + q[k];
}

/* Bits of sqrt(1/2): what a power of 2 is taken out of lies from there to sqrt(2). */
#define ROOT 0x3f3504f3

/* 2^23 * log2(x) of positive normal numbers. In this unit the exponent's bits, read as an integer, need no shift. */
INLINE void ID(log2_scaled)(VF x[4])
{
    VI power[4];
    VF f[4];
    EACH power[k] = ((VI)x[k] - ROOT) & (int32_t)0xff800000;
    EACH f[k] = (VF)((VI)x[k] - power[k]) - 1.0f;
    ID(log2_ratio)(f, x, 0x1p23f);
    EACH x[k] = f[k] * x[k] + __builtin_convertvector(power[k], VF);
}

#define LN_2_SCALED (0.693147181f * 0x1p-23f)

/* Natural logarithms of positive normal numbers. */
INLINE void ID(log)(VF x[4])
{
    ID(log2_scaled)(x);
    EACH x[k] = x[k] * LN_2_SCALED;
}

#define LOG2_E 1.44269504f

/* 2^(x * scale) where x * scale is from -127, which gives 0, to 128, which gives infinity. */
INLINE void ID(power_of_2)(VF x[4], VF scale)
{
    VF shifted[4], square[4], odd[4];
    /* Adding 1.5 * 2^23 rounds to an integer, which the low bits of the sum then hold; 127 is the exponent's bias. */
    EACH shifted[k] = x[k] * scale + (12582912.0f + 127.0f);
    EACH x[k] = x[k] * scale - (shifted[k] - (12582912.0f + 127.0f));
    EACH square[k] = x[k] * x[k];
    EACH odd[k] = square[k] * 1.326472731e-03f + 5.550733581e-02f;
    EACH odd[k] = odd[k] * square[k] + 6.931470037e-01f;
    EACH x[k] = x[k] * odd[k] + 1.0f;
    EACH odd[k] = square[k] * 9.671512991e-03f + 2.402224243e-01f;
    EACH x[k] = odd[k] * square[k] + x[k];
    EACH x[k] *= (VF)((VI)shifted[k] << 23);
}

/* Exponentials of numbers that are 0 or less; those under -88 give 0, as does a NaN. */
INLINE void ID(exp)(VF x[4])
{
    EACH x[k] = VMAX(x[k], ID(all)(-127.0f / LOG2_E));
    ID(power_of_2)(x, ID(all)(LOG2_E));
}

/* Logistic function of any numbers but NaN. */
INLINE void ID(sigmoid)(VF x[4])
{
    EACH x[k] = VMIN(VMAX(-x[k], ID(all)(-127.0f / LOG2_E)), ID(all)(128.0f / LOG2_E));
    ID(power_of_2)(x, ID(all)(LOG2_E));
    EACH x[k] = 1.0f / (1.0f + x[k]);
}

/* The sign bit that is the inverse of another's. */
INLINE VI ID(flipped_sign)(VI x) { return ~x & INT32_MIN; }

/* The vector with lanes i and i ^ distance exchanged. */
#define SWAPPED(v, distance) \
    ((distance) == 1 ? SWAP_1(v) : (distance) == 2 ? SWAP_2(v) : (distance) == 4 ? SWAP_4(v) : SWAP_8(v))
