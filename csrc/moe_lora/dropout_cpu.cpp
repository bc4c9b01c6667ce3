#include "moe_lora/dropout_cpu.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "philox.h"

namespace floe::moe_lora {
namespace {

constexpr int kCalls = 16;  // Philox calls side by side: one per vector lane
constexpr int kTile = kCalls * philox::kColumnsPerCall;

// The bytes of `kCalls` consecutive blocks of 16 columns. The same rounds as philox_4x32, written
// lane by lane so that the compiler vectorises them.
FLOE_HOST_DEVICE void draw_bytes(philox::Key key, std::int64_t row, std::int64_t first_block,
                                 std::uint8_t* bytes) {
  static_assert(std::endian::native == std::endian::little, "byte j of a word is its j-th address");
  std::uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
  for (int i = 0; i < kCalls; ++i) {
    const philox::Words counter = philox::counter_of(row, first_block + i);
    c0[i] = counter.word[0];
    c1[i] = counter.word[1];
    c2[i] = counter.word[2];
    c3[i] = counter.word[3];
  }
  for (int round = 0; round < philox::kRounds; ++round) {
    for (int i = 0; i < kCalls; ++i) {
      const philox::Words next = philox::philox_4x32({{c0[i], c1[i], c2[i], c3[i]}}, key, 1);
      c0[i] = next.word[0];
      c1[i] = next.word[1];
      c2[i] = next.word[2];
      c3[i] = next.word[3];
    }
    key = philox::next_key(key);
  }
  std::uint32_t words[kCalls * 4];
  for (int i = 0; i < kCalls; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
  std::memcpy(bytes, words, sizeof words);
}

template <typename T>
FLOE_HOST_DEVICE void drop_tile(const T* __restrict__ input, T* __restrict__ output, int count,
                                const std::uint8_t* __restrict__ bytes, std::uint32_t threshold,
                                Accumulator<T> scale) {
  T scaled[kTile];  // two loops: each vectorises, one with both widths does not
  for (int j = 0; j < count; ++j) scaled[j] = narrow<T>(widen(input[j]) * scale);
  // A select, not a product: a dropped infinity or NaN is 0.
  for (int j = 0; j < count; ++j) output[j] = bytes[j] >= threshold ? scaled[j] : T{};
}

template <typename T>
FLOE_HOST_DEVICE void drop_rows_of(const T* input, T* output, std::int64_t columns,
                                   std::int64_t first_row, std::int64_t last_row, double p,
                                   std::int64_t seed) {
  const philox::Key key = philox::key_of(seed);
  const std::uint32_t threshold = philox::threshold(p);
  const auto scale = static_cast<Accumulator<T>>(philox::scale(threshold));
  std::uint8_t bytes[kTile];
  for (std::int64_t row = first_row; row < last_row; ++row) {
    for (std::int64_t column = 0; column < columns; column += kTile) {
      const std::int64_t offset = row * columns + column;
      const auto count = static_cast<int>(std::min<std::int64_t>(kTile, columns - column));
      draw_bytes(key, row, column / philox::kColumnsPerCall, bytes);
      if (count == kTile) {  // a constant trip count for the compiler
        drop_tile(input + offset, output + offset, kTile, bytes, threshold, scale);
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
