// The dropout mask as a pure function of (seed, row, column).
//
// Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives 16
// bytes a call, hence 16 keep decisions: 8 bits are the resolution of the dropout rate. Seven
// rounds are the fewest that pass BigCrush in that paper. floe_triton draws the same mask.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace floe::philox {

inline constexpr int kRounds = 7;
inline constexpr int kColumnsPerCall = 16;

struct Words {
  std::uint32_t word[4];
};

struct Key {
  std::uint32_t word[2];
};

FLOE_INLINE Key key_of(std::int64_t seed) {
  const auto bits = static_cast<std::uint64_t>(seed);
  return {{static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32)}};
}

// The counter of columns [16 * block, 16 * block + 16) of `row`. Blocks beyond 2^32 would repeat,
// at 2^36 columns.
FLOE_INLINE Words counter_of(std::int64_t row, std::int64_t block) {
  const auto bits = static_cast<std::uint64_t>(row);
  return {{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(bits),
           static_cast<std::uint32_t>(bits >> 32), 0u}};
}

FLOE_INLINE Key next_key(Key key) {
  return {{key.word[0] + 0x9E3779B9u, key.word[1] + 0xBB67AE85u}};
}

FLOE_INLINE Words philox_4x32(Words counter, Key key, int rounds = kRounds) {
  for (int round = 0; round < rounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter.word[0];
    const std::uint64_t product2 = std::uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(product2 >> 32) ^ counter.word[1] ^ key.word[0],
                static_cast<std::uint32_t>(product2),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key.word[1],
                static_cast<std::uint32_t>(product0)}};
    key = next_key(key);
  }
  return counter;
}

// The byte that decides column `16 * block + j`; the column is kept iff byte >= threshold(p).
FLOE_INLINE std::uint32_t byte_of(const Words& words, int j) {
  return words.word[j / 4] >> (8 * (j % 4)) & 0xffu;
}

// round(256 p) for p in [0, 1), ties to even as in Python; at least one byte in 256 is kept.
inline std::uint32_t threshold(double p) {
  return static_cast<std::uint32_t>(std::fmin(255.0, std::nearbyint(256.0 * p)));
}

// 1 / (1 - threshold / 256): the mean is preserved exactly for the rate that is really drawn.
inline double scale(std::uint32_t threshold) { return 256.0 / (256.0 - threshold); }

}  // namespace floe::philox
