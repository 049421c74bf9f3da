// The smallest program around the engine: continues a prompt, given as token ids, greedily.
//   consumer CHECKPOINT ID...       (CHECKPOINT: what `splitfuse convert MODEL CHECKPOINT` wrote)
#include <splitfuse/splitfuse.h>

#include <cstdlib>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: consumer CHECKPOINT ID...\n";
    return 2;
  }
  try {
    std::vector<splitfuse::Token> prompt;
    for (int i = 2; i < argc; ++i) prompt.push_back(std::atoi(argv[i]));

    splitfuse::Checkpoint checkpoint = splitfuse::open_checkpoint(argv[1]);
    const splitfuse::EngineConfig config = {.quantize = checkpoint.weights->format(), .token_budget = 256};
    splitfuse::Engine engine(checkpoint.config, *checkpoint.weights, config);

    const splitfuse::PutResult put = engine.put(1, prompt, {.max_tokens = 16, .temperature = 0});
    if (!put) {
      std::cerr << "refused: " << put.reason << "\n";
      return 1;
    }
    while (engine.has_work()) {
      for (const splitfuse::Sampled& sampled : engine.step().sampled) std::cout << sampled.token << std::endl;
    }
    engine.flush(1);
  } catch (const splitfuse::Error& error) {
    std::cerr << "consumer: " << error.what() << "\n";
    return 1;
  }
}
