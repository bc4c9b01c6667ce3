#include "moe_lora/route_cpu.h"

#include <algorithm>
#include <cmath>

namespace floe::moe_lora {
namespace {

// gate [M] = softmax((logits + bias) / temperature), the largest exponent subtracted.
template <typename A>
void softmax(const A* logits, const A* bias, A temperature, std::int64_t experts, A* gate) {
  for (std::int64_t i = 0; i < experts; ++i) {
    gate[i] = (logits[i] + (bias != nullptr ? bias[i] : A{0})) / temperature;
  }
  const A largest = *std::max_element(gate, gate + experts);
  A sum = 0;
  for (std::int64_t i = 0; i < experts; ++i) {
    gate[i] = std::exp(gate[i] - largest);
    sum += gate[i];
  }
  for (std::int64_t i = 0; i < experts; ++i) gate[i] /= sum;
}

}  // namespace

template <typename T>
void route_tokens(const Route<T>& call, std::int64_t first, std::int64_t last) {
  using A = Accumulator<T>;
  const auto& [linears, rank, experts] = call.group;
  for (std::int64_t g = 0; g < linears; ++g) {
    const A* bias = call.bias != nullptr ? call.bias + g * experts : nullptr;
    for (std::int64_t t = first; t < last; ++t) {
      const A* products = call.products + t * call.group.row_count();
      A* hidden = call.hidden + (g * call.tokens + t) * rank;
      A* gate = call.gate + (g * call.tokens + t) * experts;
      T* z = call.z + (g * call.tokens + t) * experts * rank;
      std::copy_n(products + g * rank, rank, hidden);
      softmax(products + linears * rank + g * experts, bias, call.temperature, experts, gate);
      for (std::int64_t i = 0; i < experts; ++i, z += rank) {
        const A factor = call.scaling * gate[i];
        for (std::int64_t j = 0; j < rank; ++j) {
          z[j] = narrow<T>(factor * hidden[j]);
        }
      }
    }
  }
}

// d hidden_j = sum_i gate_i d_ij, d gate_i = sum_j d_ij hidden_j with d = scaling * grad_z, and
// d logit_i = gate_i (d gate_i - sum_l gate_l d gate_l) / temperature.
template <typename A>
void route_backward_tokens(const RouteBackward<A>& call, std::int64_t first, std::int64_t last) {
  const auto& [linears, rank, experts] = call.group;
  for (std::int64_t t = first; t < last; ++t) {
    A* grads = call.grads + t * call.group.row_count();
    for (std::int64_t g = 0; g < linears; ++g) {
      const A* grad_z = call.grad_z + (g * call.tokens + t) * experts * rank;
      const A* hidden = call.hidden + (g * call.tokens + t) * rank;
      const A* gate = call.gate + (g * call.tokens + t) * experts;
      A* grad_hidden = grads + g * rank;
      A* grad_logits = grads + linears * rank + g * experts;
      std::fill_n(grad_hidden, rank, A{0});
      A mean = 0;
      for (std::int64_t i = 0; i < experts; ++i, grad_z += rank) {
        A grad_gate = 0;
        for (std::int64_t j = 0; j < rank; ++j) {
          grad_hidden[j] += gate[i] * (call.scaling * grad_z[j]);
          grad_gate += call.scaling * grad_z[j] * hidden[j];
        }
        grad_logits[i] = grad_gate;
        mean += gate[i] * grad_gate;
      }
      for (std::int64_t i = 0; i < experts; ++i) {
        grad_logits[i] = gate[i] * (grad_logits[i] - mean) / call.temperature;
      }
    }
  }
}

template void route_tokens(const Route<BFloat16>&, std::int64_t, std::int64_t);
template void route_tokens(const Route<Float16>&, std::int64_t, std::int64_t);
template void route_tokens(const Route<float>&, std::int64_t, std::int64_t);
template void route_tokens(const Route<double>&, std::int64_t, std::int64_t);
template void route_backward_tokens(const RouteBackward<float>&, std::int64_t, std::int64_t);
template void route_backward_tokens(const RouteBackward<double>&, std::int64_t, std::int64_t);

}  // namespace floe::moe_lora
