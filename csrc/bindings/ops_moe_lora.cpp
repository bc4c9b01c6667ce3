// Dropout and the forward products of the MoE-LoRA linear on the CPU. ops.cpp has the schemas but
// that of keyed_dropout, which floe_triton defines: this is its kernel for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/moe_lora_calls.h"
#include "moe_lora/dropout_cpu.h"
#include "moe_lora/route_cpu.h"

namespace floe::bindings {
namespace {

using torch::stable::parallel_for;

Tensor dropout_cpu(const Tensor& x, double p, const Tensor& seed) {
  STD_TORCH_CHECK(x.defined() && x.dim() >= 1, "floe: x must be [..., K]");
  with_float_type(x.scalar_type(), [](auto) {});  // refuses other dtypes
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "floe: p must be in [0, 1), got ", p);
  const std::int64_t value = value_of_seed(seed);
  const Tensor input = as_contiguous(x);
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

// What op moe_lora_experts returns, in the order of its schema.
struct Outputs {
  std::vector<Tensor> ys;
  Tensor hidden, gate, z;
};

Outputs new_outputs(const GroupArguments& in) {
  const std::int64_t linears = in.group.linears, experts = in.group.experts;
  std::vector<Tensor> ys;
  for (std::size_t g = 0; g < in.expand.size(); ++g) {
    ys.push_back(new_tensor({in.tokens(), in.features(g)}, in.type()));
  }
  return {ys, new_tensor({linears, in.tokens(), in.group.hidden}, in.wide()),
          new_tensor({linears, in.tokens(), experts}, in.wide()),
          new_tensor({linears, in.tokens(), in.group.width()}, in.type())};
}

// [G, M] of the accumulator's type; none where no linear has one.
std::optional<Tensor> stack_router_biases(const OptionalTensors& biases, const GroupArguments& in) {
  STD_TORCH_CHECK(biases.empty() || biases.size() == in.expand.size(),
                  "floe: router_biases must have one entry per linear or none");
  const auto given = std::count_if(biases.begin(), biases.end(),
                                   [](const auto& bias) { return bias.has_value(); });
  if (given == 0) return std::nullopt;
  const std::int64_t experts = in.group.experts;
  Tensor stacked = new_tensor({in.group.linears, experts}, in.wide());
  auto* target = static_cast<char*>(stacked.mutable_data_ptr());
  for (const std::optional<Tensor>& bias : biases) {
    STD_TORCH_CHECK(bias.has_value(), "floe: router_biases must be all given or all None");
    check_shape("router_biases", *bias, {experts});
    with_float_type(bias->scalar_type(), [](auto) {});  // refuses other dtypes
    const Tensor copy = resolved(*bias);
    const Tensor wide = copy.scalar_type() == in.wide() ? copy : torch::stable::to(copy, in.wide());
    const auto bytes = static_cast<std::size_t>(experts) * wide.element_size();
    std::memcpy(target, wide.const_data_ptr(), bytes);
    target += bytes;
  }
  return stacked;
}

// The given gates [T, M] of every linear into gate [G, T, M].
void take_gates(const std::vector<Tensor>& gates, const GroupArguments& in, const Tensor& gate) {
  STD_TORCH_CHECK(gates.size() == in.expand.size(),
                  "floe: gates must have one entry per linear or none");
  auto* target = static_cast<char*>(gate.mutable_data_ptr());
  for (const Tensor& given : gates) {
    check_shape("gates", given, {in.tokens(), in.group.experts});
    with_float_type(given.scalar_type(), [](auto) {});  // refuses other dtypes
    const Tensor dense = as_contiguous(given);
    const Tensor wide =
        given.scalar_type() == in.wide() ? dense : torch::stable::to(dense, in.wide());
    const auto bytes = static_cast<std::size_t>(wide.numel()) * wide.element_size();
    if (bytes > 0) std::memcpy(target, wide.const_data_ptr(), bytes);
    target += bytes;
  }
}

// What is added to the experts' output of every linear, contiguous.
struct Added {
  OptionalTensors biases, bases;  // of each linear [N] or [T, N], or none

  template <typename T>
  static const T* pointer(const std::optional<Tensor>& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
  }
};

Added check_added(const OptionalTensors& biases, const std::vector<Tensor>& bases,
                  const GroupArguments& in) {
  const std::size_t linears = in.expand.size();
  STD_TORCH_CHECK(biases.empty() || biases.size() == linears,
                  "floe: biases must have one entry per linear or none");
  STD_TORCH_CHECK(bases.empty() || bases.size() == linears,
                  "floe: base_outputs must have one entry per linear or none");
  Added added{OptionalTensors(linears), OptionalTensors(linears)};
  for (std::size_t g = 0; g < biases.size(); ++g) {
    if (!biases[g]) continue;
    check_shape("biases", *biases[g], {in.features(g)});
    check_type("biases", *biases[g], in.type());
    added.biases[g] = resolved(*biases[g]);
  }
  for (std::size_t g = 0; g < bases.size(); ++g) {
    check_shape("base_outputs", bases[g], {in.tokens(), in.features(g)});
    check_type("base_outputs", bases[g], in.type());
    added.bases[g] = as_contiguous(bases[g]);
  }
  return added;
}

template <typename T>
std::vector<moe_lora::Expand<T>> expand_calls(const GroupArguments& in, const Added& added,
                                              const Outputs& out) {
  std::vector<moe_lora::Expand<T>> calls;
  const std::int64_t width = in.group.width();
  const T* z = data<T>(out.z);
  for (std::size_t g = 0; g < in.expand.size(); ++g, z += in.tokens() * width) {
    calls.push_back({z, in.parameter<T>(in.expand[g]), Added::pointer<T>(added.biases[g]),
                     Added::pointer<T>(added.bases[g]), mutable_data<T>(out.ys[g]), nullptr,
                     in.tokens(), in.features(g), width});
  }
  return calls;
}

// Gives the calls their packed parameters; the tensor that holds them.
template <typename T>
Tensor pack(const GroupArguments& in, moe_lora::Shrink<T>& shrink,
            std::vector<moe_lora::Expand<T>>& expands) {
  std::int64_t size = shrink.packed_size();
  for (const auto& expand : expands) size += expand.packed_size();
  Tensor packed = new_tensor({size}, in.wide());
  auto* next = mutable_data<Accumulator<T>>(packed);
  Tasks tasks;
  shrink.packed = std::exchange(next, next + shrink.packed_size());
  tasks.add(shrink, Step::kPack);
  for (auto& expand : expands) {
    expand.packed = std::exchange(next, next + expand.packed_size());
    tasks.add(expand, Step::kPack);
  }
  tasks.run(size);
  return packed;
}

// What passes between the steps of so many tasks, of kTokens tokens each, stays in the cache.
inline constexpr std::int64_t kTasksInCache = 8;

// Every parameter is packed once; then each run of tokens takes all three steps in a row.
template <typename T>
void run_experts(const GroupArguments& in, const std::optional<Tensor>& router_bias,
                 std::int64_t top_k, const Added& added, const Outputs& out) {
  using A = Accumulator<T>;
  using moe_lora::kTokens;
  const std::int64_t tokens = in.tokens(), columns = in.columns();
  const auto parameters = in.shrink_parameters<T>();
  const Tensor products = new_tensor({tokens, in.group.row_count()}, in.wide());
  moe_lora::Shrink<T> shrink{
      data<T>(in.x), parameters.data(), mutable_data<A>(products), nullptr, tokens, columns,
      in.group,      in.dropout};
  const moe_lora::Route<T> route{data<A>(products),
                                 router_bias ? data<A>(*router_bias) : nullptr,
                                 mutable_data<A>(out.hidden),
                                 mutable_data<A>(out.gate),
                                 mutable_data<T>(out.z),
                                 tokens,
                                 in.group,
                                 static_cast<A>(in.scaling),
                                 static_cast<A>(in.temperature),
                                 top_k == 0 ? in.group.experts : top_k};
  auto expands = expand_calls<T>(in, added, out);
  const Tensor packed = pack(in, shrink, expands);
  const std::int64_t grain = 1 + kElementsPerThread / (1 + kTokens * (columns + in.all_features()));
  parallel_for(0, shrink.tasks(Step::kRun), grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin; first < end; first += kTasksInCache) {
      const std::int64_t last = std::min(first + kTasksInCache, end);
      run_tasks(shrink, Step::kRun, first, last);
      moe_lora::route_tokens(route, first * kTokens, std::min(last * kTokens, tokens));
      for (const auto& expand : expands) run_tasks(expand, Step::kRun, first, last);
    }
  });
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> experts_cpu(
    const Tensor& x, const std::vector<Tensor>& shrink_weights,
    const std::vector<Tensor>& expand_weights, const OptionalTensors& router_biases,
    const OptionalTensors& biases, const std::vector<Tensor>& base_outputs, double scaling,
    double temperature, double dropout_p, const std::optional<Tensor>& seed,
    const std::vector<Tensor>& gates, std::int64_t top_k) {
  const GroupArguments in = check_group(x, shrink_weights, expand_weights, scaling, temperature,
                                        dropout_p, seed, !gates.empty());
  STD_TORCH_CHECK(top_k >= 0 && top_k <= in.group.experts, "floe: top_k must be in [0, M], got ",
                  top_k);
  const std::optional<Tensor> router_bias = stack_router_biases(router_biases, in);
  STD_TORCH_CHECK(gates.empty() || (top_k == 0 && !router_bias),
                  "floe: top_k must be 0 and router_biases None where gates are given");
  const Added added = check_added(biases, base_outputs, in);
  const Outputs out = new_outputs(in);
  if (!gates.empty()) take_gates(gates, in, out.gate);
  with_float_type(in.type(),
                  [&]<typename T>(T) { run_experts<T>(in, router_bias, top_k, added, out); });
  return {out.ys, out.hidden, out.gate, out.z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(floe, CPU, m) {
  m.impl("keyed_dropout", TORCH_BOX(&dropout_cpu));
  m.impl("moe_lora_experts", TORCH_BOX(&experts_cpu));
}

}  // namespace floe::bindings
