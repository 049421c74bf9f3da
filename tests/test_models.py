"""Every family against transformers on the same weights: logits of every position, greedy tokens, and answers that no
way of splitting changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engines import ISAS, Run, random_tokens, reference, reference_logits, same_bits
from tiny_models import Tiny, save
from tiny_models_layer_norm import LAYER_NORM
from tiny_models_rms import RMS

MODELS: dict[str, Tiny] = {**RMS, **LAYER_NORM}
RELATIVE = 2e-5  # of the largest logit of the position
NEW_TOKENS = 64
pytestmark = pytest.mark.machine_independent  # each test names its instruction set
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(ours, the reference's) of a model of MODELS."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            directory = tmp_path_factory.mktemp("model")
            made[name] = (directory, save(MODELS[name], directory))
        return made[name]

    return make


def prompt_of(name: str) -> list[int]:
    return random_tokens(7, MODELS[name].tokens)


def all_logits(path: Path, tokens: list[int], **config: object) -> np.ndarray:
    """[len(tokens), vocab]: row i speaks of token i + 1."""
    run = Run(path, capture=True, **config)
    run.put(0, tokens, max_tokens=1, prompt_logprobs=0)
    run.finish_all()
    return np.stack([run.logits[0][position] for position in range(1, len(tokens) + 1)])


@every_model
def test_logits_of_every_position_are_those_of_transformers(
    checkpoint: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    ours, theirs = checkpoint(name)
    tokens = prompt_of(name)
    truth = reference_logits(theirs, tokens)
    for isa in dict.fromkeys((ISAS[0], ISAS[-1])):
        logits = all_logits(ours, tokens, isa=isa, threads=2, token_budget=512)
        error = np.abs(logits - truth).max(-1) / np.abs(truth).max(-1)
        assert error.max() <= RELATIVE, f"{isa}: position {error.argmax()}"


@every_model
def test_greedy_tokens_are_those_of_transformers_however_they_are_split(
    checkpoint: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    """Chunks of 7 tokens, in a batch with another sequence, against whole prompts in transformers."""
    ours, theirs = checkpoint(name)
    tokens = prompt_of(name)
    model = reference(theirs)
    prompt = torch.tensor([tokens])
    with torch.inference_mode():
        truth = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(tokens) :].tolist()
    run = Run(ours, threads=2, token_budget=7)
    run.put(0, tokens, max_tokens=NEW_TOKENS, ignore_eos=True)
    run.put(1, tokens[:50], max_tokens=NEW_TOKENS, ignore_eos=True)
    run.finish_all()
    assert run.tokens[0] == truth


@every_model
def test_splitting_sharing_and_preempting_change_no_bit(
    checkpoint: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    path, _ = checkpoint(name)
    tokens = prompt_of(name)
    prompts = [tokens, [*tokens[:96], *random_tokens(8, 20)], tokens[:33]]
    params = {"max_tokens": 24, "ignore_eos": True}
    alone = []
    for prompt in prompts:
        run = Run(path, capture=True, token_budget=512, prefix_caching=False)
        run.put(0, prompt, **params)
        alone.append(run.finish_all())
    # A pool too small for all three at once, small chunks, prefixes shared.
    longest = -(-(max(map(len, prompts)) + 24) // 16)
    crowded = Run(path, capture=True, threads=2, token_budget=11, blocks=longest + 3)
    for round in range(2):
        for index, prompt in enumerate(prompts):
            crowded.put(10 * round + index, prompt, **params)
        crowded.finish_all()
    assert crowded.preempted > 0
    assert crowded.cached > 0
    for round in range(2):
        for index, truth in enumerate(alone):
            id = 10 * round + index
            assert crowded.tokens[id] == truth.tokens[0]
            for position, logits in truth.logits[0].items():
                assert same_bits(crowded.logits[id][position], logits), (index, position)
