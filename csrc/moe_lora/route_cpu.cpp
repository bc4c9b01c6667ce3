#include "moe_lora/route_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

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

// Keeps the k largest of `count` logits, equal ones by the lower index; the others become -inf. NaN
// is neither above nor below another, so that it stays.
template <typename A>
FLOE_INLINE void keep_largest(A* __restrict__ logits, std::int64_t count, std::int64_t k,
                              A* __restrict__ copy) {
  std::copy_n(logits, count, copy);
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t above = 0;
    for (std::int64_t j = 0; j < count; ++j) {
      above += copy[j] > copy[i] || (copy[j] == copy[i] && j < i) ? 1 : 0;
    }
    if (above >= k) logits[i] = -std::numeric_limits<A>::infinity();
  }
}

// hidden of one linear.
template <typename T, typename A = Accumulator<T>>
FLOE_INLINE void take_hidden(const Route<T>& call, std::int64_t g, std::int64_t first,
                             std::int64_t last) {
  const std::int64_t hidden = call.group.hidden;
  for (std::int64_t t = first; t < last; ++t) {
    const A* products = call.products + t * call.group.row_count() + g * hidden;
    std::copy_n(products, hidden, call.hidden + (g * call.tokens + t) * hidden);
  }
}

// The softmax's exponents of one linear; the largest exponent of a token is 0.
template <typename T, typename A = Accumulator<T>>
FLOE_INLINE void take_logits(const Route<T>& call, std::int64_t g, std::int64_t first,
                             std::int64_t last, A* __restrict__ gate) {
  const std::int64_t experts = call.group.experts;
  const A* bias = call.bias != nullptr ? call.bias + g * experts : nullptr;
  const Scratch<A> copy(experts);
  for (std::int64_t t = first; t < last; ++t, gate += experts) {
    const A* products = call.products + t * call.group.row_count();
    const A* logits = products + call.group.hidden_rows() + g * experts;
    for (std::int64_t i = 0; i < experts; ++i) {
      gate[i] = (logits[i] + (bias != nullptr ? bias[i] : A{0})) / call.temperature;
    }
    if (call.top_k < experts) keep_largest(gate, experts, call.top_k, copy.get());
    const A largest = *std::max_element(gate, gate + experts);
    for (std::int64_t i = 0; i < experts; ++i) gate[i] -= largest;
  }
}

// From exponentials to weights whose sum is 1.
template <typename A>
FLOE_INLINE void normalise(A* __restrict__ gate, std::int64_t experts) {
  A sum = 0;
  for (std::int64_t i = 0; i < experts; ++i) sum += gate[i];
  for (std::int64_t i = 0; i < experts; ++i) gate[i] /= sum;
}

// z [M r] of one token.
template <typename T, typename A = Accumulator<T>>
FLOE_INLINE void write_gated(const Group& group, A scaling, const A* __restrict__ hidden,
                             const A* __restrict__ gate, A* __restrict__ wide, T* __restrict__ z) {
  const std::int64_t step = group.hidden_step();
  for (std::int64_t i = 0; i < group.experts; ++i) {
    const A factor = scaling * gate[i];
    for (std::int64_t j = 0; j < group.rank; ++j) {
      wide[i * group.rank + j] = factor * hidden[i * step + j];
    }
  }
  for (std::int64_t k = 0; k < group.width(); ++k) z[k] = narrow<T>(wide[k]);
}

template <typename T>
FLOE_INLINE void route(const Route<T>& call, std::int64_t first, std::int64_t last) {
  using A = Accumulator<T>;
  const std::int64_t experts = call.group.experts;
  const Scratch<A> wide(call.group.width());
  for (std::int64_t g = 0; g < call.group.linears; ++g) {
    A* gate = call.gate + (g * call.tokens + first) * experts;
    take_hidden(call, g, first, last);
    const bool routes = call.group.logits > 0;
    if (routes) {
      take_logits(call, g, first, last, gate);
      for (std::int64_t k = 0; k < (last - first) * experts; ++k) gate[k] = exponential(gate[k]);
    }
    for (std::int64_t t = first; t < last; ++t, gate += experts) {
      const std::int64_t row = g * call.tokens + t;
      if (routes) normalise(gate, experts);
      write_gated(call.group, call.scaling, call.hidden + row * call.group.hidden, gate, wide.get(),
                  call.z + row * call.group.width());
    }
  }
}

// d hidden_j = sum_i gate_i d_ij, d gate_i = sum_j d_ij hidden_j with d = scaling * grad_z, and
// d logit_i = gate_i (d gate_i - sum_l gate_l d gate_l) / temperature.
template <typename A>
FLOE_INLINE void route_backward(const RouteBackward<A>& call, std::int64_t first,
                                std::int64_t last) {
  const Group& group = call.group;
  const std::int64_t rank = group.rank, experts = group.experts, step = group.hidden_step();
  for (std::int64_t t = first; t < last; ++t) {
    A* grads = call.grads + t * group.row_count();
    for (std::int64_t g = 0; g < group.linears; ++g) {
      const std::int64_t row = g * call.tokens + t;
      const A* grad_z = call.grad_z + row * group.width();
      const A* hidden = call.hidden + row * group.hidden;
      const A* gate = call.gate + row * experts;
      A* grad_hidden = grads + g * group.hidden;
      A* grad_gates = call.grad_gates != nullptr ? call.grad_gates + row * experts
                                                 : grads + group.hidden_rows() + g * experts;
      std::fill_n(grad_hidden, group.hidden, A{0});
      A mean = 0;
      for (std::int64_t i = 0; i < experts; ++i, grad_z += rank) {
        A grad_gate = 0;
        for (std::int64_t j = 0; j < rank; ++j) {
          grad_hidden[i * step + j] += gate[i] * (call.scaling * grad_z[j]);
          grad_gate += call.scaling * grad_z[j] * hidden[i * step + j];
        }
        grad_gates[i] = grad_gate;
        mean += gate[i] * grad_gate;
      }
      if (call.grad_gates != nullptr) continue;
      for (std::int64_t i = 0; i < experts; ++i) {
        grad_gates[i] = gate[i] * (grad_gates[i] - mean) / call.temperature;
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
