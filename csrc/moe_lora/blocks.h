// Products of cache-sized tiles, accumulated in registers. `Lanes` is WideLanes or another type
// with its members.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moe_lora/draw.h"
#include "moe_lora/linear_cpu.h"
#include "moe_lora/scratch.h"

namespace floe::moe_lora {

// sums[a, l] += sum over steps s of u[a, s] * v[s, l]; a step is kPair elements of u and of each
// lane of v. Strides in elements.
template <typename Lanes, int kRows, int kVectors>
FLOE_INLINE void add_steps(typename Lanes::Vector (&sums)[kRows][kVectors],
                           const typename Lanes::Element* u, std::int64_t u_row,
                           std::int64_t u_step, const typename Lanes::Element* v,
                           std::int64_t v_step, std::int64_t steps) {
  for (std::int64_t s = 0; s < steps; ++s, u += u_step, v += v_step) {
    typename Lanes::Operand right[kVectors];
#pragma GCC unroll 8
    for (int l = 0; l < kVectors; ++l) {
      Lanes::load_operand(right[l], v + l * Lanes::kLanes * Lanes::kPair);
    }
#pragma GCC unroll 8
    for (int a = 0; a < kRows; ++a) {
      typename Lanes::Operand left;
      Lanes::broadcast(left, u + a * u_row);
#pragma GCC unroll 8
      for (int l = 0; l < kVectors; ++l) Lanes::multiply_add(sums[a][l], left, right[l]);
    }
  }
}

template <typename Lanes, int kRows, int kVectors>
FLOE_INLINE void multiply_block(const typename Lanes::Element* u, std::int64_t u_row,
                                std::int64_t u_step, const typename Lanes::Element* v,
                                std::int64_t v_step, std::int64_t steps, typename Lanes::Sum* out,
                                std::int64_t out_row) {
  typename Lanes::Vector sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int a = 0; a < kRows; ++a) {
#pragma GCC unroll 8
    for (int l = 0; l < kVectors; ++l) {
      Lanes::load(sums[a][l], out + a * out_row + l * Lanes::kLanes);
    }
  }
  add_steps<Lanes>(sums, u, u_row, u_step, v, v_step, steps);
#pragma GCC unroll 8
  for (int a = 0; a < kRows; ++a) {
#pragma GCC unroll 8
    for (int l = 0; l < kVectors; ++l) {
      Lanes::store(out + a * out_row + l * Lanes::kLanes, sums[a][l]);
    }
  }
}

template <typename Lanes, int kVectors>
FLOE_INLINE void multiply_lanes(const typename Lanes::Element* u, std::int64_t u_row,
                                std::int64_t u_step, const typename Lanes::Element* v,
                                std::int64_t v_step, std::int64_t steps, typename Lanes::Sum* out,
                                std::int64_t out_row, std::int64_t rows) {
  std::int64_t a = 0;
  for (; a + Lanes::kBlockRows <= rows; a += Lanes::kBlockRows) {
    multiply_block<Lanes, Lanes::kBlockRows, kVectors>(u + a * u_row, u_row, u_step, v, v_step,
                                                       steps, out + a * out_row, out_row);
  }
  if (a < rows) {
    multiply_block<Lanes, 4, kVectors>(u + a * u_row, u_row, u_step, v, v_step, steps,
                                       out + a * out_row, out_row);
  }
}

// out [rows, lanes] += u v; `rows` is a multiple of 4, `lanes` of kLanes.
template <typename Lanes>
FLOE_INLINE void multiply(const typename Lanes::Element* u, std::int64_t u_row, std::int64_t u_step,
                          const typename Lanes::Element* v, std::int64_t v_step, std::int64_t steps,
                          typename Lanes::Sum* out, std::int64_t out_row, std::int64_t rows,
                          std::int64_t lanes) {
  std::int64_t l = 0;
  for (; l + 2 * Lanes::kLanes <= lanes; l += 2 * Lanes::kLanes) {
    multiply_lanes<Lanes, 2>(u, u_row, u_step, v + l * Lanes::kPair, v_step, steps, out + l,
                             out_row, rows);
  }
  if (l < lanes) {
    multiply_lanes<Lanes, 1>(u, u_row, u_step, v + l * Lanes::kPair, v_step, steps, out + l,
                             out_row, rows);
  }
}

// sums[t, p] (a vector) += lane by lane products of tile[t, :] and rows[p, :], `columns` long.
template <typename Lanes, int kRows>
FLOE_INLINE void dot_block(const typename Lanes::Element* tile, const typename Lanes::Element* rows,
                           std::int64_t row_stride, std::int64_t columns, typename Lanes::Sum* sums,
                           std::int64_t sums_row) {
  typename Lanes::Vector block[Lanes::kDotTokens][kRows];
#pragma GCC unroll 8
  for (int t = 0; t < Lanes::kDotTokens; ++t) {
#pragma GCC unroll 8
    for (int p = 0; p < kRows; ++p) {
      Lanes::load(block[t][p], sums + (t * sums_row + p) * Lanes::kLanes);
    }
  }
  for (std::int64_t c = 0; c < columns; c += Lanes::kLanes * Lanes::kPair) {
    typename Lanes::Operand left[Lanes::kDotTokens], right;
#pragma GCC unroll 8
    for (int t = 0; t < Lanes::kDotTokens; ++t) {
      Lanes::load_operand(left[t], tile + t * kColumns + c);
    }
#pragma GCC unroll 8
    for (int p = 0; p < kRows; ++p) {
      Lanes::load_operand(right, rows + p * row_stride + c);
#pragma GCC unroll 8
      for (int t = 0; t < Lanes::kDotTokens; ++t) {
        Lanes::multiply_add(block[t][p], left[t], right);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Lanes::kDotTokens; ++t) {
#pragma GCC unroll 8
    for (int p = 0; p < kRows; ++p) {
      Lanes::store(sums + (t * sums_row + p) * Lanes::kLanes, block[t][p]);
    }
  }
}

template <typename Lanes, int kRows>
FLOE_INLINE void dot_tokens(const typename Lanes::Element* tile, std::int64_t tokens,
                            const typename Lanes::Element* rows, std::int64_t row_stride,
                            std::int64_t columns, typename Lanes::Sum* sums,
                            std::int64_t sums_row) {
  for (std::int64_t t = 0; t < tokens; t += Lanes::kDotTokens) {
    dot_block<Lanes, kRows>(tile + t * kColumns, rows, row_stride, columns,
                            sums + t * sums_row * Lanes::kLanes, sums_row);
  }
}

// sums [tokens, row_count] of a tile, in groups of rows of nearly one size.
template <typename Lanes>
FLOE_INLINE void dot(const typename Lanes::Element* tile, std::int64_t tokens,
                     const typename Lanes::Element* rows, std::int64_t row_count,
                     std::int64_t row_stride, std::int64_t columns, typename Lanes::Sum* sums,
                     std::int64_t sums_row) {
  const std::int64_t groups = ceil_divide(row_count, Lanes::kDotRows);
  for (std::int64_t g = 0, p = 0; g < groups; ++g) {
    const std::int64_t count = ceil_divide(row_count - p, groups - g);
    const auto* part = rows + p * row_stride;
    auto* target = sums + p * Lanes::kLanes;
    p += count;
    if (count == 1) {
      dot_tokens<Lanes, 1>(tile, tokens, part, row_stride, columns, target, sums_row);
    } else if (count == 2) {
      dot_tokens<Lanes, 2>(tile, tokens, part, row_stride, columns, target, sums_row);
    } else if (count == 3) {
      dot_tokens<Lanes, 3>(tile, tokens, part, row_stride, columns, target, sums_row);
    } else if constexpr (Lanes::kDotRows > 3) {
      if (count == 4) {
        dot_tokens<Lanes, 4>(tile, tokens, part, row_stride, columns, target, sums_row);
      } else if (count == 5) {
        dot_tokens<Lanes, 5>(tile, tokens, part, row_stride, columns, target, sums_row);
      } else {
        dot_tokens<Lanes, 6>(tile, tokens, part, row_stride, columns, target, sums_row);
      }
    }
  }
}

// tile [round_up(tokens, 4), round_up(columns, kPadding)] of rows kColumns apart; zero where the
// matrix ends.
template <typename Lanes, typename T>
FLOE_INLINE void load_tile(const T* __restrict__ source, std::int64_t stride, std::int64_t tokens,
                           std::int64_t columns, typename Lanes::Element* __restrict__ tile) {
  const std::int64_t padded = round_up(columns, kPadding);
  for (std::int64_t t = 0; t < tokens; ++t) {
    auto* row = tile + t * kColumns;
    Lanes::load_row(source + t * stride, columns, row);
    std::fill(row + columns, row + padded, typename Lanes::Element{});
  }
  for (std::int64_t t = tokens; t < round_up(tokens, 4); ++t) {
    std::fill(tile + t * kColumns, tile + t * kColumns + padded, typename Lanes::Element{});
  }
}

// The rows of a tile as the operand of a product that sums over them; where a step takes one row,
// the tile itself. Columns in whole vectors.
template <typename Lanes>
FLOE_INLINE const typename Lanes::Element* pair_rows(const typename Lanes::Element* tile,
                                                     std::int64_t stride, std::int64_t rows,
                                                     std::int64_t columns,
                                                     typename Lanes::Element* pairs) {
  if constexpr (Lanes::kPair == 1) return tile;
  for (std::int64_t t = 0; t < rows; t += Lanes::kPair) {
    const auto* row = tile + t * stride;
    Lanes::pair(row, row + stride, columns, columns, pairs + t * stride);
  }
  return pairs;
}

// The keep bytes of a tile, [tokens, kColumns], and its kept elements.
template <typename Lanes>
struct Mask {
  philox::Key key;
  std::uint32_t threshold;
  Scratch<std::uint8_t> bytes{kTokens * kColumns};

  FLOE_INLINE explicit Mask(const Dropout& dropout)
      : key(philox::key_of(dropout.seed)), threshold(philox::threshold(dropout.p)) {}

  FLOE_INLINE void draw(std::int64_t first_row, std::int64_t rows, std::int64_t column) {
    for (std::int64_t t = 0; t < rows; ++t) {
      Lanes::draw(key, first_row + t, column / philox::kColumnsPerCall, bytes.get() + t * kColumns);
    }
  }

  FLOE_INLINE void keep_tile(const typename Lanes::Element* tile, std::int64_t tokens,
                             std::int64_t columns, typename Lanes::Element* kept) const {
    const std::int64_t padded = round_up(columns, kPadding);
    for (std::int64_t t = 0; t < tokens; ++t) {
      Lanes::keep_elements(tile + t * kColumns, kept + t * kColumns, padded,
                           bytes.get() + t * kColumns, threshold);
    }
    for (std::int64_t t = tokens; t < round_up(tokens, 4); ++t) {
      std::fill(kept + t * kColumns, kept + t * kColumns + padded, typename Lanes::Element{});
    }
  }

  FLOE_INLINE typename Lanes::Sum scale() const {
    return static_cast<typename Lanes::Sum>(philox::scale(threshold));
  }
};

}  // namespace floe::moe_lora
