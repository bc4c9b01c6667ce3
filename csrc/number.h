// 16-bit floats as raw bits, and their conversions. Integer arithmetic only on the host, so that
// loops over them vectorise on every instruction set and no flush-to-zero mode changes a result.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace floe {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

// float16 and bfloat16 accumulate in float, float in float, double in double.
template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

FLOE_HOST_DEVICE float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FLOE_HOST_DEVICE std::uint32_t bits_from_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FLOE_HOST_DEVICE float widen(BFloat16 x) { return float_from_bits(std::uint32_t{x.bits} << 16); }
FLOE_HOST_DEVICE float widen(float x) { return x; }
FLOE_HOST_DEVICE double widen(double x) { return x; }

FLOE_HOST_DEVICE float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  constexpr std::uint32_t kExponentGap = (127u - 15u) << 23;
  constexpr std::uint32_t kInfinity = 0x1fu << 23;  // float16's top exponent, in float's position
  constexpr std::uint32_t kSmallestNormal = 0x1u << 23;
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & kInfinity;
  std::uint32_t bits = magnitude + kExponentGap;
  bits = exponent == kInfinity ? bits + kExponentGap : bits;
  // A subnormal holds its value without a leading 1: put one in, then subtract it.
  const float subnormal =
      float_from_bits(bits + kSmallestNormal) - float_from_bits(kExponentGap + kSmallestNormal);
  bits = exponent == 0 ? bits_from_float(subnormal) : bits;
  return float_from_bits(bits | (x.bits & 0x8000u) << 16);
#endif
}

// Round to nearest, ties to even. NaN stays NaN.
template <typename T>
FLOE_HOST_DEVICE T narrow(Accumulator<T> value);

template <>
FLOE_HOST_DEVICE double narrow<double>(double value) {
  return value;
}

template <>
FLOE_HOST_DEVICE float narrow<float>(float value) {
  return value;
}

template <>
FLOE_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
  const std::uint32_t bits = bits_from_float(value);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
FLOE_HOST_DEVICE Float16 narrow<Float16>(float value) {
  constexpr std::uint32_t kOverflow = (127u + 16u) << 23;        // 65536, beyond every float16
  constexpr std::uint32_t kSmallestNormal = (127u - 14u) << 23;  // 2^-14
  constexpr std::uint32_t kSubnormalMagic = (127u - 15u + 23u - 10u + 1u) << 23;
  const std::uint32_t bits = bits_from_float(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Adding the magic number lets the float adder shift and round a subnormal into the low bits.
  const float shifted = float_from_bits(magnitude) + float_from_bits(kSubnormalMagic);
  const std::uint32_t subnormal = bits_from_float(shifted) - kSubnormalMagic;
  const std::uint32_t normal =
      (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  std::uint32_t result = magnitude < kSmallestNormal ? subnormal : normal;
  result = magnitude >= kOverflow ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {static_cast<std::uint16_t>(result | (bits >> 16 & 0x8000u))};
}

}  // namespace floe
