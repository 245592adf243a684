/* The sampling kernels. Included by _cpu_level.h. */

/* Swaps rows and columns of the 4 by 4 matrices that the four vectors hold in each of their 128-bit lanes. */
INLINE void ID(transpose)(VI v[4])
{
    VI a = UNPACK_LO32(v[0], v[1]), b = UNPACK_HI32(v[0], v[1]);
    VI c = UNPACK_LO32(v[2], v[3]), d = UNPACK_HI32(v[2], v[3]);
    v[0] = UNPACK_LO64(a, c);
    v[1] = UNPACK_HI64(a, c);
    v[2] = UNPACK_LO64(b, d);
    v[3] = UNPACK_HI64(b, d);
}

INLINE void ID(transpose_floats)(VF v[4])
{
    VI w[4] = {(VI)v[0], (VI)v[1], (VI)v[2], (VI)v[3]};
    ID(transpose)(w);
    for (int k = 0; k < 4; k++)
        v[k] = (VF)w[k];
}

/* Philox 4x32-7 of WIDTH counters: words[k] holds the k-th word of each. Lane L stands for counter
 * (WIDTH / 4) * (L % 4) + L / 4, so that transpose() puts words[] into the order of columns.
 *
 * A counter's words are kept in the low halves of 64-bit lanes, even and odd lanes apart: the multiplication reads
 * low halves only, so high halves may hold anything, and a product needs no shuffle to be used. */
INLINE void ID(philox)(const Key *key, uint32_t column4, int columns_vary, uint32_t row, VI words[4])
{
    VL half[2][4];
    for (int odd = 0; odd < 2; odd++) {
        VL lane;
        for (int i = 0; i < WIDTH / 2; i++) {
            int at = 2 * i + odd;
            lane[i] = (uint64_t)((WIDTH / 4) * (at % 4) + at / 4);
        }
        half[odd][0] = (VL){0} + column4;
        half[odd][1] = (VL){0} + row;
        half[odd][columns_vary ? 0 : 1] += lane;
        half[odd][2] = (VL){0} + key->step;
        half[odd][3] = (VL){0} + key->draw;
    }
    uint32_t k0 = (uint32_t)key->seed, k1 = (uint32_t)(key->seed >> 32);
    for (int round = 0; round < ROUNDS; round++) {
        for (int odd = 0; odd < 2; odd++) {
            VL *c = half[odd];
            VL p0 = MUL_LOW(c[0], (VL){0} + 0xD2511F53u), p1 = MUL_LOW(c[2], (VL){0} + 0xCD9E8D57u);
            c[0] = (p1 >> 32) ^ c[1] ^ ((VL){0} + k0);
            c[2] = (p0 >> 32) ^ c[3] ^ ((VL){0} + k1);
            c[1] = p1;
            c[3] = p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int k = 0; k < 4; k++)
        words[k] = (VI)((half[0][k] & 0xFFFFFFFFull) | (half[1][k] << 32));
}

/* The low 31 bits as a number in (0, 0.5]. */
INLINE VF ID(near)(VI word)
{
    return (__builtin_convertvector(word & 0x7fffffff, VF) + 0.5f) * 0x1p-32f;
}

/* Minus the Gumbel noise of each word: the logarithm of an exponential number. */
INLINE VF ID(minus_gumbel)(VI word)
{
    VI upper = word < 0;
    VF near = ID(near)(word);
    VF x = ID(where)(upper, 1.0f - near, near);
    /* What rounding 1 - near has lost, which is all that is left of a small `near`. */
    VF lost = (VF)(upper & (VI)((1.0f - x) - near));
    return ID(log)(-(ID(log)(x) + lost));
}

INLINE VF ID(logistic)(VI word)
{
    VF near = ID(near)(word);
    VF size = ID(log)((1.0f - near) / near);
    return (VF)((VI)size ^ (~word & INT32_MIN));
}

/* Derivative of the logistic function at x / tau, over tau; even in x. */
INLINE VF ID(slope)(VF x, float inverse_tau)
{
    VF e = ID(exp)((VF)((VI)(x * inverse_tau) | INT32_MIN));
    VF upper = 1.0f / (1.0f + e);
    return e * upper * upper * inverse_tau;
}

/* The slope of the relaxed gate, averaged over draws of its noise given which side of 0 the score is on. */
INLINE VF ID(conditional_slope)(const Work *w, VF logit, VI is_open, VI word)
{
    VI upper = word < 0;
    VF near = ID(near)(word), far = 1.0f - near;
    VF log_near = ID(log)(near), log_far = ID(log)(far) + ((1.0f - far) - near);
    /* Logarithms of the uniform number behind the noise, and of 1 less it. */
    VF log_of = ID(where)(upper, log_far, log_near), log_rest = ID(where)(upper, log_near, log_far);
    VF towards = (VF)((VI)logit ^ (~is_open & INT32_MIN)) + log_of;
    VF softplus = VMAX(towards, (VF){0}) + ID(log)(1.0f + ID(exp)((VF)((VI)towards | INT32_MIN)));
    return ID(slope)(softplus - log_rest, w->inverse_tau);
}

/* ReinMax: 2 a (1 - a) - p (1 - p) / 2 with a halfway from the gate to sigmoid(l / tau). */
INLINE VF ID(reinmax_slope)(const Work *w, VF logit, VI is_open)
{
    VF x = logit * w->inverse_tau;
    VF e = ID(exp)((VF)((VI)x | INT32_MIN));
    VF upper = 1.0f / (1.0f + e);
    /* Half the chance of the other state: 1 - a where the gate is open, a where it is closed. */
    VF other = 0.5f * ID(where)((x >= 0.0f) ^ is_open, upper, e * upper);
    return 2.0f * other * (1.0f - other) - 0.5f * ID(slope)(logit, 1.0f);
}

INLINE void ID(hard_and_soft)(VF score, VF inverse_tau, VF *hard, VF *soft)
{
    VI nan = score != score;
    *hard = (VF)(((score > 0.0f) & (VI)ID(all)(1.0f)) | nan);
    *soft = (VF)((VI)ID(sigmoid)(score * inverse_tau) | nan);
}

/* Gates, and beside them what backward needs: the relaxed gates, or the slopes of an estimator. */
static void ID(sigmoid_forward)(const Work *w, int64_t begin, int64_t end)
{
    VF inverse_tau = ID(all)(w->inverse_tau);
    for (int64_t at = begin; at < end; at += BLOCK) {
        float in[BLOCK], hard[BLOCK], soft[BLOCK];
        int64_t left = end - at;
        int whole = left >= BLOCK;
        const float *from = w->logits + at;
        float *to_hard = w->hard + at, *to_soft = w->soft + at;
        if (!whole) {
            memset(in, 0, sizeof in);
            memcpy(in, from, left * sizeof(float));
            from = in;
            to_hard = hard;
            to_soft = soft;
        }
        VI words[4];
        VF slopes[4] = {{0}, {0}, {0}, {0}};
        ID(philox)(&w->key, (uint32_t)(at / 4), 1, 0, words);
        ID(transpose)(words);
        UNROLL_4
        for (int k = 0; k < 4; k++) {
            VF h, s, logit = ID(load)(from + k * WIDTH);
            VF score = logit + ID(logistic)(words[k]);
            ID(hard_and_soft)(score, inverse_tau, &h, &s);
            if (w->reinmax)
                s = (VF)((VI)ID(reinmax_slope)(w, logit, score > 0.0f) | (score != score));
            if (w->hard)
                ID(store)(to_hard + k * WIDTH, h);
            ID(store)(to_soft + k * WIDTH, s);
        }
        for (int draw = 1; draw <= w->draws; draw++) {
            Key key = w->key;
            key.draw = (uint32_t)draw;
            ID(philox)(&key, (uint32_t)(at / 4), 1, 0, words);
            ID(transpose)(words);
            UNROLL_4
            for (int k = 0; k < 4; k++) {
                VI is_open = ID(load)(to_hard + k * WIDTH) > 0.0f;
                slopes[k] += ID(conditional_slope)(w, ID(load)(from + k * WIDTH), is_open, words[k]);
            }
        }
        for (int k = 0; w->draws && k < 4; k++) {
            VF h = ID(load)(to_hard + k * WIDTH);
            ID(store)(to_soft + k * WIDTH, (VF)((VI)(slopes[k] * (1.0f / w->draws)) | (h != h)));
        }
        if (!whole) {
            if (w->hard)
                memcpy(w->hard + at, hard, left * sizeof(float));
            memcpy(w->soft + at, soft, left * sizeof(float));
        }
    }
}

static void ID(sigmoid_backward)(const Work *w, int64_t begin, int64_t end)
{
    const float *gradient = w->gradient, *soft = w->saved;
    float *out = w->out, inverse_tau = w->inverse_tau;
    for (int64_t i = begin; i < end; i++)
        out[i] = gradient[i] * (inverse_tau * soft[i] * (1.0f - soft[i]));
}

/* What becomes of a row whose best score is `best`: 0, it is sampled; 1, it is NaN; 2, it has no category. */
INLINE int ID(kind)(float best, int nan) { return nan || best == INFINITY ? 1 : best == -INFINITY ? 2 : 0; }

/* One long row: lanes run along the columns. The relaxed row's memory holds the scores until they are used. */
INLINE int ID(long_row)(const Work *w, const float *logits, float *hard, float *soft, int64_t columns, uint32_t row)
{
    int64_t whole = columns / BLOCK * BLOCK;
    float tail[BLOCK];
    VF best4[4];
    VI nan4[4] = {{0}, {0}, {0}, {0}};
    for (int k = 0; k < BLOCK; k++)
        tail[k] = -INFINITY;
    memcpy(tail, logits + whole, (columns - whole) * sizeof(float));
    for (int k = 0; k < 4; k++)
        best4[k] = ID(all)(-INFINITY);
    for (int64_t at = 0; at < columns; at += BLOCK) {
        const float *from = at < whole ? logits + at : tail;
        float *to = at < whole ? soft + at : tail;
        VI words[4];
        ID(philox)(&w->key, (uint32_t)(at / 4), 1, row, words);
        ID(transpose)(words);
        UNROLL_4
        for (int k = 0; k < 4; k++) {
            VF score = ID(load)(from + k * WIDTH) - ID(minus_gumbel)(words[k]);
            best4[k] = VMAX(best4[k], score);
            nan4[k] |= score != score;
            ID(store)(to + k * WIDTH, score);
        }
    }
    float best = ID(largest)(VMAX(VMAX(best4[0], best4[1]), VMAX(best4[2], best4[3])));
    int kind = ID(kind)(best, ID(any)(nan4[0] | nan4[1] | nan4[2] | nan4[3]));
    if (kind) {
        for (int64_t i = 0; i < columns; i++) {
            soft[i] = NAN;
            if (hard)
                hard[i] = NAN;
        }
        return kind == 2;
    }
    VF top = ID(all)(best), total4[4] = {{0}, {0}, {0}, {0}}, total = {0}, ones = {0};
    for (int64_t at = 0; at < columns; at += BLOCK) {
        float *scores = at < whole ? soft + at : tail, first[BLOCK];
        float *to = at < whole && hard ? hard + at : first;
        UNROLL_4
        for (int k = 0; k < 4; k++) {
            VF score = ID(load)(scores + k * WIDTH);
            VF e = ID(exp)((score - top) * w->inverse_tau);
            VF h = (VF)((score == top) & (VI)ID(all)(1.0f));
            total4[k] += e;
            ones += h;
            ID(store)(scores + k * WIDTH, e);
            ID(store)(to + k * WIDTH, h);
        }
        if (at >= whole && hard)
            memcpy(hard + at, first, (columns - at) * sizeof(float));
        if (at % SPAN == SPAN - BLOCK || at + BLOCK >= columns)
            total += ID(take_sum)(total4);
    }
    if (hard && ID(sum)(ones) != 1.0f) {
        int found = 0;
        for (int64_t i = 0; i < columns; i++) {
            hard[i] = !found && hard[i] == 1.0f;
            found |= hard[i] == 1.0f;
        }
    }
    VF scale = ID(all)(1.0f / ID(sum)(total));
    for (int64_t at = 0; at < whole; at += WIDTH)
        ID(store)(soft + at, ID(load)(soft + at) * scale);
    for (int k = 0; k < 4; k++)
        ID(store)(tail + k * WIDTH, ID(load)(tail + k * WIDTH) * scale);
    memcpy(soft + whole, tail, (columns - whole) * sizeof(float));
    return 0;
}

/* Four columns of WIDTH rows, to or from vectors with a row in each lane; what is outside the matrix is 0. */
INLINE void ID(get_tile)(const float *from, int64_t columns, int wide, int64_t rows, VF v[4])
{
    if (wide == 4 && rows == WIDTH) {
        for (int k = 0; k < 4; k++)
            v[k] = LOAD_ROWS(from + k * (WIDTH / 4) * columns, columns);
    } else {
        float tile[BLOCK] = {0};
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < wide; k++)
                tile[4 * r + k] = from[r * columns + k];
        for (int k = 0; k < 4; k++)
            v[k] = ID(load)(tile + k * WIDTH);
    }
    ID(transpose_floats)(v);
}

INLINE void ID(put_tile)(float *to, int64_t columns, int wide, int64_t rows, VF v[4])
{
    ID(transpose_floats)(v);
    if (wide == 4 && rows == WIDTH) {
        for (int k = 0; k < 4; k++)
            STORE_ROWS(to + k * (WIDTH / 4) * columns, columns, v[k]);
    } else {
        float tile[BLOCK];
        for (int k = 0; k < 4; k++)
            ID(store)(tile + k * WIDTH, v[k]);
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < wide; k++)
                to[r * columns + k] = tile[4 * r + k];
    }
}

/* WIDTH short rows at once, one in each lane: a row's reductions are sums of vectors. Returns impossible rows. */
INLINE int64_t ID(short_rows)(const Work *w, int64_t row, int64_t rows)
{
    int64_t columns = w->columns;
    const float *logits = w->logits + row * columns;
    float *hard = w->hard ? w->hard + row * columns : NULL, *soft = w->soft + row * columns;
    VF scores[SHORT_ROW], best = ID(all)(-INFINITY), total = {0};
    VI nan = {0}, taken = {0};
    for (int at = 0; at < columns; at += 4) {
        int wide = columns - at < 4 ? (int)(columns - at) : 4;
        VI words[4];
        VF in[4];
        ID(get_tile)(logits + at, columns, wide, rows, in);
        ID(philox)(&w->key, (uint32_t)(at / 4), 0, (uint32_t)row, words);
        UNROLL_4
        for (int k = 0; k < wide; k++) {
            VF score = in[k] - ID(minus_gumbel)(words[k]);
            best = VMAX(best, score);
            nan |= score != score;
            scores[at + k] = score;
        }
    }
    VI impossible = best == -INFINITY;
    VI bad = nan | (best == INFINITY) | impossible;
    for (int at = 0; at < columns; at += 4) {
        int wide = columns - at < 4 ? (int)(columns - at) : 4;
        VF h[4] = {{0}, {0}, {0}, {0}};
        UNROLL_4
        for (int k = 0; k < wide; k++) {
            VI wins = (scores[at + k] == best) & ~taken;
            taken |= wins;
            h[k] = (VF)((wins & (VI)ID(all)(1.0f)) | bad);
            VF e = ID(exp)((scores[at + k] - best) * w->inverse_tau);
            total += e;
            scores[at + k] = e;
        }
        if (hard)
            ID(put_tile)(hard + at, columns, wide, rows, h);
    }
    VF scale = 1.0f / total;
    for (int at = 0; at < columns; at += 4) {
        int wide = columns - at < 4 ? (int)(columns - at) : 4;
        VF s[4] = {{0}, {0}, {0}, {0}};
        for (int k = 0; k < wide; k++)
            s[k] = (VF)((VI)(scores[at + k] * scale) | bad);
        ID(put_tile)(soft + at, columns, wide, rows, s);
    }
    int64_t count = 0;
    if (ID(any)(impossible)) {
        for (int r = 0; r < rows; r++) {
            int lost = 1;
            for (int64_t i = 0; i < columns; i++)
                lost &= logits[r * columns + i] == -INFINITY;
            count += lost;
        }
    }
    return count;
}

static int64_t ID(softmax_forward)(const Work *w, int64_t begin, int64_t end)
{
    int64_t impossible = 0;
    if (w->offsets) {
        for (int64_t row = begin; row < end; row++) {
            int64_t at = w->offsets[row], columns = w->offsets[row + 1] - at;
            float *hard = w->hard ? w->hard + at : NULL;
            if (columns)
                impossible += ID(long_row)(w, w->logits + at, hard, w->soft + at, columns, (uint32_t)row);
        }
    } else if (w->columns <= SHORT_ROW) {
        for (int64_t row = begin; row < end; row += WIDTH)
            impossible += ID(short_rows)(w, row, end - row < WIDTH ? end - row : WIDTH);
    } else {
        for (int64_t row = begin; row < end; row++) {
            int64_t at = row * w->columns;
            float *hard = w->hard ? w->hard + at : NULL;
            impossible += ID(long_row)(w, w->logits + at, hard, w->soft + at, w->columns, (uint32_t)row);
        }
    }
    return impossible;
}

INLINE void ID(long_row_backward)(const float *gradient, const float *soft, float *out, int64_t columns, float scale)
{
    VF dot4[4] = {{0}, {0}, {0}, {0}}, total = {0};
    int64_t i = 0;
    float dot = 0;
    for (; i + BLOCK <= columns; i += BLOCK) {
        for (int k = 0; k < 4; k++)
            dot4[k] += ID(load)(gradient + i + k * WIDTH) * ID(load)(soft + i + k * WIDTH);
        if (i % SPAN == SPAN - BLOCK)
            total += ID(take_sum)(dot4);
    }
    for (; i + WIDTH <= columns; i += WIDTH)
        total += ID(load)(gradient + i) * ID(load)(soft + i);
    for (; i < columns; i++)
        dot += gradient[i] * soft[i];
    dot += ID(sum)(total + ID(take_sum)(dot4));
    for (i = 0; i + WIDTH <= columns; i += WIDTH)
        ID(store)(out + i, (ID(load)(gradient + i) - dot) * (ID(load)(soft + i) * scale));
    for (; i < columns; i++)
        out[i] = (gradient[i] - dot) * (soft[i] * scale);
}

INLINE void ID(short_rows_backward)(const Work *w, int64_t row, int64_t rows)
{
    int64_t columns = w->columns, start = row * columns;
    VF g[32], s[32], dot = {0};
    for (int at = 0; at < columns; at += 4) {
        int wide = columns - at < 4 ? (int)(columns - at) : 4;
        ID(get_tile)(w->gradient + start + at, columns, wide, rows, g + at);
        ID(get_tile)(w->saved + start + at, columns, wide, rows, s + at);
        for (int k = 0; k < wide; k++)
            dot += g[at + k] * s[at + k];
    }
    for (int at = 0; at < columns; at += 4) {
        int wide = columns - at < 4 ? (int)(columns - at) : 4;
        VF out[4];
        for (int k = 0; k < 4; k++)
            out[k] = k < wide ? (g[at + k] - dot) * (s[at + k] * w->inverse_tau) : (VF){0};
        ID(put_tile)(w->out + start + at, columns, wide, rows, out);
    }
}

static void ID(softmax_backward)(const Work *w, int64_t begin, int64_t end)
{
    /* A row that fills a few vectors is better read as the one piece that it is. */
    if (!w->offsets && w->columns < 32) {
        for (int64_t row = begin; row < end; row += WIDTH)
            ID(short_rows_backward)(w, row, end - row < WIDTH ? end - row : WIDTH);
        return;
    }
    for (int64_t row = begin; row < end; row++) {
        int64_t at = w->offsets ? w->offsets[row] : row * w->columns;
        int64_t columns = w->offsets ? w->offsets[row + 1] - at : w->columns;
        ID(long_row_backward)(w->gradient + at, w->saved + at, w->out + at, columns, w->inverse_tau);
    }
}

/* The noise itself, for tests: Gumbel noise of rows, or logistic noise of one row where `binary`. */
static void ID(noise)(const Work *w, int64_t begin, int64_t end)
{
    for (int64_t row = begin; row < end; row++)
        for (int64_t at = 0; at < w->columns; at += BLOCK) {
            int64_t left = w->columns - at < BLOCK ? w->columns - at : BLOCK;
            float made[BLOCK];
            VI words[4];
            ID(philox)(&w->key, (uint32_t)(at / 4), 1, (uint32_t)row, words);
            ID(transpose)(words);
            for (int k = 0; k < 4; k++)
                ID(store)(made + k * WIDTH, w->binary ? ID(logistic)(words[k]) : -ID(minus_gumbel)(words[k]));
            memcpy(w->out + row * w->columns + at, made, left * sizeof(float));
        }
}
