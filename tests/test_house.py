"""The house rules: who may include or import whom, how long things may be, what the tree may say.

Each rule is a function from the tree (any tree: `Path`) to a list of offences, so that the second half of this file
can show it a tree that breaks the rule.
"""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.machine_independent

# ---- The floors of C++: a folder may include what it names, itself, and the system headers of its column.
# A new folder needs a row here, and a reason in cpp/README.md.

CPP_FLOORS = {
    # folder                  project headers                                        system headers
    "cpp/include/splitfuse": ({"splitfuse"}, {"std"}),
    "cpp/base": ({"splitfuse", "base"}, {"std", "posix"}),
    "cpp/backend": ({"splitfuse", "base", "backend"}, {"std"}),
    "cpp/host": ({"splitfuse", "base", "backend", "host"}, {"std"}),
    "cpp/cpu": ({"splitfuse", "base", "backend", "cpu"}, {"std", "posix"}),
    "cuda": ({"splitfuse", "base", "backend", "cuda"}, {"std", "cuda"}),
    "cuda/device": ({"splitfuse", "base", "cuda"}, {"std", "cuda"}),
    "cuda/gemm": ({"splitfuse", "base", "backend", "cuda"}, {"std", "cuda"}),
    "cuda/attention": ({"splitfuse", "base", "backend", "cuda"}, {"std", "cuda"}),
    "cuda/ops": ({"splitfuse", "base", "backend", "cuda"}, {"std", "cuda"}),
    "cpp/model": ({"splitfuse", "base", "backend", "model"}, {"std", "posix"}),
    "cpp/engine": ({"splitfuse", "base", "backend", "host", "model", "engine"}, {"std", "posix"}),
    "python/bindings": ({"splitfuse", "bindings"}, {"std", "pybind11"}),
}
# Single files that may see more.
CPP_EXCEPTIONS = {
    "python/bindings/bench.cc": {"base", "backend", "host", "cpu", "model"},
    "python/bindings/testing.cc": {"base", "backend", "host", "cpu", "model"},
    "python/bindings/testing_arrays.h": {"base", "backend"},
    "python/bindings/testing_experts.cc": {"base", "backend"},
    "python/bindings/testing_attention.cc": {"backend"},
    "python/bindings/testing_attention.h": {"backend"},
    "python/bindings/testing_engine.cc": {"base", "backend", "host", "model", "engine"},
}
ISAS = r"(avx2|avx_vnni|avx512|avx512_vnni|avx512_bf16|neon|neon_bf16|neon_i8mm)"
INTRINSICS = re.compile(rf"_{ISAS}(-inl)?\.(cc|h)$")  # files of one instruction set
POSIX = re.compile(r"(sys/\w+|linux/\w+|cpuid|fcntl|pthread|sched|unistd)\.h")
CUDA = re.compile(r"cuda\w*\.h|(cub|cute|cutlass|nv)/[\w/.]+|cooperative_groups(/\w+)?\.h")
BACKEND_FACTORY = re.compile(r"\bmake_(cpu|cuda)_backend\b")

# ---- The floors of Python. "local" is the package itself; the standard library is free to all.

PYTHON_FLOORS = {
    "": {"local", "numpy"},
    "bench": {"local", "numpy"},
    "bench/serving": {"local", "numpy"},
    "cli": {"local"},
    "formats": {"local", "numpy"},
    "models": {"local", "numpy"},
    "policies": {"local"},
    "server": {"local", "fastapi", "pydantic", "starlette"},
}
# Each outside library has its file.
PYTHON_EXCEPTIONS = {
    "_progress.py": {"rich"},
    "bench/common.py": {"rich"},
    "bench/saturation.py": {"matplotlib"},
    "bench/serving/http_load.py": {"aiohttp"},
    "bench/serving/plots.py": {"matplotlib"},
    "server/http_protocol.py": {"uvicorn"},
    "bin_file.py": {"torch"},
    "chat_template.py": {"jinja2"},
    "gguf_file.py": {"gguf"},
    "gguf_tokenizer.py": {"tokenizers"},
    "hub.py": {"huggingface_hub"},
    "live_model.py": {"torch", "transformers"},
    "server/metrics.py": {"prometheus_client"},
    "server/serve.py": {"uvicorn"},
    "tokenizer.py": {"tokenizers", "transformers"},
}

CODE = ("cpp", "cuda", "python/bindings", "tests/cpp")
MAX_LINES = 400
MAX_KERNEL_LINES = 600
MAX_TEST_LINES = 700
MAX_FUNCTION = 90  # 70 is the sign; beyond this it is a wall
MAX_KERNEL_FUNCTION = 150
CACHES = {"__pycache__", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
SKIPPED = {".git", ".venv", "build", "dist", *CACHES}


def tree(root: Path, *suffixes: str) -> list[Path]:
    """Every text file of ours, those of the given suffixes only if there are any."""
    files = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        ours = (
            path.is_file() and not SKIPPED & set(inside.parts) and path.suffix not in {".so", ".pyc", ".whl"}
        )
        if ours and (not suffixes or path.suffix in suffixes):
            files.append(inside)
    return files


def in_folder(file: Path, folders: tuple[str, ...]) -> bool:
    return any(file.is_relative_to(folder) for folder in folders)


# ---- Rules


def system_kind(header: str, file: Path) -> str:
    if header.startswith("pybind11/"):
        return "pybind11"
    if header in ("immintrin.h", "arm_neon.h"):
        return (
            "std" if INTRINSICS.search(file.name) else "intrinsics outside the files of one instruction set"
        )
    if POSIX.fullmatch(header):
        return "posix"
    if CUDA.fullmatch(header):
        return "cuda"
    return "std" if re.fullmatch(r"[a-z_]+", header) else "unknown"


def include_offences(root: Path) -> list[str]:
    offences = []
    for file in tree(root, ".h", ".cc", ".cu", ".cuh"):
        if not in_folder(file, ("cpp", "cuda", "python")):
            continue
        folder = file.parent.as_posix()
        if folder not in CPP_FLOORS:
            offences.append(f"{file}: its folder has no row in CPP_FLOORS")
            continue
        ours, system = CPP_FLOORS[folder]
        ours = ours | CPP_EXCEPTIONS.get(file.as_posix(), set())
        text = (root / file).read_text()
        for quote, header in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE):
            if quote == '"':
                floor = header.split("/")[0] if "/" in header else file.parent.name
                allowed = floor in ours
            else:
                floor = system_kind(header, file)
                allowed = floor in system
            if not allowed:
                offences.append(f"{file} includes {header} ({floor})")
        if (
            folder not in ("cpp/backend", "cpp/cpu", "cuda")
            and file.as_posix() not in {"cpp/engine/make_backend.cc", *CPP_EXCEPTIONS}
            and BACKEND_FACTORY.search(text)
        ):
            offences.append(f"{file} names a backend; only cpp/engine/make_backend.cc may")
    return offences


def imported_packages(source: str, depth: int) -> set[str]:
    """Top-level names that a module `depth` folders below the package imports, "local" for the package's own."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level > depth + 1:
                names.add("beyond the package")
            names.add("local" if node.level else (node.module or "").split(".")[0])
    return {"local" if name == "splitfuse" else name for name in names}


def import_offences(root: Path) -> list[str]:
    import sys

    offences = []
    package = root / "python/splitfuse"
    for file in tree(package, ".py"):
        folder = file.parent.as_posix() if file.parent != Path() else ""
        if folder not in PYTHON_FLOORS:
            offences.append(f"python/splitfuse/{file}: its folder has no row in PYTHON_FLOORS")
            continue
        allowed = PYTHON_FLOORS[folder] | PYTHON_EXCEPTIONS.get(file.as_posix(), set())
        for name in imported_packages((package / file).read_text(), len(file.parts) - 1):
            if name not in allowed and name not in sys.stdlib_module_names:
                offences.append(f"python/splitfuse/{file} imports {name}")
    return offences


# What turns data into code. torch's own reader of old checkpoints is told weights_only; pickle is there for its error.
MODULES_THAT_EXECUTE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
EXECUTING_EXCEPTIONS = {"bin_file.py": {"pickle", "torch.load"}}
CALLS_THAT_EXECUTE = re.compile(
    r"eval|exec|compile|__import__|(builtins\.)?(eval|exec)|yaml\.(full_|unsafe_)?load(_all)?|torch\.load"
    r"|(pickle|marshal|shelve)\.\w+"
)


def executing_offences(root: Path) -> list[str]:
    """Nothing that comes from a file or a client is ever run: it might be a stranger's."""
    package = root / "python/splitfuse"
    offences = []
    for file in tree(package, ".py"):
        allowed = EXECUTING_EXCEPTIONS.get(file.as_posix(), set())
        for node in ast.walk(ast.parse((package / file).read_text())):
            found = executed_by(node)
            if found and not found <= allowed:
                offences.append(
                    f"python/splitfuse/{file}:{node.lineno}: {', '.join(sorted(found - allowed))}"
                )
    return offences


def executed_by(node: ast.AST) -> set[str]:
    """What a node imports or calls that could run what it is given."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & MODULES_THAT_EXECUTE
    if isinstance(node, ast.ImportFrom):
        return {node.module or ""} & MODULES_THAT_EXECUTE
    if not isinstance(node, ast.Call):
        return set()
    called = ast.unparse(node.func)
    if called == "torch.load" and any(
        keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
    ):
        return {"torch.load"}
    pickles = any(keyword.arg == "allow_pickle" for keyword in node.keywords)  # numpy.load
    return {f"{called} that may execute"} if pickles or CALLS_THAT_EXECUTE.fullmatch(called) else set()


KERNEL = re.compile(rf"cpp/cpu/\w+(_(ref|{ISAS})\.cc|-inl\.h)|cuda/(\w+/)*\w+\.cuh?")


def is_kernel(file: Path) -> bool:
    return bool(KERNEL.fullmatch(file.as_posix()))


def length_offences(root: Path) -> list[str]:
    offences = []
    for file in tree(root, ".h", ".cc", ".cu", ".cuh", ".py"):
        lines = (root / file).read_text().splitlines()
        limit = MAX_KERNEL_LINES if is_kernel(file) else MAX_LINES
        if file.is_relative_to("tests"):
            limit = MAX_TEST_LINES
        if len(lines) > limit:
            offences.append(f"{file} has {len(lines)} lines, {limit} are the sign of one subject")
        limit = MAX_KERNEL_FUNCTION if is_kernel(file) else MAX_FUNCTION
        for name, length in functions(file, lines):
            if length > limit:
                offences.append(f"{file}: {name} has {length} lines, more than {limit}")
    return offences


def functions(file: Path, lines: list[str]) -> list[tuple[str, int]]:
    """(name, lines) of every function. In C++ by layout, which clang-format holds: up to the brace in its column."""
    if file.suffix == ".py":
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, kinds)]
        return [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in nodes]
    found = []
    opening = re.compile(
        r"^(\s*)(?!namespace|class|struct|enum|union|extern|if|for|while|switch|else|do|try|[:,)])\S.*\{$"
    )
    for start, line in enumerate(lines):
        match = opening.match(line)
        if match and ("(" in line or ")" in line):
            closing = match[1] + "}"
            end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith(closing)), start)
            found.append((line.strip(), end - start + 1))
    return found


def header_offences(root: Path) -> list[str]:
    """Headers choose nothing at compile time, and are read once."""
    offences = []
    for file in tree(root, ".h", ".cuh"):
        if not in_folder(file, CODE):
            continue
        text = (root / file).read_text()
        offences += [
            f"{file}: {line}" for line in re.findall(r"^\s*#\s*(?:if|ifdef|ifndef)\b.*", text, re.MULTILINE)
        ]
        if not file.name.endswith("-inl.h") and "#pragma once" not in text:
            offences.append(f"{file}: no #pragma once")
    return offences


def environment_offences(root: Path) -> list[str]:
    """A switch that README does not list is a switch nobody knows."""
    readme = (root / "README.md").read_text()
    offences = []
    for file in tree(root, ".h", ".cc", ".cu", ".cuh", ".py"):
        if in_folder(file, ("cpp", "cuda", "python")):
            for name in set(re.findall(r'"(SPLITFUSE_[A-Z0-9_]+)"', (root / file).read_text())):
                if name not in readme:
                    offences.append(f"{file}: the environment variable {name} is not in README.md")
    return offences


def unbuilt_offences(root: Path) -> list[str]:
    """Source lists are written by hand, so a file can be forgotten."""
    lists = "".join((root / file).read_text() for file in tree(root, ".txt", ".cmake"))
    listed = {Path(word).stem for word in re.findall(r"[\w./]+", lists)}
    return [f"{file} is in no CMake list" for file in tree(root, ".cc", ".cu") if file.stem not in listed]


def readme_offences(root: Path) -> list[str]:
    """README shows the consumer whole, so it must be the one that is tested."""
    program = (root / "tests/cpp/consumer/main.cc").read_text().strip()
    if program in (root / "README.md").read_text():
        return []
    return ["README.md shows another program than tests/cpp/consumer/main.cc"]


# Spelled so that this file does not offend itself.
PROMISES = re.compile(r"\b(TO[D]O|FI[X]ME|XX[X])\b")
PLACES = re.compile(
    r"(?<![\w.])/(work|home|root|tmp)/\w|\bpypi[.]org|python[h]osted|deb[.]debian|registry[.]npm"
)


def wording_offences(root: Path) -> list[str]:
    """No promises instead of work, and nothing about the machine somebody happened to use."""
    offences = []
    for file in tree(root):
        if file.suffix == ".png":
            continue
        for number, line in enumerate((root / file).read_text().splitlines(), 1):
            if found := PROMISES.search(line) or PLACES.search(line):
                offences.append(f"{file}:{number}: {found[0]}")
    return offences


RULES = [
    include_offences,
    import_offences,
    executing_offences,
    length_offences,
    header_offences,
    environment_offences,
    readme_offences,
    unbuilt_offences,
    wording_offences,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_holds(rule):
    assert rule(ROOT) == []


def headers() -> list[Path]:
    return [
        file for file in tree(ROOT, ".h") if file.is_relative_to("cpp") and not file.name.endswith("-inl.h")
    ]


@pytest.mark.parametrize("header", headers(), ids=str)
def test_header_compiles_alone(header):
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler, "no C++ compiler"
    public = header.is_relative_to("cpp/include")
    folders = ["cpp/include"] if public else ["cpp/include", "cpp"]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{ROOT / folder}" for folder in folders]
    program = f'#include "{header.relative_to(folders[-1])}"\n'
    done = subprocess.run([compiler, *flags, "-x", "c++", "-"], input=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Every rule bites

BROKEN = {
    "cpp/host/up.cc": ('#include "engine/engine_impl.h"\n', include_offences),
    "cpp/cpu/across.cc": ('#include "host/kv_pool.h"\n', include_offences),
    "cpp/base/torch.cc": ("#include <torch/torch.h>\n", include_offences),
    "cpp/cpu/rows.cc": ("#include <immintrin.h>\n", include_offences),
    "cpp/cpu/linear.cc": ("#include <arm_neon.h>\n", include_offences),
    "cpp/cpu/gpu.cc": ("#include <cuda_runtime_api.h>\n", include_offences),
    "cuda/gemm/posix.cc": ("#include <unistd.h>\n", include_offences),
    "cuda/device/up.h": ('#pragma once\n#include "backend/backend.h"\n', include_offences),
    "cpp/include/splitfuse/unix.h": ("#pragma once\n#include <unistd.h>\n", include_offences),
    "cpp/model/choose.cc": ("auto b = make_cpu_backend(t, 1, isa);\n", include_offences),
    "cpp/novel/thing.h": ("#pragma once\n", include_offences),
    "python/bindings/engine.cc": ('#include "base/json.h"\n', include_offences),
    "python/splitfuse/scheduler.py": ("import torch\n", import_offences),
    "python/splitfuse/models/llama.py": (
        "def f():\n    from transformers import AutoConfig\n",
        import_offences,
    ),
    "python/splitfuse/loader.py": ("from ... import tests\n", import_offences),
    "python/splitfuse/novel/thing.py": ("", import_offences),
    "python/splitfuse/hub.py": ("import pickle\n", executing_offences),
    "python/splitfuse/llm.py": ("def f():\n    from marshal import loads\n", executing_offences),
    "python/splitfuse/text.py": ("eval('1')\n", executing_offences),
    "python/splitfuse/request.py": ("exec(given)\n", executing_offences),
    "python/splitfuse/results.py": ("yaml.load(given)\n", executing_offences),
    "python/splitfuse/demo.py": ("np.load(file, allow_pickle=True)\n", executing_offences),
    "python/splitfuse/mii.py": ("torch.load(file, weights_only=True)\n", executing_offences),
    "python/splitfuse/bin_file.py": ("torch.load(file)\n", executing_offences),
    "cpp/base/long.h": ("#pragma once\n" + "\n" * MAX_LINES, length_offences),
    "cpp/base/long.cc": ("void f(int a) {\n" + "  a++;\n" * MAX_FUNCTION + "}\n", length_offences),
    "python/splitfuse/long.py": ("def f():\n" + "    pass\n" * MAX_FUNCTION, length_offences),
    "cpp/base/choice.h": ("#pragma once\n#ifdef HAVE_CUDA\n#endif\n", header_offences),
    "cuda/ops/choice.cuh": ("#pragma once\n#if __CUDA_ARCH__ >= 900\n#endif\n", header_offences),
    "cpp/base/twice.h": ("int f();\n", header_offences),
    "cpp/base/env.cc": ('auto e = std::getenv("SPLITFUSE_SECRET");\n', environment_offences),
    "tests/cpp/consumer/main.cc": ("int main() { return 1; }\n", readme_offences),
    "tests/cpp/forgotten.cc": ("", unbuilt_offences),
    "python/splitfuse/later.py": ("# TO" + "DO: later\n", wording_offences),
    "docs.md": ("see /wo" + "rk/notes\n", wording_offences),
}


@pytest.mark.parametrize("file", BROKEN)
def test_the_rule_sees_a_breach(file, tmp_path):
    text, rule = BROKEN[file]
    (tmp_path / "README.md").write_text("SPLITFUSE_CPU_ISA\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert len(rule(tmp_path)) == 1


def test_the_rules_pass_what_is_right(tmp_path):
    good = {
        "README.md": "SPLITFUSE_CPU_ISA\nint main() {}\n",
        "tests/cpp/consumer/main.cc": "int main() {}\n",
        "cpp/CMakeLists.txt": "engine/engine.cc engine/make_backend.cc cpu/isa.cc cpu/rows_avx2.cc rows_neon.cc\n",
        "tests/cpp/CMakeLists.txt": "main.cc testing.cc\n",
        "cpp/engine/engine.cc": '#include "engine/engine.h"\n#include "host/kv_pool.h"\n#include <sys/mman.h>\n',
        "cpp/engine/make_backend.cc": "auto b = make_cpu_backend(t, 1, isa);\n",
        "cpp/cpu/isa.cc": '#include "cpu/isa.h"\nauto e = std::getenv("SPLITFUSE_CPU_ISA");\n',
        "cpp/cpu/rows_avx2.cc": "#include <immintrin.h>\n",
        "cuda/gemm/tiles.cuh": '#pragma once\n#include <cute/tensor.hpp>\n#include "cuda/device/check.h"\n',
        "cpp/cpu/rows_neon.cc": "#include <arm_neon.h>\n",
        "python/bindings/testing.cc": '#include "host/kv_pool.h"\n#include "bindings.h"\n#include <pybind11/stl.h>\n',
        "python/splitfuse/bin_file.py": "import os\nimport pickle\nimport torch\nfrom . import _core\n"
        "from .models import llama\ntorch.load(os, weights_only=True)\nre.compile('x')\n",
    }
    for file, text in good.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert [offence for rule in RULES for offence in rule(tmp_path)] == []
