#include "splitfuse/types.h"

#include "base/check.h"

namespace splitfuse {

int64_t dtype_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
  }
  SPLITFUSE_ASSERT(!"a DType outside the enumeration");
  return "";
}

DType dtype_from_name(const std::string& name) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw ConfigError(cat("dtype is \"", name, "\"; expected \"float32\", \"bfloat16\" or \"float16\""));
}

const char* weight_format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::kDense:
      return "dense";
    case WeightFormat::kInt8:
      return "int8";
    case WeightFormat::kInt4:
      return "int4";
  }
  SPLITFUSE_ASSERT(!"a WeightFormat outside the enumeration");
  return "";
}

WeightFormat weight_format_from_name(const std::string& name) {
  for (const WeightFormat format : {WeightFormat::kDense, WeightFormat::kInt8, WeightFormat::kInt4}) {
    if (name == weight_format_name(format)) return format;
  }
  throw ConfigError(cat("quantize is \"", name, "\"; expected \"dense\", \"int8\" or \"int4\""));
}

const char* kv_dtype_name(KvDType dtype) { return dtype == KvDType::kInt8 ? "int8" : "auto"; }

KvDType kv_dtype_from_name(const std::string& name) {
  for (const KvDType dtype : {KvDType::kAuto, KvDType::kInt8}) {
    if (name == kv_dtype_name(dtype)) return dtype;
  }
  throw ConfigError(cat("kv_dtype is \"", name, "\"; expected \"auto\" or \"int8\""));
}

}  // namespace splitfuse
