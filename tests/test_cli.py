"""The splitfuse command, run as a user runs it."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from splitfuse import LLM, SamplingParams, __version__
from splitfuse._core import usable_cores

pytestmark = pytest.mark.machine_independent
COMMAND = [sys.executable, "-m", "splitfuse"]
SMALL = ["--dtype", "float32", "--kv-memory", "16MiB", "--token-budget", "48", "--max-sequences", "16"]
HELP = [
    [], ["generate"], ["chat"], ["convert"], ["info"], ["bench"],
    ["bench", "throughput"], ["bench", "latency"], ["bench", "saturation"], ["bench", "kernels"],
    ["bench", "roofline"],
]  # fmt: skip


def run(*args, stdin="", **kwargs):
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **kwargs,
    )


def succeed(*args, **kwargs):
    done = run(*args, **kwargs)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tiny_llama):
    return str(tiny_llama())


@pytest.fixture(scope="module")
def expected(model):
    """Greedy answers to "the cat", by LLM."""
    with LLM(model, dtype="float32", kv_memory="16MiB", token_budget=48, verbose=False) as llm:
        params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
        chat = llm.chat([{"role": "user", "content": "the cat"}], params)[0]
        return {"generate": llm.generate("the cat", params)[0], "chat": chat}


GREEDY = ["--max-tokens", "10", "--temperature", "0", "--ignore-eos"]


# ---------------------------------------------------------------- help and errors


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help(command):
    text = succeed(*command, "--help")
    assert text.startswith("usage: splitfuse")
    if len(command) < 2:
        assert "examples:" in text


def test_version():
    assert succeed("--version") == f"splitfuse {__version__}\n"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["generate"], "MODEL"),
        (["generate", "/no/such/model", "hi"], "/no/such/model"),
        (["generate", "MODEL", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "MODEL", "hi", "--temperature", "nan"], "temperature"),
        (["generate", "MODEL", "hi", "--max-tokens", "0"], "max_tokens"),
        (["generate", "MODEL", "hi", "--max-tokens", "many"], "max-tokens"),
        (["generate", "MODEL", "hi", "--max-tokens", "9999"], "context"),
        (["generate", "MODEL", ""], "empty"),
        (["generate", "MODEL", "hi", "--stream", "--json"], "--stream"),
        (["generate", "MODEL", "hi", "--logprobs", "2"], "--json"),
        (["generate", "MODEL", "hi", "--wings", "2"], "--wings"),
        (["generate", "MODEL", "hi", "--isa", "sse9"], "sse9"),
        (["generate", "MODEL", "hi", "--kv-memory", "lots"], "lots"),
        (["generate", "MODEL", "hi", "--kv-memory", "100TiB"], "memory plan"),
        (["generate", "MODEL", "hi", "--device", "cuda"], "cuda"),
        (["chat", "MODEL", "--json"], "MESSAGE"),
        (["convert", "MODEL", "/proc/nowhere"], "/proc/nowhere"),
        (["info", "/etc/hostname"], "hostname"),
        (["bench"], "WHAT"),
        (["bench", "throughput", "MODEL", "--requests", "0"], "requests"),
        (["bench", "latency", "MODEL", "--prefill", "9999"], "10000"),
        (["bench", "roofline", "--isa", "sse9"], "sse9"),
    ],
    ids=" ".join,
)
def test_an_error_is_one_line_and_exit_code_2(model, args, reason):
    small = SMALL if args[:1] == ["generate"] and "MODEL" in args and "--kv-memory" not in args else []
    done = run(*[model if a == "MODEL" else a for a in args], *small)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("splitfuse")
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- generate, chat


def test_generate_prints_the_text_alone(model, expected):
    for stream in ("--stream", "--no-stream"):
        assert (
            succeed("generate", model, "the cat", *GREEDY, *SMALL, stream) == expected["generate"].text + "\n"
        )
    assert (
        succeed("generate", model, "-", *GREEDY, *SMALL, stdin="the cat") == expected["generate"].text + "\n"
    )


def test_generate_json(model, expected):
    facts = json.loads(succeed("generate", model, "the cat", "--json", "--logprobs", "2", *GREEDY, *SMALL))
    output = expected["generate"]
    assert facts["prompt"] == "the cat"
    assert facts["prompt_token_ids"] == output.prompt_token_ids
    (answer,) = facts["outputs"]
    assert (answer["text"], answer["token_ids"]) == (output.text, output.token_ids)
    assert (answer["finish_reason"], answer["stop_reason"], answer["index"]) == ("length", None, 0)
    assert [position[0]["token_id"] for position in answer["logprobs"]] == output.token_ids
    assert all(len(position) == 2 for position in answer["logprobs"])


def test_generate_n_and_seed(model):
    args = ["generate", model, "the cat", "--n", "3", "--seed", "4", "--json", "--max-tokens", "8", *SMALL]
    first, again = (json.loads(succeed(*args)) for _ in range(2))
    assert first == again
    assert len({tuple(o["token_ids"]) for o in first["outputs"]}) == 3
    text = succeed("generate", model, "the cat", "--n", "2", "--max-tokens", "4", *SMALL)
    assert "--- 1 of 2\n" in text
    assert "--- 2 of 2\n" in text


def test_generate_stops_before_a_stop_string(model, expected):
    text = expected["generate"].text
    stop = text[4:6]
    assert (
        succeed("generate", model, "the cat", "--stop", stop, *GREEDY, *SMALL)
        == text[: text.index(stop)] + "\n"
    )


def test_verbose_prints_the_plan_on_stderr(model, expected):
    done = run("generate", model, "the cat", "-v", *GREEDY, *SMALL)
    assert done.stdout == expected["generate"].text + "\n"
    assert "memory plan" in done.stderr


def test_chat_answers_a_message(model, expected):
    for stream in ("--stream", "--no-stream"):
        assert succeed("chat", model, "the cat", *GREEDY, *SMALL, stream) == expected["chat"].text + "\n"
    facts = json.loads(succeed("chat", model, "the cat", "--json", *GREEDY, *SMALL))
    assert facts["outputs"][0]["text"] == expected["chat"].text
    assert facts["prompt"] == expected["chat"].prompt


def test_chat_takes_turns_from_a_pipe(model, expected):
    lines = succeed("chat", model, *GREEDY, *SMALL, stdin="the cat\n\nand then?\n")
    with LLM(model, dtype="float32", kv_memory="16MiB", token_budget=48, verbose=False) as llm:
        messages = [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": expected["chat"].text},
            {"role": "user", "content": "and then?"},
        ]
        second = llm.chat(messages, SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True))[0].text
    assert lines == f"{expected['chat'].text}\n{second}\n"


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *args):
        self.fd, end = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *args],
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            preexec_fn=self._own(end),
        )
        os.close(end)
        self.seen = ""

    @staticmethod
    def _own(fd):
        def take():
            import fcntl
            import termios

            fcntl.ioctl(fd, termios.TIOCSCTTY, 0)

        return take

    def until(self, done, seconds=60):
        """Reads until done(what was seen) is true."""
        deadline = time.monotonic() + seconds
        while not done(self.seen):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")

    def type(self, text):
        self.seen = ""
        os.write(self.fd, text.encode())

    def interrupt_until_prompt(self):
        """A Ctrl-C that comes just before the line editor begins to wait is seen only with the next key, so it
        is given again."""
        for _ in range(20):
            self.type("\x03")
            try:
                return self.until(lambda seen: seen.endswith("> "), seconds=3)
            except AssertionError:
                pass
        raise AssertionError(self.seen)


def test_a_conversation_on_a_terminal(model):
    terminal = Terminal("chat", model, "--temperature", "0", "--ignore-eos", *SMALL)
    try:
        terminal.until(lambda seen: "Ctrl-D leaves" in seen and seen.endswith("> "))
        terminal.type("the cat\n")
        terminal.until(lambda seen: len(seen) > 60)
        terminal.interrupt_until_prompt()  # the answer stops, the conversation does not
        terminal.interrupt_until_prompt()  # at the prompt it does nothing
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
        assert "Traceback" not in terminal.seen
    finally:
        terminal.process.kill()
        os.close(terminal.fd)


def start_long(model, **kwargs):
    args = ["generate", model, "the cat", "--stream", "--max-tokens", "500", "--ignore-eos", *SMALL]
    process = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
    assert process.stdout.read(1)
    return process


def test_ctrl_c_is_quiet(model):
    process = start_long(model)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == b""


def test_a_closed_pipe_is_quiet(model):
    process = start_long(model)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(30) == 141
    assert errors == b""


# ---------------------------------------------------------------- convert, info, bench


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_model_gives_the_same_answer(model, expected, tmp_path, dtype):
    out = tmp_path / "out"
    text = succeed("convert", model, out, "--dtype", dtype)
    assert text.startswith(f"{out}: ")
    facts = json.loads(succeed("chat", out, "the cat", "--json", *GREEDY, *SMALL))
    if dtype == "float32":
        assert facts["outputs"][0]["token_ids"] == expected["chat"].token_ids
    assert facts["prompt"] == expected["chat"].prompt


def test_convert_does_not_write_over_a_model(model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = run("convert", model, tmp_path)
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


def test_info(model):
    facts = json.loads(succeed("info", model, "--json", *SMALL))
    config = facts["config"]
    assert (config["hidden_size"], config["num_layers"], config["vocab_size"]) == (88, 3, 331)
    layer = 2 * 88 * (4 + 2) * 24 + 3 * 88 * 116 + 2 * 88
    assert facts["parameters"] == 3 * layer + 2 * 331 * 88 + 88
    assert facts["costs"]["kv_bytes_per_token"] == 2 * 3 * 2 * 24 * 4
    assert facts["costs"]["flops_per_token"] == 2 * (3 * (layer - 2 * 88) + 331 * 88)
    assert facts["memory"]["kv_pool"] <= 16 << 20
    assert facts["machine"]["isa"] in facts["machine"]["isas"]
    assert facts["ceilings"] is None
    text = succeed("info", model, *SMALL)
    for word in ("hidden_size", "memory plan", "KV pool", "instruction sets", "--measure"):
        assert word in text


def test_info_of_an_int8_cache(model):
    facts = json.loads(succeed("info", model, "--json", "--kv-dtype", "int8", *SMALL))
    assert facts["machine"]["kv_dtype"] == "int8"
    assert facts["costs"]["kv_bytes_per_token"] == 2 * 3 * 2 * (24 + 4)
    assert "bytes in int8" in succeed("info", model, "--kv-dtype", "int8", *SMALL)
    done = run("info", model, "--kv-dtype", "int4", *SMALL)
    assert done.returncode == 2
    assert "--kv-dtype" in done.stderr


def test_info_measured(model):
    ceilings = json.loads(succeed("info", model, "--json", "--measure", *SMALL))["ceilings"]
    assert ceilings["read_gbps"] > 0.1
    assert ceilings["peak_gflops"] > 0.1
    decode = ceilings["decode_tokens_per_s_at_256"]
    assert 0 < decode["1"] < decode["8"] < decode["32"]


def test_bench_throughput(model):
    args = ["--requests", "6", "--input", "24", "--output", "8", "--json", *SMALL]
    done = run("bench", "throughput", model, *args)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["requests"] == 6
    assert facts["token_budget"] == 48
    assert facts["output_tokens"] == pytest.approx(facts["output_tokens_per_s"] * facts["seconds"])
    assert facts["of_roof"] > 0
    assert facts["forwards"] >= 8
    assert facts["policy"] == "splitfuse"
    again = json.loads(run("bench", "throughput", model, *args).stdout)
    assert (again["input_tokens"], again["output_tokens"]) == (facts["input_tokens"], facts["output_tokens"])


def test_bench_throughput_by_another_policy(model):
    args = ["--requests", "3", "--input", "200", "--output", "4", "--json", *SMALL]
    facts = json.loads(succeed("bench", "throughput", model, "--policy", "prefill_first", *args))
    assert facts["policy"] == "prefill_first"
    assert facts["forwards"] < facts["input_tokens"] / 48  # whole prompts at once
    done = run("bench", "throughput", model, "--policy", "fifo", *args)
    assert done.returncode == 2
    assert "static_chunk" in done.stderr


def test_bench_latency(model):
    args = ["--prefill", "40", "100", "--batch", "1", "4", "--context", "32", "--steps", "8", "--repeat", "2"]
    done = run("bench", "latency", model, *args, "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [r["tokens"] for r in facts["prefill"]] == [40, 100]
    assert [r["batch"] for r in facts["decode"]] == [1, 4]
    for row in facts["prefill"] + facts["decode"]:
        assert row["tokens_per_s"] > 0
        assert row["of_roof"] > 0
    for row in facts["decode"]:
        assert row["barriers"] >= 3 * 5 or usable_cores() == 1
        seconds = row["in_barriers"] * row["seconds_per_step"]
        assert seconds == pytest.approx(1e-6 * facts["barrier_us"] * row["barriers"])
    host = facts["host_us"]
    assert host["sequences"] == 16
    assert 0 < host["engine"]["p50"] <= host["engine"]["p99"]
    text = run("bench", "latency", model, *args, "--no-host", *SMALL).stdout
    assert "of roof" in text
    assert "in barriers" in text
    assert "roof measured in this run" in text


def test_bench_saturation(model, tmp_path):
    plot = tmp_path / "saturation.png"
    args = [
        "--max",
        "100",
        "--prompt",
        "30",
        "--repeat",
        "2",
        "--kv-memory",
        "16MiB",
        "--max-sequences",
        "16",
    ]
    facts = json.loads(succeed("bench", "saturation", model, *args, "--plot", plot, "--json"))
    tokens = [row["tokens"] for row in facts["rows"]]
    assert tokens == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    best = max(row["tokens_per_s"] for row in facts["rows"])
    for row in facts["rows"]:
        assert row["best_seconds"] <= row["seconds"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["of_best"] == pytest.approx(row["tokens_per_s"] / best)
        assert row["of_roof"] == pytest.approx(row["tokens_per_s"] / row["roof_tokens_per_s"])
    assert facts["plateau"] == next(row["tokens"] for row in facts["rows"] if row["of_best"] >= 0.95)
    assert 16 <= facts["token_budget"] <= 512
    assert [point[0] for point in facts["budget_curve"]] == [64, 128, 256, 512]
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = succeed("bench", "saturation", model, *args, "--max", "9", "--token-budget", "48")
    for word in ("knee", "plateau", "token budget, as given", "of roof"):
        assert word in text


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--max", "1000"], "1000 tokens is more than this engine takes, 512"),
        (["--max", "100", "--prompt", "2"], "50 sequences, more than the 16"),
        (["--plot", "here.txt"], "must end in one of"),
        (["--plot", "nowhere/here.png"], "there is no folder nowhere"),
    ],
)
def test_bench_saturation_refuses(model, tmp_path, args, reason):
    done = run("bench", "saturation", model, *args, *SMALL, cwd=tmp_path)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_at_once(model):
    program = (
        "import sys; sys.modules['matplotlib'] = None; from splitfuse.cli import main;"
        "sys.exit(main(['bench', 'saturation', sys.argv[1], '--plot', 'x.png']))"
    )
    done = subprocess.run([sys.executable, "-c", program, model], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "splitfuse: error: a plot needs matplotlib: pip install 'splitfuse[bench]'\n"


def test_bench_kernels_and_roofline(model):
    facts = json.loads(
        succeed("bench", "kernels", model, "--seconds", "0.001", "--dtype", "float32", "--json")
    )
    assert {row["layer"] for row in facts["linear"]} == {"qkv", "o", "gate, up", "down", "head"}
    assert all(row["us"] > 0 and row["of_roof"] > 0 for row in facts["linear"] + facts["attention"])
    facts = json.loads(succeed("bench", "roofline", "--seconds", "0.1", "--threads", "1", "--json"))
    assert [row["dtype"] for row in facts["rows"]] == ["float32", "bfloat16"]
    assert all(row["read_gbps"] > 0.1 and row["peak_gflops"] > 0.1 for row in facts["rows"])


# ---------------------------------------------------------------- imports


def test_import_is_light_and_fast():
    program = (
        "import sys, time; t = time.perf_counter(); import splitfuse; t = time.perf_counter() - t;"
        "print(t, *[m for m in ('transformers', 'rich', 'torch', 'tokenizers', 'gguf') if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    times = [r.stdout.split() for r in runs]
    assert all(len(t) == 1 for t in times), times
    assert min(float(t[0]) for t in times) < 0.5


def test_names_are_there():
    import splitfuse

    for name in splitfuse.__all__:
        assert getattr(splitfuse, name) is not None
    assert set(splitfuse.__all__) <= set(dir(splitfuse))
    with pytest.raises(AttributeError, match="nonsense"):
        splitfuse.nonsense  # noqa: B018
    assert callable(splitfuse.pipeline)
