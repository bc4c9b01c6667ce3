// The grid around fisher_core.h: who runs which phase, and nothing else.
#include <algorithm>

#include "fisher/fisher_core.h"
#include "fisher/fisher_cuda.h"

namespace floe::fisher {
namespace {

constexpr int kThreads = kBlockX * kBlockY;
constexpr std::int64_t kMaxBlocks = 0x7fffffff;  // beyond it blocks take several positions

unsigned grid_of(std::int64_t blocks) {
  return static_cast<unsigned>(std::min(blocks, kMaxBlocks));
}

// Sum over the warp; every lane ends with the same bits, because a + b == b + a.
__device__ double sum_warp(double value) {
  FLOE_UNROLL
  for (int offset = kBlockX / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

template <typename T, int kWidth>
__global__ __launch_bounds__(kThreads) void partial_kernel(Site<T> site, std::int64_t splits,
                                                           Accumulator<T>* __restrict__ partial,
                                                           std::int64_t blocks) {
  __shared__ BlockSums<T, kWidth> sums;
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  for (std::int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const BlockPosition at = position_of<kWidth>(block, site.columns, splits);
    sum_strip<T, kWidth>(site, at, splits, x, y, sums);
    __syncthreads();
    for (int i = y * kBlockX + x; i < kBlockX * kWidth; i += kThreads) {
      const std::int64_t column = at.first_column + i;
      if (column < site.columns) {
        partial[(at.sample * splits + at.split) * site.columns + column] =
            sum_threads<T, kWidth>(sums, i);
      }
    }
    __syncthreads();
  }
}

template <typename A, int kLanes>
__global__ __launch_bounds__(kThreads) void gradients_kernel(const A* __restrict__ partial,
                                                             Extent extent,
                                                             A* __restrict__ gradient) {
  const std::int64_t entries = extent.samples * extent.units;
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes; i < entries;
       i += stride) {
    double value = sum_lane(partial, extent, i / extent.units, i % extent.units, lane, kLanes);
    if constexpr (kLanes > 1) value = sum_warp(value);
    if (lane == 0) gradient[i] = static_cast<A>(value);
  }
}

// Blocks of 32 x 8: y takes the samples y, y + 8, ...; x is a lane of the block's one unit (heads)
// or one of its 32 units (neurons).
template <typename A, int kLanes>
__global__ __launch_bounds__(kThreads) void squares_kernel(const A* __restrict__ partial,
                                                           Extent extent,
                                                           const double* __restrict__ scale,
                                                           double* __restrict__ fisher) {
  __shared__ double squares[kBlockY][kBlockX];
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int lane = x % kLanes;
  const std::int64_t unit = std::int64_t{blockIdx.x} * (kBlockX / kLanes) + x / kLanes;
  double total = 0;
  if (unit < extent.units) {
    for (std::int64_t sample = y; sample < extent.samples; sample += kBlockY) {
      double value = sum_lane(partial, extent, sample, unit, lane, kLanes);
      if constexpr (kLanes > 1) value = sum_warp(value);
      total = add_square(value, scale == nullptr ? 1.0 : scale[sample], total);
    }
  }
  squares[y][x] = total;
  __syncthreads();
  if (y == 0 && lane == 0 && unit < extent.units) {
    double sum = 0;
    FLOE_UNROLL
    for (int i = 0; i < kBlockY; ++i) sum += squares[i][x];
    fisher[unit] += sum;
  }
}

template <typename T, int kWidth>
cudaError_t launch_partial_of(const Site<T>& site, Accumulator<T>* partial, cudaStream_t stream) {
  const std::int64_t splits = splits_of(site.tokens);
  const std::int64_t blocks = site.samples * splits * blocks_per_split<kWidth>(site.columns);
  if (blocks == 0) return cudaSuccess;  // an empty grid is a launch error
  partial_kernel<T, kWidth>
      <<<grid_of(blocks), dim3(kBlockX, kBlockY), 0, stream>>>(site, splits, partial, blocks);
  return cudaGetLastError();
}

template <typename A, int kLanes>
cudaError_t launch_gradients_of(const A* partial, const Extent& extent, A* gradient,
                                cudaStream_t stream) {
  const std::int64_t threads = extent.samples * extent.units * kLanes;
  if (threads == 0) return cudaSuccess;
  gradients_kernel<A, kLanes>
      <<<grid_of((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(partial, extent,
                                                                              gradient);
  return cudaGetLastError();
}

template <typename A, int kLanes>
cudaError_t launch_squares_of(const A* partial, const Extent& extent, const double* scale,
                              double* fisher, cudaStream_t stream) {
  constexpr int kUnits = kBlockX / kLanes;
  const std::int64_t blocks = (extent.units + kUnits - 1) / kUnits;
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxBlocks) return cudaErrorInvalidValue;
  squares_kernel<A, kLanes>
      <<<grid_of(blocks), dim3(kBlockX, kBlockY), 0, stream>>>(partial, extent, scale, fisher);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t launch_partial(const Site<T>& site, Accumulator<T>* partial, cudaStream_t stream) {
  return vectorizable(site) ? launch_partial_of<T, kVectorWidth<T>>(site, partial, stream)
                            : launch_partial_of<T, 1>(site, partial, stream);
}

template <typename A>
cudaError_t launch_gradients(const A* partial, const Extent& extent, A* gradient,
                             cudaStream_t stream) {
  return warp_per_unit(extent.group_size)
             ? launch_gradients_of<A, kBlockX>(partial, extent, gradient, stream)
             : launch_gradients_of<A, 1>(partial, extent, gradient, stream);
}

template <typename A>
cudaError_t launch_squares(const A* partial, const Extent& extent, const double* scale,
                           double* fisher, cudaStream_t stream) {
  return warp_per_unit(extent.group_size)
             ? launch_squares_of<A, kBlockX>(partial, extent, scale, fisher, stream)
             : launch_squares_of<A, 1>(partial, extent, scale, fisher, stream);
}

template cudaError_t launch_partial(const Site<BFloat16>&, float*, cudaStream_t);
template cudaError_t launch_partial(const Site<Float16>&, float*, cudaStream_t);
template cudaError_t launch_partial(const Site<float>&, float*, cudaStream_t);
template cudaError_t launch_partial(const Site<double>&, double*, cudaStream_t);
template cudaError_t launch_gradients(const float*, const Extent&, float*, cudaStream_t);
template cudaError_t launch_gradients(const double*, const Extent&, double*, cudaStream_t);
template cudaError_t launch_squares(const float*, const Extent&, const double*, double*,
                                    cudaStream_t);
template cudaError_t launch_squares(const double*, const Extent&, const double*, double*,
                                    cudaStream_t);

}  // namespace floe::fisher
