// Mask gradients and their squares on the CPU; the shapes that the CUDA side shares.
//
// A site is the input of a projection: activation and gradient are [samples, tokens, columns],
// contiguous; a unit (head or neuron) is `group_size` consecutive columns. The work has two steps:
//   partial[s, p, c]  = sum over the tokens of split p of activation * gradient   (float)
//   gradient[s, u]    = sum over splits and the unit's columns                    (double)
// The number of splits depends on the number of tokens alone: results do not depend on threads.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "number.h"

namespace floe::fisher {

template <typename T>
struct Site {
  const T* activation;
  const T* gradient;
  const bool* token_mask;  // [samples, tokens], or null: every token counts
  std::int64_t samples, tokens, columns;
};

struct Extent {
  std::int64_t samples, splits, units, group_size;

  FLOE_HOST_DEVICE std::int64_t columns() const { return units * group_size; }
};

struct TokenRange {
  std::int64_t first, last;
};

// At least 64 tokens a split keep the partial sums below 2 % of the traffic; at most 64 splits.
FLOE_HOST_DEVICE std::int64_t splits_of(std::int64_t tokens) {
  const std::int64_t splits = (tokens + 63) / 64;
  return splits < 1 ? 1 : splits > 64 ? 64 : splits;
}

FLOE_HOST_DEVICE TokenRange tokens_of(std::int64_t split, std::int64_t splits,
                                      std::int64_t tokens) {
  const std::int64_t length = (tokens + splits - 1) / splits;
  const std::int64_t first = split * length, last = first + length;
  return {first < tokens ? first : tokens, last < tokens ? last : tokens};
}

// Tasks [first, last) of samples * splits; task = sample * splits + split writes its own row of
// `partial` [samples, splits, columns].
void sum_tokens(const Site<BFloat16>& site, float* partial, std::int64_t first, std::int64_t last);
void sum_tokens(const Site<Float16>& site, float* partial, std::int64_t first, std::int64_t last);
void sum_tokens(const Site<float>& site, float* partial, std::int64_t first, std::int64_t last);
void sum_tokens(const Site<double>& site, double* partial, std::int64_t first, std::int64_t last);

// Entries [first, last) of gradient [samples, units], in row-major order.
void sum_splits(const float* partial, const Extent& extent, double* gradient, std::int64_t first,
                std::int64_t last);
void sum_splits(const double* partial, const Extent& extent, double* gradient, std::int64_t first,
                std::int64_t last);

// Units [first, last): fisher[u] += sum_s (scale[s] * gradient[s, u])^2, samples in order. A null
// scale is 1.
void add_squares(const double* gradient, const double* scale, std::int64_t samples,
                 std::int64_t units, double* fisher, std::int64_t first, std::int64_t last);

}  // namespace floe::fisher
