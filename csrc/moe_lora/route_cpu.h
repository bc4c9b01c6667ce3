// The router of a group of linears that read one x, between its products: softmax, the gated
// hidden z, and both backwards. Small beside every product: T (r + M r) numbers a linear.
//
// products and grads [T, P], hidden [G, T, H], gate [G, T, M], z and grad_z [G, T, M r].
#pragma once

#include <cstdint>

#include "moe_lora/linear_cpu.h"

namespace floe::moe_lora {

// gate = softmax((logits + bias) / temperature) over the top_k largest, equal ones by the lower
// index; z = (scaling * gate_i * hidden_j) rounded to T. Where gates are given, gate holds them.
template <typename T>
struct Route {
  using A = Accumulator<T>;
  const A* products;
  const A* bias;  // [G, M] or null
  A* hidden;
  A* gate;
  T* z;
  std::int64_t tokens;
  Group group;
  A scaling, temperature;
  std::int64_t top_k;  // M where the softmax is over all
};

// The products' gradients, and those of given gates.
template <typename A>
struct RouteBackward {
  const A* grad_z;
  const A* hidden;
  const A* gate;
  A* grads;
  A* grad_gates;  // [G, T, M], null where the gates are a router's
  std::int64_t tokens;
  Group group;
  A scaling, temperature;
};

// Tokens [first, last).
void route_tokens(const Route<BFloat16>& call, std::int64_t first, std::int64_t last);
void route_tokens(const Route<Float16>& call, std::int64_t first, std::int64_t last);
void route_tokens(const Route<float>& call, std::int64_t first, std::int64_t last);
void route_tokens(const Route<double>& call, std::int64_t first, std::int64_t last);
void route_backward_tokens(const RouteBackward<float>& call, std::int64_t first, std::int64_t last);
void route_backward_tokens(const RouteBackward<double>& call, std::int64_t first,
                           std::int64_t last);

}  // namespace floe::moe_lora
