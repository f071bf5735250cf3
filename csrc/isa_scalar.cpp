// The kernels for any processor.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "slice.h"
#include "vec_types.h"

namespace fastadapt {
namespace scalar {

#include "vec_scalar.h"

#include "all-inl.h"

}  // namespace scalar
}  // namespace fastadapt
