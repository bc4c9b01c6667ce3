// The vectors that the blocked products are written in: one accumulator type, any instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "moe_lora/draw.h"
#include "number.h"

namespace floe::moe_lora {

// Elements are widened when a tile is loaded, and every step of a product takes one of them.
// Vectors pass by reference: by value, their calling convention depends on the instruction set.
template <typename A>
struct WideLanes {
  using Element = A;
  using Sum = A;
  static constexpr int kPair = 1;  // elements that one step of a product takes
  static constexpr int kLanes = 64 / sizeof(A);
  static constexpr int kBlockRows = 4;  // times two vectors: what the registers hold
  static constexpr int kDotTokens = 2, kDotRows = 3;
  typedef A Vector __attribute__((vector_size(64)));
  using Operand = Vector;

  template <typename T>
  static FLOE_INLINE A element(T stored) {
    return widen(stored);
  }
  static FLOE_INLINE A element_of_sum(A sum) { return sum; }

  static FLOE_INLINE void load(Vector& vector, const A* source) {
    std::memcpy(&vector, source, sizeof vector);
  }
  static FLOE_INLINE void store(A* target, const Vector& vector) {
    std::memcpy(target, &vector, sizeof vector);
  }
  static FLOE_INLINE void load_operand(Vector& vector, const A* source) { load(vector, source); }
  static FLOE_INLINE void broadcast(Vector& vector, const A* source) {
    vector = Vector{} + *source;
  }
  static FLOE_INLINE void multiply_add(Vector& sum, const Vector& u, const Vector& v) {
    sum += u * v;
  }

  // Lanes whose byte is below the threshold become 0, whatever they hold.
  static FLOE_INLINE void keep(Vector& vector, const std::uint8_t* bytes, std::uint32_t threshold) {
    using Whole = std::conditional_t<sizeof(A) == 8, std::int64_t, std::int32_t>;
    typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
    typedef Whole Wholes __attribute__((vector_size(64)));
    Bytes drawn;
    std::memcpy(&drawn, bytes, sizeof drawn);
    const Wholes wide = __builtin_convertvector(drawn, Wholes);
    vector = wide >= static_cast<Whole>(threshold) ? vector : Vector{};
  }

  static FLOE_INLINE A total(const A* source) {
    A sums[kLanes];
    std::memcpy(sums, source, sizeof sums);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }

  static FLOE_INLINE void draw(philox::Key key, std::int64_t row, std::int64_t first_block,
                               std::uint8_t* bytes) {
    draw_bytes(key, row, first_block, bytes);
  }
  static FLOE_INLINE void keep_elements(const A* __restrict__ source, A* __restrict__ target,
                                        std::int64_t count, const std::uint8_t* __restrict__ bytes,
                                        std::uint32_t threshold) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = bytes[i] >= threshold ? source[i] : A{};
  }

  template <typename T>
  static FLOE_INLINE void load_row(const T* __restrict__ source, std::int64_t count,
                                   A* __restrict__ target) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = element(source[i]);
  }

  // `lanes` steps of a product along rows: the elements of kPair rows (here one), zero from `count`
  // on.
  template <typename T>
  static FLOE_INLINE void pair(const T* __restrict__ row, const T*, std::int64_t count,
                               std::int64_t lanes, A* __restrict__ target) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = element(row[i]);
    for (std::int64_t i = count; i < lanes; ++i) target[i] = A{};
  }

  template <typename T>
  static FLOE_INLINE void narrow_row(const A* __restrict__ source, T* __restrict__ target,
                                     std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = narrow<T>(source[i]);
  }
};

}  // namespace floe::moe_lora
