#include "moe_lora/linear_cpu.h"

#include "moe_lora/backward.h"
#include "moe_lora/lanes.h"

namespace floe::moe_lora {

#define FLOE_DEFINE(Call, T)                                                      \
  FLOE_VECTOR_CLONES void run(const Call<T>& call, Step step, std::int64_t first, \
                              std::int64_t last) {                                \
    run_step<WideLanes<Accumulator<T>>>(call, step, first, last);                 \
  }
#define FLOE_DEFINE_CALLS(T) \
  FLOE_DEFINE(Shrink, T)     \
  FLOE_DEFINE(Expand, T)     \
  FLOE_DEFINE(GradY, T)      \
  FLOE_DEFINE(GradX, T)

FLOE_DEFINE_CALLS(BFloat16)
FLOE_DEFINE_CALLS(Float16)
FLOE_DEFINE_CALLS(float)
FLOE_DEFINE_CALLS(double)

}  // namespace floe::moe_lora
