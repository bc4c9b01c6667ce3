// Working memory of one task range.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "host_device.h"

namespace floe::moe_lora {

// Uninitialised, at the start of a cache line. All inline: a copy compiled for one instruction set
// must not be linked into code for another.
template <typename E>
class Scratch {
 public:
  FLOE_INLINE explicit Scratch(std::int64_t count)
      : data_(static_cast<E*>(::operator new(static_cast<std::size_t>(count) * sizeof(E), kLine))) {
  }
  FLOE_INLINE ~Scratch() { ::operator delete(data_, kLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  FLOE_INLINE E* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  E* data_;
};

}  // namespace floe::moe_lora
