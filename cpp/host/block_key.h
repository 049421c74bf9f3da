// Names for the contents of KV blocks: a keyed hash chain over tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "splitfuse/types.h"

namespace splitfuse {

/// 128 bits that stand for a block's tokens and everything before them, the cache salt included.
struct BlockKey {
  uint64_t low = 0, high = 0;
  bool operator==(const BlockKey&) const = default;
};

/// Makes keys with SipHash-2-4-128 (Aumasson and Bernstein, 2012) under a secret drawn at construction, so
/// that nobody who chooses tokens or salts can make two contents share a key.
class BlockKeyer {
 public:
  BlockKeyer();
  BlockKeyer(uint64_t secret0, uint64_t secret1) : secret0_(secret0), secret1_(secret1) {}
  /// The key that precedes a sequence's first block.
  BlockKey root(const std::string& salt) const;
  BlockKey next(const BlockKey& parent, std::span<const Token> tokens) const;
  BlockKey hash(std::span<const std::byte> bytes) const;

 private:
  uint64_t secret0_, secret1_;
};

}  // namespace splitfuse
