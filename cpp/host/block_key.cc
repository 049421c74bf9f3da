#include "host/block_key.h"

#include <bit>
#include <cstring>
#include <random>

namespace splitfuse {
namespace {

class SipState {
 public:
  SipState(uint64_t key0, uint64_t key1)
      : v0_(key0 ^ 0x736f6d6570736575u), v1_(key1 ^ 0x646f72616e646f6du ^ 0xee), v2_(key0 ^ 0x6c7967656e657261u),
        v3_(key1 ^ 0x7465646279746573u) {}

  void absorb(const void* data, size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(data);
    length_ += bytes;
    while (bytes > 0) {
      pending_ |= uint64_t{*at++} << (8 * filled_);
      --bytes;
      if (++filled_ == 8) flush();
    }
  }

  BlockKey finish() {
    pending_ |= (length_ & 0xff) << 56;
    flush();
    v2_ ^= 0xee;
    for (int i = 0; i < 4; ++i) round();
    BlockKey key;
    key.low = v0_ ^ v1_ ^ v2_ ^ v3_;
    v1_ ^= 0xdd;
    for (int i = 0; i < 4; ++i) round();
    key.high = v0_ ^ v1_ ^ v2_ ^ v3_;
    return key;
  }

 private:
  void flush() {
    v3_ ^= pending_;
    round();
    round();
    v0_ ^= pending_;
    pending_ = 0;
    filled_ = 0;
  }
  void round() {
    v0_ += v1_;
    v1_ = std::rotl(v1_, 13) ^ v0_;
    v0_ = std::rotl(v0_, 32);
    v2_ += v3_;
    v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ += v3_;
    v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ += v1_;
    v1_ = std::rotl(v1_, 17) ^ v2_;
    v2_ = std::rotl(v2_, 32);
  }

  uint64_t v0_, v1_, v2_, v3_;
  uint64_t pending_ = 0;
  uint64_t length_ = 0;
  int filled_ = 0;
};

uint64_t random_word() {
  std::random_device device;
  return (uint64_t{device()} << 32) | device();
}

}  // namespace

BlockKeyer::BlockKeyer() : BlockKeyer(random_word(), random_word()) {}

BlockKey BlockKeyer::hash(std::span<const std::byte> bytes) const {
  SipState state(secret0_, secret1_);
  state.absorb(bytes.data(), bytes.size());
  return state.finish();
}

BlockKey BlockKeyer::root(const std::string& salt) const {
  return hash(std::as_bytes(std::span(salt.data(), salt.size())));
}

BlockKey BlockKeyer::next(const BlockKey& parent, std::span<const Token> tokens) const {
  SipState state(secret0_, secret1_);
  state.absorb(&parent, sizeof(parent));
  state.absorb(tokens.data(), tokens.size_bytes());
  return state.finish();
}

}  // namespace splitfuse
