// The router of a group of linears that read one x, between its products: softmax, the gated
// hidden z, and both backwards. Small beside every product: T (r + M r) numbers a linear.
//
// G linears, T tokens, M experts, r rank. Columns of products and of grads: G blocks of r hidden,
// then G blocks of M logits. hidden [G, T, r], gate [G, T, M], z and grad_z [G, T, M r].
#pragma once

#include <cstdint>

#include "number.h"

namespace floe::moe_lora {

struct RouteShape {
  std::int64_t tokens, groups, rank, experts;

  std::int64_t columns() const { return groups * (rank + experts); }
};

// gate = softmax((logits + bias) / temperature), z = (scaling * gate_i * hidden_j) rounded to T.
template <typename T>
struct Route {
  using A = Accumulator<T>;
  const A* products;
  const A* bias;  // [G, M] or null
  A* hidden;
  A* gate;
  T* z;
  RouteShape shape;
  A scaling, temperature;
};

// grads [T, G (r + M)] of the products; grad_z holds one pointer a linear.
template <typename A>
struct RouteBackward {
  const A* const* grad_z;
  const A* hidden;
  const A* gate;
  A* grads;
  RouteShape shape;
  A scaling, temperature;
};

// Tokens [first, last).
template <typename T>
void route_tokens(const Route<T>& call, std::int64_t first, std::int64_t last);
template <typename A>
void route_backward_tokens(const RouteBackward<A>& call, std::int64_t first, std::int64_t last);

}  // namespace floe::moe_lora
