// The KV block manager: fixed-size blocks, reference counts, prefix cache with LRU eviction.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "host/block_key.h"
#include "host/prefix_index.h"

namespace splitfuse {

using BlockId = int32_t;
/// In a block table: no block, because no attention window reaches back to it.
inline constexpr BlockId kNoBlock = -1;

/// Hands out block numbers; the memory behind them is the backend's. A block is held (references > 0),
/// cached (no references, but its content has a key: evictable, least recently released first), or free.
/// Allocates in the constructor alone.
class KvPool {
 public:
  KvPool(int32_t blocks, int32_t block_size, bool prefix_caching);

  int32_t total() const { return static_cast<int32_t>(references_.size()); }
  int32_t block_size() const { return block_size_; }
  /// Free or evictable.
  int32_t available() const { return free_ + cached_; }
  int32_t cached() const { return cached_; }
  int32_t used() const { return total() - available(); }
  bool prefix_caching() const { return prefix_caching_; }

  /// Appends `count` blocks, each with one reference, evicting as needed; false, nothing changed, if there
  /// are too few.
  bool allocate(int32_t count, std::vector<BlockId>& table);
  /// Drops one reference of each, last block first, so that a chain is later evicted from its end.
  void release(std::span<const BlockId> table);
  /// The first block that a token at `position` sees through windows of `window` tokens; 0: everything.
  int32_t first_seen(int32_t position, int32_t window) const {
    return window == 0 ? 0 : std::max(0, position - window + 1) / block_size_;
  }
  /// The most leading keys after which a sequence can go on: those that the next token sees through windows of
  /// `window` tokens (0: all) are in the cache.
  int32_t match(std::span<const BlockKey> keys, int32_t window = 0) const;
  /// Appends the blocks of keys that match() found, one reference more on each.
  void share(std::span<const BlockKey> keys, std::vector<BlockId>& table);
  /// Makes a full, held block findable, and says which block to hold from now on: if another block has that
  /// content already, the reference moves to it. So equal prefixes are always the same blocks.
  BlockId publish(BlockId block, const BlockKey& key);

  /// How many of a sequence's blocks others hold too.
  int32_t shared(std::span<const BlockId> table) const;
  /// What would be available if every one of `tables` were released.
  template <class Tables>
  int32_t available_after(const Tables& tables) {
    int32_t freed = 0;
    for (std::span<const BlockId> table : tables) {
      for (BlockId block : table) freed += --references_[block] == 0;
    }
    for (std::span<const BlockId> table : tables) {
      for (BlockId block : table) ++references_[block];
    }
    return available() + freed;
  }

  /// Empty if every count and list agrees with the tables that sequences hold; else what is wrong.
  std::string check(const std::vector<std::span<const BlockId>>& tables) const;

 private:
  struct Link {
    BlockId previous, next;
  };
  void push_back(Link& list, BlockId block);
  void unlink(Link& list, BlockId block);
  BlockId take();
  void reference(BlockId block);

  int32_t block_size_;
  bool prefix_caching_;
  std::vector<int32_t> references_;   // [blocks]
  std::vector<Link> links_;           // [blocks]: place in the free or the cached list
  Link free_list_{-1, -1};            // previous: last, next: first
  Link cached_list_{-1, -1};
  int32_t free_ = 0, cached_ = 0;
  PrefixIndex index_;
};

}  // namespace splitfuse
