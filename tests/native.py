"""A release build of the C++ library at build/native, shared by the tests that look at it."""

import functools
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/native"


def run(*command: str | Path, **options) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def build() -> Path:
    """Builds what has changed; the folder."""
    run(
        "cmake",
        "-S",
        ROOT,
        "-B",
        BUILD,
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DSPLITFUSE_PYTHON=OFF",
    )
    run("cmake", "--build", BUILD, "-j", str(os.cpu_count()))
    return BUILD
