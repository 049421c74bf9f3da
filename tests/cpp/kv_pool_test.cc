// Block keys, the prefix index and the KV pool, the last two held to naive models under random operations.
#include "host/kv_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <list>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "host/block_key.h"
#include "host/prefix_index.h"

namespace splitfuse {
namespace {

// ---- Keys

std::string hex(const BlockKey& key) {
  std::string text;
  for (uint64_t half : {key.low, key.high}) {
    for (int byte = 0; byte < 8; ++byte) {
      char digits[3];
      std::snprintf(digits, sizeof(digits), "%02x", static_cast<unsigned>(half >> (8 * byte) & 0xff));
      text += digits;
    }
  }
  return text;
}

// The published vectors: key 00 01 .. 0f, message 00 01 .. of each length. `openssl mac SIPHASH` gives the same.
TEST(BlockKeyer, SipHash128) {
  const BlockKeyer keyer(0x0706050403020100u, 0x0f0e0d0c0b0a0908u);
  const std::map<size_t, std::string> expected = {
      {0, "a3817f04ba25a8e66df67214c7550293"},  {1, "da87c1d86b99af44347659119b22fc45"},
      {2, "8177228da4a45dc7fca38bdef60affe4"},  {3, "9c70b60c5267a94e5f33b6b02985ed51"},
      {7, "a1f1ebbed8dbc153c0b84aa61ff08239"},  {8, "3b62a9ba6258f5610f83e264f31497b4"},
      {9, "264499060ad9baabc47f8b02bb6d71ed"},  {15, "5493e99933b0a8117e08ec0f97cfc3d9"},
      {16, "6ee2a4ca67b054bbfd3315bf85230577"}, {63, "5150d1772f50834a503e069a973fbd7c"},
  };
  for (const auto& [length, digest] : expected) {
    std::vector<std::byte> message(length);
    for (size_t i = 0; i < length; ++i) message[i] = static_cast<std::byte>(i);
    EXPECT_EQ(hex(keyer.hash(message)), digest) << length << " bytes";
  }
}

TEST(BlockKeyer, AKeyStandsForEveryTokenBeforeItToo) {
  const BlockKeyer keyer(1, 2);
  const std::vector<Token> a = {1, 2, 3, 4}, b = {1, 2, 3, 5};
  const BlockKey root = keyer.root("");
  EXPECT_EQ(keyer.next(root, a), keyer.next(root, a));
  EXPECT_NE(keyer.next(root, a), keyer.next(root, b));
  EXPECT_NE(keyer.next(keyer.next(root, a), b), keyer.next(keyer.next(root, b), b));
}

TEST(BlockKeyer, SaltsAndSecretsSeparate) {
  const BlockKeyer keyer(1, 2);
  const std::vector<Token> tokens = {1, 2, 3, 4};
  std::set<std::string> keys;
  for (const char* salt : {"", "a", "b", "ab"}) keys.insert(hex(keyer.next(keyer.root(salt), tokens)));
  EXPECT_EQ(keys.size(), 4u);
  EXPECT_NE(BlockKeyer(3, 2).root("a"), keyer.root("a"));
  EXPECT_NE(BlockKeyer().root("a"), BlockKeyer().root("a"));   // each draws its own secret
}

// ---- Index

TEST(PrefixIndex, AgreesWithAMapUnderCollisions) {
  constexpr int32_t kBlocks = 40;
  PrefixIndex index(kBlocks);
  std::map<uint64_t, int32_t> model;   // key.high -> block
  std::mt19937 random(3);
  for (int round = 0; round < 20000; ++round) {
    // Few home slots, some of them at the table's end, so that runs are long and wrap.
    const uint64_t name = random() % 64;
    const BlockKey key{(name % 5) * 127, name};
    const auto block = static_cast<int32_t>(random() % kBlocks);
    if (!index.contains(block)) {
      const bool fresh = !model.contains(name);
      ASSERT_EQ(index.insert(key, block), fresh);
      if (fresh) model[name] = block;
    } else {
      ASSERT_EQ(model.erase(index.key(block).high), 1u);
      index.erase(block);
    }
    ASSERT_EQ(index.size(), static_cast<int32_t>(model.size()));
    for (uint64_t other = 0; other < 64; ++other) {
      const auto at = model.find(other);
      ASSERT_EQ(index.find({(other % 5) * 127, other}), at == model.end() ? -1 : at->second);
    }
  }
}

// ---- Pool

constexpr int32_t kBlockSize = 16;

/// What the pool should do, in the plainest words.
class NaivePool {
 public:
  explicit NaivePool(int32_t blocks) : references_(blocks, 0) {
    for (BlockId block = 0; block < blocks; ++block) free_.insert(block);
  }
  int32_t available() const { return static_cast<int32_t>(free_.size() + lru_.size()); }
  int32_t cached() const { return static_cast<int32_t>(lru_.size()); }

  /// The pool chose `block`; true if it was allowed to.
  bool allocated(BlockId block) {
    if (!free_.empty()) {
      if (free_.erase(block) == 0) return false;
    } else {
      if (lru_.empty() || lru_.front() != block) return false;
      lru_.pop_front();
      by_key_.erase(names_.at(block));
      names_.erase(block);
    }
    references_[block] = 1;
    return true;
  }
  void hold(BlockId block) {
    if (references_[block]++ == 0) lru_.remove(block);
  }
  void release(const std::vector<BlockId>& table) {
    for (auto block = table.rbegin(); block != table.rend(); ++block) {
      if (--references_[*block] > 0) continue;
      if (names_.contains(*block)) {
        lru_.push_back(*block);
      } else {
        free_.insert(*block);
      }
    }
  }
  BlockId find(const std::string& key) const {
    const auto at = by_key_.find(key);
    return at == by_key_.end() ? -1 : at->second;
  }
  BlockId publish(BlockId block, const std::string& key) {
    if (names_.contains(block)) return block;
    if (const BlockId same = find(key); same >= 0) {
      hold(same);
      release({block});
      return same;
    }
    names_[block] = key;
    by_key_[key] = block;
    return block;
  }
  int32_t shared(const std::vector<BlockId>& table) const {
    return static_cast<int32_t>(
        std::count_if(table.begin(), table.end(), [&](BlockId block) { return references_[block] > 1; }));
  }
  int32_t available_after(const std::vector<std::vector<BlockId>>& tables) const {
    std::map<BlockId, int32_t> dropped;
    for (const auto& table : tables) {
      for (BlockId block : table) ++dropped[block];
    }
    int32_t freed = 0;
    for (const auto& [block, count] : dropped) freed += count == references_[block];
    return available() + freed;
  }

 private:
  std::vector<int32_t> references_;
  std::set<BlockId> free_;
  std::list<BlockId> lru_;   // released first, first
  std::map<BlockId, std::string> names_;
  std::map<std::string, BlockId> by_key_;
};

/// A sequence as the engine drives the pool: attach, then grow a block at a time and publish it.
struct Holder {
  std::string content;   // one letter a block, after the salt's letter
  std::vector<BlockKey> keys;
  std::vector<BlockId> table;
};

class PoolPair {
 public:
  explicit PoolPair(uint32_t seed) : random_(seed) {}

  void run(int rounds) {
    for (int round = 0; round < rounds; ++round) {
      const uint32_t action = random_() % 8;
      if (holders_.empty() || (action == 0 && holders_.size() < 6)) {
        attach();
      } else if (action <= 5) {
        grow(holders_[random_() % holders_.size()]);
      } else {
        drop(random_() % holders_.size());
      }
      compare();
      if (::testing::Test::HasFatalFailure()) return;
    }
    while (!holders_.empty()) drop(0);
    compare();
    EXPECT_EQ(pool_.used(), 0);
  }

  int refused() const { return refused_; }
  int hits() const { return hits_; }

 private:
  BlockKey key_of(const Holder& holder, char letter) const {
    const std::vector<Token> tokens(kBlockSize, letter);
    return keyer_.next(holder.keys.empty() ? keyer_.root(holder.content.substr(0, 1)) : holder.keys.back(), tokens);
  }
  void name_next_block(Holder& holder) {
    const char letter = "xy"[random_() % 2];
    holder.keys.push_back(key_of(holder, letter));
    holder.content += letter;
  }

  void attach() {
    Holder holder{std::string(1, "st"[random_() % 2]), {}, {}};
    for (uint32_t blocks = random_() % 5; blocks > 0; --blocks) name_next_block(holder);
    const int32_t found = pool_.match(holder.keys);
    for (int32_t i = 0; i < static_cast<int32_t>(holder.keys.size()); ++i) {
      const BlockId block = naive_.find(holder.content.substr(0, i + 2));
      ASSERT_TRUE(i < found ? block >= 0 : i > found || block == -1);
    }
    holder.keys.resize(found);
    holder.content.resize(found + 1);
    pool_.share(holder.keys, holder.table);
    for (int32_t i = 0; i < found; ++i) {
      ASSERT_EQ(holder.table[i], naive_.find(holder.content.substr(0, i + 2)));
      naive_.hold(holder.table[i]);
    }
    hits_ += found;
    holders_.push_back(std::move(holder));
  }

  void grow(Holder& holder) {
    const auto count = static_cast<int32_t>(1 + random_() % 3);
    const size_t before = holder.table.size();
    const bool fits = count <= naive_.available();
    ASSERT_EQ(pool_.allocate(count, holder.table), fits);
    ASSERT_EQ(holder.table.size(), before + (fits ? count : 0));
    refused_ += !fits;
    if (!fits) return;
    for (size_t i = before; i < holder.table.size(); ++i) ASSERT_TRUE(naive_.allocated(holder.table[i]));
    for (size_t i = before; i < holder.table.size(); ++i) {
      name_next_block(holder);
      const BlockId block = pool_.publish(holder.table[i], holder.keys.back());
      ASSERT_EQ(block, naive_.publish(holder.table[i], holder.content));
      holder.table[i] = block;
    }
  }

  void drop(size_t index) {
    pool_.release(holders_[index].table);
    naive_.release(holders_[index].table);
    holders_.erase(holders_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  void compare() {
    ASSERT_EQ(pool_.available(), naive_.available());
    ASSERT_EQ(pool_.cached(), naive_.cached());
    ASSERT_EQ(pool_.used(), pool_.total() - naive_.available());
    std::vector<std::span<const BlockId>> tables;
    std::vector<std::vector<BlockId>> some;
    for (const Holder& holder : holders_) {
      tables.emplace_back(holder.table);
      ASSERT_EQ(pool_.shared(holder.table), naive_.shared(holder.table));
      if (random_() % 2) some.push_back(holder.table);
    }
    ASSERT_EQ(pool_.check(tables), "");
    ASSERT_EQ(pool_.available_after(some), naive_.available_after(some));
    ASSERT_EQ(pool_.check(tables), "");   // that was only a question
  }

  std::mt19937 random_;
  BlockKeyer keyer_;
  KvPool pool_{12, kBlockSize, true};
  NaivePool naive_{12};
  std::vector<Holder> holders_;
  int refused_ = 0, hits_ = 0;
};

TEST(KvPool, AgreesWithANaiveModelUnderRandomOperations) {
  int refused = 0, hits = 0;
  for (uint32_t seed = 0; seed < 40; ++seed) {
    PoolPair pair(seed);
    pair.run(400);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
    refused += pair.refused();
    hits += pair.hits();
  }
  EXPECT_GT(refused, 100);   // the model was asked what it is for
  EXPECT_GT(hits, 100);
}

/// Keys of a chain of `count` blocks.
std::vector<BlockKey> chain(const BlockKeyer& keyer, const std::string& salt, int32_t count) {
  std::vector<BlockKey> keys;
  BlockKey key = keyer.root(salt);
  for (Token i = 0; i < count; ++i) keys.push_back(key = keyer.next(key, std::vector<Token>(kBlockSize, i)));
  return keys;
}

/// A chain that was published and released.
std::vector<BlockId> cache_chain(KvPool& pool, const std::vector<BlockKey>& keys) {
  std::vector<BlockId> table;
  EXPECT_TRUE(pool.allocate(static_cast<int32_t>(keys.size()), table));
  for (size_t i = 0; i < keys.size(); ++i) table[i] = pool.publish(table[i], keys[i]);
  pool.release(table);
  return table;
}

TEST(KvPool, EvictsTheLeastRecentlyReleasedAndAChainFromItsEnd) {
  const BlockKeyer keyer;
  KvPool pool(6, kBlockSize, true);
  const auto old_keys = chain(keyer, "old", 3), new_keys = chain(keyer, "new", 3);
  cache_chain(pool, old_keys);
  cache_chain(pool, new_keys);
  EXPECT_EQ(pool.cached(), 6);
  std::vector<BlockId> table;
  for (int32_t left : {2, 1, 0}) {
    ASSERT_TRUE(pool.allocate(1, table));
    EXPECT_EQ(pool.match(old_keys), left);
    EXPECT_EQ(pool.match(new_keys), 3);
  }
  ASSERT_TRUE(pool.allocate(1, table));
  EXPECT_EQ(pool.match(new_keys), 2);
}

TEST(KvPool, UseMakesAPrefixYoung) {
  const BlockKeyer keyer;
  KvPool pool(4, kBlockSize, true);
  const auto a = chain(keyer, "a", 2), b = chain(keyer, "b", 2);
  cache_chain(pool, a);
  cache_chain(pool, b);
  std::vector<BlockId> table;
  pool.share(a, table);
  EXPECT_EQ(pool.available(), 2);
  pool.release(table);
  table.clear();
  ASSERT_TRUE(pool.allocate(2, table));
  EXPECT_EQ(pool.match(a), 2);
  EXPECT_EQ(pool.match(b), 0);
}

TEST(KvPool, FreeBlocksGoBeforeCachedOnes) {
  const BlockKeyer keyer;
  KvPool pool(4, kBlockSize, true);
  const auto keys = chain(keyer, "", 2);
  cache_chain(pool, keys);
  std::vector<BlockId> table;
  ASSERT_TRUE(pool.allocate(2, table));
  EXPECT_EQ(pool.match(keys), 2);
}

TEST(KvPool, EqualContentIsOneBlock) {
  const BlockKeyer keyer;
  KvPool pool(4, kBlockSize, true);
  const auto keys = chain(keyer, "", 1);
  std::vector<BlockId> first, second;
  ASSERT_TRUE(pool.allocate(1, first));
  ASSERT_TRUE(pool.allocate(1, second));
  EXPECT_EQ(pool.publish(first[0], keys[0]), first[0]);
  EXPECT_EQ(pool.publish(first[0], keys[0]), first[0]);   // again changes nothing
  EXPECT_EQ(pool.used(), 2);
  second[0] = pool.publish(second[0], keys[0]);
  EXPECT_EQ(second, first);
  EXPECT_EQ(pool.used(), 1);
  EXPECT_EQ(pool.shared(first), 1);
  EXPECT_EQ(pool.check({first, second}), "");
}

TEST(KvPool, SharedBlocksAreCountedWhereverTheyLie) {
  const BlockKeyer keyer;
  KvPool pool(8, kBlockSize, true);
  std::vector<BlockId> behind, ahead;
  ASSERT_TRUE(pool.allocate(4, behind));
  // One ahead of it has given the first two back and shares the other two.
  const auto keys = chain(keyer, "", 4);
  for (size_t i = 0; i < keys.size(); ++i) behind[i] = pool.publish(behind[i], keys[i]);
  pool.share(std::span(keys).subspan(2), ahead);
  EXPECT_EQ(pool.shared(behind), 2);
  EXPECT_EQ(pool.shared(std::span(behind).first(3)), 1);
  EXPECT_EQ(pool.shared(ahead), 2);
}

TEST(KvPool, MatchesWhatAWindowSees) {
  const BlockKeyer keyer;
  KvPool pool(8, kBlockSize, true);
  const auto keys = chain(keyer, "", 6);
  std::vector<BlockId> table, taken;
  ASSERT_TRUE(pool.allocate(6, table));
  for (size_t i = 0; i < keys.size(); ++i) table[i] = pool.publish(table[i], keys[i]);
  // The first two blocks are evicted; the others are there.
  pool.release(std::span(table).first(2));
  ASSERT_TRUE(pool.allocate(4, taken));
  pool.release(std::span(table).subspan(2));
  EXPECT_EQ(pool.match(keys), 0);
  for (int32_t end = 0; end <= 6; ++end) {
    for (const int32_t window : {1, kBlockSize, kBlockSize + 1, 3 * kBlockSize, 4 * kBlockSize, 5 * kBlockSize}) {
      int32_t expected = 0;   // the longest beginning of which the window sees nothing that is gone
      for (int32_t n = 1; n <= end; ++n) {
        if (n > 2 && pool.first_seen(n * kBlockSize, window) >= 2) expected = n;
        if (n <= 2 && pool.first_seen(n * kBlockSize, window) >= n) expected = n;
      }
      EXPECT_EQ(pool.match(std::span(keys).first(end), window), expected) << end << ' ' << window;
    }
  }
}

TEST(KvPool, SaltsNeverShare) {
  const BlockKeyer keyer;
  KvPool pool(8, kBlockSize, true);
  cache_chain(pool, chain(keyer, "one", 3));
  EXPECT_EQ(pool.match(chain(keyer, "one", 3)), 3);
  EXPECT_EQ(pool.match(chain(keyer, "two", 3)), 0);
  EXPECT_EQ(pool.match(chain(keyer, "", 3)), 0);
}

TEST(KvPool, AnUnservedRequestChangesNothing) {
  const BlockKeyer keyer;
  KvPool pool(3, kBlockSize, true);
  const auto keys = chain(keyer, "", 2);
  cache_chain(pool, keys);
  std::vector<BlockId> table;
  EXPECT_FALSE(pool.allocate(4, table));
  EXPECT_TRUE(table.empty());
  EXPECT_EQ(pool.available(), 3);
  EXPECT_EQ(pool.match(keys), 2);
  EXPECT_EQ(pool.check({}), "");
}

TEST(KvPool, WithoutPrefixCachingNothingIsKept) {
  const BlockKeyer keyer;
  KvPool pool(4, kBlockSize, false);
  const auto keys = chain(keyer, "", 2);
  cache_chain(pool, keys);
  EXPECT_EQ(pool.cached(), 0);
  EXPECT_EQ(pool.available(), 4);
  EXPECT_EQ(pool.match(keys), 0);
}

TEST(KvPool, TheCheckerSeesALostReference) {
  KvPool pool(4, kBlockSize, true);
  std::vector<BlockId> table;
  ASSERT_TRUE(pool.allocate(2, table));
  EXPECT_EQ(pool.check({table}), "");
  EXPECT_NE(pool.check({}), "");
  EXPECT_NE(pool.check({table, table}), "");
  const std::vector<BlockId> wrong = {4};
  EXPECT_NE(pool.check({table, wrong}), "");
}

}  // namespace
}  // namespace splitfuse
