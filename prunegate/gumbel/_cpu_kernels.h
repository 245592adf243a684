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

/* Which counters of WIDTH in a row stand in the even or odd places, so that put_in_order() leaves them in order. */
INLINE VL ID(ordered_lanes)(int odd)
{
    VL lane;
    for (int i = 0; i < WIDTH / 2; i++)
        lane[i] = (uint64_t)(odd * (WIDTH / 2) + (i % 2) * (WIDTH / 4) + i / 2);
    return lane;
}

/* Which rows stand in the even or odd places, so that words and get_tile() put them in the same lanes. */
INLINE VL ID(row_lanes)(int odd)
{
    VL lane;
    for (int i = 0; i < WIDTH / 2; i++) {
        int at = 2 * i + odd;
        lane[i] = (uint64_t)((WIDTH / 4) * (at % 4) + at / 4);
    }
    return lane;
}

/* Four words of WIDTH counters, from low halves: counter after counter. */
INLINE void ID(put_in_order)(VL c[2][4], VI words[4])
{
    for (int odd = 0; odd < 2; odd++) {
        VI a = PAIRED(c[odd][0], c[odd][1]), b = PAIRED(c[odd][2], c[odd][3]);
        words[2 * odd] = UNPACK_LO64(a, b);
        words[2 * odd + 1] = UNPACK_HI64(a, b);
    }
}

/* Philox 4x32-7 of WIDTH counters (column / 4, row, step, draw).
 *
 * A counter's words are kept in the low halves of 64-bit lanes, those of even and odd places apart: the multiplication
 * reads low halves only, so high halves may hold anything, and a product needs no shuffle to be used. Where the columns
 * vary and nothing else, two words of the first two rounds are the same for all, and the multiplications by them are
 * done once; where it is the rows, they are in the first three. */
typedef struct {
    VL keys[ROUNDS][2];
    uint32_t k[ROUNDS][2];
    uint32_t step, draw;
} ID(Keys);

INLINE VL ID(low)(uint32_t x) { return (VL){0} + x; }

INLINE void ID(set_keys)(ID(Keys) *keys, Key key)
{
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
    for (int round = 0; round < ROUNDS; round++) {
        keys->k[round][0] = k0;
        keys->k[round][1] = k1;
        keys->keys[round][0] = ID(low)(k0);
        keys->keys[round][1] = ID(low)(k1);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    keys->step = key.step;
    keys->draw = key.draw;
}

#define M0 0xD2511F53u
#define M1 0xCD9E8D57u
#define HIGH(product) ((uint32_t)((product) >> 32))

/* The rounds from `first` on, for even and odd places. */
INLINE void ID(rounds)(const ID(Keys) *keys, int first, VL c[2][4])
{
    for (int round = first; round < ROUNDS; round++) {
        VL p0[2], p1[2];
        for (int odd = 0; odd < 2; odd++) {
            p0[odd] = MUL_LOW(c[odd][0], ID(low)(M0));
            p1[odd] = MUL_LOW(c[odd][2], ID(low)(M1));
        }
        for (int odd = 0; odd < 2; odd++) {
            c[odd][0] = (p1[odd] >> 32) ^ (c[odd][1] ^ keys->keys[round][0]);
            c[odd][2] = (p0[odd] >> 32) ^ (c[odd][3] ^ keys->keys[round][1]);
            c[odd][1] = p1[odd];
            c[odd][3] = p0[odd];
        }
    }
}

/* What the first rounds of one row's counters have in common. */
typedef struct {
    VL end, left, right, last;
} ID(Line);

INLINE ID(Line) ID(line)(const ID(Keys) *keys, uint32_t row)
{
    uint64_t p1 = (uint64_t)keys->step * M1;
    uint64_t p0 = (uint64_t)(HIGH(p1) ^ row ^ keys->k[0][0]) * M0;
    return (ID(Line)){
        .end = ID(low)(keys->draw ^ keys->k[0][1]),
        .left = ID(low)((uint32_t)p1 ^ keys->k[1][0]),
        .right = ID(low)(HIGH(p0) ^ keys->k[1][1]),
        .last = ID(low)((uint32_t)p0),
    };
}

/* Words of the columns from 4 * column4 on, in their order. */
INLINE void ID(line_words)(const ID(Keys) *keys, const ID(Line) *line, uint32_t column4, VI words[4])
{
    VL c[2][4];
    for (int odd = 0; odd < 2; odd++) {
        VL p0 = MUL_LOW(ID(ordered_lanes)(odd) + column4, ID(low)(M0));
        VL p1 = MUL_LOW((p0 >> 32) ^ line->end, ID(low)(M1));
        c[odd][0] = (p1 >> 32) ^ line->left;
        c[odd][1] = p1;
        c[odd][2] = p0 ^ line->right;
        c[odd][3] = line->last;
    }
    ID(rounds)(keys, 2, c);
    ID(put_in_order)(c, words);
}

/* Words of four columns of the rows from `row` on, which are in the given places; low halves. */
INLINE void ID(rows_words)(const ID(Keys) *keys, uint32_t column4, uint32_t row, const VL places[2], VL c[2][4])
{
    uint64_t p0 = (uint64_t)column4 * M0, p1 = (uint64_t)keys->step * M1;
    uint64_t q1 = (uint64_t)(HIGH(p0) ^ keys->draw ^ keys->k[0][1]) * M1;
    uint64_t q0 = (uint64_t)(HIGH(q1) ^ (uint32_t)p1 ^ keys->k[1][0]) * M0;
    for (int odd = 0; odd < 2; odd++) {
        VL first = MUL_LOW((places[odd] + row) ^ ID(low)(HIGH(p1) ^ keys->k[0][0]), ID(low)(M0));
        VL second = MUL_LOW((first >> 32) ^ ID(low)((uint32_t)p0 ^ keys->k[1][1]), ID(low)(M1));
        c[odd][0] = (second >> 32) ^ ID(low)((uint32_t)q1 ^ keys->k[2][0]);
        c[odd][1] = second;
        c[odd][2] = first ^ ID(low)(HIGH(q0) ^ keys->k[2][1]);
        c[odd][3] = ID(low)((uint32_t)q0);
    }
    ID(rounds)(keys, 3, c);
}

/* Words of short rows from `row` on, each of `counters` counters; low halves. */
INLINE void ID(places_words)(const ID(Keys) *keys, uint32_t row, int counters, const VL places[2], VL c[2][4])
{
    uint64_t p1 = (uint64_t)keys->step * M1;
    for (int odd = 0; odd < 2; odd++) {
        VL p0 = MUL_LOW(places[odd] % counters, ID(low)(M0));
        c[odd][0] = (places[odd] / counters + row) ^ ID(low)(HIGH(p1) ^ keys->k[0][0]);
        c[odd][1] = ID(low)((uint32_t)p1);
        c[odd][2] = (p0 >> 32) ^ ID(low)(keys->draw ^ keys->k[0][1]);
        c[odd][3] = p0;
    }
    ID(rounds)(keys, 1, c);
}

/* The low 31 bits as numbers in (0, 0.5]. */
INLINE void ID(near)(const VI words[4], VF near[4])
{
    EACH near[k] = __builtin_convertvector(words[k] & 0x7fffffff, VF) * 0x1p-32f + 0x1p-33f;
}

/* Minus the Gumbel noise of each word: the logarithm of an exponential number. */
INLINE void ID(minus_gumbel)(const VI words[4], VF noise[4])
{
    VF near[4], f[4];
    VI x[4], power[4];
    ID(near)(words, near);
    EACH x[k] = (VI)SELECT_SIGN(words[k], 1.0f - near[k], near[k]);
    EACH power[k] = (x[k] - ROOT) & (int32_t)0xff800000;
    EACH f[k] = (VF)(x[k] - power[k]) - 1.0f;
    /* Above sqrt(1/2) the number is 1 - near, rounded: all that is left of a small `near` is in it itself. */
    EACH f[k] = SELECT_ZERO(power[k], -near[k], f[k]);
    ID(log2_ratio)(f, noise, -1.0f);
    EACH noise[k] = f[k] * noise[k] - __builtin_convertvector(power[k], VF) * 0x1p-23f;
    ID(log2_scaled)(noise);
    /* The first logarithm was to base 2: its factor is taken out of the second. */
    EACH noise[k] = noise[k] * LN_2_SCALED - 0.366512921f;
}

INLINE void ID(logistic)(const VI words[4], VF noise[4])
{
    VF near[4];
    ID(near)(words, near);
    EACH noise[k] = (1.0f - near[k]) / near[k];
    ID(log)(noise);
    EACH noise[k] = (VF)((VI)noise[k] ^ ID(flipped_sign)(words[k]));
}

/* Derivatives of the logistic function of x * scale; even in x. */
INLINE void ID(slope)(VF x[4], VF scale)
{
    VF upper[4];
    EACH x[k] = (VF)((VI)(x[k] * scale) | INT32_MIN);
    ID(exp)(x);
    EACH upper[k] = 1.0f / (1.0f + x[k]);
    EACH x[k] = (x[k] * upper[k]) * (upper[k] * scale);
}

/* Slopes of relaxed gates, added up over draws of their noise given which side of 0 their scores are on. */
INLINE void ID(add_conditional_slope)(const Work *w, const float *logits, const float *hard, VI words[4], VF total[4])
{
    VF near[4], log_near[4], log_far[4], towards[4], rest[4], e[4];
    ID(near)(words, near);
    EACH log_near[k] = near[k];
    EACH log_far[k] = 1.0f - near[k];
    EACH e[k] = (1.0f - log_far[k]) - near[k];
    ID(log)(log_near);
    ID(log)(log_far);
    EACH log_far[k] += e[k];
    EACH {
        VI is_open = ID(load)(hard + k * WIDTH) > 0.0f;
        /* Logarithms of the uniform number behind the noise, and of 1 less it. */
        VF of = SELECT_SIGN(words[k], log_far[k], log_near[k]);
        rest[k] = SELECT_SIGN(words[k], log_near[k], log_far[k]);
        towards[k] = (VF)((VI)ID(load)(logits + k * WIDTH) ^ ID(flipped_sign)(is_open)) + of;
        e[k] = (VF)((VI)towards[k] | INT32_MIN);
    }
    ID(exp)(e);
    EACH e[k] += 1.0f;
    ID(log)(e);
    EACH e[k] += VMAX(towards[k], (VF){0}) - rest[k];
    ID(slope)(e, ID(all)(w->inverse_tau));
    EACH total[k] += e[k];
}

/* ReinMax: 2 a (1 - a) - p (1 - p) / 2 with a halfway from the gate to sigmoid(l / tau). */
INLINE void ID(reinmax_slopes)(const VF logit[4], const VF score[4], float inverse_tau, VF slope[4])
{
    VF x[4], e[4];
    EACH x[k] = logit[k] * inverse_tau;
    EACH e[k] = (VF)((VI)x[k] | INT32_MIN);
    ID(exp)(e);
    EACH slope[k] = logit[k];
    ID(slope)(slope, ID(all)(1.0f));
    EACH {
        VF upper = 1.0f / (1.0f + e[k]);
        /* Half the chance of the other state: 1 - a where the gate is open, a where it is closed. */
        VF other = 0.5f * ID(where)((x[k] >= 0.0f) ^ (score[k] > 0.0f), upper, e[k] * upper);
        slope[k] = 2.0f * other * (1.0f - other) - 0.5f * slope[k];
    }
}

/* The mean of conditional slopes over all draws, for a block of gates. */
static void ID(conditional_slopes)(const Work *w, const float *logits, const float *hard, float *slopes, uint32_t at4)
{
    VF total[4] = {{0}, {0}, {0}, {0}};
    for (int draw = 1; draw <= w->draws; draw++) {
        VI words[4];
        ID(Keys) keys;
        ID(set_keys)(&keys, (Key){w->key.seed, w->key.step, (uint32_t)draw});
        ID(Line) line = ID(line)(&keys, 0);
        ID(line_words)(&keys, &line, at4, words);
        ID(add_conditional_slope)(w, logits, hard, words, total);
    }
    for (int k = 0; k < 4; k++) {
        VF h = ID(load)(hard + k * WIDTH);
        ID(store)(slopes + k * WIDTH, POISONED(UNORDERED(h, h), total[k] * (1.0f / w->draws)));
    }
}

/* Gates, and what backward needs: d gate / d logit. Without hard gates, relaxed ones. */
INLINE void ID(gates)(const Work *w, int64_t begin, int64_t end, int kind)
{
    ID(Keys) keys;
    ID(set_keys)(&keys, w->key);
    ID(Line) line = ID(line)(&keys, 0);
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
        ID(line_words)(&keys, &line, (uint32_t)(at / 4), words);
        VF logit[4], score[4], beside[4];
        MASK nan[4];
        EACH logit[k] = ID(load)(from + k * WIDTH);
        ID(logistic)(words, score);
        EACH score[k] += logit[k];
        EACH nan[k] = UNORDERED(score[k], score[k]);
        if (kind != RELAXED) {
            VF one = ID(all)(1.0f);
            EACH ID(store)(to_hard + k * WIDTH, POISONED(nan[k], KEPT(ABOVE(score[k], (VF){0}), one)));
        }
        if (kind == REINMAX) {
            ID(reinmax_slopes)(logit, score, w->inverse_tau, beside);
        } else if (kind == RELAXED) {
            EACH beside[k] = score[k] * w->inverse_tau;
            ID(sigmoid)(beside);
        } else {
            EACH beside[k] = score[k];
            ID(slope)(beside, ID(all)(w->inverse_tau));
        }
        EACH ID(store)(to_soft + k * WIDTH, POISONED(nan[k], beside[k]));
        if (kind == CONDITIONAL)
            ID(conditional_slopes)(w, from, to_hard, to_soft, (uint32_t)(at / 4));
        if (!whole) {
            if (w->hard)
                memcpy(w->hard + at, hard, left * sizeof(float));
            memcpy(w->soft + at, soft, left * sizeof(float));
        }
    }
}

static void ID(sigmoid_forward)(const Work *w, int64_t begin, int64_t end)
{
    if (w->kind == HARD)
        ID(gates)(w, begin, end, HARD);
    else if (w->kind == RELAXED)
        ID(gates)(w, begin, end, RELAXED);
    else if (w->kind == REINMAX)
        ID(gates)(w, begin, end, REINMAX);
    else
        ID(gates)(w, begin, end, CONDITIONAL);
}

/* What becomes of a row whose best score is `best`: 0, it is sampled; 1, it is NaN; 2, it has no category. */
INLINE int ID(kind)(float best, int nan) { return nan || best == INFINITY ? 1 : best == -INFINITY ? 2 : 0; }

/* One long row: lanes run along the columns. The relaxed row's memory holds the scores until they are used. */
static int ID(long_row)(const ID(Keys) *keys, const Work *w, int64_t row)
{
    int64_t begin = w->offsets ? w->offsets[row] : row * w->columns;
    int64_t columns = w->offsets ? w->offsets[row + 1] - begin : w->columns;
    const float *logits = w->logits + begin;
    float *hard = w->hard ? w->hard + begin : NULL, *soft = w->soft + begin;
    if (!columns)
        return 0;
    ID(Line) line = ID(line)(keys, (uint32_t)row);
    int64_t whole = columns / BLOCK * BLOCK;
    float tail[BLOCK];
    VF best4[4];
    MASK nan = UNORDERED((VF){0}, (VF){0});
    for (int k = 0; k < BLOCK; k++)
        tail[k] = -INFINITY;
    memcpy(tail, logits + whole, (columns - whole) * sizeof(float));
    for (int k = 0; k < 4; k++)
        best4[k] = ID(all)(-INFINITY);
    for (int64_t at = 0; at < columns; at += BLOCK) {
        const float *from = at < whole ? logits + at : tail;
        float *to = at < whole ? soft + at : tail;
        VI words[4];
        ID(line_words)(keys, &line, (uint32_t)(at / 4), words);
        VF score[4];
        ID(minus_gumbel)(words, score);
        EACH score[k] = ID(load)(from + k * WIDTH) - score[k];
        EACH best4[k] = VMAX(best4[k], score[k]);
        nan |= UNORDERED(score[0], score[1]) | UNORDERED(score[2], score[3]);
        EACH ID(store)(to + k * WIDTH, score[k]);
    }
    float best = ID(largest)(VMAX(VMAX(best4[0], best4[1]), VMAX(best4[2], best4[3])));
    int kind = ID(kind)(best, BITS(nan) != 0);
    if (kind) {
        for (int64_t i = 0; i < columns; i++) {
            soft[i] = NAN;
            if (hard)
                hard[i] = NAN;
        }
        return kind == 2;
    }
    VF top = ID(all)(best), total4[4] = {{0}, {0}, {0}, {0}}, total = {0};
    VF unit = ID(all)(LOG2_E * w->inverse_tau), least = -127.0f / unit;
    int64_t ones = 0;
    for (int64_t at = 0; at < columns; at += BLOCK) {
        float *scores = at < whole ? soft + at : tail, first[BLOCK];
        float *to = at < whole && hard ? hard + at : first;
        VF score[4];
        EACH score[k] = ID(load)(scores + k * WIDTH);
        EACH {
            MASK wins = EQUAL(score[k], top);
            ones += __builtin_popcount(BITS(wins));
            ID(store)(to + k * WIDTH, KEPT(wins, ID(all)(1.0f)));
        }
        EACH score[k] = VMAX(score[k] - top, least);
        ID(power_of_2)(score, unit);
        EACH total4[k] += score[k];
        EACH ID(store)(scores + k * WIDTH, score[k]);
        if (at >= whole && hard)
            memcpy(hard + at, first, (columns - at) * sizeof(float));
        if (at % SPAN == SPAN - BLOCK || at + BLOCK >= columns)
            total += ID(take_sum)(total4);
    }
    if (hard && ones != 1) {
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

/* How many of the rows have nothing but minus infinity. */
static int64_t ID(impossible)(const float *logits, int64_t rows, int64_t columns)
{
    int64_t count = 0;
    for (int r = 0; r < rows; r++) {
        int lost = 1;
        for (int64_t i = 0; i < columns; i++)
            lost &= logits[r * columns + i] == -INFINITY;
        count += lost;
    }
    return count;
}

/* WIDTH short rows at once, one in each lane: a row's reductions are sums of vectors. Returns impossible rows. */
static int64_t ID(short_rows)(const ID(Keys) *keys, const Work *w, int64_t row, int64_t rows)
{
    int64_t columns = w->columns;
    const float *logits = w->logits + row * columns;
    float *hard = w->hard ? w->hard + row * columns : NULL, *soft = w->soft + row * columns;
    VF scores[SHORT_ROW], best = ID(all)(-INFINITY), total = {0};
    VF unit = ID(all)(LOG2_E * w->inverse_tau), least = -127.0f / unit;
    VI nan = {0}, taken = {0};
    VL lanes[2] = {ID(row_lanes)(0), ID(row_lanes)(1)};
    for (int at = 0; at < columns; at += 4) {
        int wide = columns - at < 4 ? (int)(columns - at) : 4;
        VF in[4];
        VL c[2][4];
        VI words[4];
        ID(get_tile)(logits + at, columns, wide, rows, in);
        ID(rows_words)(keys, (uint32_t)(at / 4), (uint32_t)row, lanes, c);
        EACH words[k] = PAIRED(c[0][k], c[1][k]);
        ID(minus_gumbel)(words, scores + at);
        for (int k = 0; k < wide; k++) {
            scores[at + k] = in[k] - scores[at + k];
            best = VMAX(best, scores[at + k]);
            nan |= scores[at + k] != scores[at + k];
        }
    }
    VI impossible = best == -INFINITY;
    VI bad = nan | (best == INFINITY) | impossible;
    for (int at = 0; at < columns; at += 4) {
        int wide = columns - at < 4 ? (int)(columns - at) : 4;
        VF h[4] = {{0}, {0}, {0}, {0}};
        for (int k = 0; k < wide; k++) {
            VI wins = (scores[at + k] == best) & ~taken;
            taken |= wins;
            h[k] = (VF)((wins & (VI)ID(all)(1.0f)) | bad);
        }
        EACH scores[at + k] = VMAX(scores[at + k] - best, least);
        ID(power_of_2)(scores + at, unit);
        for (int k = 0; k < wide; k++)
            total += scores[at + k];
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
    VF lost = (VF)(impossible & (VI)ID(all)(1.0f));
    return ID(sum)(lost) > 0 ? ID(impossible)(logits, rows, columns) : 0;
}

/* Rows of which several make a block, or one does: vectors hold what lies side by side, so nothing is turned round.
 * `columns` divides the block, and is a constant where this is inlined. Returns impossible rows. */
INLINE int64_t ID(fitting_rows)(const ID(Keys) *keys, const Work *w, int64_t begin, int64_t end, const int columns)
{
    const int rows = BLOCK / columns, joined = columns > WIDTH ? columns / WIDTH : 1;
    VF unit = ID(all)(LOG2_E * w->inverse_tau), least = -127.0f / unit;
    VL lanes[2] = {ID(ordered_lanes)(0), ID(ordered_lanes)(1)};
    int64_t impossible = 0;
    for (int64_t row = begin; row < end; row += rows) {
        float in[BLOCK], hard[BLOCK], soft[BLOCK];
        int64_t present = end - row < rows ? end - row : rows, at = row * columns;
        const float *from = w->logits + at;
        float *to_hard = w->hard ? w->hard + at : hard, *to_soft = w->soft + at;
        if (present < rows) {
            memset(in, 0, sizeof in);
            memcpy(in, from, present * columns * sizeof(float));
            from = in;
            to_hard = hard;
            to_soft = soft;
        }
        VI words[4];
        if (columns == BLOCK) {
            ID(Line) line = ID(line)(keys, (uint32_t)row);
            ID(line_words)(keys, &line, 0, words);
        } else {
            VL c[2][4];
            if (columns == 4)
                ID(rows_words)(keys, 0, (uint32_t)row, lanes, c);
            else
                ID(places_words)(keys, (uint32_t)row, columns / 4, lanes, c);
            ID(put_in_order)(c, words);
        }
        VF score[4], best[4], total[4];
        ID(minus_gumbel)(words, score);
        EACH best[k] = score[k] = ID(load)(from + k * WIDTH) - score[k];
        int wrong = BITS(UNORDERED(score[0], score[1]) | UNORDERED(score[2], score[3])), ones = 0;
        for (int k = 0; k < 4; k += joined) {
            for (int j = 1; j < joined; j++)
                best[k] = VMAX(best[k], best[k + j]);
            for (int distance = 1; distance < columns && distance < WIDTH; distance *= 2)
                best[k] = VMAX(best[k], SWAPPED(best[k], distance));
            wrong |= BITS(EQUAL(best[k], ID(all)(INFINITY)));
        }
        EACH {
            VF top = best[k / joined * joined];
            MASK wins = EQUAL(score[k], top);
            ones += __builtin_popcount(BITS(wins));
            if (w->hard)
                ID(store)(to_hard + k * WIDTH, KEPT(wins, ID(all)(1.0f)));
            score[k] = VMAX(score[k] - top, least);
        }
        ID(power_of_2)(score, unit);
        EACH total[k] = score[k];
        for (int k = 0; k < 4; k += joined) {
            for (int j = 1; j < joined; j++)
                total[k] += total[k + j];
            for (int distance = 1; distance < columns && distance < WIDTH; distance *= 2)
                total[k] += SWAPPED(total[k], distance);
            total[k] = 1.0f / total[k];
        }
        EACH ID(store)(to_soft + k * WIDTH, score[k] * total[k / joined * joined]);
        if (present < rows) {
            memcpy(w->soft + at, soft, present * columns * sizeof(float));
            if (w->hard)
                memcpy(w->hard + at, hard, present * columns * sizeof(float));
        }
        /* A shared best score, or a row that cannot be sampled: taken one by one. */
        if (wrong || ones != rows)
            for (int64_t r = row; r < row + present; r++)
                impossible += ID(long_row)(keys, w, r);
    }
    return impossible;
}

static int64_t ID(softmax_forward)(const Work *w, int64_t begin, int64_t end)
{
    int64_t impossible = 0, columns = w->offsets ? 0 : w->columns;
    ID(Keys) keys;
    ID(set_keys)(&keys, w->key);
    switch (columns <= BLOCK ? columns : 0) {
    case 4: return ID(fitting_rows)(&keys, w, begin, end, 4);
    case 8: return ID(fitting_rows)(&keys, w, begin, end, 8);
    case 16: return ID(fitting_rows)(&keys, w, begin, end, 16);
    case 32: return ID(fitting_rows)(&keys, w, begin, end, BLOCK < 32 ? BLOCK : 32);
    case 64: return ID(fitting_rows)(&keys, w, begin, end, BLOCK < 64 ? BLOCK : 64);
    }
    if (columns && columns <= SHORT_ROW)
        for (int64_t row = begin; row < end; row += WIDTH)
            impossible += ID(short_rows)(&keys, w, row, end - row < WIDTH ? end - row : WIDTH);
    else
        for (int64_t row = begin; row < end; row++)
            impossible += ID(long_row)(&keys, w, row);
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
    ID(Keys) keys;
    ID(set_keys)(&keys, w->key);
    for (int64_t row = begin; row < end; row++) {
        ID(Line) line = ID(line)(&keys, (uint32_t)row);
        for (int64_t at = 0; at < w->columns; at += BLOCK) {
            int64_t left = w->columns - at < BLOCK ? w->columns - at : BLOCK;
            float made[BLOCK];
            VI words[4];
            ID(line_words)(&keys, &line, (uint32_t)(at / 4), words);
            VF drawn[4];
            if (w->binary) {
                ID(logistic)(words, drawn);
            } else {
                ID(minus_gumbel)(words, drawn);
                EACH drawn[k] = -drawn[k];
            }
            EACH ID(store)(made + k * WIDTH, drawn[k]);
            memcpy(w->out + row * w->columns + at, made, left * sizeof(float));
        }
    }
}
