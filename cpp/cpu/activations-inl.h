// Activations of sums that still are in the first cache, for gemm-inl.h, which includes this. One function for all of
// a file's formats and tiles: a loop of each activation in every one of them would be most of the library.

using Math = Functions<Vec>;

inline Vec::Reg negative(Vec::Reg x) { return Vec::sub(Vec::set(0.0f), x); }

inline Vec::Reg itself(Vec::Reg x) { return x; }

/// x * sigmoid(by)
inline Vec::Reg times_sigmoid(Vec::Reg x, Vec::Reg by) {
  return Vec::div(x, Vec::add(Vec::set(1.0f), Math::exp(negative(by))));
}

inline Vec::Reg silu(Vec::Reg x) { return times_sigmoid(x, x); }

inline Vec::Reg relu(Vec::Reg x) { return Vec::max(Vec::set(0.0f), x); }

/// max(x, 0) - a Q(a) with a = |x|, where Q(a) = 1 - Phi(a) = e^(-a^2 / 2) P(q) / (a + 4), q = (a - 4) / (a + 4): in
/// this form (after Shepherd and Laframboise, Math. Comp. 36, 1981) the tail keeps its digits. P is the polynomial of
/// degree 9 with the least relative error, 2^-26.7, for a in [0, 15]; found by reweighted least squares on 400
/// Chebyshev points of q, from values with 40 digits. Beyond 15, a Q(a) is below every float.
inline Vec::Reg gelu(Vec::Reg x) {
  const Vec::Reg a = Vec::min(Vec::set(15.0f), Vec::max(x, negative(x)));
  const Vec::Reg square = Vec::mul(a, a);
  const Vec::Reg rest = Vec::madd(a, a, negative(square));  // what rounding took from the square
  Vec::Reg e = Math::exp(Vec::mul(square, Vec::set(-0.5f)));
  e = Vec::madd(Vec::mul(e, rest), Vec::set(-0.5f), e);
  const Vec::Reg t = Vec::div(Vec::set(1.0f), Vec::add(a, Vec::set(4.0f)));
  const Vec::Reg q = Vec::madd(t, Vec::set(-8.0f), Vec::set(1.0f));
  Vec::Reg p = Vec::set(-0x1.196e26p-13f);
  p = Vec::madd(p, q, Vec::set(0x1.6e4968p-13f));
  p = Vec::madd(p, q, Vec::set(0x1.9b261ap-10f));
  p = Vec::madd(p, q, Vec::set(-0x1.cc1722p-9f));
  p = Vec::madd(p, q, Vec::set(-0x1.ed17d8p-8f));
  p = Vec::madd(p, q, Vec::set(0x1.eed34cp-5f));
  p = Vec::madd(p, q, Vec::set(-0x1.7e001ep-3f));
  p = Vec::madd(p, q, Vec::set(0x1.8c6d9ep-2f));
  p = Vec::madd(p, q, Vec::set(-0x1.373e38p-1f));
  p = Vec::madd(p, q, Vec::set(0x1.82b4bcp-1f));
  return Vec::madd(negative(a), Vec::mul(Vec::mul(e, t), p), relu(x));
}

/// (1 + tanh(y)) / 2 is sigmoid(2y), which keeps its digits where it is small.
inline Vec::Reg gelu_tanh(Vec::Reg x) {
  const Vec::Reg inner = Vec::madd(Vec::mul(x, x), Vec::set(0.044715f), Vec::set(1.0f));
  return times_sigmoid(x, Vec::mul(Vec::mul(x, inner), Vec::set(1.5957691216f)));  // 2 sqrt(2 / pi)
}

inline Vec::Reg swiglu_clamped(Vec::Reg gate, Vec::Reg up) {
  gate = Vec::min(Vec::set(7.0f), gate);
  up = Vec::min(Vec::set(7.0f), Vec::max(Vec::set(-7.0f), up));
  return Vec::mul(times_sigmoid(gate, Vec::mul(gate, Vec::set(1.702f))), Vec::add(up, Vec::set(1.0f)));
}

template <Vec::Reg (*Act)(Vec::Reg)>
inline Vec::Reg times_up(Vec::Reg gate, Vec::Reg up) {
  return Vec::mul(Act(gate), up);
}

template <Vec::Reg (*Act)(Vec::Reg)>
inline void each(float* values, int32_t count) {
  for (int32_t i = 0; i < count; i += Vec::kLanes) Vec::store(values + i, Act(Vec::load(values + i)));
}

/// Sums of gate and up, in groups that alternate, become `count` values at the front: what is written has been read.
/// The groups are one long run, so that a wide register never is half empty but at the end, where it computes on what
/// lies behind the sums. A narrow one takes a part of a group.
template <Vec::Reg (*Combine)(Vec::Reg, Vec::Reg)>
inline void pairs(float* sums, int32_t count) {
  for (int32_t i = 0; i < count; i += Vec::kLanes) {
    const float* at = sums + 2 * i - i % kGateGroup;
    Vec::store(sums + i, Combine(Vec::gates(at), Vec::ups(at)));
  }
}

/// Makes `count` values, in place, of as many sums, or of twice as many of a gated linear.
[[gnu::noinline]] void activate(Activation activation, bool gated, float* sums, int32_t count) {
  switch (activation) {
    case Activation::kNone:
      return gated ? pairs<times_up<itself>>(sums, count) : void();
    case Activation::kSilu:
      return gated ? pairs<times_up<silu>>(sums, count) : each<silu>(sums, count);
    case Activation::kGelu:
      return gated ? pairs<times_up<gelu>>(sums, count) : each<gelu>(sums, count);
    case Activation::kGeluTanh:
      return gated ? pairs<times_up<gelu_tanh>>(sums, count) : each<gelu_tanh>(sums, count);
    case Activation::kRelu:
      return gated ? pairs<times_up<relu>>(sums, count) : each<relu>(sums, count);
    case Activation::kSwigluClamped:
      return pairs<swiglu_clamped>(sums, count);
  }
}
