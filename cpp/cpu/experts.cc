#include "cpu/experts.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "base/check.h"

namespace splitfuse {
namespace {

/// to [columns] = weight * from, or += it.
void weigh(const float* from, float weight, int32_t columns, bool add, float* to) {
  if (add) {
    for (int32_t c = 0; c < columns; ++c) to[c] += weight * from[c];
  } else {
    for (int32_t c = 0; c < columns; ++c) to[c] = weight * from[c];
  }
}

}  // namespace

ExpertOps::Places ExpertOps::lay_out(const StepLimits& limits, std::byte* base) const {
  Places at;
  if (limits.experts == 0) return at;
  const auto take = [&](int64_t bytes) -> std::byte* {
    std::byte* place = base ? base + at.bytes : nullptr;
    at.bytes += round_up(bytes, int64_t{64});
    return place;
  };
  const int64_t slots = int64_t{limits.max_rows} * limits.experts_per_row;
  const int64_t hidden = row_stride(limits.expert_hidden);
  at.logits = reinterpret_cast<float*>(take(limits.max_rows * row_stride(limits.experts) * 4));
  at.routing = take(pool_.size() * routing_scratch_bytes(limits.experts));
  at.choices = reinterpret_cast<ExpertChoice*>(take(slots * int64_t{sizeof(ExpertChoice)}));
  at.slot_of_choice = reinterpret_cast<int32_t*>(take(slots * 4));
  at.row_of_slot = reinterpret_cast<int32_t*>(take(slots * 4));
  at.first_slot = reinterpret_cast<int32_t*>(take((limits.experts + 1) * int64_t{4}));
  at.inner = take(slots * row_stride(limits.expert_intermediate) * dtype_size(dtype_));
  at.in = take(slots * hidden * 4);
  at.y = reinterpret_cast<float*>(at.in);
  return at;
}

int64_t ExpertOps::scratch_bytes(const StepLimits& limits) const {
  return lay_out(limits, nullptr).bytes + 2 * limits.experts * int64_t{sizeof(LinearRows)};
}

void ExpertOps::prepare(const StepLimits& limits) {
  limits_ = limits;
  first_.assign(static_cast<size_t>(limits.experts), {});
  second_.assign(static_cast<size_t>(limits.experts), {});
  scratch_ = Memory(lay_out(limits, nullptr).bytes, &pool_);
  at_ = lay_out(limits, scratch_.data());
}

void ExpertOps::run(const Experts& experts, const void* in, int32_t rows, float* out) {
  if (rows == 0) return;
  const Routing& routing = experts.routing;
  const auto count = static_cast<int32_t>(experts.in.size());
  SPLITFUSE_ASSERT(rows <= limits_.max_rows && count == routing.experts + (routing.shared ? 1 : 0));
  SPLITFUSE_ASSERT(count <= limits_.experts && experts_of_row(routing) <= limits_.experts_per_row);
  SPLITFUSE_ASSERT(experts.router.k <= limits_.expert_hidden && experts.router.n <= limits_.experts);
  linears_.multiply(experts.router, in, rows, Epilogue::kStore, at_.logits);
  choose(routing, row_stride(experts.router.n), rows);
  place(experts_of_row(routing), rows, count);
  const size_t used = list_linears(experts, in);
  const auto firsts = std::span(first_).first(used);
  gather(firsts, in);
  linears_.multiply(firsts, Epilogue::kAct);
  linears_.multiply(std::span(second_).first(used), Epilogue::kStore);
  combine(experts_of_row(routing), rows, experts.router.k, out);
}

void ExpertOps::choose(const Routing& routing, int64_t stride, int32_t rows) {
  const int32_t each = experts_of_row(routing);
  pool_.run_parts(rows, [&](int thread, int64_t first, int64_t past) {
    std::byte* const scratch = at_.routing + thread * routing_scratch_bytes(limits_.experts);
    for (int64_t r = first; r < past; ++r) {
      choose_experts(routing, at_.logits + r * stride, scratch, at_.choices + r * each);
    }
  });
}

/// Gives every choice a slot: a counting sort.
void ExpertOps::place(int32_t each, int32_t rows, int32_t experts) {
  const int64_t choices = int64_t{rows} * each;
  int32_t* const first = at_.first_slot;
  std::fill(first, first + experts + 1, 0);
  for (int64_t i = 0; i < choices; ++i) ++first[at_.choices[i].expert + 1];
  for (int32_t e = 0; e < experts; ++e) first[e + 1] += first[e];
  for (int64_t i = 0; i < choices; ++i) {
    const int32_t slot = first[at_.choices[i].expert]++;
    at_.slot_of_choice[i] = slot;
    at_.row_of_slot[slot] = static_cast<int32_t>(i / each);
  }
  // Each has moved on to where the next began.
  std::copy_backward(first, first + experts, first + experts + 1);
  first[0] = 0;
}

/// Names the linears that have rows, and their places.
size_t ExpertOps::list_linears(const Experts& experts, const void* in) {
  const int64_t act = dtype_size(dtype_);
  const int64_t hidden = row_stride(experts.router.k);
  std::byte* inner = at_.inner;
  size_t used = 0;
  for (size_t e = 0; e < experts.in.size(); ++e) {
    const int64_t slot = at_.first_slot[e];
    const int32_t rows = at_.first_slot[e + 1] - at_.first_slot[e];
    if (rows == 0) continue;
    // The shared expert's rows are all rows in their order.
    const bool shared = static_cast<int32_t>(e) == experts.routing.experts;
    first_[used] = {&experts.in[e], shared ? in : at_.in + slot * hidden * act, rows, inner};
    second_[used] = {&experts.out[e], inner, rows, at_.y + slot * hidden};
    inner += rows * row_stride(experts.in[e].n) * act;
    ++used;
  }
  SPLITFUSE_ASSERT(inner <= at_.in);   // which follows
  return used;
}

/// Copies rows to their slots, and zeroes what the first linears leave out at the end of the second's rows.
void ExpertOps::gather(std::span<const LinearRows> firsts, const void* in) {
  const int64_t act = dtype_size(dtype_);
  const int64_t row_bytes = row_stride(firsts[0].linear->k) * act;
  int64_t slots = 0;
  for (const LinearRows& first : firsts) slots += first.rows;
  pool_.run_parts(slots, [&](int, int64_t begin, int64_t past) {
    int64_t before = 0;
    for (const LinearRows& first : firsts) {
      const int64_t columns = first.linear->n;
      const int64_t end = std::min<int64_t>(past - before, first.rows);
      for (int64_t r = std::max<int64_t>(begin - before, 0); r < end; ++r) {
        const int64_t slot = before + r;
        if (first.in != in) {
          std::memcpy(at_.in + slot * row_bytes, static_cast<const std::byte*>(in) + at_.row_of_slot[slot] * row_bytes,
                      static_cast<size_t>(row_bytes));
        }
        std::byte* const inner = static_cast<std::byte*>(first.out) + r * row_stride(columns) * act;
        std::memset(inner + columns * act, 0, static_cast<size_t>((row_stride(columns) - columns) * act));
      }
      before += first.rows;
    }
  });
}

void ExpertOps::combine(int32_t each, int32_t rows, int32_t columns, float* out) {
  const int64_t stride = row_stride(columns);
  pool_.run_parts(rows, [&](int, int64_t first, int64_t past) {
    for (int64_t r = first; r < past; ++r) {
      for (int64_t i = r * each; i < (r + 1) * each; ++i) {
        weigh(at_.y + at_.slot_of_choice[i] * stride, at_.choices[i].weight, columns, i > r * each, out + r * stride);
      }
    }
  });
}

}  // namespace splitfuse
