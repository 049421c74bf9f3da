"""The C++ package as an embedder meets it: found by CMake, linked, run; and what CMake says of what is missing."""

import os
import subprocess
import sys

import pytest

import native
import splitfuse

pytestmark = pytest.mark.machine_independent

PROMPT = [1, 4093, 198, 19556, 28, 638, 359, 346, 47]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "demo"
    native.run(sys.executable, "-m", "splitfuse", "convert", "demo", folder)
    return folder


@pytest.fixture(scope="module")
def answer():
    params = splitfuse.SamplingParams(max_tokens=16, temperature=0.0)
    with splitfuse.LLM("demo") as llm:
        return llm.generate(PROMPT, params)[0].token_ids


@pytest.fixture(scope="module")
def installed_prefix(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("prefix")
    native.run("cmake", "--install", native.build(), "--prefix", prefix)
    return prefix


def build_consumer(prefix, folder):
    source = native.ROOT / "tests/cpp/consumer"
    native.run("cmake", "-S", source, "-B", folder, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    native.run("cmake", "--build", folder)
    return folder / "consumer"


@pytest.mark.parametrize("source", ["wheel", "cmake --install"])
def test_consumer_gives_the_tokens_python_gives(source, installed_prefix, checkpoint, answer, tmp_path):
    prefix = splitfuse.cmake_prefix() if source == "wheel" else installed_prefix
    ids = native.run(build_consumer(prefix, tmp_path), checkpoint, *map(str, PROMPT)).split()
    assert [int(token) for token in ids] == list(answer)


def test_consumer_explains_a_bad_checkpoint(installed_prefix, tmp_path):
    consumer = build_consumer(installed_prefix, tmp_path)
    done = subprocess.run([consumer, tmp_path / "absent", "1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "absent" in done.stderr


def configure(folder, *arguments, **environment):
    """What CMake says of a configuration that must be refused."""
    command = ["cmake", "-S", native.ROOT, "-B", folder, "-G", "Ninja", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode != 0
    return " ".join(done.stderr.split())


def test_cuda_on_names_what_is_missing(tmp_path):
    said = configure(tmp_path, "-DSPLITFUSE_CUDA=ON", CUDACXX="/nonexistent/nvcc")
    assert "a CUDA compiler" in said
    assert "CUTLASS headers" in said


def test_cuda_takes_three_values(tmp_path):
    assert "must be AUTO, ON or OFF" in configure(tmp_path, "-DSPLITFUSE_CUDA=YES")


def test_no_compiler_is_said_plainly(tmp_path):
    assert "needs a C++20 compiler" in configure(tmp_path, CXX="/nonexistent/g++")


def test_old_compiler_is_said_plainly(tmp_path):
    old = tmp_path / "old-g++"
    old.write_text('#!/bin/bash\nexec g++ "${@/-std=c++20/-std=c++14}"\n')
    old.chmod(0o755)
    said = configure(tmp_path / "build", CXX=str(old))
    assert "cannot compile a C++20 program" in said
