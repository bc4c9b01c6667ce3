// The keep bytes of one row: the rounds of philox_4x32 for many columns at once.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace floe::moe_lora {

inline constexpr int kCalls = 16;  // Philox calls side by side: one per vector lane
inline constexpr int kDrawn = kCalls * philox::kColumnsPerCall;

// The bytes of `kCalls` consecutive blocks of 16 columns. The same rounds as philox_4x32, written
// lane by lane so that the compiler vectorises them.
FLOE_INLINE void draw_bytes(philox::Key key, std::int64_t row, std::int64_t first_block,
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

}  // namespace floe::moe_lora
