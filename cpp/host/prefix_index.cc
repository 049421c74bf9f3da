#include "host/prefix_index.h"

#include <bit>

#include "base/check.h"

namespace splitfuse {

PrefixIndex::PrefixIndex(int32_t blocks)
    : slots_(std::bit_ceil(static_cast<size_t>(blocks) * 2 + 2), -1), keys_(blocks), named_(blocks, 0),
      mask_(slots_.size() - 1) {}

int32_t PrefixIndex::find(const BlockKey& key) const {
  for (size_t at = home(key); slots_[at] >= 0; at = (at + 1) & mask_) {
    if (keys_[slots_[at]] == key) return slots_[at];
  }
  return -1;
}

bool PrefixIndex::insert(const BlockKey& key, int32_t block) {
  SPLITFUSE_ASSERT(!named_[block]);
  size_t at = home(key);
  for (; slots_[at] >= 0; at = (at + 1) & mask_) {
    if (keys_[slots_[at]] == key) return false;
  }
  slots_[at] = block;
  keys_[block] = key;
  named_[block] = 1;
  ++size_;
  return true;
}

void PrefixIndex::erase(int32_t block) {
  SPLITFUSE_ASSERT(named_[block]);
  size_t hole = home(keys_[block]);
  while (slots_[hole] != block) hole = (hole + 1) & mask_;
  // Close the hole with every later entry of the run that may move up, so that no probe ends early.
  for (size_t at = (hole + 1) & mask_; slots_[at] >= 0; at = (at + 1) & mask_) {
    const size_t wanted = home(keys_[slots_[at]]);
    if (((at - wanted) & mask_) >= ((at - hole) & mask_)) {
      slots_[hole] = slots_[at];
      hole = at;
    }
  }
  slots_[hole] = -1;
  named_[block] = 0;
  --size_;
}

}  // namespace splitfuse
