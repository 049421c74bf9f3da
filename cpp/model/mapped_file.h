// A file's bytes as read-only memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace splitfuse {

/// Maps a whole file. Pages come in when they are read. The file may be replaced or removed meanwhile; making it
/// shorter in place is fatal to whoever reads the lost part, as with every mapping.
class MappedFile {
 public:
  /// Throws CheckpointError, naming the file, if it cannot be opened or is not a regular file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  const std::byte* data() const { return data_; }
  int64_t size() const { return size_; }

  /// Bytes [begin, end) will be read soon: their reading from disk begins.
  void prefetch(int64_t begin, int64_t end) const;
  /// Bytes [begin, end) have been read: their pages, and some around them, leave this process. They come back if
  /// they are read again.
  void drop(int64_t begin, int64_t end) const;

 private:
  void advise(int64_t begin, int64_t end, int advice) const;

  std::string path_;
  const std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace splitfuse
