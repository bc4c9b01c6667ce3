#include "moe_lora/route_cpu.h"

#include <algorithm>
#include <cmath>

#include "moe_lora/scratch.h"

namespace floe::moe_lora {
namespace {

// e^x for x <= 0, to 2 units in the last place; 0 where that is no normal number. NaN stays NaN.
// Written out because a loop over std::exp is not vectorised.
FLOE_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float f = (x - n * kLn2High) - n * kLn2Low;  // |f| <= ln 2 / 2, where 8 terms suffice
  float sum = 1.0f / 5040.0f;
  for (const float term :
       {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
    sum = sum * f + term;
  }
  const float power = float_from_bits((bits_from_float(shifted) + 127u) << 23);  // 2^n
  return x < -87.3f ? 0.0f : sum * power;
}

FLOE_INLINE double exponential(double x) { return std::exp(x); }

// hidden, and the softmax's exponents, of one linear; the largest exponent of a token is 0.
template <typename T, typename A = Accumulator<T>>
FLOE_INLINE void take_products(const Route<T>& call, std::int64_t g, std::int64_t first,
                               std::int64_t last, A* __restrict__ gate) {
  const auto& [linears, rank, experts] = call.group;
  const A* bias = call.bias != nullptr ? call.bias + g * experts : nullptr;
  for (std::int64_t t = first; t < last; ++t, gate += experts) {
    const A* products = call.products + t * call.group.row_count();
    const A* logits = products + linears * rank + g * experts;
    std::copy_n(products + g * rank, rank, call.hidden + (g * call.tokens + t) * rank);
    for (std::int64_t i = 0; i < experts; ++i) {
      gate[i] = (logits[i] + (bias != nullptr ? bias[i] : A{0})) / call.temperature;
    }
    const A largest = *std::max_element(gate, gate + experts);
    for (std::int64_t i = 0; i < experts; ++i) gate[i] -= largest;
  }
}

// gate [M] and z [M r] of one token; `gate` holds the exponentials.
template <typename T, typename A = Accumulator<T>>
FLOE_INLINE void write_gated(const Group& group, A scaling, const A* __restrict__ hidden,
                             A* __restrict__ gate, A* __restrict__ wide, T* __restrict__ z) {
  A sum = 0;
  for (std::int64_t i = 0; i < group.experts; ++i) sum += gate[i];
  for (std::int64_t i = 0; i < group.experts; ++i) {
    gate[i] /= sum;
    const A factor = scaling * gate[i];
    for (std::int64_t j = 0; j < group.rank; ++j) wide[i * group.rank + j] = factor * hidden[j];
  }
  for (std::int64_t k = 0; k < group.width(); ++k) z[k] = narrow<T>(wide[k]);
}

template <typename T>
FLOE_INLINE void route(const Route<T>& call, std::int64_t first, std::int64_t last) {
  using A = Accumulator<T>;
  const auto& [linears, rank, experts] = call.group;
  const Scratch<A> wide(call.group.width());
  for (std::int64_t g = 0; g < linears; ++g) {
    A* gate = call.gate + (g * call.tokens + first) * experts;
    take_products(call, g, first, last, gate);
    for (std::int64_t k = 0; k < (last - first) * experts; ++k) gate[k] = exponential(gate[k]);
    for (std::int64_t t = first; t < last; ++t, gate += experts) {
      const std::int64_t row = g * call.tokens + t;
      write_gated(call.group, call.scaling, call.hidden + row * rank, gate, wide.get(),
                  call.z + row * call.group.width());
    }
  }
}

// d hidden_j = sum_i gate_i d_ij, d gate_i = sum_j d_ij hidden_j with d = scaling * grad_z, and
// d logit_i = gate_i (d gate_i - sum_l gate_l d gate_l) / temperature.
template <typename A>
FLOE_INLINE void route_backward(const RouteBackward<A>& call, std::int64_t first,
                                std::int64_t last) {
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

}  // namespace

#define FLOE_DEFINE(function, Call, run)                                                      \
  FLOE_VECTOR_CLONES void function(const Call& call, std::int64_t first, std::int64_t last) { \
    run(call, first, last);                                                                   \
  }
FLOE_DEFINE(route_tokens, Route<BFloat16>, route)
FLOE_DEFINE(route_tokens, Route<Float16>, route)
FLOE_DEFINE(route_tokens, Route<float>, route)
FLOE_DEFINE(route_tokens, Route<double>, route)
FLOE_DEFINE(route_backward_tokens, RouteBackward<float>, route_backward)
FLOE_DEFINE(route_backward_tokens, RouteBackward<double>, route_backward)

}  // namespace floe::moe_lora
