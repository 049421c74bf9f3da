#include "splitfuse/engine.h"

#include <utility>

#include "engine/engine_impl.h"
#include "engine/make_backend.h"

namespace splitfuse {
namespace {

/// Every call goes through here: the engine is open, and nobody else is inside.
template <class Body>
decltype(auto) enter(const std::unique_ptr<Engine::Impl>& impl, Body&& body) {
  if (!impl) throw StateError("the engine is closed");
  Engine::Impl::Guard guard(*impl);
  return body(*impl);
}

}  // namespace

Engine::Engine(const ModelConfig& model, WeightSource& weights, const EngineConfig& config, const ProgressFn& progress)
    : impl_(std::make_unique<Impl>(model, weights, config, progress, make_backend(config))) {}
Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

PutResult Engine::put(SeqId id, std::span<const Token> tokens, const SamplingParams& params, int32_t priority,
                      const std::string& cache_salt) {
  return enter(impl_, [&](Impl& impl) { return impl.put(id, tokens, params, priority, cache_salt); });
}

const StepOutput& Engine::step() {
  return enter(impl_, [](Impl& impl) -> const StepOutput& { return impl.step(nullptr); });
}

const StepOutput& Engine::step(const StepPlan& plan) {
  return enter(impl_, [&](Impl& impl) -> const StepOutput& { return impl.step(&plan); });
}

Capacity Engine::query() const {
  return enter(impl_, [](const Impl& impl) { return impl.query(); });
}

Progress Engine::query(SeqId id) const {
  return enter(impl_, [&](const Impl& impl) { return impl.query(id); });
}

Limits Engine::view(std::vector<SeqView>& out) {
  return enter(impl_, [&](Impl& impl) { return impl.view(out); });
}

bool Engine::has_work() const {
  return enter(impl_, [](const Impl& impl) { return impl.has_work(); });
}

void Engine::flush(SeqId id) {
  enter(impl_, [&](Impl& impl) { impl.flush(id); });
}

const MemoryPlan& Engine::memory_plan() const {
  return enter(impl_, [](const Impl& impl) -> const MemoryPlan& { return impl.memory_plan(); });
}

const ModelConfig& Engine::model_config() const {
  return enter(impl_, [](const Impl& impl) -> const ModelConfig& { return impl.model(); });
}

std::string Engine::describe() const {
  return enter(impl_, [](const Impl& impl) { return impl.describe(); });
}

void Engine::close() {
  if (!impl_) return;
  {
    Impl::Guard guard(*impl_);
  }
  impl_.reset();
}

}  // namespace splitfuse
