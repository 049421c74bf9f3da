#include "engine/memory_plan.h"

#include <algorithm>
#include <cstdio>
#include <limits>

#include "base/check.h"
#include "engine/make_backend.h"
#include "host/batch_builder.h"
#include "host/kv_pool.h"
#include "model/checkpoint_layout.h"
#include "model/decoder.h"
#include "model/weights.h"

namespace splitfuse {
namespace {

constexpr int64_t kDefaultKvBytes = int64_t{1} << 30;
constexpr int32_t kMaxLogitRows = 64;      // logits are made and sampled this many rows at a time
constexpr int64_t kHostBytesPerBlock = 64;   // list links, references, key and index slots of one KV block

std::string mebibytes(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

/// Blocks that one sequence of `tokens` ever holds at once, if it can go on in chunks of at least a block.
int64_t blocks_of_one(const ModelConfig& model, const EngineConfig& config, int64_t tokens) {
  const int64_t window = kv_window(model);
  const int64_t blocks = ceil_div<int64_t>(tokens, config.block_size);
  return window == 0 ? blocks : std::min(blocks, ceil_div<int64_t>(window, config.block_size) + 2);
}

/// The longest sequence that `blocks` blocks are enough for.
int64_t longest_in(const ModelConfig& model, const EngineConfig& config, int64_t blocks) {
  constexpr int64_t kAny = std::numeric_limits<int32_t>::max();
  return blocks_of_one(model, config, kAny) <= blocks ? kAny : blocks * config.block_size;
}

/// KV bytes where the caller left them open: 1 GiB, or one longest sequence if that is more; never more than all
/// sequences could use, nor than half of what is left, unless one sequence of the length asked for needs it.
int64_t default_kv_bytes(const ModelConfig& model, const EngineConfig& config, int64_t block_bytes, int64_t left) {
  const int32_t longest = config.max_model_len > 0 ? config.max_model_len : model.max_position;
  const int64_t one = blocks_of_one(model, config, longest) * block_bytes;
  const int64_t wanted = std::min(std::max(kDefaultKvBytes, one), one * config.max_sequences);
  return std::min(wanted, std::max(left / 2, config.max_model_len > 0 ? one : block_bytes));
}

/// What the layers alone ask for.
void size_layers(const ModelConfig& model, const EngineConfig& config, StepLimits& limits) {
  const MoeConfig& moe = model.moe;
  if (moe.experts > 0) {
    const int32_t shared = moe.shared_intermediate_size > 0 ? 1 : 0;
    limits.experts = moe.experts + shared;
    limits.experts_per_row = moe.top_k + shared;
    limits.expert_hidden = model.hidden_size;
    limits.expert_intermediate = std::max(moe.intermediate_size, moe.shared_intermediate_size);
  }
  if (config.quantize != WeightFormat::kDense) {
    limits.integer_depth = std::max({model.hidden_size, model.table_size(), model.num_heads * model.head_dim,
                                     model.intermediate_size, limits.expert_intermediate});
  }
}

}  // namespace

int32_t kv_window(const ModelConfig& model) {
  int32_t widest = 0;
  for (int32_t i = 0; i < model.num_layers; ++i) {
    const int32_t window = model.layer(i).window;
    if (window == 0) return 0;
    widest = std::max(widest, window);
  }
  return widest;
}

KvShape kv_shape(const ModelConfig& model, const EngineConfig& config, int32_t blocks) {
  return {model.num_layers, model.num_kv_heads, model.head_dim, config.block_size, blocks, config.kv_dtype};
}

void validate(const EngineConfig& config, const ModelConfig& model) {
  const auto require = [](bool good, const char* field, auto value, const char* expected) {
    if (!good) throw ConfigError(cat(field, " is ", value, ", expected ", expected));
  };
  require(config.threads >= 0 && config.threads <= 1024, "threads", config.threads, "0 (all usable cores) to 1024");
  require(config.token_budget >= 0 && config.token_budget <= 1 << 20, "token_budget", config.token_budget,
          "1 to 1048576, or 0 to measure it");
  require(config.max_step_tokens >= 0 && config.max_step_tokens <= 1 << 20, "max_step_tokens", config.max_step_tokens,
          "0 to 1048576");
  require(config.max_sequences >= 1 && config.max_sequences <= 1 << 16, "max_sequences", config.max_sequences,
          "1 to 65536");
  require(config.block_size >= 16 && config.block_size <= 1024 && config.block_size % 16 == 0, "block_size",
          config.block_size, "a multiple of 16 up to 1024");
  require(config.kv_bytes >= 0, "kv_bytes", config.kv_bytes, "a number of bytes, or 0 for the default");
  require(config.max_model_len >= 0 && config.max_model_len <= model.max_position, "max_model_len",
          config.max_model_len, cat("1 to the model's ", model.max_position, ", or 0 for what fits").c_str());
}

Sizing size_engine(const ModelConfig& model, const EngineConfig& config, const Backend& backend) {
  validate(model);
  validate(config, model);
  Sizing sizing;
  MemoryPlan& plan = sizing.plan;
  StepLimits& limits = sizing.limits;
  plan.available = backend.available();
  plan.weights = lay_out_weights(model, config.quantize, backend, nullptr).bytes;
  plan.token_budget = config.token_budget > 0 ? config.token_budget : kLargestAutoBudget;

  const KvShape one_block = kv_shape(model, config, 1);
  const int64_t block_bytes = backend.kv_block_bytes(one_block);
  limits.vocab = model.vocab_size;
  limits.max_context = config.max_model_len > 0 ? config.max_model_len : model.max_position;
  if (config.kv_bytes > 0) {
    const int64_t held = longest_in(model, config, config.kv_bytes / block_bytes);
    limits.max_context = static_cast<int32_t>(std::min<int64_t>(limits.max_context, held));
  }
  limits.max_rows = std::max(plan.token_budget, std::min(config.max_step_tokens, limits.max_context));
  limits.max_seqs = std::min(config.max_sequences, plan.token_budget);
  limits.max_logit_rows = std::min(kMaxLogitRows, plan.token_budget);
  size_layers(model, config, limits);
  plan.max_step_tokens = limits.max_rows;
  plan.kv_bytes_per_token = block_bytes / config.block_size;
  plan.workspace = lay_out_workspace(model, backend.dtype(), limits, nullptr).bytes +
                   backend.scratch_bytes(attention_shape(model, one_block, limits.max_context, nullptr), limits);
  const int64_t output_row = sizeof(SampleResult) + sizeof(PromptLogprob) + kMaxLogprobs * sizeof(TokenLogprob);
  plan.host = BatchBuilder::bytes(limits.max_rows, limits.max_seqs) + limits.max_rows * output_row;

  const int64_t left = plan.available - plan.total();
  const int64_t kv_bytes = config.kv_bytes > 0 ? config.kv_bytes : default_kv_bytes(model, config, block_bytes, left);
  const int64_t blocks = kv_bytes / block_bytes;
  if (blocks < 1) {
    throw MemoryError(cat("a KV pool of ", mebibytes(kv_bytes), " holds no block: one block of ", config.block_size,
                          " tokens takes ", mebibytes(block_bytes)));
  }
  plan.blocks = static_cast<int32_t>(std::min<int64_t>(blocks, int64_t{1} << 30));
  plan.kv_pool = plan.blocks * block_bytes;
  plan.host += plan.blocks * kHostBytesPerBlock;
  const int64_t capacity = longest_in(model, config, plan.blocks);
  if (config.max_model_len > capacity) {
    throw MemoryError(cat("max_model_len is ", config.max_model_len, " tokens, but the KV pool of ",
                          mebibytes(plan.kv_pool), " holds ", capacity,
                          ": raise the pool's size or lower max_model_len"));
  }
  plan.max_model_len = static_cast<int32_t>(std::min<int64_t>(limits.max_context, capacity));
  limits.max_context = plan.max_model_len;
  if (plan.total() > plan.available) {
    throw MemoryError(cat("the memory plan does not fit:\n", plan.to_string(),
                          "Make the KV pool smaller, lower token_budget or max_model_len, or free memory."));
  }
  return sizing;
}

std::string MemoryPlan::to_string() const {
  std::string text;
  const auto line = [&](const char* name, int64_t bytes, const std::string& note) {
    char row[160];
    std::snprintf(row, sizeof(row), "  %-10s %10.1f MiB  %s\n", name, static_cast<double>(bytes) / (1 << 20),
                  note.c_str());
    text += row;
  };
  text += "memory plan\n";
  line("weights", weights, "packed");
  line("KV pool", kv_pool,
       cat(blocks, " blocks, ", kv_bytes_per_token, " bytes a token, sequences up to ", max_model_len, " tokens"));
  line("workspace", workspace, cat("forwards of up to ", max_step_tokens, " tokens"));
  line("host", host, "block tables, batch metadata");
  line("total", total(), cat("of ", mebibytes(available), " available"));
  return text;
}

std::vector<KernelChoice> chosen_kernels(const EngineConfig& config) {
  return make_backend(config)->kernels(config.quantize, matrix_format("embed.weight", config.quantize),
                                       config.kv_dtype);
}

MemoryPlan plan_memory(const ModelConfig& model, const EngineConfig& config) {
  return size_engine(model, config, *make_backend(config)).plan;
}

}  // namespace splitfuse
