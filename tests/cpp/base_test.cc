// Memory, control groups, 16-bit formats and random numbers.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "base/cgroup.h"
#include "base/memory.h"
#include "base/numeric.h"
#include "base/philox.h"
#include "base/thread_pool.h"
#include "splitfuse/types.h"

namespace splitfuse {
namespace {

TEST(Memory, IsZeroedAlignedAndResident) {
  for (int64_t bytes : {int64_t{1}, int64_t{4096}, int64_t{100'000}, (int64_t{5} << 20) + 17}) {
    Memory memory(bytes);
    EXPECT_EQ(memory.size(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.data()) % 4096, 0u);
    for (int64_t i = 0; i < bytes; ++i) ASSERT_EQ(memory.data()[i], std::byte{0});
    std::memset(memory.data(), 1, static_cast<size_t>(bytes));
  }
  EXPECT_EQ(Memory(0).data(), nullptr);
}

TEST(Memory, IsResidentWhoeverTouchedIt) {
  ThreadPool three(3);
  ThreadPool one(1);
  for (ThreadPool* pool : {static_cast<ThreadPool*>(nullptr), &one, &three}) {
    for (int64_t pages : {1, 2, 1000, 5000}) {
      const Memory memory(pages * 4096 - 17, pool);
      std::vector<unsigned char> resident(static_cast<size_t>(pages));
      ASSERT_EQ(mincore(memory.data(), static_cast<size_t>(memory.size()), resident.data()), 0);
      for (unsigned char page : resident) ASSERT_EQ(page & 1, 1);
    }
  }
}

TEST(Memory, Moves) {
  Memory first(100);
  std::byte* const data = first.data();
  Memory second(std::move(first));
  EXPECT_EQ(second.data(), data);
  Memory third;
  third = std::move(second);
  EXPECT_EQ(third.data(), data);
  EXPECT_EQ(third.size(), 100);
}

TEST(Memory, RefusesWhatIsNotThere) {
  const int64_t available = available_memory();
  ASSERT_GT(available, 0);
  try {
    Memory memory(available * 2);
    FAIL() << "took twice what is available";
  } catch (const MemoryError& error) {
    EXPECT_NE(std::string(error.what()).find("MiB"), std::string::npos);
  }
}

TEST(Cgroup, ReadsNumbers) {
  const auto folder = std::filesystem::temp_directory_path() / "splitfuse_cgroup_test";
  std::filesystem::create_directories(folder);
  const std::string file = folder / "file";
  const auto write = [&](const char* text) { std::ofstream(file) << text; };
  write("max\n");
  EXPECT_FALSE(read_number(file).has_value());
  write("1234\n");
  EXPECT_EQ(read_number(file), 1234);
  write("anon 5\ninactive_file 70\nMemAvailable:   99 kB\n");
  EXPECT_EQ(read_keyed_number(file, "inactive_file"), 70);
  EXPECT_EQ(read_keyed_number(file, "MemAvailable"), 99);
  EXPECT_FALSE(read_keyed_number(file, "file").has_value());
  std::filesystem::remove_all(folder);
  EXPECT_FALSE(read_number(file).has_value());
}

// Half precision by its definition.
double half_value(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31;
  const double fraction = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  return sign *
         (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25));
}

TEST(Numeric, EveryHalfIsExactAndComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = f16_to_float(half);
    if ((bits & 0x7c00) == 0x7c00) {
      ASSERT_EQ(std::isnan(value), (bits & 0x3ff) != 0) << bits;
      ASSERT_EQ(std::isinf(value), (bits & 0x3ff) == 0) << bits;
      ASSERT_EQ(std::isnan(f16_to_float(float_to_f16(value))), std::isnan(value));
      continue;
    }
    ASSERT_EQ(value, half_value(bits)) << bits;
    ASSERT_EQ(std::signbit(value), (bits & 0x8000) != 0) << bits;
    ASSERT_EQ(float_to_f16(value), half) << bits;
  }
}

TEST(Numeric, HalvesRoundToNearestTiesToEven) {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const auto low = static_cast<uint16_t>(bits);
    const auto high = static_cast<uint16_t>(bits + 1);
    const auto middle = static_cast<float>((half_value(low) + half_value(high)) / 2);   // exact
    ASSERT_EQ(float_to_f16(middle), bits % 2 == 0 ? low : high) << bits;
    ASSERT_EQ(float_to_f16(std::nextafter(middle, 0.0f)), low) << bits;
    ASSERT_EQ(float_to_f16(std::nextafter(middle, 1e9f)), high) << bits;
  }
  EXPECT_EQ(float_to_f16(65519.99f), 0x7bff);
  EXPECT_EQ(float_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_f16(-1e30f), 0xfc00);
  EXPECT_EQ(float_to_f16(1e-30f), 0);
}

TEST(Numeric, Bfloat16RoundsToNearestTiesToEven) {
  EXPECT_EQ(float_to_bf16(1.0f), 0x3f80);
  EXPECT_EQ(float_to_bf16(1.0f + 0x1p-8f), 0x3f80);                // a tie, down to even
  EXPECT_EQ(float_to_bf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3f81);
  EXPECT_EQ(float_to_bf16(1.0f + 0x3p-8f), 0x3f82);                // a tie, up to even
  EXPECT_EQ(float_to_bf16(3.4e38f), 0x7f80);
  EXPECT_EQ(bf16_to_float(0xc049), -3.140625f);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

// Known answers of the authors' library Random123: philox4x32, 10 rounds.
TEST(Philox, HasThePublishedVectors) {
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, UniformsAreInRangeAndKeyedByAllThree) {
  const double base = philox_uniform(1, 2, 3);
  EXPECT_EQ(base, philox_uniform(1, 2, 3));
  EXPECT_NE(base, philox_uniform(2, 2, 3));
  EXPECT_NE(base, philox_uniform(1 + (uint64_t{1} << 32), 2, 3));
  EXPECT_NE(base, philox_uniform(1, 3, 3));
  EXPECT_NE(base, philox_uniform(1, 2, 4));
  double sum = 0.0;
  for (uint32_t i = 0; i < 100'000; ++i) {
    const double u = philox_uniform(7, 0, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
  }
  EXPECT_NEAR(sum / 100'000, 0.5, 0.004);   // 4 sigmas
}

}  // namespace
}  // namespace splitfuse
