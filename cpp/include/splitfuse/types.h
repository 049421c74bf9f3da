// The vocabulary every part of splitfuse shares: ids, number formats and the typed errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace splitfuse {

using SeqId = int64_t;
using Token = int32_t;

/// A number format, of weights and activations.
enum class DType : uint8_t { kF32, kBF16, kF16 };

/// Bytes of one element.
int64_t dtype_size(DType dtype);
/// "float32", "bfloat16" or "float16".
const char* dtype_name(DType dtype);
/// The inverse of dtype_name. Throws ConfigError for any other name.
DType dtype_from_name(const std::string& name);

/// How the matrices of linear layers are held. kDense: in the format of the activations. kInt8: 8-bit integers with a
/// scale for each 32 inputs of a channel. kInt4: 4-bit integers with a scale and a minimum for each 32; the embedding
/// table and the head are then kInt8. Activations meet both as 8-bit integers with a scale for each 32.
enum class WeightFormat : uint8_t { kDense, kInt8, kInt4 };

/// "dense", "int8" or "int4".
const char* weight_format_name(WeightFormat format);
/// The inverse of weight_format_name. Throws ConfigError for any other name.
WeightFormat weight_format_from_name(const std::string& name);

/// The number format of a KV cache.
enum class KvDType : uint8_t {
  kAuto,   // that of the activations
  kInt8,   // 8 bits, and a float32 scale for each position and KV head, of its key and of its value
};

/// "auto" or "int8".
const char* kv_dtype_name(KvDType dtype);
/// The inverse of kv_dtype_name. Throws ConfigError for any other name.
KvDType kv_dtype_from_name(const std::string& name);

/// kGelu is x * Phi(x); kGeluTanh its approximation by tanh; kSwigluClamped, of gated MLPs alone, is
/// min(g, 7) * sigmoid(1.702 min(g, 7)) * (clamp(u, -7, 7) + 1).
enum class Activation : uint8_t { kNone, kSilu, kGelu, kGeluTanh, kRelu, kSwigluClamped };

/// The root of everything this library throws on purpose. The message says what was wrong, what was
/// expected and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A model or engine configuration that cannot be run.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// A checkpoint that is missing, damaged, or not what its configuration says.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

/// A memory plan that does not fit; carries the numbers in its message.
class MemoryError : public Error {
 public:
  using Error::Error;
};

/// A plan, id or argument that the engine refuses; nothing has changed.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// A call in a state that forbids it: after close, or from two threads at once.
class StateError : public Error {
 public:
  using Error::Error;
};

}  // namespace splitfuse
