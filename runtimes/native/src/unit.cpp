// The kernels, compiled once per instruction set (compile.py): -DUNIT=avx2 makes kernels_avx2.
#include "attention_int8.h"
#include "products.h"
#include "rows.h"

#define JOIN(a, b) a##b
#define NAME(unit) JOIN(kernels_, unit)
#define TEXT_OF(unit) #unit
#define TEXT(unit) TEXT_OF(unit)

namespace herd {
extern const Kernels NAME(UNIT);
const Kernels NAME(UNIT) = {TEXT(UNIT), product, quantize, rms_norm, layer_norm, gelu, swiglu, hadamard, rotate, append, attend, merge};
}  // namespace herd
