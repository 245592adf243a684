/* Products with a gate for each channel, and both gradients in one visit. Included by _cpu_level.h.
 *
 * Either whole rows are multiplied by a row of gates, or runs of elements by one gate each.
 */

#define ROWS_AT_ONCE 4

INLINE void ID(product_rows)(const Product *p, int64_t row, int rows, int exact)
{
    int64_t columns = p->channels;
    const float *x = p->x + row * columns;
    float *out = p->out + row * columns;
    for (int64_t at = 0; at < columns; at += WIDTH) {
        VF gate = ID(take)(p->gate, at, columns, exact);
        UNROLL_4
        for (int r = 0; r < rows; r++)
            ID(give)(out + r * columns, at, columns, exact, ID(take)(x + r * columns, at, columns, exact) * gate);
    }
}

INLINE void ID(product_rows_backward)(const Product *p, int64_t row, int rows, int exact, float *to_gate)
{
    int64_t columns = p->channels;
    const float *x = p->x + row * columns, *gradient = p->gradient + row * columns;
    float *out = p->out ? p->out + row * columns : NULL;
    for (int64_t at = 0; at < columns; at += WIDTH) {
        VF gate = ID(take)(p->gate, at, columns, exact), total = {0};
        UNROLL_4
        for (int r = 0; r < rows; r++) {
            VF incoming = ID(take)(gradient + r * columns, at, columns, exact);
            total += incoming * ID(take)(x + r * columns, at, columns, exact);
            if (out)
                ID(give)(out + r * columns, at, columns, exact, incoming * gate);
        }
        ID(give)(to_gate, at, columns, exact, ID(take)(to_gate, at, columns, exact) + total);
    }
}

INLINE void ID(product_run)(const Product *p, int64_t start, float gate)
{
    for (int64_t at = 0; at < p->run; at += WIDTH)
        ID(give)(p->out + start, at, p->run, 0, ID(take)(p->x + start, at, p->run, 0) * gate);
}

INLINE float ID(product_run_backward)(const Product *p, int64_t start, float gate)
{
    VF total = {0};
    for (int64_t at = 0; at < p->run; at += WIDTH) {
        VF incoming = ID(take)(p->gradient + start, at, p->run, 0);
        total += incoming * ID(take)(p->x + start, at, p->run, 0);
        if (p->out)
            ID(give)(p->out + start, at, p->run, 0, incoming * gate);
    }
    return ID(sum)(total);
}

static void ID(product_forward)(const Product *p, int64_t begin, int64_t end)
{
    int64_t row = begin;
    for (; p->run > 1 && row < end; row++)
        for (int64_t channel = 0; channel < p->channels; channel++)
            ID(product_run)(p, (row * p->channels + channel) * p->run, p->gate[channel]);
    for (; row + ROWS_AT_ONCE <= end && p->channels % WIDTH == 0; row += ROWS_AT_ONCE)
        ID(product_rows)(p, row, ROWS_AT_ONCE, 1);
    for (; row < end; row++)
        ID(product_rows)(p, row, 1, 0);
}

static void ID(product_backward)(const Product *p, int64_t begin, int64_t end)
{
    /* Threads add up sums of their own. */
    float *to_gate = p->sums + begin / p->rows_a_share * p->channels;
    int64_t row = begin;
    memset(to_gate, 0, p->channels * sizeof(float));
    for (; p->run > 1 && row < end; row++)
        for (int64_t channel = 0; channel < p->channels; channel++)
            to_gate[channel] +=
                ID(product_run_backward)(p, (row * p->channels + channel) * p->run, p->gate[channel]);
    for (; row + ROWS_AT_ONCE <= end && p->channels % WIDTH == 0; row += ROWS_AT_ONCE)
        ID(product_rows_backward)(p, row, ROWS_AT_ONCE, 1, to_gate);
    for (; row < end; row++)
        ID(product_rows_backward)(p, row, 1, 0, to_gate);
}

#undef ROWS_AT_ONCE
