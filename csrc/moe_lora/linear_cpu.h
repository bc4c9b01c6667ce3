// The MoE-LoRA linear's own products on the CPU: everything but the frozen weight's.
//
// A call is a struct of pointers and sizes and some steps, each a range of independent tasks; the
// caller spreads the tasks over threads. What a task computes depends on the sizes alone, and sums
// over tasks are formed in a fixed order, so results are bitwise the same for any thread count.
//
// T tokens, K in features, N out features, P rows that x is multiplied with, J = M r columns of z.
// All matrices are contiguous.
#pragma once

#include <cstdint>

#include "number.h"

namespace floe::moe_lora {

inline constexpr std::int64_t kTokens = 32;    // of a tile
inline constexpr std::int64_t kColumns = 256;  // of a tile: one draw of keep bytes
inline constexpr std::int64_t kPadding = 32;   // packed operands are padded to this
inline constexpr std::int64_t kTokensAChunk = 1024;
inline constexpr std::int64_t kColumnSplits = 8;

constexpr std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_divide(a, b) * b; }

struct Dropout {
  bool active = false;
  double p = 0.0;
  std::int64_t seed = 0;
};

// A parameter as it is stored: in T, or in the accumulator's type and rounded to T when packed.
template <typename T>
struct Parameter {
  const void* data;
  bool wide;
};

// G linears that read one x, of one rank r and number of experts M. Of x's P = G (H + Q) products,
// first come H of hidden for every linear, then Q logits for every linear. H is r, or M r where
// every expert has an A of its own; Q is M, or 0 where gates are given.
struct Group {
  std::int64_t linears, rank, experts, hidden, logits;

  std::int64_t stored_rows() const { return hidden + logits; }
  std::int64_t hidden_rows() const { return linears * hidden; }
  std::int64_t row_count() const { return linears * stored_rows(); }
  std::int64_t width() const { return experts * rank; }
  // What expert i + 1's hidden values lie behind expert i's.
  std::int64_t hidden_step() const { return hidden == rank ? 0 : rank; }

  // Of the P rows, row p is this row of what that linear stores, [H + Q, K].
  struct Stored {
    std::int64_t linear, row;
  };
  Stored stored(std::int64_t p) const {
    if (p < hidden_rows()) return {p / hidden, p % hidden};
    const std::int64_t logit = p - hidden_rows();
    return {logit / logits, hidden + logit % logits};
  }
};

enum class Step { kPack, kRun, kFinish };

// products [T, P] = [dropout(x) A^T, x R^T]
template <typename T>
struct Shrink {
  const T* x;
  const Parameter<T>* shrink;  // one a linear
  Accumulator<T>* products;
  void* packed;  // packed_size() accumulators
  std::int64_t tokens, columns;
  Group group;
  Dropout dropout;

  std::int64_t padded_columns() const { return round_up(columns, kPadding); }
  std::int64_t packed_size() const { return group.row_count() * padded_columns(); }
  std::int64_t tasks(Step step) const {
    if (step == Step::kFinish) return 0;
    return step == Step::kPack ? group.row_count() : ceil_divide(tokens, kTokens);
  }
};

// y [T, N] = z expand^T + bias + base
template <typename T>
struct Expand {
  const T* z;
  Parameter<T> expand;  // [N, J]
  const T* bias;        // [N] or null
  const T* base;        // [T, N] or null
  T* y;
  void* packed;
  std::int64_t tokens, features, width;  // T, N, J

  std::int64_t packed_size() const { return round_up(features, kPadding) * round_up(width, 2); }
  std::int64_t tasks(Step step) const {
    if (step == Step::kFinish) return 0;
    return ceil_divide(step == Step::kPack ? features : tokens, kTokens);
  }
};

// A [T, columns] matrix cut into tasks: chunks of tokens times splits of columns.
struct Cut {
  std::int64_t tokens, columns;

  std::int64_t chunks() const { return ceil_divide(tokens, kTokensAChunk); }
  std::int64_t chunk_tokens() const {
    return round_up(ceil_divide(tokens, chunks() > 0 ? chunks() : 1), kTokens);
  }
  std::int64_t split_columns() const {
    return round_up(ceil_divide(columns, kColumnSplits), kPadding);
  }
  std::int64_t splits() const { return columns > 0 ? ceil_divide(columns, split_columns()) : 0; }
  std::int64_t tasks() const { return chunks() * splits(); }
};

// grad_z [T, J] = grad_y expand, grad_expand [N, J] = grad_y^T z
template <typename T>
struct GradY {
  const T* grad_y;
  const T* z;
  Parameter<T> expand;
  Accumulator<T>* grad_z;
  void* grad_expand;  // T, or the accumulator where wide_gradient; null where not needed
  bool wide_gradient;
  void* packed;
  Accumulator<T>* partial_z;       // [splits, T, padded J]
  Accumulator<T>* partial_expand;  // [chunks, splits, split columns, padded J]
  std::int64_t tokens, features, width;

  Cut cut() const { return {tokens, features}; }
  std::int64_t padded_width() const { return round_up(width, 16); }
  std::int64_t packed_size() const { return round_up(features, 2) * padded_width(); }
  std::int64_t partial_z_size() const { return cut().splits() * tokens * padded_width(); }
  std::int64_t partial_expand_size() const {
    return cut().tasks() * cut().split_columns() * padded_width();
  }
  std::int64_t tasks(Step step) const {
    if (step == Step::kPack) return ceil_divide(features, kTokens);
    if (step == Step::kRun) return cut().tasks();
    return ceil_divide(tokens, kTokens) + ceil_divide(grad_expand ? features : 0, kTokens);
  }
};

// Of grads [T, P], those of hidden and of the logits: grad_x [T, K] = keep / (1 - p) * (hidden A) +
// logits R and grad_shrink, as P rows, = [hidden^T dropout(x), logits^T x]
template <typename T>
struct GradX {
  const Accumulator<T>* grads;
  const T* x;
  const Parameter<T>* shrink;  // one a linear
  T* grad_x;                   // null where not needed
  void* const* grad_shrink;    // one a linear, as GradY's grad_expand; null where not needed
  bool wide_gradient;
  void* packed;
  Accumulator<T>* partial_rows;  // [chunks, splits, padded P, split columns]
  std::int64_t tokens, columns;
  Group group;
  Dropout dropout;

  Cut cut() const { return {tokens, columns}; }
  std::int64_t hidden_rows() const { return group.hidden_rows(); }
  std::int64_t row_count() const { return group.row_count(); }
  std::int64_t logit_rows() const { return row_count() - hidden_rows(); }
  std::int64_t padded_rows() const {
    return round_up(hidden_rows(), 4) + round_up(logit_rows(), 4);
  }
  std::int64_t packed_size() const {
    return round_up(columns, kPadding) * (round_up(hidden_rows(), 2) + round_up(logit_rows(), 2));
  }
  std::int64_t partial_rows_size() const {
    return cut().tasks() * padded_rows() * cut().split_columns();
  }
  std::int64_t tasks(Step step) const {
    if (step == Step::kPack) return grad_x ? ceil_divide(columns, kPadding) : 0;
    if (step == Step::kRun) return cut().tasks();
    return grad_shrink ? row_count() : 0;
  }
};

// Tasks [first, last) of one step of a call.
#define FLOE_DECLARE(T)                                                              \
  void run(const Shrink<T>& call, Step step, std::int64_t first, std::int64_t last); \
  void run(const Expand<T>& call, Step step, std::int64_t first, std::int64_t last); \
  void run(const GradY<T>& call, Step step, std::int64_t first, std::int64_t last);  \
  void run(const GradX<T>& call, Step step, std::int64_t first, std::int64_t last);
FLOE_DECLARE(BFloat16)
FLOE_DECLARE(Float16)
FLOE_DECLARE(float)
FLOE_DECLARE(double)
#undef FLOE_DECLARE

}  // namespace floe::moe_lora
