"""Which kernels run is told, and told truly: of each rung, in every format that the engine has."""

import json
import subprocess
import sys

import pytest

from splitfuse import _core

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

LADDER = ("ref", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16")
ISAS = [isa for isa in LADDER if isa in _core.cpu_isas()]


def up_to(isa: str, *rungs: str) -> str:
    """The highest of `rungs` that is not above `isa`."""
    return [rung for rung in LADDER[: LADDER.index(isa) + 1] if rung in ("ref", *rungs)][-1]


def chosen(**config: str) -> dict[str, tuple[str, str]]:
    return {name: (isa, detail) for name, isa, detail in _core.chosen_kernels(_core.EngineConfig(**config))}


@pytest.mark.parametrize("isa", ISAS)
def test_each_rung_names_the_kernels_it_has(isa: str) -> None:
    wide = up_to(isa, "avx2", "avx512")
    dot = up_to(isa, "avx2", "avx512", "avx512_bf16")
    integers = isa if isa == "avx_vnni" else up_to(isa, "avx2", "avx512", "avx512_vnni")
    for dtype, floats in (("float32", wide), ("bfloat16", dot)):
        got = {name: rung for name, (rung, _) in chosen(isa=isa, dtype=dtype).items()}
        expected = {"linear": floats, "head": floats, "attention": floats, "norms": wide, "sampling": wide}
        assert got == expected
        for quantize in ("int8", "int4"):
            got = {name: rung for name, (rung, _) in chosen(isa=isa, dtype=dtype, quantize=quantize).items()}
            assert got == {**expected, "linear": integers, "head": integers}
        assert chosen(isa=isa, dtype=dtype, kv_dtype="int8")["attention"][0] == wide


TILES = (
    ("ref", "float32", "dense", "float32, 16 columns x 1 rows"),
    ("avx2", "float32", "dense", "float32, 16 columns x 6 rows"),
    ("avx512_vnni", "bfloat16", "int8", "int8, 48 columns x 4 rows"),
)


@pytest.mark.parametrize(("isa", "dtype", "quantize", "tile"), [tile for tile in TILES if tile[0] in ISAS])
def test_the_tile_of_a_linear_kernel(isa: str, dtype: str, quantize: str, tile: str) -> None:
    assert chosen(isa=isa, dtype=dtype, quantize=quantize)["linear"] == (isa, tile)


def test_formats_are_named() -> None:
    kernels = chosen(quantize="int4", kv_dtype="int8")
    assert kernels["linear"][1].startswith("int4")
    assert kernels["head"][1].startswith("int8")
    assert kernels["attention"][1] == "int8 keys and values"
    assert chosen(dtype="float32")["attention"][1] == "float32 keys and values"


def test_info_prints_them(tiny_llama) -> None:
    command = [
        sys.executable,
        "-m",
        "splitfuse",
        "info",
        str(tiny_llama()),
        "--isa",
        "ref",
        "--quantize",
        "int8",
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    )
    assert facts["kernels"]["linear"] == {"isa": "ref", "detail": "int8, 16 columns x 1 rows"}
    assert set(facts["kernels"]) == {"linear", "head", "attention", "norms", "sampling"}
    lines = [line.split() for line in text.splitlines()]
    assert ["linear", "ref", "int8,", "16", "columns", "x", "1", "rows"] in lines
    assert ["attention", "ref", "bfloat16", "keys", "and", "values"] in lines
