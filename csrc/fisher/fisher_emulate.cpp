// fisher.cu's grid on the CPU, thread for thread: for machines without a GPU, in tests. Phases are
// the stretches between two barriers; within one, the order of threads cannot matter.
#include <vector>

#include "fisher/fisher_core.h"

namespace floe::fisher {
namespace {

template <typename T, int kWidth>
void emulate_partial(const Site<T>& site, std::int64_t splits, Accumulator<T>* partial) {
  const std::int64_t blocks = site.samples * splits * blocks_per_split<kWidth>(site.columns);
  std::vector<BlockSums<T, kWidth>> shared(1);
  BlockSums<T, kWidth>& sums = shared.front();
  for (std::int64_t block = 0; block < blocks; ++block) {
    const BlockPosition at = position_of<kWidth>(block, site.columns, splits);
    for (int y = 0; y < kBlockY; ++y) {
      for (int x = 0; x < kBlockX; ++x) sum_strip<T, kWidth>(site, at, splits, x, y, sums);
    }
    for (int i = 0; i < kBlockX * kWidth; ++i) {
      const std::int64_t column = at.first_column + i;
      if (column >= site.columns) continue;
      partial[(at.sample * splits + at.split) * site.columns + column] =
          sum_threads<T, kWidth>(sums, i);
    }
  }
}

template <typename A>
double emulate_warp(const A* partial, const Extent& extent, std::int64_t sample,
                    std::int64_t unit) {
  double value[kBlockX];
  for (int lane = 0; lane < kBlockX; ++lane) {
    value[lane] = sum_lane(partial, extent, sample, unit, lane, kBlockX);
  }
  for (int offset = kBlockX / 2; offset > 0; offset /= 2) {
    double sum[kBlockX];
    for (int lane = 0; lane < kBlockX; ++lane) sum[lane] = value[lane] + value[lane ^ offset];
    for (int lane = 0; lane < kBlockX; ++lane) value[lane] = sum[lane];
  }
  return value[0];
}

template <typename A>
double emulate_gradient(const A* partial, const Extent& extent, std::int64_t sample,
                        std::int64_t unit) {
  return warp_per_unit(extent.group_size) ? emulate_warp(partial, extent, sample, unit)
                                          : sum_lane(partial, extent, sample, unit, 0, 1);
}

template <typename A>
void emulate_squares(const A* partial, const Extent& extent, const double* scale, double* fisher) {
  for (std::int64_t unit = 0; unit < extent.units; ++unit) {
    double squares[kBlockY] = {};
    for (int y = 0; y < kBlockY; ++y) {
      for (std::int64_t sample = y; sample < extent.samples; sample += kBlockY) {
        squares[y] = add_square(emulate_gradient(partial, extent, sample, unit),
                                scale == nullptr ? 1.0 : scale[sample], squares[y]);
      }
    }
    double sum = 0;
    for (int y = 0; y < kBlockY; ++y) sum += squares[y];
    fisher[unit] += sum;
  }
}

template <typename T>
void emulate(const Site<T>& site, std::int64_t group_size, bool allow_vector, const double* scale,
             Accumulator<T>* partial, double* gradient, double* fisher) {
  const Extent extent{site.samples, splits_of(site.tokens), site.columns / group_size, group_size};
  if (allow_vector && vectorizable(site)) {
    emulate_partial<T, kVectorWidth<T>>(site, extent.splits, partial);
  } else {
    emulate_partial<T, 1>(site, extent.splits, partial);
  }
  for (std::int64_t s = 0; s < extent.samples; ++s) {
    for (std::int64_t u = 0; u < extent.units; ++u) {
      gradient[s * extent.units + u] = emulate_gradient(partial, extent, s, u);
    }
  }
  emulate_squares(partial, extent, scale, fisher);
}

}  // namespace
}  // namespace floe::fisher

// partial [samples, splits, columns] is float, or double for double; gradient [samples, units] and
// fisher [units] (added to) are double; token_mask and scale may be null.
#define FLOE_EMULATE(name, T)                                                                  \
  extern "C" void floe_emulate_##name(                                                         \
      const T* activation, const T* gradient, const bool* token_mask, std::int64_t samples,    \
      std::int64_t tokens, std::int64_t columns, std::int64_t group_size, bool allow_vector,   \
      const double* scale, floe::Accumulator<T>* partial, double* gradients, double* fisher) { \
    floe::fisher::emulate<T>({activation, gradient, token_mask, samples, tokens, columns},     \
                             group_size, allow_vector, scale, partial, gradients, fisher);     \
  }

FLOE_EMULATE(bfloat16, floe::BFloat16)
FLOE_EMULATE(float16, floe::Float16)
FLOE_EMULATE(float32, float)
FLOE_EMULATE(float64, double)

extern "C" std::int64_t floe_splits_of(std::int64_t tokens) {
  return floe::fisher::splits_of(tokens);
}
