"""Whole engines on a GPU. tests/gpu.sh runs this file, where there is one; pytest alone does not collect it."""

from pathlib import Path

import numpy as np
import pytest

from engines import Run, log_softmax, random_tokens, same_bits
from tiny_models import save
from tiny_models_layer_norm import LAYER_NORM
from tiny_models_rms import RMS

FAMILIES = {**RMS, **LAYER_NORM}

SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1, "seed": 3}
PROMPTS = [random_tokens(i, length) for i, length in enumerate([1, 16, 63, 130, 257, 480])]


def logits_of(path: Path, prompt: list[int], **config) -> np.ndarray:
    run = Run(path, capture=True, dtype="bfloat16", **config)
    run.put(1, prompt, max_tokens=1, prompt_logprobs=0)
    run.finish_all()
    return np.stack([run.logits[1][i] for i in range(1, len(prompt) + 1)])


def assert_close(path: Path) -> None:
    """As near to the CPU's bfloat16 as that is to float32, or thereabouts."""
    prompt = PROMPTS[3]
    ours, theirs = (log_softmax(logits_of(path, prompt, device=device)) for device in ("cuda", "cpu"))
    difference = np.abs(np.exp(ours) - np.exp(theirs)).sum(-1)
    assert np.median(difference) < 0.05
    assert difference.max() < 0.5


@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_llama_is_close_to_the_cpu(tiny_llama, head_dim: int) -> None:
    assert_close(tiny_llama(head_dim=head_dim))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_close_to_the_cpu(name: str, tmp_path: Path) -> None:
    save(FAMILIES[name], tmp_path)
    assert_close(tmp_path)


def test_splitting_never_changes_the_answer(tiny_llama) -> None:
    """Each request alone, in one forward, and all together in chunks of every kind: the same bits."""
    path = tiny_llama()
    alone = {}
    for i, prompt in enumerate(PROMPTS):
        run = Run(path, capture=True, dtype="bfloat16", device="cuda", token_budget=1024)
        run.put(1, prompt, max_tokens=12, **(SAMPLED if i % 2 else {}))
        run.finish_all()
        alone[i] = run
    for budget in (3, 17, 64, 300):
        run = Run(path, capture=True, dtype="bfloat16", device="cuda", token_budget=budget)
        for i, prompt in enumerate(PROMPTS):
            run.put(i, prompt, max_tokens=12, **(SAMPLED if i % 2 else {}))
        run.finish_all()
        for i in range(len(PROMPTS)):
            assert run.tokens[i] == alone[i].tokens[1], (budget, i)
            for position, logits in alone[i].logits[1].items():
                assert same_bits(run.logits[i][position], logits), (budget, i, position)


def test_a_sequence_of_nan_harms_no_other(tiny_llama) -> None:
    run = Run(tiny_llama(), dtype="bfloat16", device="cuda", token_budget=64)
    for i in range(3):
        run.put(i, PROMPTS[2], max_tokens=8, ignore_eos=True)
    run.probe.poison_logits = True
    run.finish_all()
    assert sorted(len(run.tokens[i]) for i in range(3)) == [0, 8, 8]
    assert list(run.finish.values()).count("error") == 1
