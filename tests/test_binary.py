"""What is inside the binaries: what they need, what they show, and where wide vectors are."""

import importlib.metadata
import re
from pathlib import Path

import pytest

import native
import splitfuse

pytestmark = pytest.mark.machine_independent

PACKAGE = Path(splitfuse._core.__file__).parent
LIBRARY = PACKAGE / "lib/libsplitfuse.so.0"
ISA_OBJECT = re.compile(r"_(avx2|avx_vnni|avx512|avx512_vnni|avx512_bf16)\.cc\.o$")
WIDE_REGISTER = re.compile(r"%[yzt]mm\d")
SOURCES = native.ROOT / "python/splitfuse"
HEADERS = native.ROOT / "cpp/include"
MAX_WHEEL_BYTES = 6_000_000


def needed(binary: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", native.run("readelf", "-d", binary)))


def test_library_needs_the_system_and_nothing_else():
    system = {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libpthread.so.0",
        "ld-linux-x86-64.so.2",
    }
    assert needed(LIBRARY) <= system
    loaded = native.run("ldd", LIBRARY)
    assert "libtorch" not in loaded
    assert "libpython" not in loaded


def test_module_needs_only_the_library_beside_it():
    module = Path(splitfuse._core.__file__)
    assert "libsplitfuse.so.0" in needed(module)
    resolved = re.search(r"libsplitfuse\.so\.0 => (\S+)", native.run("ldd", module))
    assert resolved
    assert Path(resolved[1]).resolve() == LIBRARY.resolve()
    assert "torch" not in native.run("ldd", module)


def test_library_shows_its_own_namespace_only():
    own = re.compile(r"(typeinfo for |typeinfo name for |vtable for )?splitfuse::")
    symbols = [
        line.split(maxsplit=2)[2] for line in native.run("nm", "-DC", "--defined-only", LIBRARY).splitlines()
    ]
    assert "splitfuse::version()" in symbols
    assert [symbol for symbol in symbols if not own.match(symbol)] == []


def objects() -> list[Path]:
    return sorted(path for path in native.build().rglob("*.o") if "splitfuse" in str(path.parent))


def test_wide_vectors_stay_in_the_files_of_their_instruction_set():
    wide = {file.name for file in objects() if WIDE_REGISTER.search(native.run("objdump", "-d", file))}
    outside = {name for name in wide if not ISA_OBJECT.search(name)}
    assert outside == set()
    # The search itself works: where wide vectors belong, they are.
    assert {
        "gemm_avx2.cc.o",
        "gemm_avx512.cc.o",
        "gemm_avx512_bf16.cc.o",
        "integer_gemm_avx512_vnni.cc.o",
    } <= wide


def test_files_of_an_instruction_set_leave_nothing_the_linker_may_share():
    # A weak symbol compiled here could become the copy that every other file calls, on any processor.
    weak = re.compile(r"^\S+ [WVu] .+$", re.MULTILINE)
    found = {
        file.name: symbols for file in objects() if (symbols := weak.findall(native.run("nm", "-C", file)))
    }
    assert {name: symbols for name, symbols in found.items() if ISA_OBJECT.search(name)} == {}
    # The search itself works: other files have plenty.
    assert "engine_impl.cc.o" in found


def test_installed_package_holds_every_file():
    sources = {
        str(file.relative_to(SOURCES))
        for kind in ("*.py", "*.pyi", "py.typed")
        for file in SOURCES.rglob(kind)
    }
    headers = {str(file.relative_to(HEADERS)) for file in HEADERS.rglob("*.h")}
    assert sources
    assert headers
    installed = {str(file) for file in importlib.metadata.distribution("splitfuse").files or []}
    assert {f"splitfuse/{file}" for file in sources} | {
        f"splitfuse/include/{file}" for file in headers
    } <= installed


def test_installed_package_is_small_and_needs_no_torch():
    distribution = importlib.metadata.distribution("splitfuse")
    files = [file for file in distribution.files or [] if "__pycache__" not in file.parts]
    assert any(file.name == "libsplitfuse.so.0" for file in files)
    # Unpacked, so the wheel is smaller still.
    assert sum(Path(file.locate()).stat().st_size for file in files) <= MAX_WHEEL_BYTES
    plain = [name for name in distribution.requires or [] if "extra ==" not in name]
    assert not any(re.match(r"(torch|accelerate)\b", name) for name in plain)
