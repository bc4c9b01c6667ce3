// The products of the backward pass: each of grad_y and x is read once, in tiles that serve both
// a product along their columns and one along their tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "moe_lora/forward.h"

namespace floe::moe_lora {

// The part of a matrix that task `index` covers.
struct Part {
  std::int64_t first_token, last_token, first_column, last_column;

  FLOE_INLINE Part(const Cut& cut, std::int64_t index)
      : first_token(index / cut.splits() * cut.chunk_tokens()),
        last_token(std::min(first_token + cut.chunk_tokens(), cut.tokens)),
        first_column(index % cut.splits() * cut.split_columns()),
        last_column(std::min(first_column + cut.split_columns(), cut.columns)) {}
};

// target [count] = the sum of `parts` rows, `stride` apart; in the accumulator's type or in T.
template <typename T, typename A>
FLOE_INLINE void add_parts(const A* parts, std::int64_t part_count, std::int64_t stride,
                           std::int64_t count, void* target, std::int64_t offset, bool wide) {
  A sums[kColumns];
  for (std::int64_t c = 0; c < count; c += kColumns) {
    const std::int64_t run = std::min(kColumns, count - c);
    std::fill(sums, sums + run, A{});
    for (std::int64_t i = 0; i < part_count; ++i) {
      const A* part = parts + i * stride + c;
      for (std::int64_t k = 0; k < run; ++k) sums[k] += part[k];
    }
    if (wide) {
      std::copy(sums, sums + run, static_cast<A*>(target) + offset + c);
    } else {
      T* narrowed = static_cast<T*>(target) + offset + c;
      for (std::int64_t k = 0; k < run; ++k) narrowed[k] = narrow<T>(sums[k]);
    }
  }
}

// expand [N, J] in pairs of rows, J padded.
template <typename Lanes, typename T>
FLOE_INLINE void pack_pairs(const GradY<T>& call, std::int64_t first, std::int64_t last) {
  const std::int64_t width = call.padded_width(), end = std::min(last * kTokens, call.features);
  auto* packed = static_cast<typename Lanes::Element*>(call.packed);
  const Scratch<T> scratch(2 * call.width);
  for (std::int64_t n = first * kTokens; n < end; n += Lanes::kPair) {
    const bool is_last = n + 1 == call.features;
    const T* row =
        rounded(call.expand, n * call.width, (is_last ? 1 : 2) * call.width, scratch.get());
    Lanes::pair(row, is_last ? nullptr : row + call.width, call.width, width, packed + n * width);
  }
}

template <typename Lanes, typename T>
struct GradYScratch {
  using Element = typename Lanes::Element;
  Scratch<Element> tile{kTokens * kColumns}, pairs{kTokens * kColumns};
  Scratch<Element> z, z_pairs;          // [kTokens, padded J]
  Scratch<typename Lanes::Sum> grad_z;  // [kTokens, padded J]

  FLOE_INLINE explicit GradYScratch(const GradY<T>& call)
      : z(kTokens * call.padded_width()),
        z_pairs(kTokens * call.padded_width()),
        grad_z(kTokens * call.padded_width()) {}
};

template <typename Lanes, typename T>
FLOE_INLINE const typename Lanes::Element* load_z(const GradY<T>& call,
                                                  GradYScratch<Lanes, T>& scratch,
                                                  std::int64_t origin, std::int64_t tokens) {
  const std::int64_t width = call.padded_width();
  const std::int64_t rows = round_up(tokens, 4);
  std::fill(scratch.z.get(), scratch.z.get() + rows * width, typename Lanes::Element{});
  for (std::int64_t t = 0; t < tokens; ++t) {
    Lanes::load_row(call.z + (origin + t) * call.width, call.width, scratch.z.get() + t * width);
  }
  return pair_rows<Lanes>(scratch.z.get(), width, rows, width, scratch.z_pairs.get());
}

// One tile of grad_y: adds to the tokens' grad_z and to grad_expand of the tile's columns.
template <typename Lanes, typename T>
FLOE_INLINE void grad_y_tile(const GradY<T>& call, GradYScratch<Lanes, T>& scratch,
                             const typename Lanes::Element* z, std::int64_t origin,
                             std::int64_t tokens, std::int64_t n, std::int64_t columns,
                             typename Lanes::Sum* grad_expand) {
  constexpr std::int64_t kPair = Lanes::kPair;
  const std::int64_t width = call.padded_width(), rows = round_up(tokens, 4);
  const auto* packed = static_cast<const typename Lanes::Element*>(call.packed);
  load_tile<Lanes>(call.grad_y + origin * call.features + n, call.features, tokens, columns,
                   scratch.tile.get());
  multiply<Lanes>(scratch.tile.get(), kColumns, kPair, packed + n * width, width * kPair,
                  ceil_divide(columns, kPair), scratch.grad_z.get(), width, rows, width);
  if (call.grad_expand == nullptr) return;
  const auto* pairs = pair_rows<Lanes>(scratch.tile.get(), kColumns, rows,
                                       round_up(columns, kPadding), scratch.pairs.get());
  multiply<Lanes>(pairs, kPair, kColumns * kPair, z, width * kPair, rows / kPair, grad_expand,
                  width, round_up(columns, 4), width);
}

template <typename Lanes, typename T>
FLOE_INLINE void grad_y_parts(const GradY<T>& call, std::int64_t first, std::int64_t last) {
  const Cut cut = call.cut();
  const std::int64_t width = call.padded_width(), size = cut.split_columns() * width;
  GradYScratch<Lanes, T> scratch(call);
  for (std::int64_t task = first; task < last; ++task) {
    const Part part(cut, task);
    auto* grad_expand = call.partial_expand + task * size;
    if (call.grad_expand) std::fill(grad_expand, grad_expand + size, typename Lanes::Sum{});
    for (std::int64_t t = part.first_token; t < part.last_token; t += kTokens) {
      const std::int64_t tokens = std::min(kTokens, part.last_token - t);
      auto* sums = scratch.grad_z.get();
      std::fill(sums, sums + round_up(tokens, 4) * width, typename Lanes::Sum{});
      const auto* z = load_z(call, scratch, t, tokens);
      for (std::int64_t n = part.first_column; n < part.last_column; n += kColumns) {
        grad_y_tile(call, scratch, z, t, tokens, n, std::min(kColumns, part.last_column - n),
                    grad_expand + (n - part.first_column) * width);
      }
      const std::int64_t row = task % cut.splits() * call.tokens + t;
      std::copy(sums, sums + tokens * width, call.partial_z + row * width);
    }
  }
}

// Tasks are runs of tokens, then runs of features.
template <typename Lanes, typename T>
FLOE_INLINE void finish_grad_y(const GradY<T>& call, std::int64_t first, std::int64_t last) {
  const Cut cut = call.cut();
  const std::int64_t width = call.padded_width(), columns = cut.split_columns();
  const std::int64_t token_tasks = ceil_divide(call.tokens, kTokens);
  for (std::int64_t task = first; task < last; ++task) {
    const bool is_token = task < token_tasks;
    const std::int64_t row = (is_token ? task : task - token_tasks) * kTokens;
    for (std::int64_t i = row; i < std::min(row + kTokens, is_token ? call.tokens : call.features);
         ++i) {
      if (is_token) {
        add_parts<typename Lanes::Sum>(call.partial_z + i * width, cut.splits(),
                                       call.tokens * width, call.width, call.grad_z, i * call.width,
                                       true);
      } else {
        const auto* parts = call.partial_expand + (i / columns * columns + i % columns) * width;
        add_parts<T>(parts, cut.chunks(), cut.splits() * columns * width, call.width,
                     call.grad_expand, i * call.width, call.wide_gradient);
      }
    }
  }
}

// The P rows as the operand of pack_transposed, lanes along K and steps along P: those of A, then
// those of the routers.
template <typename Lanes, typename T>
FLOE_INLINE void pack_columns(const GradX<T>& call, std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kPair = Lanes::kPair, kLanes = kWide<Lanes>;
  const std::int64_t hidden_rows = call.hidden_rows(), row_count = call.row_count();
  const std::int64_t hidden = round_up(hidden_rows, kPair);
  const std::int64_t rows = hidden + round_up(call.logit_rows(), kPair);
  auto* packed = static_cast<typename Lanes::Element*>(call.packed);
  T scratch[2][kLanes];
  for (std::int64_t block = first * kPadding; block < last * kPadding; block += kLanes) {
    const std::int64_t count = std::clamp<std::int64_t>(call.columns - block, 0, kLanes);
    for (std::int64_t q = 0; q < rows; q += kPair) {
      const std::int64_t p = q < hidden ? q : hidden_rows + q - hidden;
      const std::int64_t end = q < hidden ? hidden_rows : row_count;
      const T* pair[2] = {nullptr, nullptr};
      for (std::int64_t i = 0; i < std::min<std::int64_t>(kPair, end - p); ++i) {
        const auto [linear, row] = call.group.stored(p + i);
        pair[i] = rounded(call.shrink[linear], row * call.columns + block, count, scratch[i]);
      }
      Lanes::pair(pair[0], pair[1], count, kLanes, packed + block * rows + q * kLanes);
    }
  }
}

template <typename Lanes, typename T>
struct GradXScratch {
  using Element = typename Lanes::Element;
  std::int64_t hidden, rows;  // of one token's grads, in whole steps
  std::int64_t padded;        // of a step's grads, in whole blocks
  Scratch<Element> tile{kTokens * kColumns}, kept{kTokens * kColumns}, pairs{kTokens * kColumns};
  Scratch<Element> grads;       // [kTokens, rows]
  Scratch<Element> grad_pairs;  // [kTokens / kPair, padded, kPair]
  Mask<Lanes> mask;

  FLOE_INLINE explicit GradXScratch(const GradX<T>& call)
      : hidden(round_up(call.hidden_rows(), Lanes::kPair)),
        rows(hidden + round_up(call.logit_rows(), Lanes::kPair)),
        padded(call.padded_rows()),
        grads(kTokens * rows),
        grad_pairs(kTokens * padded),
        mask(call.dropout) {}
};

// Both layouts of a tile's grads. The dropout's scale goes into those of hidden: there it serves
// grad_x and grad_rows alike.
template <typename Lanes, typename T>
FLOE_INLINE void load_grads(const GradX<T>& call, GradXScratch<Lanes, T>& scratch,
                            std::int64_t origin, std::int64_t tokens) {
  constexpr std::int64_t kPair = Lanes::kPair;
  using Sum = typename Lanes::Sum;
  const Sum scale = call.dropout.active ? scratch.mask.scale() : Sum{1};
  const std::int64_t hidden_rows = call.hidden_rows(), row_count = call.row_count();
  const std::int64_t all = round_up(tokens, 4), first_logit = round_up(hidden_rows, 4);
  auto *grads = scratch.grads.get(), *pairs = scratch.grad_pairs.get();
  std::fill(grads, grads + kTokens * scratch.rows, typename Lanes::Element{});
  std::fill(pairs, pairs + all * scratch.padded, typename Lanes::Element{});
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Sum* source = call.grads + (origin + t) * row_count;
    auto* step = pairs + t / kPair * scratch.padded * kPair + t % kPair;
    for (std::int64_t p = 0; p < row_count; ++p) {
      const bool is_hidden = p < hidden_rows;
      const auto value = Lanes::element_of_sum(is_hidden ? source[p] * scale : source[p]);
      const std::int64_t logit = p - hidden_rows;
      grads[t * scratch.rows + (is_hidden ? p : scratch.hidden + logit)] = value;
      step[kPair * (is_hidden ? p : first_logit + logit)] = value;
    }
  }
}

// The rows' gradients in a tile's columns; sums are [padded, stride].
template <typename Lanes, typename T>
FLOE_INLINE void add_grad_rows(const GradX<T>& call, GradXScratch<Lanes, T>& scratch,
                               std::int64_t origin, std::int64_t tokens, std::int64_t c,
                               std::int64_t columns, typename Lanes::Sum* sums,
                               std::int64_t stride) {
  constexpr std::int64_t kPair = Lanes::kPair;
  const std::int64_t rows = round_up(tokens, 4), lanes = round_up(columns, kPadding);
  const std::int64_t hidden = round_up(call.hidden_rows(), 4), step = scratch.padded * kPair;
  const auto* tile = scratch.tile.get();
  const auto* grads = scratch.grad_pairs.get();
  load_tile<Lanes>(call.x + origin * call.columns + c, call.columns, tokens, columns,
                   scratch.tile.get());
  std::int64_t plain = 0;
  if (call.dropout.active) {
    plain = hidden;
    scratch.mask.keep_tile(tile, tokens, columns, scratch.kept.get());
    const auto* kept =
        pair_rows<Lanes>(scratch.kept.get(), kColumns, rows, lanes, scratch.pairs.get());
    multiply<Lanes>(grads, kPair, step, kept, kColumns * kPair, rows / kPair, sums, stride, plain,
                    lanes);
  }
  const auto* pairs = pair_rows<Lanes>(tile, kColumns, rows, lanes, scratch.pairs.get());
  multiply<Lanes>(grads + plain * kPair, kPair, step, pairs, kColumns * kPair, rows / kPair,
                  sums + plain * stride, stride, scratch.padded - plain, lanes);
}

// grad_x of a tile.
template <typename Lanes, typename T>
FLOE_INLINE void write_grad_x(const GradX<T>& call, const GradXScratch<Lanes, T>& scratch,
                              std::int64_t origin, std::int64_t tokens, std::int64_t c,
                              std::int64_t columns) {
  constexpr std::int64_t kPair = Lanes::kPair, kLanes = kWide<Lanes>;
  constexpr int kRows = Lanes::kBlockRows;
  const auto* packed = static_cast<const typename Lanes::Element*>(call.packed);
  const std::int64_t rows = scratch.rows, hidden = scratch.hidden;
  alignas(64) typename Lanes::Sum sums[kLanes];
  for (std::int64_t t = 0; t < tokens; t += kRows) {
    const auto* grads = scratch.grads.get() + t * rows;
    for (std::int64_t k = 0; k < columns; k += kLanes) {
      const auto* operand = packed + (c + k) * rows;
      typename Lanes::Vector block[kRows][2] = {};
      add_steps<Lanes>(block, grads, rows, kPair, operand, kLanes * kPair, hidden / kPair);
      if (call.dropout.active) {
#pragma GCC unroll 8
        for (int a = 0; a < kRows; ++a) {
          const auto* bytes = scratch.mask.bytes.get() + (t + a) * kColumns + k;
          Lanes::keep(block[a][0], bytes, scratch.mask.threshold);
          Lanes::keep(block[a][1], bytes + Lanes::kLanes, scratch.mask.threshold);
        }
      }
      add_steps<Lanes>(block, grads + hidden, rows, kPair, operand + hidden * kLanes,
                       kLanes * kPair, (rows - hidden) / kPair);
      const std::int64_t count = std::min(kLanes, columns - k);
#pragma GCC unroll 8
      for (int a = 0; a < kRows; ++a) {
        if (t + a >= tokens) break;
        T* target = call.grad_x + (origin + t + a) * call.columns + c + k;
        Lanes::store(sums, block[a][0]);
        Lanes::store(sums + Lanes::kLanes, block[a][1]);
        if (count == kLanes) {  // a constant trip count for the compiler
          Lanes::narrow_row(sums, target, kLanes);
        } else {
          Lanes::narrow_row(sums, target, count);
        }
      }
    }
  }
}

template <typename Lanes, typename T>
FLOE_INLINE void grad_x_parts(const GradX<T>& call, std::int64_t first, std::int64_t last) {
  const Cut cut = call.cut();
  GradXScratch<Lanes, T> scratch(call);
  const std::int64_t stride = cut.split_columns(), size = scratch.padded * stride;
  for (std::int64_t task = first; task < last; ++task) {
    const Part part(cut, task);
    auto* sums = call.partial_rows + task * size;
    if (call.grad_shrink) std::fill(sums, sums + size, typename Lanes::Sum{});
    for (std::int64_t t = part.first_token; t < part.last_token; t += kTokens) {
      const std::int64_t tokens = std::min(kTokens, part.last_token - t);
      load_grads(call, scratch, t, tokens);
      for (std::int64_t c = part.first_column; c < part.last_column; c += kColumns) {
        const std::int64_t columns = std::min(kColumns, part.last_column - c);
        if (call.dropout.active) scratch.mask.draw(t, tokens, c);
        if (call.grad_shrink) {
          add_grad_rows(call, scratch, t, tokens, c, columns, sums + c - part.first_column, stride);
        }
        if (call.grad_x) write_grad_x(call, scratch, t, tokens, c, columns);
      }
    }
  }
}

template <typename Lanes, typename T>
FLOE_INLINE void finish_grad_x(const GradX<T>& call, std::int64_t first, std::int64_t last) {
  const Cut cut = call.cut();
  const std::int64_t columns = cut.split_columns(), size = call.padded_rows() * columns;
  const std::int64_t hidden_rows = call.hidden_rows();
  for (std::int64_t p = first; p < last; ++p) {
    const auto [linear, stored] = call.group.stored(p);
    const std::int64_t row = p < hidden_rows ? p : round_up(hidden_rows, 4) + p - hidden_rows;
    for (std::int64_t split = 0; split < cut.splits(); ++split) {
      const std::int64_t c = split * columns;
      add_parts<T>(call.partial_rows + split * size + row * columns, cut.chunks(),
                   cut.splits() * size, std::min(columns, call.columns - c),
                   call.grad_shrink[linear], stored * call.columns + c, call.wide_gradient);
    }
  }
}

template <typename Lanes, typename T>
FLOE_INLINE void run_step(const GradY<T>& call, Step step, std::int64_t first, std::int64_t last) {
  if (step == Step::kPack) pack_pairs<Lanes>(call, first, last);
  if (step == Step::kRun) grad_y_parts<Lanes>(call, first, last);
  if (step == Step::kFinish) finish_grad_y<Lanes>(call, first, last);
}

template <typename Lanes, typename T>
FLOE_INLINE void run_step(const GradX<T>& call, Step step, std::int64_t first, std::int64_t last) {
  if (step == Step::kPack) pack_columns<Lanes>(call, first, last);
  if (step == Step::kRun) grad_x_parts<Lanes>(call, first, last);
  if (step == Step::kFinish) finish_grad_x<Lanes>(call, first, last);
}

}  // namespace floe::moe_lora
