// Keys and values in their blocks, and their fetching ahead of use. Include inside the anonymous namespace of a file of
// one instruction set, after kv_rows-inl.h and before attention_tiles-inl.h, which
// says what a Format F has.
//
// With few query rows K and V come from memory, which is read at full speed only if it is told some KiB ahead. Hardware
// looks ahead within a page of 4 KiB, about a head's part of a block; so lines are fetched here in the order in which
// they will be used, as many for each step as it uses. In bursts most would be dropped.

constexpr int kTile = kAttentionTile;
constexpr int kColumn = kAttentionColumn;
constexpr int kLine = 64;
constexpr int kLead = 512;  // lines from fetching to use, found by trial

template <class F>
struct KvFetch {
  static const char* block_at(const KvLayout& layout, const std::byte* kv, const int32_t* block_table, int column) {
    return reinterpret_cast<const char*>(kv) + block_table[column / (layout.block_size / kColumn)] * layout.block_bytes;
  }
  static const char* keys_at(const KvLayout& layout, const char* block, int column) {
    return block + column % (layout.block_size / kColumn) * kColumn * F::kLaneBytes;
  }
  static const char* values_at(const KvLayout& layout, const char* block, int column) {
    return block + layout.value_offset + column % (layout.block_size / kColumn) * column_bytes(layout);
  }
  static const float* key_scales_at(const KvLayout& layout, const char* block, int column) {
    return reinterpret_cast<const float*>(block + layout.scale_offset) +
           column % (layout.block_size / kColumn) * kColumn;
  }

  // Where an item begins: the one before has fetched its first lines, or nobody has.
  static void begin(const AttentionItem& item, AttentionAhead& ahead) {
    if (ahead.in_next) {
      ahead.in_next = false;
      return;
    }
    ahead.kv = item.kv;
    ahead.block_table = item.block_table;
    ahead.first = item.begin;
    ahead.begin = item.begin / kTile * kTile;
    ahead.past = least(item.first + item.positions, item.last_segment * kAttentionSegment);
    ahead.rows = 0;
    enter_tile(ahead);
    for (int i = 0; i < kLead / kAheadLines; ++i) fetch(item, ahead);
  }

  // For step `step` of a run of them, each of which reads `Bytes`. No `ahead`: nothing is fetched.
  template <int Bytes>
  [[gnu::always_inline]] static inline void step(const AttentionItem& item, AttentionAhead* ahead, int step) {
    constexpr int kBytes = kAheadLines * kLine;
    constexpr int kSteps = Bytes < kBytes ? kBytes / Bytes : 1;
    if (ahead == nullptr || step % kSteps != 0) return;
#pragma GCC unroll 4
    for (int i = 0; i < (Bytes + kBytes - 1) / kBytes; ++i) fetch(item, *ahead);
  }

 private:
  // A column of values.
  static int64_t column_bytes(const KvLayout& layout) {
    return int64_t{kColumn / 2 * F::kPairRows * F::kLaneBytes} * layout.padded_dim;
  }

  [[gnu::always_inline]] static inline void fetch(const AttentionItem& item, AttentionAhead& ahead) {
    if (ahead.rows == 0 && !refill(item, ahead)) return;
#pragma GCC unroll 8
    for (int i = 0; i < kAheadLines; ++i) __builtin_prefetch(ahead.lines[i] + ahead.offset, 0, 2);
    ahead.offset += ahead.stride;
    --ahead.rows;
  }

  // The tile's first column that is seen.
  static void enter_column(AttentionAhead& ahead) {
    ahead.column = ahead.first > ahead.begin ? (ahead.first - ahead.begin) / kColumn : 0;
  }

  static void enter_tile(AttentionAhead& ahead) {
    ahead.values = false;
    enter_column(ahead);
    ahead.columns = (least(kTile, ahead.past - ahead.begin) + kColumn - 1) / kColumn;
  }

  // Goes on to the next lines: keys of a tile, then its values, the next tile, the next item. False at the end.
  static bool refill(const AttentionItem& item, AttentionAhead& ahead) {
    if (ahead.column == ahead.columns) {
      if (!ahead.values) {
        ahead.values = true;
        enter_column(ahead);
      } else if (ahead.begin + kTile < ahead.past) {
        ahead.begin += kTile;
        enter_tile(ahead);
      } else if (item.next_kv != nullptr && !ahead.in_next) {
        ahead.in_next = true;
        ahead.kv = item.next_kv;
        ahead.block_table = item.next_block_table;
        ahead.first = item.next_begin;
        ahead.begin = item.next_begin / kTile * kTile;
        ahead.past = item.next_past;
        enter_tile(ahead);
      } else {
        return false;
      }
    }
    fill(item.layout, ahead);
    return true;
  }

  // The next lines: a column of values, or a block of keys, or a column of keys where the tile has not all of a block.
  static void fill(const KvLayout& layout, AttentionAhead& ahead) {
    const int block_columns = layout.block_size / kColumn;
    const int column = ahead.begin / kColumn + ahead.column;
    const char* block = block_at(layout, ahead.kv, ahead.block_table, column);
    if (ahead.values) {
      fill_lines(values_at(layout, block, column), kLine, column_bytes(layout) / kLine, ahead);
      ++ahead.column;
      return;
    }
    const char* at = keys_at(layout, block, column);
    const int64_t row_bytes = int64_t{layout.block_size} * F::kLaneBytes;
    const int rows = layout.head_dim * F::kPairRows / 2;
    const bool whole = column % block_columns == 0 && ahead.columns - ahead.column >= block_columns;
    whole ? fill_lines(at, kLine, rows * row_bytes / kLine, ahead) : fill_lines(at, row_bytes, rows, ahead);
    // Two columns of int8 share the lines.
    const int shared = kLine / (kColumn * F::kLaneBytes) - column % (kLine / (kColumn * F::kLaneBytes));
    const int columns = whole ? block_columns : least(least(shared, ahead.columns - ahead.column), block_columns);
    if constexpr (F::kInt8) {
      const float* scales = key_scales_at(layout, block, column);
      for (int i = 0; i < columns; ++i) {
        __builtin_prefetch(scales + i * kColumn, 0, 2);
        __builtin_prefetch(scales + layout.block_size + i * kColumn, 0, 2);
      }
    }
    ahead.column += columns;
  }

  // `count` lines at distances of `stride`.
  static void fill_lines(const char* at, int64_t stride, int64_t count, AttentionAhead& ahead) {
    for (int i = 0; i < kAheadLines; ++i) ahead.lines[i] = at + i * stride;
    ahead.stride = kAheadLines * stride;
    ahead.rows = static_cast<int32_t>((count + kAheadLines - 1) / kAheadLines);
    ahead.offset = 0;
  }
};
