#include "moe_lora/linear_bf16_dot.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "moe_lora/draw.h"
#include "moe_lora/scratch.h"

#if !defined(FLOE_BF16_DOT)

namespace floe::moe_lora::bf16_dot {
bool available() { return false; }
}  // namespace floe::moe_lora::bf16_dot

#else

#include <immintrin.h>

// Everything that other files share is above: from here on, only what is this file's own may be
// compiled, as the linker could give it to a CPU without these instructions.
#pragma GCC push_options
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#include "moe_lora/backward.h"

namespace floe::moe_lora::bf16_dot {
namespace {

struct Bf16Lanes {
  using Element = BFloat16;
  using Sum = float;
  static constexpr int kPair = 2;
  static constexpr int kLanes = 16;
  static constexpr int kBlockRows = 8;
  static constexpr int kDotTokens = 4, kDotRows = 6;
  using Vector = __m512;
  using Operand = __m512i;

  static FLOE_INLINE BFloat16 element(BFloat16 stored) { return stored; }
  static FLOE_INLINE BFloat16 element_of_sum(float sum) { return narrow<BFloat16>(sum); }

  static FLOE_INLINE void load(Vector& vector, const float* source) {
    vector = _mm512_loadu_ps(source);
  }
  static FLOE_INLINE void store(float* target, const Vector& vector) {
    _mm512_storeu_ps(target, vector);
  }
  static FLOE_INLINE void load_operand(Operand& operand, const BFloat16* source) {
    operand = _mm512_loadu_si512(source);
  }
  static FLOE_INLINE void broadcast(Operand& operand, const BFloat16* source) {
    int pair;
    std::memcpy(&pair, source, sizeof pair);
    operand = _mm512_set1_epi32(pair);
  }
  static FLOE_INLINE void multiply_add(Vector& sum, const Operand& u, const Operand& v) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(u), reinterpret_cast<__m512bh>(v));
  }
  static FLOE_INLINE void keep(Vector& vector, const std::uint8_t* bytes, std::uint32_t threshold) {
    const __m128i drawn = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i least = _mm_set1_epi8(static_cast<char>(threshold));
    vector = _mm512_maskz_mov_ps(_mm_cmpge_epu8_mask(drawn, least), vector);
  }
  static FLOE_INLINE float total(const float* source) {
    return _mm512_reduce_add_ps(_mm512_loadu_ps(source));
  }

  // Eight calls a vector, each word in the low half of its 64 bits: where the multiplier takes it.
  static FLOE_INLINE void draw(philox::Key key, std::int64_t row, std::int64_t first_block,
                               std::uint8_t* bytes) {
    static_assert(kDrawn == 2 * 128);
    const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i even = _mm512_set1_epi64(0xD2511F53), odd = _mm512_set1_epi64(0xCD9E8D57);
    __m512i c0[2], c1[2], c2[2], c3[2];
    for (int i = 0; i < 2; ++i) {
      c0[i] = _mm512_add_epi64(lane, _mm512_set1_epi64(first_block + 8 * i));
      c1[i] = _mm512_set1_epi64(row);
      c2[i] = _mm512_srli_epi64(c1[i], 32);
      c3[i] = _mm512_setzero_si512();
    }
#pragma GCC unroll 7
    for (int round = 0; round < philox::kRounds; ++round, key = philox::next_key(key)) {
      const __m512i k0 = _mm512_set1_epi64(key.word[0]), k1 = _mm512_set1_epi64(key.word[1]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512i product0 = _mm512_mul_epu32(c0[i], even);
        const __m512i product2 = _mm512_mul_epu32(c2[i], odd);
        c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product2, 32), c1[i], k0, 0x96);
        c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[i], k1, 0x96);
        c1[i] = product2;
        c3[i] = product0;
      }
    }
    for (int i = 0; i < 2; ++i) store_words(c0[i], c1[i], c2[i], c3[i], bytes + 128 * i);
  }

  static FLOE_INLINE void keep_elements(const BFloat16* source, BFloat16* target,
                                        std::int64_t count, const std::uint8_t* bytes,
                                        std::uint32_t threshold) {
    const __m256i least = _mm256_set1_epi8(static_cast<char>(threshold));
    for (std::int64_t i = 0; i < count; i += 32) {
      const __m256i drawn = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
      const __m512i kept =
          _mm512_maskz_loadu_epi16(_mm256_cmpge_epu8_mask(drawn, least), source + i);
      _mm512_storeu_si512(target + i, kept);
    }
  }

  // Not memcpy: the compiler makes a string instruction of it, slow for runs this short.
  static FLOE_INLINE void load_row(const BFloat16* source, std::int64_t count, BFloat16* target) {
    std::int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      _mm512_storeu_si512(target + i, _mm512_loadu_si512(source + i));
    }
    const auto inside = static_cast<__mmask32>((1ull << (count - i)) - 1ull);
    _mm512_mask_storeu_epi16(target + i, inside, _mm512_maskz_loadu_epi16(inside, source + i));
  }

  // Element i of both rows side by side; zero from `count` on and where there is no second row.
  static FLOE_INLINE void pair(const BFloat16* first, const BFloat16* second, std::int64_t count,
                               std::int64_t lanes, BFloat16* target) {
    for (std::int64_t i = 0; i < lanes; i += kLanes) {
      const std::int64_t left = std::clamp<std::int64_t>(count - i, 0, kLanes);
      const auto inside = static_cast<__mmask16>((1u << left) - 1u);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, first + i));
      const auto both = static_cast<__mmask16>(second != nullptr ? inside : 0);
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(both, second + i));
      _mm512_storeu_si512(target + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }

  static FLOE_INLINE void narrow_row(const float* source, BFloat16* target, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      const __m512bh narrowed =
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(source + i + 16), _mm512_loadu_ps(source + i));
      std::memcpy(target + i, &narrowed, sizeof narrowed);
    }
    for (; i < count; ++i) target[i] = narrow<BFloat16>(source[i]);
  }

 private:
  // The words of eight calls, 16 bytes each.
  static FLOE_INLINE void store_words(__m512i c0, __m512i c1, __m512i c2, __m512i c3,
                                      std::uint8_t* bytes) {
    const __mmask16 high = 0xAAAA;
    const __m512i front = _mm512_mask_mov_epi32(c0, high, _mm512_slli_epi64(c1, 32));
    const __m512i back = _mm512_mask_mov_epi32(c2, high, _mm512_slli_epi64(c3, 32));
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(bytes, _mm512_permutex2var_epi64(front, first, back));
    _mm512_storeu_si512(bytes + 64, _mm512_permutex2var_epi64(front, second, back));
  }
};

}  // namespace

void run(const Shrink<BFloat16>& call, Step step, std::int64_t first, std::int64_t last) {
  run_step<Bf16Lanes>(call, step, first, last);
}

void run(const Expand<BFloat16>& call, Step step, std::int64_t first, std::int64_t last) {
  run_step<Bf16Lanes>(call, step, first, last);
}

void run(const GradY<BFloat16>& call, Step step, std::int64_t first, std::int64_t last) {
  run_step<Bf16Lanes>(call, step, first, last);
}

void run(const GradX<BFloat16>& call, Step step, std::int64_t first, std::int64_t last) {
  run_step<Bf16Lanes>(call, step, first, last);
}

}  // namespace floe::moe_lora::bf16_dot

#pragma GCC diagnostic pop
#pragma GCC pop_options

namespace floe::moe_lora::bf16_dot {

bool available() {
  static const bool supported =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported;
}

}  // namespace floe::moe_lora::bf16_dot

#endif
