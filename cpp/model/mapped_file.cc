#include "model/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "base/check.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

// The most that one page fault maps: a huge page.
constexpr int64_t kWindow = 2 << 20;

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw CheckpointError(cat(path, ": ", what));
}

std::string reason(int error) { return std::generic_category().message(error); }

class Descriptor {
 public:
  // Non-blocking, or a named pipe would wait for its writer before it could be refused.
  explicit Descriptor(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (fd_ < 0) refuse(path, cat("cannot open the file: ", reason(errno)));
  }
  ~Descriptor() { close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const Descriptor file(path);
  struct stat status{};
  if (fstat(file.get(), &status) != 0) refuse(path, cat("cannot read the file's status: ", reason(errno)));
  if (!S_ISREG(status.st_mode)) refuse(path, "not a regular file");
  size_ = status.st_size;
  if (size_ == 0) return;
  void* mapped = mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (mapped == MAP_FAILED) refuse(path, cat("cannot map ", size_, " bytes: ", reason(errno)));
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), static_cast<size_t>(size_));
}

void MappedFile::prefetch(int64_t begin, int64_t end) const { advise(begin, end, MADV_WILLNEED); }

void MappedFile::drop(int64_t begin, int64_t end) const { advise(begin, end, MADV_DONTNEED); }

void MappedFile::advise(int64_t begin, int64_t end, int advice) const {
  begin -= begin % kWindow;
  end = std::min(round_up(end, kWindow), size_);
  if (begin >= end) return;
  // A hint: where the system refuses it, reading only waits longer or keeps more pages.
  madvise(const_cast<std::byte*>(data_) + begin, static_cast<size_t>(end - begin), advice);
}

}  // namespace splitfuse
