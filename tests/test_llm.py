"""LLM on real engines: every way in gives the same answer, bad input harms nobody, it ends when told to."""

import gc
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import splitfuse
from splitfuse import LLM, CheckpointError, ConfigError, InvalidArgument, SamplingParams, StateError
from splitfuse._sizes import parse_bytes
from splitfuse.engine_setup import engine_config
from splitfuse.policies import POLICIES

SMALL = {"dtype": "float32", "kv_memory": "16MiB", "token_budget": 48, "max_sequences": 16, "verbose": False}
TEXTS = ["the cat", "over the hills and far away", "x", "the other thing the others think"]


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama(), **SMALL) as llm:
        yield llm


def greedy(count=12, **kwargs):
    return SamplingParams(max_tokens=count, temperature=0.0, **kwargs)


def tokens(outputs):
    return [o.token_ids for o in outputs]


def wait_idle(llm):
    """Until cancelled requests have left the engine."""
    deadline = time.monotonic() + 10
    while llm.scheduler.has_work:
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------- ways in


def test_the_answers_are_those_of_transformers(llm, tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32).eval()
    for text, output in zip(TEXTS, llm.generate(TEXTS, greedy(ignore_eos=True)), strict=True):
        ids = torch.tensor([llm.tokenizer.encode(text)])
        with torch.inference_mode():
            made = reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=12,
                max_new_tokens=12, eos_token_id=-1, pad_token_id=0,
            )  # fmt: skip
        assert output.token_ids == made[0, ids.shape[1] :].tolist()
        assert output.prompt == text
        assert output.prompt_token_ids == ids[0].tolist()


def test_one_prompt_or_many_as_text_or_ids(llm):
    alone = [llm.generate(text, greedy())[0] for text in TEXTS]
    assert tokens(llm.generate(TEXTS, greedy())) == tokens(alone)
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    assert tokens(llm.generate(ids, greedy())) == tokens(alone)
    assert tokens(llm.generate([TEXTS[0], ids[1], TEXTS[2], np.array(ids[3])], greedy())) == tokens(alone)
    assert tokens(llm.generate(ids[1], greedy())) == tokens(alone[1:2])
    assert tokens(llm.generate(np.array(ids[1], dtype=np.int32), greedy())) == tokens(alone[1:2])
    assert llm.generate(ids[1], greedy())[0].prompt is None
    assert llm.generate([], greedy()) == []
    assert [o.text for o in llm.generate(TEXTS, greedy())] == [o.text for o in alone]


def test_params_one_for_all_or_one_a_prompt(llm):
    counts = [3, 1, 7, 5]
    outputs = llm.generate(TEXTS, [greedy(n, ignore_eos=True) for n in counts])
    assert [len(o.token_ids) for o in outputs] == counts
    assert {o.finish_reason for o in outputs} == {"length"}
    with pytest.raises(InvalidArgument, match="4 prompts but 2 params"):
        llm.generate(TEXTS, [greedy()] * 2)
    assert len(llm.generate("the", None)[0].token_ids) <= 16


def test_a_stream_is_the_same_answer_in_pieces(llm):
    for text in TEXTS:
        params = greedy(40, ignore_eos=True)
        pieces = list(llm.stream(text, params))
        assert "".join(pieces) == llm.generate(text, params)[0].text
        assert len(pieces) > 5
    assert "".join(llm.stream(llm.tokenizer.encode("the"), greedy())) == llm.generate("the", greedy())[0].text


def test_chat_applies_the_template(llm):
    one = [{"role": "user", "content": "the cat"}]
    two = [{"role": "system", "content": "be brief"}, *one]
    outputs = llm.chat([one, two], greedy())
    assert [o.prompt for o in outputs] == [llm.tokenizer.render_chat(m) for m in (one, two)]
    assert outputs[0].prompt.endswith("assistant\n")
    assert llm.chat(two, greedy())[0].token_ids == outputs[1].token_ids
    ids = llm.tokenizer.encode(outputs[0].prompt, add_special_tokens=False)
    assert llm.generate(ids, greedy())[0].token_ids == outputs[0].token_ids
    assert "".join(llm.stream(one, greedy())) == outputs[0].text


def test_a_seed_fixes_the_answer_whatever_else_runs(llm):
    params = SamplingParams(max_tokens=20, seed=11, ignore_eos=True)
    alone = llm.generate("the cat", params)[0].token_ids
    crowd = llm.generate([*TEXTS, "the cat", *TEXTS], params)
    assert crowd[4].token_ids == alone
    assert crowd[0].token_ids == alone  # TEXTS[0] is the same prompt
    free = SamplingParams(max_tokens=20, ignore_eos=True)
    assert llm.generate("the cat", free)[0].token_ids != llm.generate("the cat", free)[0].token_ids


def test_n_answers(llm):
    params = SamplingParams(max_tokens=15, seed=5, n=4, ignore_eos=True)
    outputs = llm.generate("the cat", params)[0].outputs
    assert len({tuple(c.token_ids) for c in outputs}) == 4
    assert llm.generate("the cat", params)[0].outputs == outputs
    first = SamplingParams(max_tokens=15, seed=5, ignore_eos=True)
    assert llm.generate("the cat", first)[0].token_ids == outputs[0].token_ids


def test_a_prompt_is_computed_once(llm):
    """Turns of a conversation, equal beginnings and n answers find it in the prefix cache; nothing else changes."""
    prompt = [i % 250 for i in range(100)]
    whole_blocks = 99 // llm.engine.query().block_size * llm.engine.query().block_size
    assert whole_blocks > 0
    fresh = llm.generate(prompt, greedy(30, ignore_eos=True))[0]
    for again, hits in ((greedy(30, ignore_eos=True), 1), (greedy(30, ignore_eos=True, n=3), 3)):
        before = llm.engine.query().prefix_hits
        assert all(c.token_ids == fresh.token_ids for c in llm.generate(prompt, again)[0].outputs)
        assert llm.engine.query().prefix_hits - before == hits * whole_blocks
    before = llm.engine.query().prefix_hits
    llm.generate(prompt + fresh.token_ids, greedy(2))
    assert llm.engine.query().prefix_hits - before > whole_blocks
    before = llm.engine.query().prefix_hits
    salted = llm.scheduler.submit(prompt, greedy(30, ignore_eos=True), cache_salt="mine").result(30)
    assert salted.token_ids == fresh.token_ids
    assert llm.engine.query().prefix_hits == before


def test_logprobs(llm):
    params = greedy(6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = llm.generate("the cat and the dog", params)[0]
    assert len(output.logprobs) == 6
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        values = [lp.logprob for lp in entry.values()]
        assert next(iter(entry)) == token
        assert len(entry) == 3
        assert values == sorted(values, reverse=True)
        assert all(lp.token_id == t and isinstance(lp.text, str) for t, lp in entry.items())
    chosen = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
    assert output.outputs[0].cumulative_logprob == pytest.approx(sum(chosen))
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert next(iter(entry)) == token
        assert 2 <= len(entry) <= 3
    # what was generated has the same log-probability when it is read as a prompt
    again = llm.generate(output.prompt_token_ids + output.token_ids, greedy(1, prompt_logprobs=0))[0]
    read = [entry[t].logprob for t, entry in zip(output.token_ids, again.prompt_logprobs[-6:], strict=True)]
    assert read == chosen


def test_a_stop_string_cuts_the_text(llm):
    whole = llm.generate("the cat", greedy(40, ignore_eos=True))[0].text
    stop = whole[10:13]
    output = llm.generate("the cat", greedy(40, ignore_eos=True, stop=stop))[0]
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_end_of_sequence(llm):
    whole = llm.generate("the cat", greedy(12, ignore_eos=True))[0].token_ids
    output = llm.generate("the cat", greedy(12, ignore_eos=True, stop_token_ids=[whole[3]]))[0]
    assert output.token_ids == whole[: whole.index(whole[3]) + 1]
    assert output.outputs[0].stop_reason == whole[3]


def test_max_tokens_none_fills_the_context(tiny_llama):
    with LLM(tiny_llama(), max_model_len=40, **SMALL) as llm:
        assert llm.max_model_len == 40
        output = llm.generate([1, 2, 3], SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))[0]
        assert (len(output.token_ids), output.finish_reason) == (37, "length")
        with pytest.raises(InvalidArgument, match="context of 40"):
            llm.generate([1, 2, 3], greedy(38))


def test_default_params_are_the_makers_advice(llm, tiny_llama, tmp_path):
    assert llm.default_params(max_tokens=3) == SamplingParams(max_tokens=3)
    shutil.copytree(tiny_llama(), tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(
        '{"temperature": 0.5, "top_k": 9, "do_sample": true}'
    )
    with LLM(tmp_path / "m", **SMALL) as advised:
        assert advised.default_params() == SamplingParams(temperature=0.5, top_k=9)
        assert advised.default_params(temperature=1.5).temperature == 1.5
    (tmp_path / "m" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    with LLM(tmp_path / "m", **SMALL) as advised:
        assert advised.default_params().temperature == 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        (["the", []], "prompt 1: .*empty"),
        (["the", [1, 331]], "prompt 1: .*331"),
        ([[1], [-1]], "prompt 1: .*-1"),
        ([[1], [0.5]], "prompt 1"),
        (["the", None], "prompt 1"),
        (["the", [[1]]], "prompt 1: .*flat"),
        ([[1] * 600, "the"], "prompt 0: .*context"),
        ([], None),
        ("", "empty"),
        (b"the", "bytes"),
        (7, "int"),
        ({"a": 1}, "dict"),
    ],
)
def test_a_bad_prompt_stops_the_batch_before_it_runs(llm, prompts, reason):
    if reason is None:
        return
    before = llm.engine.query()
    with pytest.raises(InvalidArgument, match=reason):
        llm.generate(prompts, greedy())
    after = llm.engine.query()
    assert not llm.scheduler.has_work
    assert (after.running, after.waiting, after.prefix_queries) == (0, 0, before.prefix_queries)
    assert len(llm.generate("the", greedy(2, ignore_eos=True))[0].token_ids) == 2


def test_bad_streams_and_chats_raise_at_once(llm):
    with pytest.raises(InvalidArgument, match="n must be 1"):
        llm.stream("the", SamplingParams(n=2))
    with pytest.raises(InvalidArgument, match="empty"):
        llm.stream("")
    for messages in ([], [{"content": "no role"}], [[{"role": "user", "content": "a"}], []]):
        with pytest.raises(InvalidArgument):
            llm.chat(messages)
    assert not llm.scheduler.has_work


def test_without_a_tokenizer_ids_still_work(llm, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama(), tmp_path / "m")
    for file in (tmp_path / "m").glob("tokenizer*"):
        file.unlink()
    with LLM(tmp_path / "m", **SMALL) as bare:
        output = bare.generate([1, 2, 3], greedy())[0]
        assert output.token_ids == llm.generate([1, 2, 3], greedy())[0].token_ids
        assert output.text == ""
        for call in (lambda: bare.generate("the"), lambda: bare.stream([1]), lambda: bare.chat([{}])):
            with pytest.raises(InvalidArgument, match="tokenizer"):
                call()


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"dtype": "int4"}, ConfigError, "int4"),
        ({"kv_dtype": "int4"}, ConfigError, "kv_dtype"),
        ({"device": "tpu"}, ConfigError, "tpu"),
        ({"isa": "sse9"}, ConfigError, "sse9"),
        ({"threads": 0}, ConfigError, "threads"),
        ({"threads": "2"}, ConfigError, "threads"),
        ({"token_budget": 0}, ConfigError, "token_budget"),
        ({"token_budget": "big"}, ConfigError, "token_budget"),
        ({"max_sequences": -1}, ConfigError, "max_sequences"),
        ({"max_model_len": 10**6}, ConfigError, "max_model_len"),
        ({"kv_memory": "lots"}, ConfigError, "lots"),
        ({"kv_memory": "100TiB"}, splitfuse.MemoryError, "MiB"),
    ],
)
def test_bad_options(tiny_llama, options, error, reason):
    with pytest.raises(error, match=reason):
        LLM(tiny_llama(), **{**SMALL, **options})


def test_a_missing_model_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError):
        LLM(tmp_path, **SMALL)


def test_sizes():
    assert parse_bytes(5) == 5
    for text, size in {
        "512MiB": 512 << 20,
        "2GB": 2 * 10**9,
        "1.5 GiB": 3 << 29,
        "100": 100,
        "4k": 4000,
    }.items():
        assert parse_bytes(text) == size
    for bad in (0, -1, True, 1.5, None, "", "MiB", "-1GB", "1e9", "5XB", "0", "1 2"):
        with pytest.raises(ConfigError, match="size"):
            parse_bytes(bad)


def test_auto_options_are_the_natives_own():
    config = engine_config()
    assert (config.device, config.dtype, config.isa) == ("cpu", "bfloat16", "auto")
    assert (config.kv_dtype, engine_config(kv_dtype="int8").kv_dtype) == ("auto", "int8")
    assert (config.threads, config.token_budget, config.max_model_len, config.kv_bytes) == (0, 0, 0, 0)
    config = engine_config(threads=3, token_budget=9, max_model_len=8, kv_memory="1KiB", prefix_caching=False)
    assert (config.threads, config.token_budget, config.max_model_len, config.kv_bytes) == (3, 9, 8, 1024)
    assert config.prefix_caching is False
    assert (engine_config().pin_threads, engine_config(pin_threads=True).pin_threads) == (False, True)


# ---------------------------------------------------------------- life


def test_the_memory_plan_is_printed_if_wanted(tiny_llama, capfd):
    with LLM(tiny_llama(), **{**SMALL, "verbose": True}) as llm:
        captured = capfd.readouterr()
        assert "memory plan" in captured.err
        assert "KV pool" in captured.err
        assert llm.engine.describe() in captured.err
        assert "budget 48:" not in captured.err
        assert captured.out == ""
    with LLM(tiny_llama(), **SMALL):
        assert capfd.readouterr().err == ""


def test_a_measured_budget_is_explained(tiny_llama, capfd):
    with LLM(tiny_llama(), **{**SMALL, "verbose": True, "token_budget": "auto"}) as llm:
        said = capfd.readouterr().err
        assert f"token budget {llm.engine.query().token_budget}: the fewest" in said
        for tokens, rate in llm.engine.budget_curve():
            assert f"{tokens}: {rate:,.0f}" in said


@pytest.mark.parametrize("policy", ["splitfuse", "prefill_first", "mlfq"])
def test_a_policy_changes_no_answer(llm, tiny_llama, policy):
    with LLM(tiny_llama(), policy=policy, **SMALL) as other:
        whole = policy == "prefill_first"
        assert other.engine.memory_plan.max_step_tokens == (other.max_model_len if whole else 48)
        assert isinstance(other.scheduler, POLICIES[policy])
        prompts = [*TEXTS, list(range(200))]
        assert tokens(other.generate(prompts, greedy())) == tokens(llm.generate(prompts, greedy()))


def test_an_unknown_policy_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="no policy 'fifo'; there are: splitfuse, "):
        LLM(tmp_path / "nowhere", policy="fifo")


def test_leaving_a_stream_cancels_it(llm):
    for piece in llm.stream("the cat", greedy(400, ignore_eos=True)):
        assert isinstance(piece, str)
        break
    wait_idle(llm)
    assert llm.engine.query().used_blocks == 0


def test_a_stream_that_is_never_read_never_runs(llm):
    before = llm.engine.query().prefix_queries
    llm.stream("the cat", greedy(400))
    time.sleep(0.05)
    assert llm.engine.query().prefix_queries == before


def test_after_close_everything_raises(tiny_llama):
    llm = LLM(tiny_llama(), **SMALL)
    stream = llm.stream("the", greedy())
    llm.close()
    llm.close()
    for call in (
        lambda: llm.generate("the"),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        lambda: llm.stream("the"),
        lambda: llm.engine.step(),
    ):
        with pytest.raises(StateError, match="closed"):
            call()
    assert "closed" in repr(llm)
    with pytest.raises(StateError):
        next(stream)


def test_close_ends_what_runs_in_other_threads(tiny_llama):
    llm = LLM(tiny_llama(), **SMALL)
    reasons = []

    def work():
        reasons.append(llm.generate("the cat", greedy(450, ignore_eos=True))[0].finish_reason)

    thread = threading.Thread(target=work)
    thread.start()
    while not llm.scheduler.has_work:
        time.sleep(0.001)
    llm.close()
    thread.join(10)
    assert reasons == ["abort"]


def test_threads_share_it(llm):
    expected = tokens(llm.generate(TEXTS, greedy(20)))
    got = {}

    def work(i):
        got[i] = (
            tokens(llm.generate(TEXTS, greedy(20))) if i % 2 else "".join(llm.stream(TEXTS[0], greedy(20)))
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    text = llm.generate(TEXTS[0], greedy(20))[0].text
    assert got == {i: expected if i % 2 else text for i in range(6)}


def test_dropping_the_last_reference_frees_it(tiny_llama):
    llm = LLM(tiny_llama(), **SMALL)
    scheduler, engine = llm.scheduler, llm.engine
    del llm
    gc.collect()
    assert scheduler._thread is None
    with pytest.raises(StateError, match="closed"):
        engine.step()


def test_a_program_that_just_ends_ends(tiny_llama):
    program = f"""
import itertools, sys
from splitfuse import LLM, SamplingParams
llm = LLM({str(tiny_llama())!r}, dtype="float32", kv_memory="16MiB", token_budget=48)
stream = llm.stream("the", SamplingParams(max_tokens=450, ignore_eos=True))
print(len(list(itertools.islice(stream, 3))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_an_engine_of_ones_own(llm):
    """The same answers from put and step alone."""
    engine = llm.engine
    prompts = [llm.tokenizer.encode(text) for text in TEXTS]
    expected = tokens(llm.generate(TEXTS, greedy(9, ignore_eos=True)))
    native = greedy(9, ignore_eos=True).to_native(max_tokens=9, seed=0)
    made = {-1 - i: [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.put(-1 - i, prompt, native)
    while engine.has_work():
        output = engine.step()
        for sequence, token in zip(output.ids.tolist(), output.tokens.tolist(), strict=True):
            made[sequence].append(token)
    for sequence in made:
        engine.flush(sequence)
    assert list(made.values()) == expected


def test_smollm2_answers(smollm2):
    with LLM(smollm2, max_model_len=512, kv_memory="64MiB", verbose=False) as llm:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        output = llm.chat(question, SamplingParams(max_tokens=30, temperature=0.0))[0]
        assert "Paris" in output.text
        assert output.finish_reason == "stop"
        assert "<|im_end|>" not in output.text
        assert "".join(llm.stream(question, SamplingParams(max_tokens=30, temperature=0.0))) == output.text
