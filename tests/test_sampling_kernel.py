"""Sampling of the CPU backend on every rung of the ISA ladder, held to a plain numpy model of its rules."""

from collections import Counter

import numpy as np
import pytest

from splitfuse import _core
from splitfuse._core import SamplingParams

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

ISAS = _core.cpu_isas()
every_isa = pytest.mark.parametrize("isa", ISAS)
MASK = 0xFFFFFFFF


def sample(isa: str, logits: np.ndarray, rows: list[dict], threads: int = 2) -> list[tuple]:
    return _core.testing.Ops(dtype="float32", isa=isa, threads=threads).sample(
        logits.astype(np.float32), rows
    )


# ---- The model


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def uniform(seed: int, sample_index: int, position: int) -> float:
    bits = philox4x32([position, sample_index, 0, 0], [seed & MASK, seed >> 32])
    return (bits[0] << 32 | bits[1]) / 2**64


def kept(logits: np.ndarray, row: dict) -> np.ndarray:
    """The probability of every token after penalties, bias, stop ids, temperature, min_p, top_k and top_p."""
    params, tokens = row["params"], row.get("tokens", [])
    prompt = row.get("prompt", len(tokens))
    x = logits.astype(np.float32)  # adjusted in the logits' format: it decides on near ties
    penalty, presence, frequency = np.float32(
        [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
    )
    for token in set(tokens):
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token, times in Counter(tokens[prompt:]).items():
        x[token] -= np.float32(times) * frequency + presence
    for token, bias in params.logit_bias:
        x[token] += np.float32(bias)
    x[list(row.get("stop_ids", []))] = -np.inf
    x = x.astype(np.float64)
    order = np.lexsort((np.arange(len(x)), -x))
    p = np.zeros(len(x))
    if params.temperature == 0:
        p[order[0]] = 1
        return p
    p = np.exp((x - x.max()) / params.temperature)
    p[p < params.min_p] = 0
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    count = np.searchsorted(np.cumsum(p[order]), params.top_p * (1 - 1e-12)) + 1
    p[order[count:]] = 0
    return p / p.sum()


def expected(logits: np.ndarray, row: dict) -> tuple[set[int], np.ndarray]:
    """The token that the row's number falls on, with its neighbours if it falls next to their edge; probabilities."""
    p = kept(logits, row)
    params = row["params"]
    u = uniform(params.seed, params.sample_index, len(row.get("tokens", [])))
    edges = np.cumsum(p)
    return {int(min(np.searchsorted(edges, u + d, side="right"), len(p) - 1)) for d in (-1e-6, 0, 1e-6)}, p


# ---- The random numbers


def test_philox_model_has_the_published_vectors() -> None:
    """Known answers of the Random123 library, philox4x32 with 10 rounds."""
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32([MASK] * 4, [MASK] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter, key = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox4x32(counter, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@every_isa
def test_each_row_draws_its_own_number(isa: str) -> None:
    """Equal weights over 4096 tokens: the token says the first 12 bits of the number."""
    rows = []
    for seed in (0, 1, 2**32 - 1, 2**32, 2**64 - 1):
        for index in (0, 1, 7):
            for length in (1, 2, 5):
                params = SamplingParams(seed=seed, sample_index=index)
                rows.append({"params": params, "tokens": [3] * length})
    drawn = [token for token, *_ in sample(isa, np.zeros((len(rows), 4096)), rows)]
    want = [int(uniform(r["params"].seed, r["params"].sample_index, len(r["tokens"])) * 4096) for r in rows]
    assert drawn == want
    assert len(set(drawn)) > 40


# ---- The rules


def random_row(rng: np.random.Generator, vocab: int) -> dict:
    length = int(rng.integers(1, 60))
    ids = [int(t) for t in rng.integers(0, vocab, length)]
    coin = lambda p: rng.random() < p  # noqa: E731
    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.3, 0.7, 1.0, 1.5, 4.0])),
        top_p=float(rng.choice([0.1, 0.5, 0.9, 0.99])) if coin(0.6) else 1.0,
        top_k=int(rng.choice([1, 2, 5, 50, vocab // 2, vocab, 3 * vocab])) if coin(0.6) else 0,
        min_p=float(rng.choice([0.001, 0.05, 0.5, 1.0])) if coin(0.4) else 0.0,
        seed=int(rng.integers(0, 2**63)),
        sample_index=int(rng.integers(0, 4)),
        repetition_penalty=float(rng.choice([0.5, 1.3, 2.0])) if coin(0.3) else 1.0,
        presence_penalty=float(rng.choice([-1.0, 0.5, 2.0])) if coin(0.3) else 0.0,
        frequency_penalty=float(rng.choice([-1.0, 0.5, 2.0])) if coin(0.3) else 0.0,
        logit_bias=[
            (int(t), float(b)) for t, b in zip(rng.permutation(vocab)[:3], [-100.0, 2.0, 5.0], strict=True)
        ]
        if coin(0.3)
        else [],
    )
    row = {
        "params": params,
        "tokens": ids,
        "prompt": int(rng.integers(0, length + 1)),
        "top": int(rng.integers(-1, 21)),
    }
    if coin(0.3):
        row["stop_ids"] = [int(t) for t in rng.permutation(vocab)[:2]]
    return row


@every_isa
@pytest.mark.parametrize("vocab", [5, 33, 331, 1024, 1025, 20011])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_rules(isa: str, vocab: int, spread: float) -> None:
    rng = np.random.default_rng(vocab)
    count = 60 if vocab < 5000 else 20
    logits = (rng.standard_normal((count, vocab)) * spread).astype(np.float32)
    logits[::3] = np.round(logits[::3] * 4) / 4  # many ties
    rows = [random_row(rng, vocab) for _ in range(count)]
    for row, x, (token, logprob, top, rank) in zip(rows, logits, sample(isa, logits, rows), strict=True):
        tokens, p = expected(x, row)
        # Where the edge of a kept set falls between two tokens within rounding, either side is right.
        assert token in tokens or (p[token] == 0 and near_an_edge(x, row, token)), (
            token,
            tokens,
            row["params"],
        )
        wide = x.astype(np.float64)
        raw = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        if row["top"] < 0:
            assert (top, rank) == ([], 0)
            continue
        order = np.lexsort((np.arange(vocab), -wide))
        assert order[rank - 1] == token
        assert abs(logprob - raw[token]) < 2e-6 * max(1, abs(raw[token]))
        best = order[: row["top"]]
        assert [t for t, _ in top] == best.tolist()
        assert np.allclose([v for _, v in top], raw[best], rtol=2e-6, atol=2e-6)


def near_an_edge(logits: np.ndarray, row: dict, token: int) -> bool:
    """Whether the token would be kept if top_p or min_p were larger or smaller by a rounding."""
    params = row["params"]
    fields = {name: getattr(params, name) for name in dir(params) if not name.startswith("_")}
    for change in (1 - 1e-5, 1 + 1e-5):
        near = {"top_p": min(1.0, fields["top_p"] * change), "min_p": min(1.0, fields["min_p"] * change)}
        if token in expected(logits, {**row, "params": SamplingParams(**{**fields, **near})})[0]:
            return True
    return False


@every_isa
def test_exact_cuts(isa: str) -> None:
    """Probabilities that binary fractions hold exactly: 1/2, 1/4, 1/8, 1/16, 1/16."""
    logits = np.log2([8.0, 4.0, 2.0, 1.0, 1.0])[[3, 0, 4, 2, 1]] * np.log(2)  # ids: 1/16, 1/2, 1/16, 1/8, 1/4
    seen: dict[str, set[int]] = {}
    cases = {
        "all": {},
        "k1": {"top_k": 1},
        "k3": {"top_k": 3},
        "k4 takes the lower id of a tie": {"top_k": 4},
        "p.6": {"top_p": 0.6},
        "p.9 takes the lower id of a tie": {"top_p": 0.9},
        "k2 then p: 2/3 of what is left": {"top_k": 2, "top_p": 0.6},
        "min_p": {"min_p": 0.2},
        "min_p then p": {"min_p": 0.2, "top_p": 0.55},
    }
    rows = [
        {"params": SamplingParams(seed=seed, **case), "tokens": [0]}
        for case in cases.values()
        for seed in range(150)
    ]
    drawn = [token for token, *_ in sample(isa, np.tile(logits, (len(rows), 1)), rows)]
    for i, name in enumerate(cases):
        seen[name] = set(drawn[150 * i : 150 * (i + 1)])
    assert seen == {
        "all": {0, 1, 2, 3, 4},
        "k1": {1},
        "k3": {1, 3, 4},
        "k4 takes the lower id of a tie": {0, 1, 3, 4},
        "p.6": {1, 4},
        "p.9 takes the lower id of a tie": {0, 1, 3, 4},
        "k2 then p: 2/3 of what is left": {1},
        "min_p": {1, 3, 4},
        "min_p then p": {1},
    }


@every_isa
def test_ties_go_to_the_lowest_id(isa: str) -> None:
    logits = np.zeros((3, 3000))
    logits[1, [17, 1500, 2999]] = 4
    logits[2, 2999] = 1e-3
    rows = [{"params": SamplingParams(temperature=0.0), "tokens": [0], "top": 3}] * 3
    results = sample(isa, logits, rows)
    assert [token for token, *_ in results] == [0, 17, 2999]
    assert [[t for t, _ in top] for _, _, top, _ in results] == [[0, 1, 2], [17, 1500, 2999], [2999, 0, 1]]


@every_isa
def test_penalties_tell_prompt_from_output(isa: str) -> None:
    logits = np.array([3.0, 2.9, 2.8, -1.0, -1.1])
    greedy = {"temperature": 0.0}
    rows = [
        {"params": SamplingParams(**greedy, presence_penalty=2.0), "tokens": [0, 0], "prompt": 2},
        {"params": SamplingParams(**greedy, presence_penalty=2.0), "tokens": [0, 0], "prompt": 1},
        {"params": SamplingParams(**greedy, frequency_penalty=0.06), "tokens": [0, 0], "prompt": 0},
        {"params": SamplingParams(**greedy, frequency_penalty=0.06), "tokens": [0, 0], "prompt": 1},
        {"params": SamplingParams(**greedy, repetition_penalty=1.1), "tokens": [0, 0], "prompt": 2},
        {
            "params": SamplingParams(**greedy, repetition_penalty=1.2),
            "tokens": [3, 2, 1, 0],
            "stop_ids": [0, 1, 2],
        },
        {"params": SamplingParams(**greedy, logit_bias=[(4, 4.2)]), "tokens": [0]},
    ]
    drawn = [token for token, *_ in sample(isa, np.tile(logits, (len(rows), 1)), rows)]
    assert drawn == [0, 1, 1, 0, 1, 4, 4]


@every_isa
def test_chosen_logprob_is_of_the_untouched_logits(isa: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 500)) * 3
    params = SamplingParams(temperature=0.5, logit_bias=[(9, 100.0)], repetition_penalty=1.5)
    ((token, logprob, top, rank),) = sample(isa, logits, [{"params": params, "tokens": [9, 4], "top": 20}])
    x = logits[0].astype(np.float32).astype(np.float64)
    raw = x - np.log(np.exp(x).sum())
    assert token == 9
    assert rank == 1 + np.count_nonzero(x > x[9]) > 1
    assert abs(logprob - raw[9]) < 1e-5
    assert np.allclose([v for _, v in top], np.sort(raw)[::-1][:20], atol=1e-5)


@every_isa
def test_target_rows_only_report(isa: str) -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((2, 700))
    rows = [{"target": 13, "top": 0, "tokens": [1]}, {"target": 699, "top": 5, "tokens": [1]}]
    results = sample(isa, logits, rows)
    raw = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [(token, len(top)) for token, _, top, _ in results] == [(13, 0), (699, 5)]
    assert np.allclose([logprob for _, logprob, *_ in results], [raw[0, 13], raw[1, 699]], atol=1e-5)


# ---- Bad rows


@every_isa
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_hold_no_choice(isa: str, temperature: float) -> None:
    good = np.linspace(-1, 1, 2050)
    logits = np.tile(good, (8, 1))
    logits[0, 0] = logits[1, 2049] = logits[2, 1024] = np.nan
    logits[3] = -np.inf
    logits[4, :-1] = -np.inf
    logits[5, 7] = np.inf
    logits[7, 5] = -np.inf
    params = SamplingParams(temperature=temperature, top_k=1)
    rows = [{"params": params, "tokens": [1], "top": 2} for _ in range(8)]
    rows[6]["stop_ids"] = list(range(2050))
    results = sample(isa, logits, rows)
    assert [token for token, *_ in results] == [-1, -1, -1, -1, 2049, -1, -1, 2049]
    assert results[4][1] == 0.0


@every_isa
@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 1e5, 3e38])
def test_extreme_temperatures(isa: str, temperature: float) -> None:
    rng = np.random.default_rng(2)
    logits = np.tile(rng.permutation(64) / 8.0, (400, 1))
    rows = [{"params": SamplingParams(temperature=temperature, seed=s), "tokens": [1]} for s in range(400)]
    seen = {token for token, *_ in sample(isa, logits, rows)}
    assert seen == {int(np.argmax(logits[0]))} if temperature < 1 else len(seen) > 55


# ---- Distribution and independence


@every_isa
@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.6}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.1, "top_k": 20, "top_p": 0.9}],
)
def test_draws_have_the_distribution(isa: str, fields: dict) -> None:
    """Chi-square over 20,000 seeds, which are fixed: it passes always or never."""
    rng = np.random.default_rng(3)
    logits, draws = rng.standard_normal(40) * 1.5, 20000
    counts = np.zeros(40)
    for start in range(0, draws, 4000):
        rows = [
            {"params": SamplingParams(seed=s, **fields), "tokens": [0]} for s in range(start, start + 4000)
        ]
        for token, *_ in sample(isa, np.tile(logits, (4000, 1)), rows):
            counts[token] += 1
    p = kept(logits.astype(np.float32), rows[0])
    assert counts[p == 0].sum() == 0
    likely = p * draws >= 5
    chi = ((counts[likely] - p[likely] * draws) ** 2 / (p[likely] * draws)).sum()
    freedom = likely.sum() - 1
    assert chi < freedom + 4 * np.sqrt(2 * freedom)  # four sigmas


@every_isa
def test_rows_do_not_matter_to_each_other(isa: str) -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((50, 5000)) * 3
    rows = [random_row(rng, 5000) for _ in range(50)]
    together = sample(isa, logits, rows)
    for threads in (1, 3):
        order = rng.permutation(50)
        mixed = sample(isa, logits[order], [rows[i] for i in order], threads)
        assert [mixed[int(np.where(order == i)[0][0])] for i in range(50)] == together
    alone = [sample(isa, logits[i : i + 1], rows[i : i + 1], 1)[0] for i in range(0, 50, 7)]
    assert alone == together[::7]


@every_isa
def test_large_vocabulary(isa: str) -> None:
    """256k tokens of nearly equal weight: sums may not lose the small parts."""
    vocab = 262144
    logits = np.zeros((9, vocab), np.float32)
    logits[:, 0] = 5.0
    rows = [
        {"params": SamplingParams(seed=s, top_p=0.999 if s % 2 else 1.0), "tokens": [0], "top": 0}
        for s in range(9)
    ]
    total = np.exp(5.0) + vocab - 1
    for row, (token, logprob, *_) in zip(rows, sample(isa, logits, rows), strict=True):
        u = uniform(row["params"].seed, 0, 1)
        kept_total = total if row["params"].top_p == 1 else np.ceil(0.999 * total - np.exp(5.0)) + np.exp(5.0)
        want = max(0, u * kept_total - np.exp(5.0) + 1)
        assert abs(token - want) <= 2
        assert abs(logprob - (logits[0, token] - np.log(total))) < 1e-5
