"""The engine's threads: where they may run, how often they wait for each other, and that they sleep."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines import Run, random_tokens
from splitfuse import ConfigError, _core

pytestmark = pytest.mark.machine_independent
CPUS = sorted(os.sched_getaffinity(0))


def allowed() -> dict[str, list[int]]:
    """Of each thread of this process, the CPUs that it may run on."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        text = next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list:"))
        ranges = [part.split("-") for part in text.split(",")]
        found[task.name] = [cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)]
    return found


def workers_of(make) -> tuple[object, list[list[int]]]:
    """What `make` made, and where the threads that it started may run."""
    before = allowed()
    made = make()
    return made, sorted(cpus for task, cpus in allowed().items() if task not in before)


@pytest.fixture(scope="module")
def model(tiny_llama) -> Path:
    return tiny_llama()


def test_each_pinned_worker_has_a_cpu_of_its_own(model: Path) -> None:
    before = allowed()
    run, workers = workers_of(lambda: Run(model, threads=len(CPUS), pin_threads=True))
    assert workers == [[cpu] for cpu in CPUS[1:]]
    assert "pinned" in run.engine.describe()
    assert len(run.answer(1, random_tokens(1, 20), max_tokens=4)) == 4
    run.engine.close()
    assert {
        task: cpus for task, cpus in allowed().items() if task in before
    } == before  # the caller among them


def test_others_may_run_anywhere(model: Path) -> None:
    run, workers = workers_of(lambda: Run(model, threads=3))
    assert workers == [CPUS, CPUS]
    assert "pinned" not in run.engine.describe()


def test_only_cpus_that_the_caller_may_use_are_taken(model: Path) -> None:
    os.sched_setaffinity(0, CPUS[-1:])
    try:
        with pytest.raises(ConfigError, match="pin_threads: there are 2 threads, and 1 CPUs"):
            Run(model, threads=2, pin_threads=True)
        _, workers = workers_of(lambda: Run(model, threads=0, pin_threads=True))
    finally:
        os.sched_setaffinity(0, CPUS)
    assert workers == []


def test_more_pinned_threads_than_cpus_are_one_line_on_the_command_line(model: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "splitfuse",
        "info",
        str(model),
        "--pin-threads",
        "--threads",
        len(CPUS) + 1,
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"splitfuse: error: pin_threads: there are {len(CPUS) + 1} threads")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("rows", "operations"), [(1, 5), (3, 8)])
def test_the_barriers_of_a_forward(model: Path, rows: int, operations: int) -> None:
    """Four GEMMs and attention wait in each layer; norms and rotation too, unless they are one row's."""
    counts = {}
    for threads in (1, 2):
        run = Run(model, threads=threads)
        run.engine.put(1, random_tokens(1, rows), _core.SamplingParams(max_tokens=2))
        counts[threads] = run.engine.step().barriers
        run.engine.close()
    beginning = 0 if rows == 1 else 2  # rotary angles, embedding
    assert counts == {1: 0, 2: 3 * operations + beginning + 2}  # head, sampling


def test_an_idle_engine_burns_no_core(model: Path) -> None:
    run = Run(model, threads=4)
    run.engine.put(1, random_tokens(1, 20), _core.SamplingParams(max_tokens=4))
    run.engine.step()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.02
