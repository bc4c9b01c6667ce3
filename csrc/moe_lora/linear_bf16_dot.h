// The same calls with the CPU's bfloat16 dot products (AVX512-BF16: two products and two sums a
// lane and instruction). Operands are packed differently: one call's steps all run here or none.
#pragma once

#include "moe_lora/linear_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FLOE_BF16_DOT
#endif

namespace floe::moe_lora::bf16_dot {

// Whether this CPU has them and ATEN_CPU_CAPABILITY, where set, allows them; false where this
// file's functions do not exist.
bool available();

#if defined(FLOE_BF16_DOT)
void run(const Shrink<BFloat16>& call, Step step, std::int64_t first, std::int64_t last);
void run(const Expand<BFloat16>& call, Step step, std::int64_t first, std::int64_t last);
void run(const GradY<BFloat16>& call, Step step, std::int64_t first, std::int64_t last);
void run(const GradX<BFloat16>& call, Step step, std::int64_t first, std::int64_t last);
#endif

}  // namespace floe::moe_lora::bf16_dot
