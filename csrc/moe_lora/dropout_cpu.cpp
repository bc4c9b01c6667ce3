#include "moe_lora/dropout_cpu.h"

#include <algorithm>

#include "moe_lora/draw.h"

namespace floe::moe_lora {
namespace {

template <typename T>
FLOE_INLINE void drop_tile(const T* __restrict__ input, T* __restrict__ output, int count,
                           const std::uint8_t* __restrict__ bytes, std::uint32_t threshold,
                           Accumulator<T> scale) {
  T scaled[kDrawn];  // two loops: each vectorises, one with both widths does not
  for (int j = 0; j < count; ++j) scaled[j] = narrow<T>(widen(input[j]) * scale);
  // A select, not a product: a dropped infinity or NaN is 0.
  for (int j = 0; j < count; ++j) output[j] = bytes[j] >= threshold ? scaled[j] : T{};
}

template <typename T>
FLOE_INLINE void drop_rows_of(const T* input, T* output, std::int64_t columns,
                              std::int64_t first_row, std::int64_t last_row, double p,
                              std::int64_t seed) {
  const philox::Key key = philox::key_of(seed);
  const std::uint32_t threshold = philox::threshold(p);
  const auto scale = static_cast<Accumulator<T>>(philox::scale(threshold));
  std::uint8_t bytes[kDrawn];
  for (std::int64_t row = first_row; row < last_row; ++row) {
    for (std::int64_t column = 0; column < columns; column += kDrawn) {
      const std::int64_t offset = row * columns + column;
      const auto count = static_cast<int>(std::min<std::int64_t>(kDrawn, columns - column));
      draw_bytes(key, row, column / philox::kColumnsPerCall, bytes);
      if (count == kDrawn) {  // a constant trip count for the compiler
        drop_tile(input + offset, output + offset, kDrawn, bytes, threshold, scale);
      } else {
        drop_tile(input + offset, output + offset, count, bytes, threshold, scale);
      }
    }
  }
}

}  // namespace

FLOE_VECTOR_CLONES void drop_rows(const BFloat16* input, BFloat16* output, std::int64_t columns,
                                  std::int64_t first_row, std::int64_t last_row, double p,
                                  std::int64_t seed) {
  drop_rows_of(input, output, columns, first_row, last_row, p, seed);
}

FLOE_VECTOR_CLONES void drop_rows(const Float16* input, Float16* output, std::int64_t columns,
                                  std::int64_t first_row, std::int64_t last_row, double p,
                                  std::int64_t seed) {
  drop_rows_of(input, output, columns, first_row, last_row, p, seed);
}

FLOE_VECTOR_CLONES void drop_rows(const float* input, float* output, std::int64_t columns,
                                  std::int64_t first_row, std::int64_t last_row, double p,
                                  std::int64_t seed) {
  drop_rows_of(input, output, columns, first_row, last_row, p, seed);
}

FLOE_VECTOR_CLONES void drop_rows(const double* input, double* output, std::int64_t columns,
                                  std::int64_t first_row, std::int64_t last_row, double p,
                                  std::int64_t seed) {
  drop_rows_of(input, output, columns, first_row, last_row, p, seed);
}

}  // namespace floe::moe_lora
