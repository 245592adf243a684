/* Fused samplers for CPU tensors: noise from a counter, scores, one-hot rows and relaxed rows in one visit.
 *
 * The kernels are in _cpu_level.h, compiled here for AVX-512, AVX2 with FMA, and whatever the compiler's default
 * is; the caller says which to run. Tensors come as addresses, so that no header of torch is needed and one binary
 * serves every version of Python and torch. Nothing here relies on relaxed floating-point rules of the compiler:
 * they would delete the rounding trick in exp().
 */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#endif

/* Of Philox; see philox.py. */
#define ROUNDS 7
/* Rows of up to this many columns are sampled one in each vector lane. */
#define SHORT_ROW 128
/* A thread is worth its start from about this many elements. */
#define ELEMENTS_A_THREAD 65536
#define MAX_THREADS 64

typedef struct {
    uint64_t seed;
    uint32_t step, draw;
} Key;

/* What is written beside hard gates: the slope of the relaxed gate, its mean over conditional draws, or ReinMax's. */
enum { RELAXED, HARD, CONDITIONAL, REINMAX };

typedef struct {
    Key key;
    const float *logits, *gradient, *saved;
    float *hard, *soft, *out;
    const int64_t *offsets;
    int64_t columns;
    float inverse_tau;
    int binary, draws, kind;
} Work;

typedef struct {
    const float *x, *keep, *weight, *bias, *gradient;
    float *out, *means, *scales, *sums;
    int64_t columns, rows_a_share;
    float eps, count;
    int centre;
} Norm;

typedef struct {
    const float *x, *gate, *gradient;
    float *out, *sums;
    int64_t channels, run, rows_a_share;
} Product;

typedef struct {
    void (*sigmoid_forward)(const Work *, int64_t, int64_t);
    int64_t (*softmax_forward)(const Work *, int64_t, int64_t);
    void (*softmax_backward)(const Work *, int64_t, int64_t);
    void (*noise)(const Work *, int64_t, int64_t);
    void (*norm_forward)(const Norm *, int64_t, int64_t);
    void (*norm_backward)(const Norm *, int64_t, int64_t);
    void (*product_forward)(const Product *, int64_t, int64_t);
    void (*product_backward)(const Product *, int64_t, int64_t);
} Kernels;

/* Four independent chains of arithmetic side by side keep the processor's units busy. */
#ifdef __clang__
#define UNROLL_4 _Pragma("unroll")
#else
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

#define WIDTH 4
#define ID(name) base_##name
#define VMAX(a, b) base_where((a) > (b), a, b)
#define VMIN(a, b) base_where((a) < (b), a, b)
#ifdef X86
#define MUL_LOW(a, b) ((base_vl)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#else
#define MUL_LOW(a, b) (((a) & 0xFFFFFFFFull) * ((b) & 0xFFFFFFFFull))
#endif
#define MASK base_vi
#define SELECT_SIGN(sign, negative, other) base_where((sign) < 0, negative, other)
#define SELECT_ZERO(v, yes, no) base_where((v) == 0, yes, no)
#define EQUAL(a, b) ((a) == (b))
#define ABOVE(a, b) ((a) > (b))
#define UNORDERED(a, b) (((a) != (a)) | ((b) != (b)))
#define KEPT(mask, v) ((base_vf)((mask) & (base_vi)(v)))
#define POISONED(mask, v) ((base_vf)((mask) | (base_vi)(v)))
#define BITS(mask) (((mask)[0] & 1) | ((mask)[1] & 2) | ((mask)[2] & 4) | ((mask)[3] & 8))
#define PAIRED(a, b) ((base_vi)(((a) & 0xFFFFFFFFull) | ((b) << 32)))
#define SWAP_1(v) __builtin_shufflevector(v, v, 1, 0, 3, 2)
#define SWAP_2(v) __builtin_shufflevector(v, v, 2, 3, 0, 1)
#define SWAP_4(v) (v)
#define SWAP_8(v) (v)
#define UNPACK_LO32(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define UNPACK_HI32(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define UNPACK_LO64(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define UNPACK_HI64(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#define LOAD_ROWS(from, stride) base_load(from)
#define STORE_ROWS(to, stride, v) base_store(to, v)
#define SUM_LANES(v) (((v)[0] + (v)[2]) + ((v)[1] + (v)[3]))
#include "_cpu_level.h"

#ifdef X86

/* Four floats of one row after another fill the 128-bit lanes. Through memory this would wait for its own stores. */
#define PAIR_OF_ROWS(from, stride) \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps((from) + (stride)), 1)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
static inline __attribute__((always_inline)) float avx2_sum_of_4(__m128 v)
{
    __m128 halves = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(halves, _mm_movehdup_ps(halves)));
}
#define WIDTH 8
#define ID(name) avx2_##name
#define VMAX(a, b) ((avx2_vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define VMIN(a, b) ((avx2_vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define MUL_LOW(a, b) ((avx2_vl)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#define MASK avx2_vi
#define SELECT_SIGN(sign, negative, other) \
    ((avx2_vf)_mm256_blendv_ps((__m256)(other), (__m256)(negative), (__m256)(sign)))
#define SELECT_ZERO(v, yes, no) SELECT_SIGN((v) == 0, yes, no)
#define EQUAL(a, b) ((avx2_vi)_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_EQ_OQ))
#define ABOVE(a, b) ((avx2_vi)_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_GT_OQ))
#define UNORDERED(a, b) ((avx2_vi)_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_UNORD_Q))
#define KEPT(mask, v) ((avx2_vf)((mask) & (avx2_vi)(v)))
#define POISONED(mask, v) ((avx2_vf)((mask) | (avx2_vi)(v)))
#define BITS(mask) _mm256_movemask_ps((__m256)(mask))
#define PAIRED(a, b) ((avx2_vi)_mm256_blend_epi32((__m256i)(a), _mm256_slli_epi64((__m256i)(b), 32), 0xAA))
#define SWAP_1(v) ((avx2_vf)_mm256_permute_ps((__m256)(v), 0xB1))
#define SWAP_2(v) ((avx2_vf)_mm256_permute_ps((__m256)(v), 0x4E))
#define SWAP_4(v) ((avx2_vf)_mm256_permute2f128_ps((__m256)(v), (__m256)(v), 1))
#define SWAP_8(v) (v)
#define UNPACK_LO32(a, b) ((avx2_vi)_mm256_unpacklo_epi32((__m256i)(a), (__m256i)(b)))
#define UNPACK_HI32(a, b) ((avx2_vi)_mm256_unpackhi_epi32((__m256i)(a), (__m256i)(b)))
#define UNPACK_LO64(a, b) ((avx2_vi)_mm256_unpacklo_epi64((__m256i)(a), (__m256i)(b)))
#define UNPACK_HI64(a, b) ((avx2_vi)_mm256_unpackhi_epi64((__m256i)(a), (__m256i)(b)))
#define LOAD_ROWS(from, stride) ((avx2_vf)PAIR_OF_ROWS(from, stride))
#define STORE_ROWS(to, stride, v) \
    (_mm_storeu_ps(to, _mm256_castps256_ps128((__m256)(v))), \
     _mm_storeu_ps((to) + (stride), _mm256_extractf128_ps((__m256)(v), 1)))
#define SUM_LANES(v) \
    ID(sum_of_4)(_mm_add_ps(_mm256_castps256_ps128((__m256)(v)), _mm256_extractf128_ps((__m256)(v), 1)))
#include "_cpu_level.h"
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
#define WIDTH 16
#define ID(name) avx512_##name
#define VMAX(a, b) ((avx512_vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define VMIN(a, b) ((avx512_vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define MUL_LOW(a, b) ((avx512_vl)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#define MASK __mmask16
#define SELECT_SIGN(sign, negative, other) \
    ((avx512_vf)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)(sign)), (__m512)(other), (__m512)(negative)))
#define SELECT_ZERO(v, yes, no) \
    ((avx512_vf)_mm512_mask_blend_ps(_mm512_testn_epi32_mask((__m512i)(v), (__m512i)(v)), (__m512)(no), (__m512)(yes)))
#define EQUAL(a, b) _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_EQ_OQ)
#define ABOVE(a, b) _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_GT_OQ)
#define UNORDERED(a, b) _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_UNORD_Q)
#define KEPT(mask, v) ((avx512_vf)_mm512_maskz_mov_ps(mask, (__m512)(v)))
#define POISONED(mask, v) ((avx512_vf)_mm512_mask_mov_ps((__m512)(v), mask, _mm512_set1_ps(NAN)))
#define BITS(mask) (mask)
#define PAIRED(a, b) \
    ((avx512_vi)_mm512_mask_blend_epi32(0xAAAA, (__m512i)(a), _mm512_slli_epi64((__m512i)(b), 32)))
#define SWAP_1(v) ((avx512_vf)_mm512_permute_ps((__m512)(v), 0xB1))
#define SWAP_2(v) ((avx512_vf)_mm512_permute_ps((__m512)(v), 0x4E))
#define SWAP_4(v) ((avx512_vf)_mm512_shuffle_f32x4((__m512)(v), (__m512)(v), 0xB1))
#define SWAP_8(v) ((avx512_vf)_mm512_shuffle_f32x4((__m512)(v), (__m512)(v), 0x4E))
#define UNPACK_LO32(a, b) ((avx512_vi)_mm512_unpacklo_epi32((__m512i)(a), (__m512i)(b)))
#define UNPACK_HI32(a, b) ((avx512_vi)_mm512_unpackhi_epi32((__m512i)(a), (__m512i)(b)))
#define UNPACK_LO64(a, b) ((avx512_vi)_mm512_unpacklo_epi64((__m512i)(a), (__m512i)(b)))
#define UNPACK_HI64(a, b) ((avx512_vi)_mm512_unpackhi_epi64((__m512i)(a), (__m512i)(b)))
#define LOAD_ROWS(from, stride) \
    ((avx512_vf)_mm512_insertf32x8(_mm512_castps256_ps512(PAIR_OF_ROWS(from, stride)), \
                                   PAIR_OF_ROWS((from) + 2 * (stride), stride), 1))
#define STORE_ROWS(to, stride, v) \
    (_mm_storeu_ps(to, _mm512_castps512_ps128((__m512)(v))), \
     _mm_storeu_ps((to) + (stride), _mm512_extractf32x4_ps((__m512)(v), 1)), \
     _mm_storeu_ps((to) + 2 * (stride), _mm512_extractf32x4_ps((__m512)(v), 2)), \
     _mm_storeu_ps((to) + 3 * (stride), _mm512_extractf32x4_ps((__m512)(v), 3)))
#define SUM_LANES(v) _mm512_reduce_add_ps((__m512)(v))
#include "_cpu_level.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

static const Kernels *const kernels[] = {
    &base_kernels,
#ifdef X86
    &avx2_kernels,
    &avx512_kernels,
#endif
};

static int best_level(void)
{
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

/* A share of the work for one thread. Threads are started for each call: none is left to break a later fork. */
typedef struct {
    void (*plain)(const Work *, int64_t, int64_t);
    int64_t (*counting)(const Work *, int64_t, int64_t);
    void (*norm)(const Norm *, int64_t, int64_t);
    void (*product)(const Product *, int64_t, int64_t);
    const Work *work;
    const Norm *normed;
    const Product *gated;
    int64_t begin, end, result;
} Share;

static void *run_share(void *argument)
{
    Share *share = argument;
    share->result = 0;
    if (share->counting)
        share->result = share->counting(share->work, share->begin, share->end);
    else if (share->norm)
        share->norm(share->normed, share->begin, share->end);
    else if (share->product)
        share->product(share->gated, share->begin, share->end);
    else
        share->plain(share->work, share->begin, share->end);
    return NULL;
}

static int64_t useful_threads(int64_t elements, int64_t threads)
{
    int64_t most = elements / ELEMENTS_A_THREAD;
    threads = threads > MAX_THREADS ? MAX_THREADS : threads;
    threads = threads > most ? most : threads;
    return threads < 1 ? 1 : threads;
}

static int64_t run(Share share, int64_t items, int64_t elements, int64_t unit, int64_t threads)
{
    int64_t result = 0;
    Py_BEGIN_ALLOW_THREADS
    pthread_t handles[MAX_THREADS];
    Share shares[MAX_THREADS];
    threads = useful_threads(elements, threads);
    int64_t chunk = ((items + threads - 1) / threads + unit - 1) / unit * unit;
    int started = 0;
    for (int64_t begin = 0; begin < items; begin += chunk) {
        Share *mine = &shares[started];
        *mine = share;
        mine->begin = begin;
        mine->end = begin + chunk < items ? begin + chunk : items;
        /* The last share is this thread's own; one that cannot be started is run here and now. */
        if (mine->end == items || pthread_create(&handles[started], NULL, run_share, mine)) {
            run_share(mine);
            result += mine->result;
        } else {
            started++;
        }
    }
    for (int i = 0; i < started; i++) {
        pthread_join(handles[i], NULL);
        result += shares[i].result;
    }
    Py_END_ALLOW_THREADS
    return result;
}

/* Arguments come in one order for every function; see the docstrings. */
static void *address(PyObject *o) { return (void *)(uintptr_t)PyLong_AsUnsignedLongLong(o); }

static const Kernels *take_level(PyObject *o)
{
    long level = PyLong_AsLong(o);
    if (!PyErr_Occurred() && (level < 0 || level > best_level()))
        PyErr_Format(PyExc_ValueError, "level %ld cannot run here; 0 to %d can", level, best_level());
    return PyErr_Occurred() ? NULL : kernels[level];
}

static Key take_key(PyObject *seed, PyObject *step)
{
    Key key = {PyLong_AsUnsignedLongLongMask(seed), (uint32_t)PyLong_AsUnsignedLongLongMask(step), 0};
    return key;
}

static int arity(const char *name, Py_ssize_t given, Py_ssize_t expected)
{
    if (given != expected)
        PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", name, expected, given);
    return given != expected;
}

static PyObject *sigmoid_forward(PyObject *self, PyObject *const *a, Py_ssize_t n)
{
    if (arity("sigmoid_forward", n, 10))
        return NULL;
    const Kernels *k = take_level(a[0]);
    Work w = {.key = take_key(a[5], a[6]), .logits = address(a[1]), .hard = address(a[2]), .soft = address(a[3])};
    int64_t count = PyLong_AsLongLong(a[4]), threads = PyLong_AsLongLong(a[9]);
    long draws = PyLong_AsLong(a[8]);
    w.inverse_tau = (float)PyFloat_AsDouble(a[7]);
    w.draws = draws > 0 ? (int)draws : 0;
    w.kind = !w.hard ? RELAXED : draws > 0 ? CONDITIONAL : draws < 0 ? REINMAX : HARD;
    if (!PyErr_Occurred() && draws && !w.hard)
        PyErr_SetString(PyExc_ValueError, "the slope of an estimator is that of hard gates; their address is 0");
    if (PyErr_Occurred())
        return NULL;
    run((Share){.plain = k->sigmoid_forward, .work = &w}, count, count, 64, threads);
    Py_RETURN_NONE;
}

static int64_t elements(const Work *w, int64_t rows) { return w->offsets ? w->offsets[rows] : rows * w->columns; }

static PyObject *softmax_forward(PyObject *self, PyObject *const *a, Py_ssize_t n)
{
    if (arity("softmax_forward", n, 11))
        return NULL;
    const Kernels *k = take_level(a[0]);
    Work w = {.key = take_key(a[7], a[8]), .logits = address(a[1]), .hard = address(a[2]), .soft = address(a[3])};
    int64_t rows = PyLong_AsLongLong(a[4]), threads = PyLong_AsLongLong(a[10]);
    w.columns = PyLong_AsLongLong(a[5]);
    w.offsets = address(a[6]);
    w.inverse_tau = (float)PyFloat_AsDouble(a[9]);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromLongLong(
        run((Share){.counting = k->softmax_forward, .work = &w}, rows, elements(&w, rows), 16, threads));
}

static PyObject *softmax_backward(PyObject *self, PyObject *const *a, Py_ssize_t n)
{
    if (arity("softmax_backward", n, 9))
        return NULL;
    const Kernels *k = take_level(a[0]);
    Work w = {.gradient = address(a[1]), .saved = address(a[2]), .out = address(a[3])};
    int64_t rows = PyLong_AsLongLong(a[4]), threads = PyLong_AsLongLong(a[8]);
    w.columns = PyLong_AsLongLong(a[5]);
    w.offsets = address(a[6]);
    w.inverse_tau = (float)PyFloat_AsDouble(a[7]);
    if (PyErr_Occurred())
        return NULL;
    run((Share){.plain = k->softmax_backward, .work = &w}, rows, elements(&w, rows), 16, threads);
    Py_RETURN_NONE;
}

static PyObject *noise(PyObject *self, PyObject *const *a, Py_ssize_t n)
{
    if (arity("noise", n, 7))
        return NULL;
    const Kernels *k = take_level(a[0]);
    Work w = {.key = take_key(a[4], a[5]), .out = address(a[1])};
    int64_t rows = PyLong_AsLongLong(a[2]);
    w.columns = PyLong_AsLongLong(a[3]);
    w.binary = PyObject_IsTrue(a[6]);
    if (PyErr_Occurred())
        return NULL;
    run((Share){.plain = k->noise, .work = &w}, rows, elements(&w, rows), 1, 1);
    Py_RETURN_NONE;
}

static float sum(const float *values, int64_t count)
{
    double total = 0;
    for (int64_t i = 0; i < count; i++)
        total += values[i];
    return (float)total;
}

static PyObject *norm_forward(PyObject *self, PyObject *const *a, Py_ssize_t n)
{
    if (arity("norm_forward", n, 13))
        return NULL;
    const Kernels *k = take_level(a[0]);
    Norm w = {.x = address(a[1]), .keep = address(a[2]), .weight = address(a[3]), .bias = address(a[4]),
              .out = address(a[5]), .means = address(a[6]), .scales = address(a[7])};
    int64_t rows = PyLong_AsLongLong(a[8]), threads = PyLong_AsLongLong(a[12]);
    w.columns = PyLong_AsLongLong(a[9]);
    w.eps = (float)PyFloat_AsDouble(a[10]);
    w.centre = PyObject_IsTrue(a[11]);
    if (PyErr_Occurred())
        return NULL;
    w.count = sum(w.keep, w.columns);
    run((Share){.norm = k->norm_forward, .normed = &w}, rows, rows * w.columns, 4, threads);
    Py_RETURN_NONE;
}

static PyObject *norm_backward(PyObject *self, PyObject *const *a, Py_ssize_t n)
{
    if (arity("norm_backward", n, 14))
        return NULL;
    const Kernels *k = take_level(a[0]);
    Norm w = {.gradient = address(a[1]), .x = address(a[2]), .keep = address(a[3]), .weight = address(a[4]),
              .means = address(a[5]), .scales = address(a[6]), .out = address(a[7]), .sums = address(a[8])};
    int64_t rows = PyLong_AsLongLong(a[9]), threads = PyLong_AsLongLong(a[13]);
    w.columns = PyLong_AsLongLong(a[10]);
    w.eps = (float)PyFloat_AsDouble(a[11]);
    w.centre = PyObject_IsTrue(a[12]);
    if (PyErr_Occurred())
        return NULL;
    w.count = sum(w.keep, w.columns);
    threads = useful_threads(rows * w.columns, threads);
    w.rows_a_share = (rows + threads - 1) / threads;
    run((Share){.norm = k->norm_backward, .normed = &w}, rows, rows * w.columns, w.rows_a_share, threads);
    return PyLong_FromLongLong((rows + w.rows_a_share - 1) / w.rows_a_share);
}

/* Shorter runs of elements with one gate are multiplied as rows, by gates that are repeated first. */
#define FEW 32

/* Brings a product into the form that the kernels take, with `spaces` rows of sums to write; NULL if memory ends. */
static float *spread(Product *p, int64_t spaces)
{
    int64_t repeats = p->run < FEW ? p->run : 1, columns = p->channels * repeats;
    float *space = malloc((1 + spaces) * columns * sizeof(float));
    if (!space) {
        PyErr_NoMemory();
        return NULL;
    }
    float *at = space;
    for (int64_t channel = 0; channel < p->channels; channel++)
        for (int64_t i = 0; i < repeats; i++)
            *at++ = p->gate[channel];
    p->gate = space;
    p->sums = space + columns;
    p->channels = columns;
    p->run /= repeats;
    return space;
}

static PyObject *product_forward(PyObject *self, PyObject *const *a, Py_ssize_t n)
{
    if (arity("product_forward", n, 8))
        return NULL;
    const Kernels *k = take_level(a[0]);
    Product p = {.x = address(a[1]), .gate = address(a[2]), .out = address(a[3])};
    int64_t rows = PyLong_AsLongLong(a[4]), threads = PyLong_AsLongLong(a[7]);
    p.channels = PyLong_AsLongLong(a[5]);
    p.run = PyLong_AsLongLong(a[6]);
    float *space = PyErr_Occurred() ? NULL : spread(&p, 0);
    if (!space)
        return NULL;
    run((Share){.product = k->product_forward, .gated = &p}, rows, rows * p.channels * p.run, 4, threads);
    free(space);
    Py_RETURN_NONE;
}

static PyObject *product_backward(PyObject *self, PyObject *const *a, Py_ssize_t n)
{
    if (arity("product_backward", n, 10))
        return NULL;
    const Kernels *k = take_level(a[0]);
    Product p = {.gradient = address(a[1]), .x = address(a[2]), .gate = address(a[3]), .out = address(a[4])};
    float *to_gate = address(a[5]);
    int64_t rows = PyLong_AsLongLong(a[6]), threads = PyLong_AsLongLong(a[9]), channels = PyLong_AsLongLong(a[7]);
    p.channels = channels;
    p.run = PyLong_AsLongLong(a[8]);
    if (PyErr_Occurred())
        return NULL;
    int64_t count = rows * p.channels * p.run;
    threads = useful_threads(count, threads);
    p.rows_a_share = (rows + threads - 1) / threads;
    float *space = spread(&p, threads);
    if (!space)
        return NULL;
    run((Share){.product = k->product_backward, .gated = &p}, rows, count, p.rows_a_share, threads);
    int64_t shares = (rows + p.rows_a_share - 1) / p.rows_a_share, repeats = p.channels / channels;
    for (int64_t channel = 0; channel < channels; channel++) {
        double total = 0;
        for (int64_t share = 0; share < shares; share++)
            for (int64_t i = channel * repeats; i < (channel + 1) * repeats; i++)
                total += p.sums[share * p.channels + i];
        to_gate[channel] = (float)total;
    }
    free(space);
    Py_RETURN_NONE;
}

static PyObject *level(PyObject *self, PyObject *unused) { return PyLong_FromLong(best_level()); }

static PyMethodDef methods[] = {
    {"level", level, METH_NOARGS, "Best instruction set here: 0 the compiler's default, 1 AVX2 and FMA, 2 AVX-512."},
    {"sigmoid_forward", (PyCFunction)(void (*)(void))sigmoid_forward, METH_FASTCALL,
     "(level, logits, hard or 0, soft, count, seed, step, 1 / tau, draws, threads): samples gates. With draws, soft "
     "gets d gate / d logit instead: the mean over conditional draws, or where negative, ReinMax's."},
    {"softmax_forward", (PyCFunction)(void (*)(void))softmax_forward, METH_FASTCALL,
     "(level, logits, hard or 0, soft, rows, columns, offsets or 0, seed, step, 1 / tau, threads): samples rows and "
     "returns how many of them have no possible category."},
    {"softmax_backward", (PyCFunction)(void (*)(void))softmax_backward, METH_FASTCALL,
     "(level, gradient, soft, out, rows, columns, offsets or 0, 1 / tau, threads): gradient of the logits."},
    {"noise", (PyCFunction)(void (*)(void))noise, METH_FASTCALL,
     "(level, out, rows, columns, seed, step, binary): the noise that the samplers add."},
    {"norm_forward", (PyCFunction)(void (*)(void))norm_forward, METH_FASTCALL,
     "(level, x, keep, weight or 0, bias or 0, out, means, scales, rows, columns, eps, centre, threads): "
     "rows normalised by the statistics of their kept positions."},
    {"norm_backward", (PyCFunction)(void (*)(void))norm_backward, METH_FASTCALL,
     "(level, gradient, x, keep, weight or 0, means, scales, out, sums, rows, columns, eps, centre, threads): "
     "gradient of the rows. Returns how many shares there are in sums, a space of [threads, 3, columns]: each the "
     "gradient of mask, weight and bias by part of the rows."},
    {"product_forward", (PyCFunction)(void (*)(void))product_forward, METH_FASTCALL,
     "(level, x, gate, out, rows, channels, run, threads): runs of elements multiplied by their channel's gate."},
    {"product_backward", (PyCFunction)(void (*)(void))product_backward, METH_FASTCALL,
     "(level, gradient, x, gate, out or 0, to gate, rows, channels, run, threads): gradients of x and of the gate."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpu", "Fused samplers for CPU tensors; addresses in, nothing checked.", 0, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
