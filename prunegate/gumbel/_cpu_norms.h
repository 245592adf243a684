/* LayerNorm and RMSNorm over kept positions. Included by _cpu_level.h.
 *
 * A few rows go together, so that weights, the mask and sums over rows are read and written once for all of them.
 */

#define ROWS_AT_ONCE 4

/* Columns from `at` on; what is beyond the row's end is 0. Rows of `exact` columns fill whole vectors. */
INLINE VF ID(take)(const float *from, int64_t at, int64_t columns, int exact)
{
    if (exact || at + WIDTH <= columns)
        return ID(load)(from + at);
    float part[WIDTH] = {0};
    memcpy(part, from + at, (columns - at) * sizeof(float));
    return ID(load)(part);
}

INLINE void ID(give)(float *to, int64_t at, int64_t columns, int exact, VF v)
{
    if (exact || at + WIDTH <= columns)
        ID(store)(to + at, v);
    else
        memcpy(to + at, &v, (columns - at) * sizeof(float));
}

INLINE void ID(norm_rows)(const Norm *n, int64_t row, int rows, int exact)
{
    int64_t columns = n->columns;
    const float *x = n->x + row * columns;
    float *out = n->out + row * columns;
    VF first[ROWS_AT_ONCE] = {{0}}, second[ROWS_AT_ONCE] = {{0}};
    float mean[ROWS_AT_ONCE] = {0}, scale[ROWS_AT_ONCE];
    for (int64_t at = 0; n->centre && at < columns; at += WIDTH) {
        VF keep = ID(take)(n->keep, at, columns, exact);
        UNROLL_4
        for (int r = 0; r < rows; r++)
            first[r] += keep * ID(take)(x + r * columns, at, columns, exact);
    }
    for (int r = 0; n->centre && r < rows; r++)
        n->means[row + r] = mean[r] = ID(sum)(first[r]) / n->count;
    for (int64_t at = 0; at < columns; at += WIDTH) {
        VF keep = ID(take)(n->keep, at, columns, exact);
        UNROLL_4
        for (int r = 0; r < rows; r++) {
            VF value = ID(take)(x + r * columns, at, columns, exact) - mean[r];
            second[r] += keep * value * value;
        }
    }
    UNROLL_4
    for (int r = 0; r < rows; r++)
        n->scales[row + r] = scale[r] = 1.0f / sqrtf(ID(sum)(second[r]) / n->count + n->eps);
    for (int64_t at = 0; at < columns; at += WIDTH) {
        VF weight = n->weight ? ID(take)(n->weight, at, columns, exact) : ID(all)(1.0f);
        VF bias = n->bias ? ID(take)(n->bias, at, columns, exact) : (VF){0};
        UNROLL_4
        for (int r = 0; r < rows; r++) {
            VF value = ID(take)(x + r * columns, at, columns, exact) - mean[r];
            ID(give)(out + r * columns, at, columns, exact, value * scale[r] * weight + bias);
        }
    }
}

static void ID(norm_forward)(const Norm *n, int64_t begin, int64_t end)
{
    int64_t row = begin;
    for (; row + ROWS_AT_ONCE <= end && n->columns % WIDTH == 0; row += ROWS_AT_ONCE)
        ID(norm_rows)(n, row, ROWS_AT_ONCE, 1);
    for (; row + ROWS_AT_ONCE <= end; row += ROWS_AT_ONCE)
        ID(norm_rows)(n, row, ROWS_AT_ONCE, 0);
    for (; row < end; row++)
        ID(norm_rows)(n, row, 1, 0);
}

/* The gradient of the rows, and what they add to the sums that are the gradients of the mask, weight and bias. */
INLINE void ID(norm_rows_backward)(const Norm *n, int64_t row, int rows, int exact, float *to_keep,
                                   float *to_weight, float *to_bias)
{
    int64_t columns = n->columns;
    const float *x = n->x + row * columns, *gradient = n->gradient + row * columns;
    float *out = n->out + row * columns;
    VF first[ROWS_AT_ONCE] = {{0}}, second[ROWS_AT_ONCE] = {{0}};
    float mean[ROWS_AT_ONCE] = {0}, scale[ROWS_AT_ONCE], along[ROWS_AT_ONCE], level[ROWS_AT_ONCE] = {0};
    float power[ROWS_AT_ONCE];
    UNROLL_4
    for (int r = 0; r < rows; r++) {
        scale[r] = n->scales[row + r];
        if (n->centre)
            mean[r] = n->means[row + r];
        /* The mean square of the normalised row over its kept positions: their power over itself plus epsilon. */
        power[r] = 1.0f - n->eps * scale[r] * scale[r];
    }
    for (int64_t at = 0; at < columns; at += WIDTH) {
        VF weight = n->weight ? ID(take)(n->weight, at, columns, exact) : ID(all)(1.0f);
        VF sum_weight = {0}, sum_bias = {0};
        UNROLL_4
        for (int r = 0; r < rows; r++) {
            VF incoming = ID(take)(gradient + r * columns, at, columns, exact);
            VF normal = (ID(take)(x + r * columns, at, columns, exact) - mean[r]) * scale[r];
            VF product = incoming * normal;
            sum_weight += product;
            sum_bias += incoming;
            first[r] += product * weight;
            second[r] += incoming * weight;
        }
        ID(give)(to_weight, at, columns, exact, ID(take)(to_weight, at, columns, exact) + sum_weight);
        ID(give)(to_bias, at, columns, exact, ID(take)(to_bias, at, columns, exact) + sum_bias);
    }
    UNROLL_4
    for (int r = 0; r < rows; r++) {
        along[r] = ID(sum)(first[r]) / n->count;
        if (n->centre)
            level[r] = ID(sum)(second[r]) / n->count;
    }
    for (int64_t at = 0; at < columns; at += WIDTH) {
        VF weight = n->weight ? ID(take)(n->weight, at, columns, exact) : ID(all)(1.0f);
        VF keep = ID(take)(n->keep, at, columns, exact), sum_keep = {0};
        UNROLL_4
        for (int r = 0; r < rows; r++) {
            VF incoming = ID(take)(gradient + r * columns, at, columns, exact) * weight;
            VF normal = (ID(take)(x + r * columns, at, columns, exact) - mean[r]) * scale[r];
            VF shift = normal * along[r] + level[r];
            ID(give)(out + r * columns, at, columns, exact, (incoming - keep * shift) * scale[r]);
            sum_keep -= 0.5f * along[r] * (normal * normal - power[r]) + level[r] * normal;
        }
        ID(give)(to_keep, at, columns, exact, ID(take)(to_keep, at, columns, exact) + sum_keep);
    }
}

static void ID(norm_backward)(const Norm *n, int64_t begin, int64_t end)
{
    /* Threads add up sums of their own. */
    float *to_keep = n->sums + begin / n->rows_a_share * 3 * n->columns;
    float *to_weight = to_keep + n->columns, *to_bias = to_weight + n->columns;
    int64_t row = begin;
    memset(to_keep, 0, 3 * n->columns * sizeof(float));
    for (; row + ROWS_AT_ONCE <= end && n->columns % WIDTH == 0; row += ROWS_AT_ONCE)
        ID(norm_rows_backward)(n, row, ROWS_AT_ONCE, 1, to_keep, to_weight, to_bias);
    for (; row + ROWS_AT_ONCE <= end; row += ROWS_AT_ONCE)
        ID(norm_rows_backward)(n, row, ROWS_AT_ONCE, 0, to_keep, to_weight, to_bias);
    for (; row < end; row++)
        ID(norm_rows_backward)(n, row, 1, 0, to_keep, to_weight, to_bias);
}

#undef ROWS_AT_ONCE
