// CUDA kernels of torch.ops.floe: check, choose device and stream, launch, raise.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "bindings/checks.h"
#include "fisher/fisher_cuda.h"

namespace floe::bindings {
namespace {

// torch exports one of these, by version and build; linking to either would keep this library from
// loading beside the other, or beside a CPU-only torch.
void* find_symbol(const char* name) {
  if (void* symbol = dlsym(RTLD_DEFAULT, name)) return symbol;
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  void* symbol = dlsym(library, name);
  dlclose(library);  // NOLOAD: torch itself keeps it
  return symbol;
}

cudaStream_t current_stream(std::int32_t device) {
  using NativeHandle = AOTITorchError (*)(StreamHandle, void**);  // torch >= 2.13
  using CudaStream = AOTITorchError (*)(std::int32_t, void**);    // torch with CUDA
  static const auto native_handle =
      reinterpret_cast<NativeHandle>(find_symbol("torch_stream_native_handle"));
  static const auto cuda_stream =
      reinterpret_cast<CudaStream>(find_symbol("aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  if (cuda_stream != nullptr) {
    STD_TORCH_CHECK(cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                    "floe: torch did not give the current CUDA stream of device ", device);
  } else {
    STD_TORCH_CHECK(native_handle != nullptr,
                    "floe: this torch exports neither torch_stream_native_handle (2.13 and later) "
                    "nor aoti_torch_get_current_cuda_stream (CUDA builds), so its current CUDA "
                    "stream is unknown; install a CUDA build of torch >= 2.11");
    StreamHandle handle = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_stream(device, &handle) == AOTI_TORCH_SUCCESS &&
                        native_handle(handle, &stream) == AOTI_TORCH_SUCCESS,
                    "floe: torch did not give the current CUDA stream of device ", device);
    aoti_torch_delete_stream(handle);
  }
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "floe: CUDA error: ", cudaGetErrorString(error));
}

// Makes a tensor's device current, for torch and for the CUDA runtime linked into this library, and
// knows its stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {
    check(cudaSetDevice(tensor.get_device_index()));
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

template <typename T>
const Accumulator<T>* launch_partial(const FisherArguments& arguments, const Tensor& partial,
                                     cudaStream_t stream) {
  auto* sums = static_cast<Accumulator<T>*>(partial.mutable_data_ptr());
  check(fisher::launch_partial(arguments.site<T>(), sums, stream));
  return sums;
}

Tensor mask_gradients_cuda(const Tensor& activation, const Tensor& gradient,
                           std::int64_t group_size, const std::optional<Tensor>& token_mask) {
  const FisherArguments arguments = check_fisher(activation, gradient, group_size, token_mask);
  const fisher::Extent& extent = arguments.extent;
  const OnDevice device(arguments.activation);
  Tensor result = torch::stable::new_empty(activation, {extent.samples, extent.units},
                                           accumulator_type(activation));
  const Tensor partial = arguments.new_partial();
  with_float_type(activation.scalar_type(), [&]<typename T>(T) {
    const auto* sums = launch_partial<T>(arguments, partial, device.stream());
    check(fisher::launch_gradients(
        sums, extent, static_cast<Accumulator<T>*>(result.mutable_data_ptr()), device.stream()));
  });
  return result;
}

void accumulate_fisher_cuda(const Tensor& total, const Tensor& activation, const Tensor& gradient,
                            std::int64_t group_size, const std::optional<Tensor>& token_mask,
                            const std::optional<Tensor>& sample_scale) {
  const FisherArguments arguments = check_fisher(activation, gradient, group_size, token_mask);
  const std::optional<Tensor> scale = check_accumulate(total, sample_scale, arguments);
  const OnDevice device(arguments.activation);
  const Tensor partial = arguments.new_partial();
  const auto* factors = scale ? static_cast<const double*>(scale->const_data_ptr()) : nullptr;
  with_float_type(activation.scalar_type(), [&]<typename T>(T) {
    const auto* sums = launch_partial<T>(arguments, partial, device.stream());
    check(fisher::launch_squares(sums, arguments.extent, factors,
                                 static_cast<double*>(total.mutable_data_ptr()), device.stream()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CUDA, m) {
  m.impl("mask_gradients", TORCH_BOX(&mask_gradients_cuda));
  m.impl("accumulate_fisher_", TORCH_BOX(&accumulate_fisher_cuda));
}

}  // namespace floe::bindings
