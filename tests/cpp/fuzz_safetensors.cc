// Fuzzes the reading of safetensors files and checkpoints: whatever a file holds, it is read or refused with one of
// splitfuse's own errors, and an accepted header never leads outside the file.
//
// With clang: compile with -fsanitize=fuzzer -DSPLITFUSE_LIBFUZZER. Otherwise it is a program with a mutation loop
// of its own, best built with -fsanitize=address,undefined:
//   fuzz_safetensors --seconds 60 --seed 1     mutate small valid files; an outcome not seen before (an error
//                                              message, its numbers and names apart) makes its input one to mutate
//                                              further
//   fuzz_safetensors FILE...                   run these inputs alone
// The input of a failed case stays in the file whose name was printed first.
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "model/safetensors.h"
#include "safetensors_bytes.h"
#include "safetensors_mutator.h"
#include "splitfuse/splitfuse.h"

namespace splitfuse {
namespace {

[[noreturn]] void broken(const char* promise) {
  std::fprintf(stderr, "fuzz_safetensors: broken promise: %s\n", promise);
  std::abort();
}

const std::string& case_file() {
  static const std::string kPath =
      std::filesystem::temp_directory_path() / ("splitfuse-fuzz-" + std::to_string(getpid()) + ".safetensors");
  return kPath;
}

void write_case(std::span<const char> bytes) {
  // Some file systems flush a file that is overwritten, and not a new one.
  std::filesystem::remove(case_file());
  std::ofstream out(case_file(), std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!out.flush()) broken("the case file can be written");
}

/// The outcome of `action`: "" or the message of an Error. Anything else ends the program.
template <class Action>
std::string outcome(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void check_header() {
  const SafetensorsFile file(case_file());
  int64_t at = 0;
  std::memcpy(&at, file.file().data(), sizeof(at));
  at += int64_t{sizeof(at)};
  for (const StoredTensor& tensor : file.tensors()) {
    if (tensor.begin != at || tensor.size < 0) broken("tensors follow each other");
    at = tensor.begin + tensor.size;
    for (const int64_t extent : tensor.shape) {
      if (extent < 0) broken("shapes are not negative");
    }
  }
  if (at != file.file().size()) broken("tensors cover the data");
}

/// Reads every tensor of `source`, out of order and in part, to the last byte.
int64_t read_all(WeightSource& source) {
  int64_t sum = 0;
  const auto names = source.names();
  for (auto name = names.rbegin(); name != names.rend(); ++name) {
    const TensorView tensor = source.read(*name);
    if (tensor.format != WeightFormat::kDense) {
      std::vector<float> floats(static_cast<size_t>(tensor.shape[0] * tensor.shape[1]));
      dequantize(tensor, floats.data());   // touches every byte
      source.consumed(tensor.shape[1]);
      source.release();
      continue;
    }
    int64_t bytes = dtype_size(tensor.dtype);
    if (reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(bytes) != 0) broken("tensors are aligned");
    for (const int64_t extent : tensor.shape) bytes *= extent;
    if (bytes > static_cast<int64_t>(std::filesystem::file_size(case_file()))) broken("tensors are within the file");
    for (int64_t i = 0; i < bytes; ++i) sum += static_cast<const unsigned char*>(tensor.data)[i];
    source.consumed(bytes / 2);
    if (bytes > 0) sum += static_cast<const unsigned char*>(tensor.data)[0];
    source.release();
  }
  return sum;
}

/// All that the library does with a file, on the case file. Returns what it said.
std::string run_case(std::span<const char> bytes) {
  write_case(bytes);
  std::string said = outcome([] { check_header(); });
  volatile int64_t sum = 0;   // so that reading isn't optimised away
  said += '|' + outcome([&] {
            std::vector<std::pair<std::string, std::string>> names;
            std::vector<std::pair<std::string, std::string>> all;
            for (const auto& tensor : read_safetensors_header(case_file()).tensors) {
              all.emplace_back("x" + tensor.name, tensor.name);
              if (tensor.dtype == "F32" || tensor.dtype == "BF16" || tensor.dtype == "F16") names.push_back(all.back());
            }
            sum = read_all(*open_safetensors({case_file()}, names));
            sum = read_all(*open_safetensors({case_file()}, all));
          });
  said += '|' + outcome([&] { sum = read_all(*open_checkpoint(case_file()).weights); });
  return said;
}

// ---- The loop

/// Zeros of any shape.
class ZeroSource : public WeightSource {
 public:
  explicit ZeroSource(const ModelConfig& config) {
    for (const auto& [name, shape] : weight_shapes(config)) {
      names_.push_back(name);
      shapes_[name] = shape;
    }
  }
  std::vector<std::string> names() const override { return names_; }
  TensorView read(const std::string& name) override { return {DType::kF32, shapes_.at(name), zeros_.data()}; }

 private:
  std::vector<std::string> names_;
  std::map<std::string, std::vector<int64_t>> shapes_;
  std::vector<float> zeros_ = std::vector<float>(1024);
};

std::vector<std::string> valid_files() {
  using testing::safetensors_bytes;
  ModelConfig config;
  config.vocab_size = 3;
  config.hidden_size = 2;
  config.num_layers = config.num_heads = config.num_kv_heads = 1;
  config.head_dim = 8;
  config.intermediate_size = 1;
  config.max_position = 8;
  config.eos_token_ids = {1};
  ZeroSource source(config);
  const auto written = [&](WeightFormat quantize) {
    write_checkpoint(config, source, DType::kBF16, case_file(), {}, quantize);
    std::ifstream in(case_file(), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  return {
      written(WeightFormat::kDense),
      written(WeightFormat::kInt8),
      written(WeightFormat::kInt4),
      safetensors_bytes({}),
      safetensors_bytes({{"w", "F32", "[2, 2]", std::string(16, 'w')}}, "{\"format\": \"pt\"}"),
      safetensors_bytes(
          {{"a.weight", "BF16", "[3]", "aaaaaa"}, {"b", "I64", "[1]", "bbbbbbbb"}, {"c", "F16", "[]", "cc"}}),
      safetensors_bytes({{"e", "F32", "[0, 5]", ""},
                         {"q", "F4", "[2, 4]", "qqqq"},
                         {"odd", "U8", "[1]", "o"},
                         {"u", "F32", "[1]", "uuuu"}}),
      safetensors_bytes({{"w", "F8_E4M3", "[4]", "wwww"}, {"s", "F32", "[1]", "ssss"}},
                        "{\"a\": \"\\u00e9\\ud83d\\ude00\"}", 3),
  };
}

/// A message without its numbers and what it quotes.
std::string kind_of(const std::string& message) {
  std::string out;
  bool quoted = false;
  for (const char c : message) {
    quoted ^= c == '"';
    if (!quoted && (c < '0' || c > '9')) out += c;
  }
  return out;
}

[[maybe_unused]] void fuzz(double seconds, uint64_t seed) {
  testing::Random random(seed);
  std::vector<std::string> corpus = valid_files();
  std::vector<std::string> accepted = corpus;
  std::set<std::string> seen;
  for (const std::string& file : corpus) {
    if (!run_case(file).starts_with('|')) broken("the files to start from are valid");
    seen.insert(kind_of(run_case(file)));
  }
  constexpr size_t kMaxCorpus = 4096;
  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  int64_t cases = 0;
  int64_t accepted_cases = 0;
  for (; elapsed() < seconds; ++cases) {
    const std::string bytes = testing::next_case(random, corpus, accepted);
    const std::string said = run_case(bytes);
    const bool is_accepted = said.starts_with('|');
    accepted_cases += is_accepted ? 1 : 0;
    if (seen.size() >= kMaxCorpus || !seen.insert(kind_of(said)).second) continue;
    corpus.push_back(bytes);
    if (is_accepted) accepted.push_back(bytes);
  }
  std::printf("%lld cases run, %lld files accepted, %zu outcomes, seed %llu, no failure\n",
              static_cast<long long>(cases), static_cast<long long>(accepted_cases), seen.size(),
              static_cast<unsigned long long>(seed));
}

}  // namespace
}  // namespace splitfuse

extern "C" int LLVMFuzzerTestOneInput(  // NOLINT(readability-identifier-naming): libFuzzer's name
    const uint8_t* data, size_t size) {
  splitfuse::run_case({reinterpret_cast<const char*>(data), size});
  return 0;
}

#ifndef SPLITFUSE_LIBFUZZER
int main(int argc, char** argv) {
  double seconds = 10;
  uint64_t seed = 1;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const bool valued = i + 1 < argc;
    if (valued && std::strcmp(argv[i], "--seconds") == 0) {
      seconds = std::strtod(argv[++i], nullptr);
    } else if (valued && std::strcmp(argv[i], "--seed") == 0) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (argv[i][0] == '-') {
      std::fprintf(stderr, "usage: %s [--seconds N] [--seed S] | FILE...\n", argv[0]);
      return 2;
    } else {
      files.emplace_back(argv[i]);
    }
  }
  std::printf("each case is written to %s\n", splitfuse::case_file().c_str());
  for (const std::string& file : files) {
    std::ifstream in(file, std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(in), {});
    std::printf("%s: %s\n", file.c_str(), splitfuse::run_case(bytes).c_str());
  }
  if (files.empty()) splitfuse::fuzz(seconds, seed);
  std::filesystem::remove(splitfuse::case_file());
  return 0;
}
#endif
