// Mask gradients and their squares on a CUDA device. Every function enqueues one kernel on `stream`
// and returns the launch's error; pointers are device pointers. Layouts as in fisher.h.
#pragma once

#include <cuda_runtime_api.h>

#include "fisher/fisher.h"

namespace floe::fisher {

// partial [samples, splits, columns]. T: BFloat16, Float16, float, double.
template <typename T>
cudaError_t launch_partial(const Site<T>& site, Accumulator<T>* partial, cudaStream_t stream);

// gradient [samples, units], rounded once from double. A: float, double.
template <typename A>
cudaError_t launch_gradients(const A* partial, const Extent& extent, A* gradient,
                             cudaStream_t stream);

// fisher[u] += sum_s (scale[s] * gradient[s, u])^2; a null scale is 1. A: float, double.
template <typename A>
cudaError_t launch_squares(const A* partial, const Extent& extent, const double* scale,
                           double* fisher, cudaStream_t stream);

}  // namespace floe::fisher
