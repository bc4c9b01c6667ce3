// The backward products of the MoE-LoRA linear on the CPU; ops.cpp has the schemas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/moe_lora_calls.h"
#include "moe_lora/route_cpu.h"

namespace floe::bindings {
namespace {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor> grad_y_cpu(const Tensor& grad_y, const Tensor& z, const Tensor& expand,
                                      bool needs_expand) {
  STD_TORCH_CHECK(grad_y.dim() == 2 && expand.dim() == 3,
                  "floe: grad_y must be [T, N], expand [N, M, r]");
  const std::int64_t tokens = grad_y.size(0), features = expand.size(0);
  const std::int64_t width = expand.size(1) * expand.size(2);
  const ScalarType type = grad_y.scalar_type(), wide = accumulator_type(grad_y);
  check_shape("grad_y", grad_y, {tokens, features});
  check_shape("z", z, {tokens, width});
  check_type("z", z, type);
  check_parameter("expand", expand, type);
  const Tensor gradient = torch::stable::contiguous(grad_y), routed = torch::stable::contiguous(z);
  const Tensor parameter = contiguous(expand, type);
  Tensor grad_z = empty(z, {tokens, width}, wide);
  Tensor grad_expand = needs_expand ? torch::stable::new_empty(expand, expand.sizes())
                                    : empty(expand, {0}, expand.scalar_type());
  with_float_type(type, [&]<typename T>(T) {
    using A = Accumulator<T>;
    moe_lora::GradY<T> call{data<T>(gradient),
                            data<T>(routed),
                            data<T>(parameter),
                            mutable_data<A>(grad_z),
                            needs_expand ? grad_expand.mutable_data_ptr() : nullptr,
                            expand.scalar_type() == wide,
                            nullptr,
                            nullptr,
                            nullptr,
                            tokens,
                            features,
                            width};
    const Tensor packed = empty(z, {call.packed_size()}, wide);
    const Tensor partial_z = empty(z, {call.partial_z_size()}, wide);
    const Tensor partial_expand = empty(z, {needs_expand ? call.partial_expand_size() : 0}, wide);
    call.packed = packed.mutable_data_ptr();
    call.partial_z = mutable_data<A>(partial_z);
    call.partial_expand = mutable_data<A>(partial_expand);
    run_steps(call, tokens * features);
  });
  return {grad_z, grad_expand};
}

Tensor route_backward_cpu(const std::vector<Tensor>& grad_z, const Tensor& hidden,
                          const Tensor& gate, double scaling, double temperature) {
  STD_TORCH_CHECK(hidden.dim() == 3 && gate.dim() == 3,
                  "floe: hidden must be [G, T, r], gate [G, T, M]");
  const std::int64_t groups = hidden.size(0), tokens = hidden.size(1);
  const std::int64_t rank = hidden.size(2), experts = gate.size(2);
  const ScalarType wide = hidden.scalar_type();
  STD_TORCH_CHECK(wide == ScalarType::Float || wide == ScalarType::Double,
                  "floe: hidden must be float32 or float64");
  STD_TORCH_CHECK(static_cast<std::int64_t>(grad_z.size()) == groups,
                  "floe: grad_z must hold one tensor a linear");
  STD_TORCH_CHECK(temperature > 0.0, "floe: temperature must be > 0, got ", temperature);
  check_shape("gate", gate, {groups, tokens, experts});
  check_shape("hidden", hidden, {groups, tokens, rank});
  check_type("gate", gate, wide);
  std::vector<Tensor> gradients;
  for (const Tensor& one : grad_z) {
    check_shape("grad_z", one, {tokens, experts * rank});
    check_type("grad_z", one, wide);
    gradients.push_back(torch::stable::contiguous(one));
  }
  const Tensor whole_hidden = torch::stable::contiguous(hidden);
  const Tensor whole_gate = torch::stable::contiguous(gate);
  Tensor grads = empty(hidden, {tokens, groups * (rank + experts)}, wide);
  const auto run = [&]<typename A>(A) {
    std::vector<const A*> pointers;
    for (const Tensor& one : gradients) pointers.push_back(data<A>(one));
    const moe_lora::RouteBackward<A> call{pointers.data(),
                                          data<A>(whole_hidden),
                                          data<A>(whole_gate),
                                          mutable_data<A>(grads),
                                          {tokens, groups, rank, experts},
                                          static_cast<A>(scaling),
                                          static_cast<A>(temperature)};
    parallel_for(0, tokens, 1 + kRoutedPerThread / (1 + groups * rank * experts),
                 [&](std::int64_t first, std::int64_t last) {
                   moe_lora::route_backward_tokens(call, first, last);
                 });
  };
  if (wide == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return grads;
}

std::tuple<Tensor, Tensor> grad_x_cpu(const Tensor& grads, const Tensor& x, const Tensor& rows,
                                      std::int64_t hidden_rows, double dropout_p,
                                      const std::optional<Tensor>& seed, bool needs_x,
                                      bool needs_rows) {
  STD_TORCH_CHECK(x.dim() == 2 && rows.dim() == 2, "floe: x must be [T, K], rows [P, K]");
  const std::int64_t tokens = x.size(0), columns = x.size(1), row_count = rows.size(0);
  const ScalarType type = x.scalar_type(), wide = accumulator_type(x);
  check_shape("rows", rows, {row_count, columns});
  check_parameter("rows", rows, type);
  check_shape("grads", grads, {tokens, row_count});
  check_type("grads", grads, wide);
  STD_TORCH_CHECK(0 <= hidden_rows && hidden_rows <= row_count,
                  "floe: hidden_rows must be in [0, P]");
  const Dropout dropout = check_dropout(dropout_p, seed);
  const Tensor gradient = torch::stable::contiguous(grads), input = torch::stable::contiguous(x);
  const Tensor parameter = contiguous(rows, type);
  Tensor grad_x = needs_x ? empty(x, {tokens, columns}, type) : empty(x, {0}, type);
  Tensor grad_rows = needs_rows ? empty(rows, {row_count, columns}, rows.scalar_type())
                                : empty(rows, {0}, rows.scalar_type());
  with_float_type(type, [&]<typename T>(T) {
    using A = Accumulator<T>;
    moe_lora::GradX<T> call{data<A>(gradient),
                            data<T>(input),
                            data<T>(parameter),
                            needs_x ? mutable_data<T>(grad_x) : nullptr,
                            needs_rows ? grad_rows.mutable_data_ptr() : nullptr,
                            rows.scalar_type() == wide,
                            nullptr,
                            nullptr,
                            tokens,
                            columns,
                            hidden_rows,
                            row_count,
                            dropout};
    const Tensor packed = empty(x, {call.packed_size()}, wide);
    const Tensor partial = empty(x, {needs_rows ? call.partial_rows_size() : 0}, wide);
    call.packed = packed.mutable_data_ptr();
    call.partial_rows = mutable_data<A>(partial);
    run_steps(call, tokens * columns);
  });
  return {grad_x, grad_rows};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) {
  m.impl("moe_lora_grad_y", TORCH_BOX(&grad_y_cpu));
  m.impl("route_backward", TORCH_BOX(&route_backward_cpu));
  m.impl("moe_lora_grad_x", TORCH_BOX(&grad_x_cpu));
}

}  // namespace floe::bindings
