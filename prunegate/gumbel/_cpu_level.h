/* All kernels for one instruction set, written once for vectors of WIDTH floats.
 *
 * The including file defines, for each inclusion: WIDTH, ID(name) to make names unique, and the few operations for
 * which portable vector code would be slow: VMAX, VMIN, MUL_LOW (low halves of 64-bit lanes, to 64-bit products) and the
 * unpack operations UNPACK_LO32, UNPACK_HI32, UNPACK_LO64, UNPACK_HI64, which work inside each 128-bit lane, and
 * LOAD_ROWS and STORE_ROWS, which move four floats of each of WIDTH / 4 rows; and SUM_LANES.
 */

#include "_cpu_vector.h"
#include "_cpu_kernels.h"
#include "_cpu_norms.h"
#include "_cpu_products.h"

static const Kernels ID(kernels) = {
    ID(sigmoid_forward), ID(softmax_forward), ID(softmax_backward), ID(noise),
    ID(norm_forward),    ID(norm_backward),    ID(product_forward),  ID(product_backward),
};

#undef VF
#undef VI
#undef VL
#undef BLOCK
#undef SPAN
#undef INLINE
#undef WIDTH
#undef ID
#undef VMAX
#undef VMIN
#undef MUL_LOW
#undef MASK
#undef SELECT_SIGN
#undef SELECT_ZERO
#undef EQUAL
#undef ABOVE
#undef UNORDERED
#undef KEPT
#undef POISONED
#undef BITS
#undef PAIRED
#undef SWAP_1
#undef SWAP_2
#undef SWAP_4
#undef SWAP_8
#undef EACH
#undef ROOT
#undef LN_2_SCALED
#undef LOG2_E
#undef SWAPPED
#undef M0
#undef M1
#undef HIGH
#undef UNPACK_LO32
#undef UNPACK_HI32
#undef UNPACK_LO64
#undef UNPACK_HI64
#undef LOAD_ROWS
#undef STORE_ROWS
#undef SUM_LANES
