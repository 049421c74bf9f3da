// Functions of floats for any vector width. Included only by files of one instruction set, inside their anonymous
// namespace; V as in vector_*-inl.h. All keep NaN.

template <class V>
struct Functions {
  using Reg = typename V::Reg;

  /// e^x to about one unit in the last place; beyond float's range inf and 0.
  [[gnu::always_inline]] static Reg exp(Reg x) {
    const Parts parts = reduce(V::min(V::set(89.0f), V::max(V::set(-104.0f), x)));
    return V::scale(V::add(parts.p, V::set(1.0f)), parts.n);
  }

  /// To a few units in the last place, near 0 too: t / (t + 2) with t = e^2x - 1 = 2^n p + (2^n - 1).
  [[gnu::always_inline]] static Reg tanh(Reg x) {
    const Parts parts = reduce(V::min(V::set(40.0f), V::max(V::set(-40.0f), V::add(x, x))));
    const Reg power = V::scale(V::set(1.0f), parts.n);
    const Reg t = V::madd(power, parts.p, V::sub(power, V::set(1.0f)));
    return V::div(t, V::add(t, V::set(2.0f)));
  }

 private:
  /// e^x = 2^n (1 + p)
  struct Parts {
    Reg n, p;
  };
  /// x = n ln 2 + r with |r| <= ln 2 / 2 (the reduction of Cody and Waite, ln 2 in two parts), then p = r + r^2 q(r),
  /// q the minimax polynomial of degree 4.
  [[gnu::always_inline]] static Parts reduce(Reg x) {
    const Reg n = V::round(V::mul(x, V::set(0x1.715476p+0f)));
    Reg r = V::madd(n, V::set(-0x1.62e400p-1f), x);
    r = V::madd(n, V::set(-0x1.7f7d1cp-20f), r);
    Reg q = V::set(0x1.6a2434p-10f);
    q = V::madd(q, r, V::set(0x1.1239e2p-7f));
    q = V::madd(q, r, V::set(0x1.5558f2p-5f));
    q = V::madd(q, r, V::set(0x1.555492p-3f));
    q = V::madd(q, r, V::set(0x1.fffffcp-2f));
    return {n, V::madd(V::mul(r, r), q, r)};
  }
};
