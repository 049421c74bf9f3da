#include "splitfuse/engine.h"

#include <atomic>
#include <thread>
#include <utility>

#include "engine/engine_impl.h"
#include "engine/make_backend.h"

namespace splitfuse {

/// Who is inside, and what may be read by anybody. It outlives the Impl, so that a call that comes while another
/// closes the engine finds something to ask.
struct Engine::Gate {
  enum State : uint8_t { kFree, kLooking, kWorking };

  explicit Gate(const Impl& impl)
      : plan(impl.memory_plan()), model(impl.model()), description(impl.describe()), curve(impl.budget_curve()) {}

  std::atomic<uint8_t> state{kFree};
  std::atomic<bool> closed{false};
  const MemoryPlan plan;
  const ModelConfig model;
  const std::string description;
  const std::vector<BudgetPoint> curve;

  void check_open() const {
    if (closed.load(std::memory_order_acquire)) throw StateError("the engine is closed");
  }

  /// A look takes a moment and is waited for; work is not, and whoever meets it is refused.
  void enter(State wanted) {
    for (;;) {
      uint8_t found = kFree;
      if (state.compare_exchange_strong(found, wanted, std::memory_order_acquire)) return;
      if (found == kWorking) throw StateError("the engine is in use by another thread: an Engine has one owner");
      std::this_thread::yield();
    }
  }
  void leave() { state.store(kFree, std::memory_order_release); }
};

namespace {

template <class Body>
decltype(auto) pass(Engine::Gate* gate, const std::unique_ptr<Engine::Impl>& impl, Engine::Gate::State how,
                    Body&& body) {
  if (gate == nullptr) throw StateError("the engine was moved from");
  gate->enter(how);
  struct Leave {
    Engine::Gate* gate;
    ~Leave() { gate->leave(); }
  } leave{gate};
  gate->check_open();
  return body(*impl);
}

const Engine::Gate& look(const Engine::Gate* gate) {
  if (gate == nullptr) throw StateError("the engine was moved from");
  gate->check_open();
  return *gate;
}

constexpr auto kLooking = Engine::Gate::kLooking;
constexpr auto kWorking = Engine::Gate::kWorking;

}  // namespace

Engine::Engine(const ModelConfig& model, WeightSource& weights, const EngineConfig& config, const ProgressFn& progress)
    : Engine(std::make_unique<Impl>(model, weights, config, progress, make_backend(config))) {}
Engine::Engine(std::unique_ptr<Impl> impl) : gate_(std::make_unique<Gate>(*impl)), impl_(std::move(impl)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

PutResult Engine::put(SeqId id, std::span<const Token> tokens, const SamplingParams& params, int32_t priority,
                      const std::string& cache_salt) {
  return pass(gate_.get(), impl_, kWorking,
              [&](Impl& impl) { return impl.put(id, tokens, params, priority, cache_salt); });
}

const StepOutput& Engine::step() {
  return pass(gate_.get(), impl_, kWorking, [](Impl& impl) -> const StepOutput& { return impl.step(nullptr); });
}

const StepOutput& Engine::step(const StepPlan& plan) {
  return pass(gate_.get(), impl_, kWorking, [&](Impl& impl) -> const StepOutput& { return impl.step(&plan); });
}

Capacity Engine::query() const {
  return pass(gate_.get(), impl_, kLooking, [](const Impl& impl) { return impl.query(); });
}

Progress Engine::query(SeqId id) const {
  return pass(gate_.get(), impl_, kLooking, [&](const Impl& impl) { return impl.query(id); });
}

Limits Engine::view(std::vector<SeqView>& out) {
  return pass(gate_.get(), impl_, kWorking, [&](Impl& impl) { return impl.view(out); });
}

bool Engine::has_work() const {
  return pass(gate_.get(), impl_, kLooking, [](const Impl& impl) { return impl.has_work(); });
}

void Engine::flush(SeqId id) {
  pass(gate_.get(), impl_, kWorking, [&](Impl& impl) { impl.flush(id); });
}

const MemoryPlan& Engine::memory_plan() const { return look(gate_.get()).plan; }

const ModelConfig& Engine::model_config() const { return look(gate_.get()).model; }

const std::vector<BudgetPoint>& Engine::budget_curve() const { return look(gate_.get()).curve; }

std::string Engine::describe() const { return look(gate_.get()).description; }

void Engine::close() {
  if (!gate_ || gate_->closed.load(std::memory_order_acquire)) return;
  gate_->enter(kWorking);
  gate_->closed.store(true, std::memory_order_release);
  impl_.reset();
  gate_->leave();
}

}  // namespace splitfuse
