#!/usr/bin/env bash
# Builds splitfuse with its CUDA backend and holds it to the CPU's, on a machine with a GPU and no network.
#   tests/gpu.sh                every stage
#   tests/gpu.sh kernels        only these, after a build
# Needs nvcc >= 13.0, cmake, ninja, and a Python (PYTHON names it) with pybind11, numpy, torch, transformers and pytest.
# CUTLASS: the folder SPLITFUSE_CUTLASS_DIR, the wheel nvidia-cutlass, or cutlass*.tar.gz in or beside this repository.
# The report is build/gpu/report.txt; a folder named by OUT gets a copy, with the logs.
set -uo pipefail
cd "$(dirname "$0")/.."

stages=(build kernels engine memcheck racecheck)
python=${PYTHON:-python3}
build=$PWD/build/gpu
report=$build/report.txt
mkdir -p "$build/logs"

cutlass_dir() {  # prints the folder that holds cute/ and cutlass/; nothing if CMake is to look itself
  if [ -n "${SPLITFUSE_CUTLASS_DIR:-}" ]; then
    echo "$SPLITFUSE_CUTLASS_DIR"
    return
  fi
  local tarball found
  tarball=$(find . .. -maxdepth 1 -name 'cutlass*.tar.gz' | head -n 1)
  [ -n "$tarball" ] || return 0
  if [ ! -d "$build/cutlass" ]; then
    mkdir -p "$build/cutlass"
    tar -xzf "$tarball" -C "$build/cutlass" || return 1
  fi
  found=$(find "$build/cutlass" -path '*/cute/tensor.hpp' | head -n 1)
  [ -n "$found" ] && dirname "$(dirname "$found")"
}

stage_build() {
  local cutlass options=()
  cutlass=$(cutlass_dir) || return 1
  [ -z "$cutlass" ] || options+=("-DSPLITFUSE_CUTLASS_DIR=$cutlass")
  cmake -S . -B "$build/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSPLITFUSE_CUDA=ON -DSPLITFUSE_PYTHON=ON \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$(command -v "$python")" \
    "${options[@]}" || return 1
  cmake --build "$build/cmake" -j "$(nproc)" || return 1
  rm -rf "$build/site"
  mkdir -p "$build/site/splitfuse"
  ln -s "$PWD"/python/splitfuse/* "$build/site/splitfuse/"
  find "$build/cmake" \( -name '_core*.so' -o -name 'libsplitfuse.so*' \) -exec ln -sf {} "$build/site/splitfuse/" \;
  tested -c 'from splitfuse import _core; print(_core.testing.Ops(dtype="bfloat16", device="cuda").describe())'
}

tested() { PYTHONPATH=$build/site "$python" "$@"; }
checked() {  # checked TOOL ARGUMENTS: pytest under a tool of compute-sanitizer; its own findings are faults
  local tool=$1
  shift
  command -v compute-sanitizer >/dev/null || { echo "there is no compute-sanitizer on PATH"; return 1; }
  PYTHONPATH=$build/site compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
    "$python" -m pytest -q -x -p no:cacheprovider "$@"
}

stage_kernels() { tested -m pytest -q tests/gpu_kernels.py; }
stage_engine() { tested -m pytest -q tests/gpu_engine.py; }
stage_memcheck() { checked memcheck tests/gpu_kernels.py -k 'not 128256 and not 4096 and not 20000'; }
stage_racecheck() { checked racecheck tests/gpu_kernels.py -k '577 or 5003 or 520 or mixtral or 64-128'; }

main() {
  local chosen=("$@") stage start status failed=0
  ((${#chosen[@]})) || chosen=("${stages[@]}")
  { nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; nvcc --version | tail -n 2; } >"$report" 2>&1
  for stage in "${chosen[@]}"; do
    [[ " ${stages[*]} " == *" $stage "* ]] || { echo "no stage '$stage'; there are: ${stages[*]}" >&2; exit 2; }
    start=$SECONDS
    # All of it in less than ten minutes.
    timeout --foreground $((570 - SECONDS > 1 ? 570 - SECONDS : 1)) "$BASH" "$0" --stage "$stage" >"$build/logs/$stage.log" 2>&1
    status=$?
    ((status == 0)) || failed=$((failed + 1))
    printf '%-10s %-8s %4d s  %s\n' "$stage" "$( ((status == 0)) && echo ok || echo "failed $status")" \
      $((SECONDS - start)) "$(grep -E '[0-9]+ (passed|failed)|ERROR SUMMARY|RACECHECK SUMMARY' "$build/logs/$stage.log" | tail -n 2 | tr '\n' ' ')" \
      | tee -a "$report"
    ((status == 0)) || { grep -E '^(FAILED|ERROR|E  )|error:|========= ' "$build/logs/$stage.log" | head -n 40; tail -n 15 "$build/logs/$stage.log"; } >>"$report"
  done
  cat "$report"
  [ -z "${OUT:-}" ] || cp -r "$report" "$build/logs" "$OUT/"
  ((failed == 0))
}

if [ "${1:-}" = --stage ]; then
  "stage_$2"
else
  main "$@"
fi
