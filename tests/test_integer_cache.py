"""Integers that had to be fitted are kept: the next start gives the same answers from them, and nothing that is wrong
with the cache costs more than the fitting."""

import fcntl
import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import copy_of, edit_json, run_python, save_tiny_llama
from engines import random_tokens
from splitfuse import LLM, CheckpointError, SamplingParams, _core, integer_cache, loader
from test_gguf import write_gguf

pytestmark = pytest.mark.machine_independent  # of files, which no instruction set changes
PROMPTS = [random_tokens(5, 30), random_tokens(6, 3)]
DIGEST = "bfce1ef2dca56ed0c769252aa27f95c9a767061f10943dffd026ba87e3507c44"
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
ENGINE = {"kv_memory": "4MiB", "token_budget": 64, "threads": 2, "verbose": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFUSE_CACHE", str(tmp_path / "cache"))
    return integer_cache.folder()


@pytest.fixture
def model(tiny_llama, tmp_path):
    """A copy of its own."""
    return copy_of(tiny_llama(), tmp_path / "model")


def entries(cache):
    return sorted(cache.iterdir()) if cache.exists() else []


def answers(model, quantize="int4", **options):
    """Greedy tokens and every log-probability."""
    with LLM(model, quantize=quantize, **{**ENGINE, **options}) as llm:
        return [(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in llm.generate(PROMPTS, GREEDY)]


def opened(model, quantize="int4"):
    """The model as `LLM` loads it, and what was said."""
    said = []
    return integer_cache.with_integers(loader.load(model), quantize, said.append), said


# ---- The same answers

SOURCES = {
    "float32": {},
    "bfloat16, sharded": {"dtype": "bfloat16", "shards": 3},
    "bin": {"fmt": "bin", "dtype": "bfloat16"},
    "tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
}
GGUFS = {"F16": "int4", "Q6_K": "int4", "Q5_0": "int4", "Q4_1": "int8"}


def assert_kept_and_same(model, quantize, cache):
    for dtype in ("bfloat16", "float32"):
        expected = answers(model, quantize, dtype=dtype, quantize_cache=False)
        assert dtype == "float32" or not entries(cache)
        first, second = (answers(model, quantize, dtype=dtype) for _ in range(2))
        assert first == second == expected
    (entry,) = entries(cache)
    assert [path.name for path in entry.iterdir()] == ["model.safetensors"]
    assert loader.load(entry).weights.format == quantize


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_answers_are_the_same_with_the_cache_and_without(tiny_llama, cache, source, quantize):
    assert_kept_and_same(tiny_llama(**source), quantize, cache)


@pytest.mark.parametrize(("kind", "quantize"), GGUFS.items())
def test_a_gguf_that_is_fitted_anew_is_kept_too(tiny_llama, tmp_path, cache, kind, quantize):
    shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    assert_kept_and_same(write_gguf(tmp_path / "m.gguf", tiny_llama(**shape), kind), quantize, cache)


def test_a_checkpoint_in_another_format_is_kept_too(model, tmp_path, cache):
    loader.load(model).save(tmp_path / "int4", quantize="int4")
    assert_kept_and_same(tmp_path / "int4", "int8", cache)


@pytest.mark.parametrize(("kind", "quantize"), [("Q4_0", "int4"), ("Q8_0", "int8"), ("F32", "none")])
def test_nothing_is_kept_where_nothing_is_fitted(model, tmp_path, cache, kind, quantize):
    file = write_gguf(tmp_path / "m.gguf", tiny_of_32s(tmp_path), kind)
    answers(file, quantize)
    answers(file, "auto")
    loader.load(model).save(tmp_path / "int4", quantize="int4")
    answers(tmp_path / "int4", None)
    assert not entries(cache)


def tiny_of_32s(tmp_path):
    save_tiny_llama(tmp_path / "even", hidden_size=64, intermediate_size=64, head_dim=32)
    return tmp_path / "even"


def test_the_second_start_reads_integers_alone(model, cache):
    expected = answers(model)
    file = model / "model.safetensors"
    status, header = file.stat(), int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as zeroed:  # the same file, by all that is known of it without reading
        zeroed.seek(8 + header)
        zeroed.write(bytes(status.st_size - 8 - header))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert answers(model, quantize_cache=False) != expected
    assert answers(model) == expected


def test_who_asks_is_told_where_they_are(model, cache, capfd):
    answers(model, verbose=True)
    (entry,) = entries(cache)
    assert f"matrices int4 from {entry}" in capfd.readouterr().err


# ---- What an entry depends on


def test_changed_files_and_settings_have_entries_of_their_own(model, cache):
    answers(model)
    answers(model, "int8")
    assert len(entries(cache)) == 2
    save_tiny_llama(model, seed=1)  # of the same size
    changed = answers(model)
    assert changed == answers(model, quantize_cache=False)
    assert len(entries(cache)) == 3
    edit_json(model / "config.json", rms_norm_eps=0.1)
    assert answers(model) == answers(model, quantize_cache=False) != changed
    assert len(entries(cache)) == 4


def test_a_linked_file_is_the_file_it_leads_to(tiny_llama, tmp_path, cache):
    first = opened(tiny_llama())[1]
    (tmp_path / "link").symlink_to(tiny_llama())
    assert opened(tmp_path / "link")[1] == first != []


def made_up(name, shape):
    """The same numbers on every machine."""
    indices = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(len(name) << 20)
    mixed = indices * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    return (mixed.astype(np.float32) / np.float32(2**24) - np.float32(0.5)).reshape(shape)


def test_other_integers_have_another_number(tmp_path, tiny_llama):
    """Where this fails because fitting or the file has changed on purpose: raise FITTING, or old entries will be
    opened, and write the new digest here."""
    config = loader.load(tiny_llama()).config
    shapes = dict(_core.canonical_names(config))
    digest = hashlib.sha256()
    for quantize in ("int8", "int4"):
        source = _core.callback_source(list(shapes), lambda name: made_up(name, shapes[name]))
        _core.write_checkpoint(config, source, "float32", str(tmp_path / quantize), None, quantize)
        for name, tensor in sorted(load_file(tmp_path / quantize).items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    assert (integer_cache.FITTING, digest.hexdigest()) == (1, DIGEST)


def test_integers_do_not_depend_on_the_threads_that_fit_them(tmp_path):
    save_tiny_llama(
        tmp_path / "model", vocab_size=30_000, tie_word_embeddings=True
    )  # a table of several chunks
    cores = os.sched_getaffinity(0)
    for name, used in (("one", {min(cores)}), ("all", cores)):
        os.sched_setaffinity(0, used)
        try:
            loader.load(tmp_path / "model").save(tmp_path / name, quantize="int4")
        finally:
            os.sched_setaffinity(0, cores)
    one, all_of_them = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "all"))
    assert one == all_of_them


# ---- What can go wrong


def test_a_cache_that_cannot_be_made_costs_a_warning(model, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert answers(model) == answers(model, quantize_cache=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "int4 matrices of model are not kept" in record.getMessage()
    assert "Not a directory" in record.getMessage()


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
from splitfuse import LLM, SamplingParams
with LLM(sys.argv[1], quantize="int4", kv_memory="4MiB", token_budget=64, verbose=False) as llm:
    print(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))[0].token_ids)
"""


def test_a_full_disk_costs_a_warning_and_is_left_clean(model, cache):
    done = run_python(FULL, model)
    assert done.returncode == 0
    assert "are not kept for the next start" in done.stderr
    assert "File too large" in done.stderr
    assert entries(cache) == []
    with LLM(model, quantize="int4", quantize_cache=False, **ENGINE) as llm:
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        assert json.loads(done.stdout) == llm.generate([[1, 2, 3]], params)[0].token_ids


def test_weights_beyond_the_format_are_refused_as_ever(tiny_llama, tmp_path, cache):
    shapes = dict(_core.canonical_names(loader.load(tiny_llama()).config))
    source = _core.callback_source(list(shapes), lambda name: made_up(name, shapes[name]) * np.float32(1e7))
    _core.write_checkpoint(
        loader.load(tiny_llama()).config, source, "float32", str(tmp_path / "m.safetensors")
    )
    with pytest.raises(CheckpointError, match="beyond int4"):
        answers(tmp_path / "m.safetensors")
    assert entries(cache) == []


def cut(file, other):
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file, other):
    file.write_bytes(b"")


def of_another_configuration(file, other):
    loader.load(other).save_weights(file, quantize="int4")


def of_another_format(file, other):
    loader.load(other).save_weights(file, quantize="int8")


@pytest.mark.parametrize("damage", [cut, emptied, of_another_configuration, of_another_format])
def test_a_damaged_entry_is_written_anew(model, tiny_llama, cache, damage):
    expected = answers(model)
    (entry,) = entries(cache)
    file = entry / "model.safetensors"
    good = file.read_bytes()
    damage(file, tiny_llama(num_hidden_layers=1) if damage is of_another_configuration else model)
    assert file.read_bytes() != good
    assert answers(model) == expected
    assert entries(cache) == [entry]
    assert file.read_bytes() == good


def test_processes_at_once_do_each_other_no_harm(model, cache):
    save_tiny_llama(model, vocab_size=20_000)  # long enough to meet
    code = """
import sys
from splitfuse import integer_cache, loader
sys.stdin.readline()
model = integer_cache.with_integers(loader.load(sys.argv[1]), "int4", print)
print(model.weights.read("lm_head.weight").sum())
"""
    command = [sys.executable, "-c", code, str(model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    results = [None] * len(processes)

    def finish(i):
        results[i] = processes[i].communicate("go\n", timeout=300)

    threads = [threading.Thread(target=finish, args=(i,)) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.returncode for process in processes] == [0] * len(processes), results
    assert len(set(results)) == 1
    assert results[0][1] == ""
    (entry,) = entries(cache)
    assert f"matrices int4 from {entry}" in results[0][0]


def test_what_a_killed_process_left_is_removed(model, cache):
    for name in (".fit-dead", ".fit-alive"):
        (cache / name).mkdir(parents=True)
        (cache / name / "model.safetensors.tmp-1-0").write_bytes(b"half")
    lock = os.open(cache / ".fit-alive", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        answers(model)
        assert not (cache / ".fit-dead").exists()
        assert len(list((cache / ".fit-alive").iterdir())) == 1
    finally:
        os.close(lock)


# ---- How much is kept


def test_the_entries_last_used_stay_and_nothing_else_is_touched(tiny_llama, tmp_path, cache):
    def use(seed):
        loaded, (said,) = opened(tiny_llama(seed=seed))
        return loaded, Path(said.removeprefix("matrices int4 from "))

    used = [use(seed) for seed in range(integer_cache.KEPT)]
    weights = used[1][0].weights
    expected = [weights.read(name) for name in weights.names()]
    others = [cache / "notes.txt", cache / "a-folder", tmp_path / "outside"]
    others[0].write_text("mine")
    for folder in others[1:]:
        folder.mkdir()
        (folder / "model.safetensors").write_text("mine")
        os.utime(folder, (0, 0))
    link = cache / ("0" * 32)
    link.symlink_to(tmp_path / "outside")
    use(0)  # again, which leaves 1 as the one not used for longest
    newest = use(integer_cache.KEPT)
    left = {path for path in cache.iterdir() if path not in (*others, link)}
    assert left == {entry for _, entry in (*used, newest)} - {used[1][1]}
    assert link.is_symlink()
    for path in others:
        assert (path if path.is_file() else path / "model.safetensors").read_text() == "mine"
    for name, weight in zip(weights.names(), expected, strict=True):  # removed, but open
        np.testing.assert_array_equal(weights.read(name), weight)


# ---- The command line


def command(*arguments, **how):
    tokens = ["--max-tokens", "4", "--temperature", "0", "--kv-memory", "4MiB", "--token-budget", "64"]
    line = [sys.executable, "-m", "splitfuse", "generate", *map(str, arguments), *tokens]
    return subprocess.run(line, stdin=subprocess.DEVNULL, check=True, timeout=300, **how)


def test_the_option_turns_it_off(model, cache):
    off = ["--no-quantize-cache"]
    said = [command(model, "the", "--quantize", "int4", *more, capture_output=True) for more in (off, [], [])]
    assert len({done.stdout for done in said}) == 1
    assert {done.stderr for done in said} == {b""}
    assert len(entries(cache)) == 1
    shutil.rmtree(cache)
    command(model, "the", "--quantize", "int4", *off, capture_output=True)
    assert not entries(cache)


def test_fitting_shows_its_progress_on_a_terminal(model):
    fd, end = pty.openpty()
    try:
        for shown in (True, False):
            command(model, "the", "--quantize", "int4", stdout=subprocess.DEVNULL, stderr=end)
            os.write(end, b"END")
            said = b""
            while not said.endswith(b"END"):
                said += os.read(fd, 1 << 16)
            assert (b"Fitting model to int4" in said) == shown
    finally:
        os.close(end)
        os.close(fd)
