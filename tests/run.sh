#!/usr/bin/env bash
# Installs what the tests need, below build/, and runs every test.
#   tests/run.sh                every stage
#   tests/run.sh lint cpp       only these, after one full run of setup
# PYTHON names the interpreter (python3). The last line counts tests: N passed, N failed.
set -euo pipefail
cd "$(dirname "$0")/.."

stages=(setup lint cpp threads fuzz arm cuda python isas)
python=${PYTHON:-python3}
jobs=$(nproc)
reports=build/reports
export PATH="$PWD/build/venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 CTEST_OUTPUT_ON_FAILURE=1

fail() {
  echo "tests/run.sh: $*" >&2
  exit 1
}

# ---- setup: system packages, a virtual environment, the wheel in it

compiles() { g++ -std=c++20 -fsyntax-only "$@" -x c++ - 2>/dev/null; }

stage_setup() {
  command -v "$python" >/dev/null || fail "no $python; splitfuse needs Python >= 3.10 (PYTHON=... names another)"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$python" --version) is too old; splitfuse needs Python >= 3.10"
  local missing=()
  command -v g++ >/dev/null || missing+=(g++)
  echo '#include <gtest/gtest.h>' | compiles || missing+=(libgtest-dev)
  echo '#include <Python.h>' | compiles "$("$python" -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))')" ||
    missing+=(python3-dev)
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  # The kernels for Arm are built for it and run under emulation.
  command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
  command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
  [ -d /usr/src/googletest ] || missing+=(googletest)
  # The server's page is tested in a real browser.
  command -v chromium >/dev/null || missing+=(chromium)
  command -v chromedriver >/dev/null || missing+=(chromium-driver)
  if ((${#missing[@]})); then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "this needs: ${missing[*]}. As root: apt-get install ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
  fi

  [ -x build/venv/bin/python ] || "$python" -m venv build/venv
  # torch first and pinned, or another requirement would choose its version.
  pip install -qq torch==2.13.0
  rm -rf build/dist
  pip wheel -qq --no-deps -w build/dist .
  local wheel
  wheel=$(echo build/dist/splitfuse-*.whl)
  echo "$wheel: $(stat -c %s "$wheel") bytes"
  pip install -qq --force-reinstall --no-deps "$wheel"
  pip install -qq "$wheel[test,lint]"
}

# ---- lint

sources() { find cpp cuda python/bindings tests/cpp "$@"; }

tidy() {  # tidy NAME <FILES: as they are compiled in build/NAME
  xargs -P "$jobs" -n 1 clang-tidy --quiet -p "build/$1" 2>"build/$1-tidy.log" ||
    { tail -n 20 "build/$1-tidy.log" >&2; return 1; }
}

stage_lint() {
  ruff check .
  ruff format --check .
  mypy
  sources -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format --dry-run -Werror
  configure lint -DSPLITFUSE_PYTHON=ON -Dpybind11_DIR="$(python -m pybind11 --cmakedir)"
  sources -name '*.cc' -not -path '*/consumer/*' -not -name '*_neon*' -not -path 'cuda/*' -not -name 'cuda_*' | tidy lint
}

# ---- C++

configure() {  # configure NAME [cmake arguments]: a build tree at build/NAME
  local name=$1
  shift
  cmake -S . -B "build/$name" -G Ninja -DSPLITFUSE_TESTS=ON -DSPLITFUSE_WERROR=ON -DSPLITFUSE_CUDA=OFF "$@" \
    >"build/$name.log" ||
    { cat "build/$name.log" >&2; return 1; }
}

sanitized() {  # sanitized NAME SANITIZERS LABEL [TARGET...]: builds and runs the C++ tests of that label
  configure "$1" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSPLITFUSE_SANITIZE="$2"
  cmake --build "build/$1" -j "$jobs" --target "${@:4}"
  # gcc's thread sanitizer cannot live with every layout of randomised addresses.
  local fixed=()
  setarch -R true 2>/dev/null && fixed=(setarch -R)
  "${fixed[@]}" ctest --test-dir "build/$1" --no-tests=error -L "$3"
}

stage_cpp() { sanitized asan "address;undefined" unit all; }
stage_threads() { sanitized tsan thread threads thread_pool_test engine_test; }
stage_fuzz() { build/asan/tests/cpp/fuzz_safetensors --seconds 60; }

stage_arm() {  # the kernels for 64-bit Arm, on an emulated processor that has every extension
  local gtest=$PWD/build/arm-gtest objects
  local tests=(base_test checkpoint_test engine_test kernels_attention_test kernels_experts_test kernels_test
    rungs_test thread_pool_test)
  # gcc 12 for Arm breaks down over one of the tests at -O3; the kernels get that all the same.
  local flags=("-DCMAKE_TOOLCHAIN_FILE=$PWD/cmake/aarch64-linux-gnu.cmake" -DCMAKE_BUILD_TYPE=Release
    "-DCMAKE_CXX_FLAGS_RELEASE=-O2 -DNDEBUG")
  cmake -S /usr/src/googletest -B "$gtest" -G Ninja "${flags[@]}" -DBUILD_GMOCK=OFF \
    "-DCMAKE_INSTALL_PREFIX=$gtest/installed" >build/arm-gtest.log
  cmake --build "$gtest" --target install >>build/arm-gtest.log
  configure arm "${flags[@]}" "-DCMAKE_PREFIX_PATH=$gtest/installed"
  cmake --build build/arm -j "$jobs" --target "${tests[@]}"
  # As tests/test_binary.py has it: the linker could take such a copy for every processor.
  objects=$(find build/arm -name '*_neon*.cc.o')
  [ -n "$objects" ] || fail "no kernels for Arm were built"
  # shellcheck disable=SC2086
  if aarch64-linux-gnu-nm -AC $objects | grep ' [WVu] '; then
    fail "files of an instruction set leave symbols that the linker may share"
  fi
  sources -name '*_neon*.cc' | tidy arm
  # The emulator does not tell which pages are resident.
  GTEST_FILTER=-Memory.IsResidentWhoeverTouchedIt ctest --test-dir build/arm --no-tests=error -j "$jobs" -L arm
}

# ---- CUDA

# What is fetched lies apart from the virtual environment, in which torch may want other versions of it.
toolkit=$PWD/build/cuda-toolkit

fetch_toolkit() {
  local wheels=(nvidia-cutlass==4.2.0.0)
  if ! command -v nvcc >/dev/null; then
    wheels+=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
      nvidia-cuda-cccl==13.0.85)
  fi
  [ "$(cat "$toolkit/wheels" 2>/dev/null)" != "${wheels[*]}" ] || return 0
  rm -rf "$toolkit"
  pip install -qq --no-deps --target "$toolkit" "${wheels[@]}"
  if [ -d "$toolkit/nvidia/cu13" ]; then  # CMake looks for names that wheels, which hold no links, lack
    ln -s lib "$toolkit/nvidia/cu13/lib64"
    ln -s libcudart.so.13 "$toolkit/nvidia/cu13/lib/libcudart.so"
  fi
  echo "${wheels[*]}" >"$toolkit/wheels"
}

stage_cuda() {  # the CUDA backend for all its architectures; what needs no GPU is run
  fetch_toolkit
  command -v nvcc >/dev/null || export CUDACXX="$toolkit/nvidia/cu13/bin/nvcc"
  configure cuda -DCMAKE_BUILD_TYPE=Release -DSPLITFUSE_CUDA=ON \
    -DSPLITFUSE_CUTLASS_DIR="$toolkit/cutlass_library/source/include"
  cmake --build build/cuda -j "$jobs" --target cuda_tests
  find cuda tests/cpp/cuda_* -name '*.cc' -not -name no_cuda.cc | tidy cuda
  ctest --test-dir build/cuda --no-tests=error -L cuda
}

# ---- Python, on the installed wheel

stage_python() { python -m pytest --junitxml="$reports/python.xml"; }

stage_isas() {  # the other rungs of the ladder; what no kernel touches ran above
  local isa
  for isa in $(python -c 'from splitfuse import _core; print(*_core.cpu_isas()[:-1])'); do
    echo "-- SPLITFUSE_CPU_ISA=$isa"
    SPLITFUSE_CPU_ISA=$isa python -m pytest --junitxml="$reports/python-$isa.xml" -m "not machine_independent"
  done
}

# ---- all of it

count() {  # prints "N passed, N failed"; $1: stages that failed
  "$python" - "$1" <<'PY'
import pathlib
import sys
import xml.etree.ElementTree as xml

total = bad = skipped = 0
build = pathlib.Path("build")
for report in [*build.glob("reports/*.xml"), *build.glob("*/reports/*.xml")]:
    for suite in xml.parse(report).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        bad += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0)) + int(suite.get("disabled", 0))
good = total - bad - skipped
print(f"{good} passed, {max(bad, int(sys.argv[1]))} failed" + (f", {skipped} skipped" if skipped else ""))
PY
}

main() {
  local chosen=("$@") done=() stage start failed=0
  ((${#chosen[@]})) || chosen=("${stages[@]}")
  for stage in "${chosen[@]}"; do
    [[ " ${stages[*]} " == *" $stage "* ]] || fail "no stage '$stage'; there are: ${stages[*]}"
  done
  mkdir -p build
  rm -rf "$reports" build/*/reports
  mkdir -p "$reports"
  for stage in "${chosen[@]}"; do
    echo "== $stage"
    start=$SECONDS
    # A process of its own, so that the first failing command ends the stage.
    if "$BASH" "$0" --stage "$stage"; then
      done+=("$(printf '%-8s ok      %4d s' "$stage" $((SECONDS - start)))")
    else
      done+=("$(printf '%-8s FAILED  %4d s' "$stage" $((SECONDS - start)))")
      failed=1
      break
    fi
  done
  printf '\n'
  printf '%s\n' "${done[@]}"
  count "$failed"
  exit "$failed"
}

if [ "${1:-}" = --stage ]; then
  "stage_$2"
else
  main "$@"
fi
