// Dropout of rows on the CPU: output = keep(seed, row, column) ? input / (1 - p') : 0, where p' is
// p rounded to a multiple of 1/256 (philox.h).
#pragma once

#include <cstdint>

#include "number.h"

namespace floe::moe_lora {

// Rows [first_row, last_row) of contiguous matrices with `columns` columns.
void drop_rows(const BFloat16* input, BFloat16* output, std::int64_t columns,
               std::int64_t first_row, std::int64_t last_row, double p, std::int64_t seed);
void drop_rows(const Float16* input, Float16* output, std::int64_t columns, std::int64_t first_row,
               std::int64_t last_row, double p, std::int64_t seed);
void drop_rows(const float* input, float* output, std::int64_t columns, std::int64_t first_row,
               std::int64_t last_row, double p, std::int64_t seed);
void drop_rows(const double* input, double* output, std::int64_t columns, std::int64_t first_row,
               std::int64_t last_row, double p, std::int64_t seed);

}  // namespace floe::moe_lora
