#include "host/kv_pool.h"

#include <algorithm>

#include "base/check.h"

namespace splitfuse {

KvPool::KvPool(int32_t blocks, int32_t block_size, bool prefix_caching)
    : block_size_(block_size), prefix_caching_(prefix_caching), references_(blocks, 0), links_(blocks), index_(blocks) {
  for (BlockId block = 0; block < blocks; ++block) push_back(free_list_, block);
  free_ = blocks;
}

void KvPool::push_back(Link& list, BlockId block) {
  links_[block] = {list.previous, -1};
  (list.previous >= 0 ? links_[list.previous].next : list.next) = block;
  list.previous = block;
}

void KvPool::unlink(Link& list, BlockId block) {
  const Link link = links_[block];
  (link.previous >= 0 ? links_[link.previous].next : list.next) = link.next;
  (link.next >= 0 ? links_[link.next].previous : list.previous) = link.previous;
}

BlockId KvPool::take() {
  if (free_ > 0) {
    const BlockId block = free_list_.next;
    unlink(free_list_, block);
    --free_;
    return block;
  }
  const BlockId block = cached_list_.next;
  unlink(cached_list_, block);
  --cached_;
  index_.erase(block);
  return block;
}

bool KvPool::allocate(int32_t count, std::vector<BlockId>& table) {
  if (count > available()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const BlockId block = take();
    references_[block] = 1;
    table.push_back(block);
  }
  return true;
}

void KvPool::release(std::span<const BlockId> table) {
  for (size_t i = table.size(); i-- > 0;) {
    const BlockId block = table[i];
    SPLITFUSE_ASSERT(references_[block] > 0);
    if (--references_[block] > 0) continue;
    const bool keep = index_.contains(block);
    push_back(keep ? cached_list_ : free_list_, block);
    ++(keep ? cached_ : free_);
  }
}

int32_t KvPool::match(std::span<const BlockKey> keys, int32_t window) const {
  const auto cached = [&](int32_t i) { return index_.find(keys[i]) >= 0; };
  auto end = static_cast<int32_t>(keys.size());
  if (window == 0) {
    int32_t found = 0;
    while (found < end && cached(found)) ++found;
    return found;
  }
  // From the end: where a block is missing that the window sees, no end behind it will do.
  while (end > 0) {
    const int32_t first = first_seen(end * block_size_, window);
    int32_t block = end;
    while (block > first && cached(block - 1)) --block;
    if (block == first) break;
    end = block - 1;
  }
  return end;
}

void KvPool::reference(BlockId block) {
  if (references_[block]++ > 0) return;
  unlink(cached_list_, block);
  --cached_;
}

void KvPool::share(std::span<const BlockKey> keys, std::vector<BlockId>& table) {
  for (const BlockKey& key : keys) {
    const BlockId block = index_.find(key);
    SPLITFUSE_ASSERT(block >= 0);
    reference(block);
    table.push_back(block);
  }
}

BlockId KvPool::publish(BlockId block, const BlockKey& key) {
  SPLITFUSE_ASSERT(references_[block] > 0);
  if (!prefix_caching_ || index_.contains(block)) return block;
  if (index_.insert(key, block)) return block;
  const BlockId same = index_.find(key);
  reference(same);
  release({&block, 1});
  return same;
}

int32_t KvPool::shared(std::span<const BlockId> table) const {
  return static_cast<int32_t>(
      std::count_if(table.begin(), table.end(), [&](BlockId block) { return references_[block] > 1; }));
}

std::string KvPool::check(const std::vector<std::span<const BlockId>>& tables) const {
  std::vector<int32_t> held(references_.size(), 0);
  for (const auto& table : tables) {
    for (BlockId block : table) {
      if (block < 0 || block >= total()) return cat("a block table names block ", block, " of ", total());
      ++held[block];
    }
  }
  std::vector<char> seen(references_.size(), 0);
  const auto walk = [&](const Link& list, int32_t expected, bool named, const char* name) -> std::string {
    int32_t count = 0;
    for (BlockId block = list.next; block >= 0; block = links_[block].next) {
      if (seen[block]) return cat("block ", block, " is listed twice");
      seen[block] = 1;
      if (references_[block] != 0)
        return cat("block ", block, " is in the ", name, " list with ", references_[block], " references");
      if (index_.contains(block) != named)
        return cat("block ", block, " of the ", name, " list: wrong about having a key");
      ++count;
    }
    return count == expected ? std::string() : cat("the ", name, " list has ", count, " blocks, counted ", expected);
  };
  if (auto wrong = walk(free_list_, free_, false, "free"); !wrong.empty()) return wrong;
  if (auto wrong = walk(cached_list_, cached_, true, "cached"); !wrong.empty()) return wrong;
  int32_t named = 0;
  for (BlockId block = 0; block < total(); ++block) {
    if (references_[block] != held[block]) {
      return cat("block ", block, " counts ", references_[block], " references, sequences hold ", held[block]);
    }
    if (references_[block] == 0 && !seen[block]) return cat("block ", block, " is in no list");
    if (!index_.contains(block)) continue;
    ++named;
    if (index_.find(index_.key(block)) != block) return cat("the key of block ", block, " does not find it");
  }
  return named == index_.size() ? std::string()
                                : cat("the prefix index counts ", index_.size(), " keys, blocks have ", named);
}

}  // namespace splitfuse
