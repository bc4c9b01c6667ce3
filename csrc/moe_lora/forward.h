// The products of the forward pass, tile by tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moe_lora/blocks.h"

namespace floe::moe_lora {

// Elements [offset, offset + count) of a parameter: in place, or rounded into `scratch`.
template <typename T>
FLOE_INLINE const T* rounded(const Parameter<T>& parameter, std::int64_t offset, std::int64_t count,
                             T* __restrict__ scratch) {
  if (!parameter.wide) return static_cast<const T*>(parameter.data) + offset;
  const auto* stored = static_cast<const Accumulator<T>*>(parameter.data) + offset;
  for (std::int64_t i = 0; i < count; ++i) scratch[i] = narrow<T>(stored[i]);
  return scratch;
}

template <typename Lanes, typename T>
FLOE_INLINE void pack_rows(const Shrink<T>& call, std::int64_t first, std::int64_t last) {
  auto* packed = static_cast<typename Lanes::Element*>(call.packed);
  const Scratch<T> scratch(call.columns);
  for (std::int64_t p = first; p < last; ++p) {
    auto* target = packed + p * call.padded_columns();
    const auto [linear, row] = call.group.stored(p);
    const T* source = rounded(call.shrink[linear], row * call.columns, call.columns, scratch.get());
    Lanes::load_row(source, call.columns, target);
    std::fill(target + call.columns, target + call.padded_columns(), typename Lanes::Element{});
  }
}

template <typename Lanes, typename T>
struct ShrinkScratch {
  Scratch<typename Lanes::Element> tile{kTokens * kColumns}, kept{kTokens * kColumns};
  Scratch<typename Lanes::Sum> sums;  // [kTokens, P] vectors
  Mask<Lanes> mask;

  FLOE_INLINE explicit ShrinkScratch(const Shrink<T>& call)
      : sums(kTokens * call.group.row_count() * Lanes::kLanes), mask(call.dropout) {}
};

// Adds the products of one tile of x, from token `origin` and column `c` on.
template <typename Lanes, typename T>
FLOE_INLINE void shrink_tile(const Shrink<T>& call, ShrinkScratch<Lanes, T>& scratch,
                             std::int64_t origin, std::int64_t tokens, std::int64_t c) {
  const auto* rows = static_cast<const typename Lanes::Element*>(call.packed) + c;
  const std::int64_t count = std::min(kColumns, call.columns - c);
  const std::int64_t stride = call.padded_columns(), row_count = call.group.row_count();
  const auto* tile = scratch.tile.get();
  auto* sums = scratch.sums.get();
  load_tile<Lanes>(call.x + origin * call.columns + c, call.columns, tokens, count,
                   scratch.tile.get());
  std::int64_t plain = 0;  // rows before this one are done
  if (call.dropout.active) {
    plain = call.group.hidden_rows();
    scratch.mask.draw(origin, tokens, c);
    scratch.mask.keep_tile(tile, tokens, count, scratch.kept.get());
    dot<Lanes>(scratch.kept.get(), tokens, rows, plain, stride, round_up(count, kPadding), sums,
               row_count);
  }
  dot<Lanes>(tile, tokens, rows + plain * stride, row_count - plain, stride,
             round_up(count, kPadding), sums + plain * Lanes::kLanes, row_count);
}

template <typename Lanes, typename T>
FLOE_INLINE void shrink_tokens(const Shrink<T>& call, std::int64_t first, std::int64_t last) {
  using Sum = typename Lanes::Sum;
  ShrinkScratch<Lanes, T> scratch(call);
  auto* sums = scratch.sums.get();
  const Sum scale = call.dropout.active ? scratch.mask.scale() : Sum{1};
  const std::int64_t row_count = call.group.row_count(), hidden_rows = call.group.hidden_rows();
  for (std::int64_t task = first; task < last; ++task) {
    const std::int64_t origin = task * kTokens;
    const std::int64_t tokens = std::min(kTokens, call.tokens - origin);
    std::fill(sums, sums + round_up(tokens, 4) * row_count * Lanes::kLanes, Sum{});
    for (std::int64_t c = 0; c < call.columns; c += kColumns) {
      shrink_tile(call, scratch, origin, tokens, c);
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      Sum* products = call.products + (origin + t) * row_count;
      for (std::int64_t p = 0; p < row_count; ++p) {
        const Sum total = Lanes::total(sums + (t * row_count + p) * Lanes::kLanes);
        products[p] = p < hidden_rows ? total * scale : total;
      }
    }
  }
}

// Of the operand [blocks, steps, kWide lanes], the block that starts at matrix row `n`: step s of
// lane l holds elements kPair * s ... of matrix row n + l.
template <typename Lanes>
inline constexpr std::int64_t kWide = 2 * Lanes::kLanes;

template <typename Lanes, typename T>
FLOE_INLINE void pack_transposed(const Expand<T>& call, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kPair = Lanes::kPair, kLanes = kWide<Lanes>;
  const std::int64_t steps = ceil_divide(call.width, kPair), whole = call.width / kPair;
  const std::int64_t end = std::min(last * kTokens, round_up(call.features, kLanes));
  const Scratch<T> scratch(call.width);
  for (std::int64_t n = first * kTokens; n < end; ++n) {
    auto* target = static_cast<typename Lanes::Element*>(call.packed) +
                   (n / kLanes * steps * kLanes + n % kLanes) * kPair;
    const bool inside = n < call.features;
    const T* source =
        inside ? rounded(call.expand, n * call.width, call.width, scratch.get()) : nullptr;
    for (std::int64_t s = 0; s < (inside ? whole : 0); ++s) {
      for (std::int64_t i = 0; i < kPair; ++i) {
        target[s * kLanes * kPair + i] = Lanes::element(source[s * kPair + i]);
      }
    }
    for (std::int64_t s = inside ? whole : 0; s < steps; ++s) {
      auto* step = target + s * kLanes * kPair;
      std::fill(step, step + kPair, typename Lanes::Element{});
      if (inside) step[0] = Lanes::element(source[s * kPair]);
    }
  }
}

// y[t, n : n + count] of kRows tokens; `z` is their tile.
template <typename Lanes, typename T>
FLOE_INLINE void write_sums(const Expand<T>& call, typename Lanes::Sum* __restrict__ sums,
                            std::int64_t t, std::int64_t n, std::int64_t count) {
  const std::int64_t offset = t * call.features + n;
  if (call.bias != nullptr) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] += widen(call.bias[n + i]);
  }
  if (call.base != nullptr) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] += widen(call.base[offset + i]);
  }
  Lanes::narrow_row(sums, call.y + offset, count);
}

template <typename Lanes, typename T>
FLOE_INLINE void expand_block(const Expand<T>& call, const typename Lanes::Element* z,
                              std::int64_t z_row, std::int64_t origin, std::int64_t rows) {
  constexpr std::int64_t kLanes = kWide<Lanes>, kPair = Lanes::kPair;
  const std::int64_t steps = ceil_divide(call.width, kPair);
  const auto* packed = static_cast<const typename Lanes::Element*>(call.packed);
  alignas(64) typename Lanes::Sum sums[Lanes::kBlockRows][kLanes];
  for (std::int64_t n = 0; n < call.features; n += kLanes) {
    typename Lanes::Vector block[Lanes::kBlockRows][2] = {};
    add_steps<Lanes>(block, z, z_row, kPair, packed + n * steps * kPair, kLanes * kPair, steps);
#pragma GCC unroll 8
    for (int a = 0; a < Lanes::kBlockRows; ++a) {
      Lanes::store(sums[a], block[a][0]);
      Lanes::store(sums[a] + Lanes::kLanes, block[a][1]);
    }
    const std::int64_t count = std::min(kLanes, call.features - n);
    for (std::int64_t a = 0; a < rows; ++a) {
      if (count == kLanes) {  // a constant trip count for the compiler
        write_sums<Lanes>(call, sums[a], origin + a, n, kLanes);
      } else {
        write_sums<Lanes>(call, sums[a], origin + a, n, count);
      }
    }
  }
}

template <typename Lanes, typename T>
FLOE_INLINE void expand_tokens(const Expand<T>& call, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kRows = Lanes::kBlockRows;
  const std::int64_t z_row = round_up(call.width, Lanes::kPair);
  Scratch<typename Lanes::Element> z(kRows * z_row);
  for (std::int64_t t = first * kTokens; t < std::min(last * kTokens, call.tokens); t += kRows) {
    const std::int64_t rows = std::min(kRows, call.tokens - t);
    std::fill(z.get(), z.get() + kRows * z_row, typename Lanes::Element{});
    for (std::int64_t a = 0; a < rows; ++a) {
      Lanes::load_row(call.z + (t + a) * call.width, call.width, z.get() + a * z_row);
    }
    expand_block<Lanes>(call, z.get(), z_row, t, rows);
  }
}

template <typename Lanes, typename T>
FLOE_INLINE void run_step(const Shrink<T>& call, Step step, std::int64_t first, std::int64_t last) {
  if (step == Step::kPack) pack_rows<Lanes>(call, first, last);
  if (step == Step::kRun) shrink_tokens<Lanes>(call, first, last);
}

template <typename Lanes, typename T>
FLOE_INLINE void run_step(const Expand<T>& call, Step step, std::int64_t first, std::int64_t last) {
  if (step == Step::kPack) pack_transposed<Lanes>(call, first, last);
  if (step == Step::kRun) expand_tokens<Lanes>(call, first, last);
}

}  // namespace floe::moe_lora
