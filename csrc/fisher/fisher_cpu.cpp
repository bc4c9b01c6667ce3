#include <algorithm>
#include <vector>

#include "fisher/fisher.h"

namespace floe::fisher {
namespace {

constexpr int kRows = 4;  // tokens a sweep: a quarter of the traffic to the sums

template <typename T>
FLOE_INLINE void add_one_row(const T* __restrict__ a, const T* __restrict__ g, std::int64_t columns,
                             Accumulator<T>* __restrict__ sum) {
  for (std::int64_t c = 0; c < columns; ++c) sum[c] += widen(a[c]) * widen(g[c]);
}

template <typename T>
FLOE_INLINE void add_rows(const T* const (&a)[kRows], const T* const (&g)[kRows],
                          std::int64_t columns, Accumulator<T>* __restrict__ sum) {
  // Named, because the compiler cannot see through an array that the rows do not overlap the sums.
  const T* __restrict__ a0 = a[0], * __restrict__ a1 = a[1];
  const T* __restrict__ a2 = a[2], * __restrict__ a3 = a[3];
  const T* __restrict__ g0 = g[0], * __restrict__ g1 = g[1];
  const T* __restrict__ g2 = g[2], * __restrict__ g3 = g[3];
  for (std::int64_t c = 0; c < columns; ++c) {
    // Pairs first: four products meet the running sum as one, with a quarter of its roundings.
    sum[c] += (widen(a0[c]) * widen(g0[c]) + widen(a1[c]) * widen(g1[c])) +
              (widen(a2[c]) * widen(g2[c]) + widen(a3[c]) * widen(g3[c]));
  }
}

// Rows are streamed, never blocked by columns: a row of a real model is 8 to 28 KB, and strided
// reads of column blocks run at a tenth of the memory's speed.
template <typename T>
FLOE_INLINE void sum_tokens_of(const Site<T>& site, Accumulator<T>* partial, std::int64_t first,
                               std::int64_t last) {
  const std::int64_t splits = splits_of(site.tokens);
  for (std::int64_t task = first; task < last; ++task) {
    const std::int64_t origin = task / splits * site.tokens;
    const TokenRange range = tokens_of(task % splits, splits, site.tokens);
    Accumulator<T>* sum = partial + task * site.columns;
    std::fill(sum, sum + site.columns, Accumulator<T>{0});
    const T *a[kRows], *g[kRows];
    int pending = 0;
    for (std::int64_t row = origin + range.first; row < origin + range.last; ++row) {
      if (site.token_mask != nullptr && !site.token_mask[row]) continue;
      a[pending] = site.activation + row * site.columns;
      g[pending] = site.gradient + row * site.columns;
      if (++pending == kRows) {
        add_rows(a, g, site.columns, sum);
        pending = 0;
      }
    }
    for (int i = 0; i < pending; ++i) add_one_row(a[i], g[i], site.columns, sum);
  }
}

// Columns of one sample in double, a cache-sized run of whole units at a time.
template <typename A>
FLOE_INLINE void sum_splits_of(const A* partial, const Extent& extent, double* gradient,
                               std::int64_t first, std::int64_t last) {
  const std::int64_t units = extent.units, group = extent.group_size;
  const std::int64_t units_a_run = std::max<std::int64_t>(1, 1024 / group);
  std::vector<double> column_sum(static_cast<std::size_t>(units_a_run * group));
  double* const sum = column_sum.data();
  while (first < last) {
    const std::int64_t sample = first / units, unit = first % units;
    const std::int64_t count = std::min({units_a_run, units - unit, last - first});
    const A* source = partial + sample * extent.splits * extent.columns() + unit * group;
    std::fill(sum, sum + count * group, 0.0);
    for (std::int64_t split = 0; split < extent.splits; ++split, source += extent.columns()) {
      for (std::int64_t c = 0; c < count * group; ++c) sum[c] += static_cast<double>(source[c]);
    }
    for (std::int64_t u = 0; u < count; ++u) {
      double total = 0.0;
      for (std::int64_t c = 0; c < group; ++c) total += sum[u * group + c];
      gradient[first + u] = total;
    }
    first += count;
  }
}

}  // namespace

FLOE_VECTOR_CLONES void sum_tokens(const Site<BFloat16>& site, float* partial, std::int64_t first,
                                   std::int64_t last) {
  sum_tokens_of(site, partial, first, last);
}

FLOE_VECTOR_CLONES void sum_tokens(const Site<Float16>& site, float* partial, std::int64_t first,
                                   std::int64_t last) {
  sum_tokens_of(site, partial, first, last);
}

FLOE_VECTOR_CLONES void sum_tokens(const Site<float>& site, float* partial, std::int64_t first,
                                   std::int64_t last) {
  sum_tokens_of(site, partial, first, last);
}

FLOE_VECTOR_CLONES void sum_tokens(const Site<double>& site, double* partial, std::int64_t first,
                                   std::int64_t last) {
  sum_tokens_of(site, partial, first, last);
}

FLOE_VECTOR_CLONES void sum_splits(const float* partial, const Extent& extent, double* gradient,
                                   std::int64_t first, std::int64_t last) {
  sum_splits_of(partial, extent, gradient, first, last);
}

FLOE_VECTOR_CLONES void sum_splits(const double* partial, const Extent& extent, double* gradient,
                                   std::int64_t first, std::int64_t last) {
  sum_splits_of(partial, extent, gradient, first, last);
}

void add_squares(const double* gradient, const double* scale, std::int64_t samples,
                 std::int64_t units, double* fisher, std::int64_t first, std::int64_t last) {
  for (std::int64_t s = 0; s < samples; ++s) {
    const double factor = scale == nullptr ? 1.0 : scale[s];
    const double* row = gradient + s * units;
    for (std::int64_t u = first; u < last; ++u) {
      const double value = factor * row[u];
      fisher[u] += value * value;
    }
  }
}

}  // namespace floe::fisher
