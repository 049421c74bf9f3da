// A fixed-size hash table from block key to KV block.
#pragma once

#include <cstdint>
#include <vector>

#include "host/block_key.h"

namespace splitfuse {

/// Open addressing with linear probing and backward-shift deletion; allocates in the constructor alone.
class PrefixIndex {
 public:
  /// Room for `blocks` entries, one a block.
  explicit PrefixIndex(int32_t blocks);

  /// The block of that key, or -1.
  int32_t find(const BlockKey& key) const;
  /// False, nothing changed, if the key is there already.
  bool insert(const BlockKey& key, int32_t block);
  /// Removes `block`'s entry, which must exist.
  void erase(int32_t block);
  bool contains(int32_t block) const { return named_[block]; }
  const BlockKey& key(int32_t block) const { return keys_[block]; }
  int32_t size() const { return size_; }

 private:
  size_t home(const BlockKey& key) const { return key.low & mask_; }

  std::vector<int32_t> slots_;   // block, or -1
  std::vector<BlockKey> keys_;   // [blocks]
  std::vector<char> named_;      // [blocks]: has an entry
  size_t mask_;
  int32_t size_ = 0;
};

}  // namespace splitfuse
