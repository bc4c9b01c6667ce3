// Dropout and the forward products of the MoE-LoRA linear on the CPU; ops.cpp has the schemas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "bindings/moe_lora_calls.h"
#include "moe_lora/dropout_cpu.h"
#include "moe_lora/route_cpu.h"

namespace floe::bindings {
namespace {

using torch::stable::parallel_for;

Tensor dropout_cpu(const Tensor& x, double p, const Tensor& seed) {
  STD_TORCH_CHECK(x.dim() >= 1, "floe: x must be [..., K]");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "floe: p must be in [0, 1), got ", p);
  const std::int64_t value = value_of_seed(seed);
  const Tensor input = torch::stable::contiguous(x);
  Tensor output = torch::stable::new_empty(input, input.sizes());
  const std::int64_t columns = x.size(x.dim() - 1);
  if (input.numel() == 0) return output;
  with_float_type(x.scalar_type(), [&]<typename T>(T) {
    const auto* source = data<T>(input);
    auto* target = mutable_data<T>(output);
    parallel_for(0, input.numel() / columns, 1 + kElementsPerThread / columns,
                 [&](std::int64_t first, std::int64_t last) {
                   moe_lora::drop_rows(source, target, columns, first, last, p, value);
                 });
  });
  return output;
}

Tensor shrink_cpu(const Tensor& x, const Tensor& rows, std::int64_t hidden_rows, double dropout_p,
                  const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(x.dim() == 2 && rows.dim() == 2, "floe: x must be [T, K], rows [P, K]");
  const std::int64_t tokens = x.size(0), columns = x.size(1), row_count = rows.size(0);
  check_shape("rows", rows, {row_count, columns});
  check_parameter("rows", rows, x.scalar_type());
  STD_TORCH_CHECK(0 <= hidden_rows && hidden_rows <= row_count,
                  "floe: hidden_rows must be in [0, P]");
  const Dropout dropout = check_dropout(dropout_p, seed);
  const Tensor input = torch::stable::contiguous(x), parameter = contiguous(rows, x.scalar_type());
  Tensor products = empty(x, {tokens, row_count}, accumulator_type(x));
  with_float_type(x.scalar_type(), [&]<typename T>(T) {
    moe_lora::Shrink<T> call{data<T>(input),
                             data<T>(parameter),
                             mutable_data<Accumulator<T>>(products),
                             nullptr,
                             tokens,
                             columns,
                             hidden_rows,
                             row_count,
                             dropout};
    const Tensor packed = empty(x, {call.packed_size()}, accumulator_type(x));
    call.packed = packed.mutable_data_ptr();
    run_steps(call, tokens * columns);
  });
  return products;
}

std::tuple<Tensor, Tensor, Tensor> route_cpu(const Tensor& products,
                                             const std::optional<Tensor>& router_bias,
                                             std::int64_t groups, std::int64_t rank,
                                             std::int64_t experts, double scaling,
                                             double temperature, ScalarType dtype) {
  STD_TORCH_CHECK(groups >= 1 && rank >= 1 && experts >= 1,
                  "floe: groups, rank and experts must be >= 1");
  STD_TORCH_CHECK(products.dim() == 2, "floe: products must be [T, groups * (rank + experts)]");
  const std::int64_t tokens = products.size(0);
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_shape("products", products, {tokens, groups * (rank + experts)});
  check_type("products", products, wide);
  STD_TORCH_CHECK(temperature > 0.0, "floe: temperature must be > 0, got ", temperature);
  std::optional<Tensor> bias;
  if (router_bias) {
    check_shape("router_bias", *router_bias, {groups, experts});
    bias = contiguous(*router_bias, wide);
  }
  const Tensor input = torch::stable::contiguous(products);
  Tensor hidden = empty(input, {groups, tokens, rank}, wide);
  Tensor gate = empty(input, {groups, tokens, experts}, wide);
  Tensor z = empty(input, {groups, tokens, experts * rank}, dtype);
  with_float_type(dtype, [&]<typename T>(T) {
    using A = Accumulator<T>;
    const moe_lora::Route<T> call{data<A>(input),          bias ? data<A>(*bias) : nullptr,
                                  mutable_data<A>(hidden), mutable_data<A>(gate),
                                  mutable_data<T>(z),      {tokens, groups, rank, experts},
                                  static_cast<A>(scaling), static_cast<A>(temperature)};
    parallel_for(
        0, tokens, 1 + kRoutedPerThread / (groups * rank * experts),
        [&](std::int64_t first, std::int64_t last) { moe_lora::route_tokens(call, first, last); });
  });
  return {hidden, gate, z};
}

Tensor expand_cpu(const Tensor& z, const Tensor& expand, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& base) {
  STD_TORCH_CHECK(z.dim() == 2 && expand.dim() == 3, "floe: z must be [T, M r], expand [N, M, r]");
  const std::int64_t tokens = z.size(0), features = expand.size(0);
  const std::int64_t width = expand.size(1) * expand.size(2);
  check_shape("z", z, {tokens, width});
  check_parameter("expand", expand, z.scalar_type());
  const Tensor input = torch::stable::contiguous(z),
               parameter = contiguous(expand, z.scalar_type());
  std::optional<Tensor> wide_bias, whole_base;
  if (bias) {
    check_shape("bias", *bias, {features});
    wide_bias = contiguous(*bias, accumulator_type(z));
  }
  if (base) {
    check_shape("base", *base, {tokens, features});
    check_type("base", *base, z.scalar_type());
    whole_base = torch::stable::contiguous(*base);
  }
  Tensor y = empty(z, {tokens, features}, z.scalar_type());
  with_float_type(z.scalar_type(), [&]<typename T>(T) {
    moe_lora::Expand<T> call{data<T>(input),
                             data<T>(parameter),
                             wide_bias ? data<Accumulator<T>>(*wide_bias) : nullptr,
                             whole_base ? data<T>(*whole_base) : nullptr,
                             mutable_data<T>(y),
                             nullptr,
                             tokens,
                             features,
                             width};
    const Tensor packed = empty(z, {call.packed_size()}, accumulator_type(z));
    call.packed = packed.mutable_data_ptr();
    run_steps(call, tokens * features);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout_cpu));
  m.impl("shrink", TORCH_BOX(&shrink_cpu));
  m.impl("route", TORCH_BOX(&route_cpu));
  m.impl("expand", TORCH_BOX(&expand_cpu));
}

}  // namespace floe::bindings
