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

INLINE int ID(any)(VI v)
{
    int32_t bits = 0;
    for (int i = 0; i < WIDTH; i++)
        bits |= v[i];
    return bits != 0;
}

/* Natural logarithm of positive normal numbers, within an ulp or two (the polynomial is that of Cephes). */
INLINE VF ID(log)(VF x)
{
    VI bits = (VI)x - 0x3f3504f3;
    VF e = __builtin_convertvector(bits >> 23, VF);
    VF f = (VF)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    VF z = f * f;
    VF p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    VF y = p * (f * z);
    y = y - 0.5f * z;
    return (f + y) + 0.693147181f * e;
}

/* Exponential of numbers from -87 to 89; infinite from 88.4 on. */
INLINE VF ID(bare_exp)(VF x)
{
    /* Adding 1.5 * 2^23 rounds to an integer, which the low bits of the sum then hold. */
    VF shifted = x * 1.44269504088896341f + 12582912.0f;
    VF n = shifted - 12582912.0f;
    VF r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    VF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    VF scale = (VF)(((VI)shifted - 0x4b400000 + 127) << 23);
    return p * scale;
}

/* Exponential of numbers that are 0 or less; those under -87 give 0, as does a NaN. */
INLINE VF ID(exp)(VF x)
{
    VI in_range = x > -87.0f;
    return (VF)((VI)ID(bare_exp)(VMAX(x, ID(all)(-87.0f))) & in_range);
}

/* Logistic function of any number but NaN. */
INLINE VF ID(sigmoid)(VF x) { return 1.0f / (1.0f + ID(bare_exp)(VMIN(VMAX(-x, ID(all)(-87.0f)), ID(all)(89.0f)))); }
