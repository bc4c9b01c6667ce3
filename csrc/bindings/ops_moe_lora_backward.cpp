// The backward products of the MoE-LoRA linear on the CPU; ops.cpp has the schemas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/moe_lora_calls.h"
#include "moe_lora/route_cpu.h"

namespace floe::bindings {
namespace {

using torch::stable::parallel_for;

// What op moe_lora_experts_backward returns, in the order of its schema.
struct Gradients {
  Tensor x;                            // empty where not needed
  std::vector<Tensor> shrink, expand;  // one a linear, or none
  Tensor products;                     // [T, P]
  Tensor gates;                        // [G, T, M], empty where the gates are a router's
};

Gradients new_gradients(const GroupArguments& in, bool needs_x, bool needs_shrink,
                        bool needs_expand) {
  const moe_lora::Group& group = in.group;
  const std::int64_t tokens = in.tokens(), columns = in.columns();
  Gradients out{needs_x ? new_tensor({tokens, columns}, in.type()) : new_tensor({0}, in.type()),
                {},
                {},
                new_tensor({tokens, group.row_count()}, in.wide()),
                group.logits > 0 ? new_tensor({0}, in.wide())
                                 : new_tensor({group.linears, tokens, group.experts}, in.wide())};
  for (std::size_t g = 0; g < in.expand.size(); ++g) {
    if (needs_shrink) {
      out.shrink.push_back(new_tensor({group.stored_rows(), columns}, in.shrink[g].scalar_type()));
    }
    if (needs_expand) {
      out.expand.push_back(
          new_tensor({in.features(g), group.experts, group.rank}, in.expand[g].scalar_type()));
    }
  }
  return out;
}

// What the forward left, checked and contiguous, and the outputs' gradients.
struct Saved {
  std::vector<Tensor> grad_ys;
  Tensor hidden, gate, z;
};

Saved check_saved(const std::vector<Tensor>& grad_ys, const Tensor& hidden, const Tensor& gate,
                  const Tensor& z, const GroupArguments& in) {
  const moe_lora::Group& group = in.group;
  STD_TORCH_CHECK(grad_ys.size() == in.expand.size(),
                  "floe: grad_ys must have one entry per linear");
  check_shape("hidden", hidden, {group.linears, in.tokens(), group.hidden});
  check_shape("gate", gate, {group.linears, in.tokens(), group.experts});
  check_shape("z", z, {group.linears, in.tokens(), group.width()});
  check_type("hidden", hidden, in.wide());
  check_type("gate", gate, in.wide());
  check_type("z", z, in.type());
  Saved saved{{}, as_contiguous(hidden), as_contiguous(gate), as_contiguous(z)};
  for (std::size_t g = 0; g < grad_ys.size(); ++g) {
    check_shape("grad_ys", grad_ys[g], {in.tokens(), in.features(g)});
    check_type("grad_ys", grad_ys[g], in.type());
    saved.grad_ys.push_back(as_contiguous(grad_ys[g]));
  }
  return saved;
}

// grad_z [G, T, J] and the gradients of the expand weights.
template <typename T>
void run_grad_y(const GroupArguments& in, const Saved& saved, const Tensor& grad_z,
                const Gradients& out) {
  using A = Accumulator<T>;
  const std::int64_t tokens = in.tokens(), width = in.group.width();
  const bool needed = !out.expand.empty();
  std::vector<moe_lora::GradY<T>> calls;
  for (std::size_t g = 0; g < in.expand.size(); ++g) {
    const std::int64_t offset = static_cast<std::int64_t>(g) * tokens * width;
    calls.push_back({data<T>(saved.grad_ys[g]), data<T>(saved.z) + offset,
                     in.parameter<T>(in.expand[g]), mutable_data<A>(grad_z) + offset,
                     needed ? out.expand[g].mutable_data_ptr() : nullptr,
                     in.expand[g].scalar_type() == in.wide(), nullptr, nullptr, nullptr, tokens,
                     in.features(g), width});
  }
  const auto partial_expand = [&](const auto& call) {
    return needed ? call.partial_expand_size() : 0;
  };
  std::int64_t size = 0;
  for (const auto& call : calls) {
    size += call.packed_size() + call.partial_z_size() + partial_expand(call);
  }
  const Tensor memory = new_tensor({size}, in.wide());
  A* next = mutable_data<A>(memory);
  Tasks pack, run, finish;
  for (auto& call : calls) {
    call.packed = std::exchange(next, next + call.packed_size());
    call.partial_z = std::exchange(next, next + call.partial_z_size());
    call.partial_expand = std::exchange(next, next + partial_expand(call));
    pack.add(call, Step::kPack);
    run.add(call, Step::kRun);
    finish.add(call, Step::kFinish);
  }
  pack.run(in.all_features() * width);
  run.run(in.all_features() * tokens);
  finish.run(in.all_features() * tokens);
}

template <typename T>
void run_route_backward(const GroupArguments& in, const Saved& saved, const Tensor& grad_z,
                        const Gradients& out) {
  using A = Accumulator<T>;
  const moe_lora::RouteBackward<A> call{data<A>(grad_z),
                                        data<A>(saved.hidden),
                                        data<A>(saved.gate),
                                        mutable_data<A>(out.products),
                                        in.group.logits > 0 ? nullptr : mutable_data<A>(out.gates),
                                        in.tokens(),
                                        in.group,
                                        static_cast<A>(in.scaling),
                                        static_cast<A>(in.temperature)};
  const std::int64_t grain = 1 + kRoutedPerThread / (in.group.linears * in.group.width());
  parallel_for(0, in.tokens(), grain, [&](std::int64_t first, std::int64_t last) {
    moe_lora::route_backward_tokens(call, first, last);
  });
}

template <typename T>
void run_grad_x(const GroupArguments& in, bool needs_x, const Gradients& out) {
  using A = Accumulator<T>;
  const auto parameters = in.shrink_parameters<T>();
  std::vector<void*> grad_shrink;
  for (const Tensor& grad : out.shrink) grad_shrink.push_back(grad.mutable_data_ptr());
  moe_lora::GradX<T> call{data<A>(out.products),
                          data<T>(in.x),
                          parameters.data(),
                          needs_x ? mutable_data<T>(out.x) : nullptr,
                          grad_shrink.empty() ? nullptr : grad_shrink.data(),
                          in.shrink[0].scalar_type() == in.wide(),
                          nullptr,
                          nullptr,
                          in.tokens(),
                          in.columns(),
                          in.group,
                          in.dropout};
  const std::int64_t partial = grad_shrink.empty() ? 0 : call.partial_rows_size();
  const Tensor memory = new_tensor({call.packed_size() + partial}, in.wide());
  call.packed = memory.mutable_data_ptr();
  call.partial_rows = mutable_data<A>(memory) + call.packed_size();
  for (const Step step : {Step::kPack, Step::kRun, Step::kFinish}) {
    Tasks tasks;
    tasks.add(call, step);
    tasks.run(in.tokens() * in.columns());
  }
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> experts_backward_cpu(
    const std::vector<Tensor>& grad_ys, const Tensor& x, const std::vector<Tensor>& shrink_weights,
    const std::vector<Tensor>& expand_weights, const Tensor& hidden, const Tensor& gate,
    const Tensor& z, double scaling, double temperature, double dropout_p,
    const std::optional<Tensor>& seed, bool needs_x, bool needs_shrink, bool needs_expand,
    bool gated) {
  const GroupArguments in =
      check_group(x, shrink_weights, expand_weights, scaling, temperature, dropout_p, seed, gated);
  const Saved saved = check_saved(grad_ys, hidden, gate, z, in);
  const std::int64_t tokens = in.tokens();
  const Gradients out = new_gradients(in, needs_x, needs_shrink, needs_expand);
  const Tensor grad_z = new_tensor({in.group.linears, tokens, in.group.width()}, in.wide());
  with_float_type(in.type(), [&]<typename T>(T) {
    run_grad_y<T>(in, saved, grad_z, out);
    run_route_backward<T>(in, saved, grad_z, out);
    if (needs_x || needs_shrink) run_grad_x<T>(in, needs_x, out);
  });
  return {out.x, out.shrink, out.expand, out.products, out.gates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) {
  m.impl("moe_lora_experts_backward", TORCH_BOX(&experts_backward_cpu));
}

}  // namespace floe::bindings
