// Per-sample mask gradients at one site, and their squares: the arithmetic and its order.
//
//   gradient[s, u] = sum over tokens t of s and columns c of unit u of activation * gradient
//   fisher[u]     += sum over samples s of (scale[s] * gradient[s, u])^2       (FLoE, Eq. 8-9)
//
// The CUDA kernels (fisher.cu) and a CPU emulation of their grid (fisher_emulate.cpp) both run
// these functions, one call per thread and phase. Every multiply-add is an explicit fma and every
// sum has one order, so both produce the same bits whatever the compiler contracts.
#pragma once

#include <cmath>
#include <cstdint>

#include "fisher/fisher.h"
#include "host_device.h"
#include "number.h"

namespace floe::fisher {

// A block is one warp along the columns by eight along the tokens.
inline constexpr int kBlockX = 32;
inline constexpr int kBlockY = 8;
inline constexpr int kUnroll = 4;

// Columns a thread reads at once: 16 bytes when the site is aligned for it, else one.
template <typename T>
inline constexpr int kVectorWidth = static_cast<int>(16 / sizeof(T));

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
};

// Sums of a block's threads. Padded so that neither the writes (along x) nor the reads (along the
// columns) of a warp meet in one shared-memory bank.
template <typename T, int kWidth>
struct BlockSums {
  Accumulator<T> sum[kBlockY][kWidth][kBlockX + kBlockX / kWidth];
};

struct BlockPosition {
  std::int64_t sample, split, first_column;
};

template <int kWidth>
FLOE_HOST_DEVICE std::int64_t blocks_per_split(std::int64_t columns) {
  return (columns + kBlockX * kWidth - 1) / (kBlockX * kWidth);
}

template <int kWidth>
FLOE_HOST_DEVICE BlockPosition position_of(std::int64_t block, std::int64_t columns,
                                           std::int64_t splits) {
  const std::int64_t across = blocks_per_split<kWidth>(columns);
  const std::int64_t task = block / across;
  return {task / splits, task % splits, block % across * kBlockX * kWidth};
}

FLOE_HOST_DEVICE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

FLOE_HOST_DEVICE double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

template <typename T, int kWidth>
FLOE_HOST_DEVICE Vector<T, kWidth> load(const T* values) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(values);
}

// Phase 1, every thread (x, y): its columns over the tokens y, y + 8, ... of the split.
template <typename T, int kWidth>
FLOE_HOST_DEVICE void sum_strip(const Site<T>& site, const BlockPosition& at, std::int64_t splits,
                                int x, int y, BlockSums<T, kWidth>& block) {
  Accumulator<T> sum[kWidth] = {};
  const std::int64_t column = at.first_column + std::int64_t{x} * kWidth;
  if (column < site.columns) {
    const TokenRange range = tokens_of(at.split, splits, site.tokens);
    const std::int64_t origin = at.sample * site.tokens;
    for (std::int64_t base = range.first + y; base < range.last; base += kUnroll * kBlockY) {
      bool valid[kUnroll];
      FLOE_UNROLL
      for (int i = 0; i < kUnroll; ++i) {
        const std::int64_t token = base + i * kBlockY;
        valid[i] =
            token < range.last && (site.token_mask == nullptr || site.token_mask[origin + token]);
      }
      Vector<T, kWidth> activation[kUnroll], gradient[kUnroll];
      FLOE_UNROLL
      for (int i = 0; i < kUnroll; ++i) {
        // Loads without branches stay in flight together; a skipped token reads a cached row.
        const std::int64_t token = valid[i] ? base + i * kBlockY : range.first;
        const std::int64_t offset = (origin + token) * site.columns + column;
        activation[i] = load<T, kWidth>(site.activation + offset);
        gradient[i] = load<T, kWidth>(site.gradient + offset);
      }
      FLOE_UNROLL
      for (int i = 0; i < kUnroll; ++i) {
        if (!valid[i]) continue;
        FLOE_UNROLL
        for (int j = 0; j < kWidth; ++j) {
          sum[j] =
              multiply_add(widen(activation[i].element[j]), widen(gradient[i].element[j]), sum[j]);
        }
      }
    }
  }
  FLOE_UNROLL
  for (int j = 0; j < kWidth; ++j) block.sum[y][j][x] = sum[j];
}

// Phase 2, after a barrier: the split's sum of the block's i-th column, 0 <= i < 32 * kWidth.
template <typename T, int kWidth>
FLOE_HOST_DEVICE Accumulator<T> sum_threads(const BlockSums<T, kWidth>& block, int i) {
  Accumulator<T> total = 0;
  FLOE_UNROLL
  for (int y = 0; y < kBlockY; ++y) total += block.sum[y][i % kWidth][i / kWidth];
  return total;
}

// Finalize: one lane's share of gradient[sample, unit], the columns lane, lane + lanes, ... A warp
// then adds its lanes in a butterfly (offsets 16, 8, 4, 2, 1), which leaves the same bits in each.
template <typename A>
FLOE_HOST_DEVICE double sum_lane(const A* partial, const Extent& extent, std::int64_t sample,
                                 std::int64_t unit, int lane, int lanes) {
  const A* first = partial + sample * extent.splits * extent.columns() + unit * extent.group_size;
  double total = 0;
  for (std::int64_t c = lane; c < extent.group_size; c += lanes) {
    FLOE_UNROLL_BY_4
    for (std::int64_t split = 0; split < extent.splits; ++split) {
      total += static_cast<double>(first[split * extent.columns() + c]);
    }
  }
  return total;
}

// A warp per unit where a unit is at least a warp wide (heads), else a thread per unit (neurons):
// both read consecutive addresses.
inline bool warp_per_unit(std::int64_t group_size) { return group_size >= kBlockX; }

// 16-byte loads need aligned rows; the sums have the same bits either way.
template <typename T>
bool vectorizable(const Site<T>& site) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return site.columns % kVectorWidth<T> == 0 && aligned(site.activation) && aligned(site.gradient);
}

FLOE_HOST_DEVICE double add_square(double gradient, double scale, double total) {
  const double scaled = gradient * scale;
  return multiply_add(scaled, scaled, total);
}

}  // namespace floe::fisher
