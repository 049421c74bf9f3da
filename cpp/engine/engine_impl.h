// The engine behind splitfuse/engine.h.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "engine/memory_plan.h"
#include "host/batch_builder.h"
#include "host/block_key.h"
#include "host/kv_pool.h"
#include "host/sequence.h"
#include "model/decoder.h"
#include "splitfuse/engine.h"

namespace splitfuse {

class Engine::Impl {
 public:
  Impl(const ModelConfig& model, WeightSource& weights, const EngineConfig& config, const ProgressFn& progress,
       std::unique_ptr<Backend> backend);

  PutResult put(SeqId id, std::span<const Token> tokens, const SamplingParams& params, int32_t priority,
                const std::string& salt);
  const StepOutput& step(const StepPlan* plan);
  Capacity query() const;
  Progress query(SeqId id) const;
  Limits view(std::vector<SeqView>& out);
  bool has_work() const { return !live_.empty(); }
  void flush(SeqId id);

  const MemoryPlan& memory_plan() const { return sizing_.plan; }
  const ModelConfig& model() const { return model_; }
  const std::vector<BudgetPoint>& budget_curve() const { return curve_; }
  std::string describe() const;

  /// Empty if every count, list and block table agrees; else what is wrong. For tests.
  std::string check() const;

 private:
  /// A chunk of the step that runs.
  struct Scheduled {
    Sequence* seq;
    int32_t tokens;
    int32_t blocks_before;   // in its table before the step reserved more
  };

  PutResult refuse(std::span<const Token> tokens, const SamplingParams& params, int32_t already) const;
  Sequence& find(SeqId id) const;
  Sequence& add_sequence(SeqId id);
  void enlist(Sequence& seq);
  void retire(Sequence& seq);

  int32_t measure_budget();
  Limits limits() const;
  void attach_prefix(Sequence& seq);
  void make_views(std::vector<SeqView>& out, int64_t tokens);
  void count_shared(std::vector<SeqView>& views) const;
  void check_plan(const StepPlan& plan);
  Sequence& find_near(SeqId id, size_t& next) const;
  void drop_blocks(Sequence& seq);
  void give_back_behind(Sequence& seq);
  void reserve(const StepPlan& plan);
  void unreserve();
  void run();
  void choose();
  void commit();
  void commit_chunk(const Scheduled& chunk);
  void commit_logits(const LogitRow& row, const SampleResult& result);
  void finish(Sequence& seq, const Sampled& last);
  Finish finish_of(const Sequence& seq, Token token) const;

  ModelConfig model_;
  EngineConfig config_;
  std::unique_ptr<Backend> backend_;
  Sizing sizing_;
  DeviceBuffer weight_memory_, kv_memory_, workspace_memory_;
  WeightPlaces weight_places_;   // while they are loaded
  DecoderWeights weights_;
  std::unique_ptr<Decoder> decoder_;
  int32_t window_;                // tokens that the widest attention window sees; 0: all
  KvPool pool_;
  BlockKeyer keyer_;

  std::unordered_map<SeqId, std::unique_ptr<Sequence>> sequences_;
  std::vector<Sequence*> live_;   // in service order: by priority, then arrival
  std::vector<Sequence*> idle_;   // finished, not flushed
  int32_t holders_ = 0;           // of live_, how many hold blocks
  uint64_t arrivals_ = 0;
  int32_t budget_ = 0;
  std::vector<BudgetPoint> curve_;
  int64_t prefix_queries_ = 0, prefix_hits_ = 0;

  // One step's state, reserved at construction or at put().
  std::vector<SeqView> views_;
  std::vector<Sequence*> viewed_;  // behind each of the last views
  StepPlan plan_;
  BatchBuilder builder_;
  std::vector<SampleRow> sample_rows_;
  std::vector<SampleResult> results_;
  std::vector<int32_t> rows_;
  std::vector<Scheduled> scheduled_;   // the plan's chunks
  std::vector<SeqId> named_;                              // by a caller's plan
  std::vector<std::span<const BlockId>> tables_;          // of the sequences it preempts
  StepOutput output_;
};

/// For tests: engines on a given backend, and what is inside.
struct EngineAccess {
  static Engine make(std::unique_ptr<Engine::Impl> impl) { return Engine(std::move(impl)); }
  static Engine::Impl& impl(Engine& engine) { return *engine.impl_; }
};

}  // namespace splitfuse
