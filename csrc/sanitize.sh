#!/usr/bin/env bash
# Builds csrc with AddressSanitizer and UndefinedBehaviorSanitizer, and runs what calls it, on every instruction set of this
# machine. PYTHON names the interpreter to use. (ThreadSanitizer sees torch's own libgomp as races.)
#
#   csrc/sanitize.sh                both, in a scratch folder
#   csrc/sanitize.sh build FOLDER   the build alone, which needs pybind11 and no torch
#   csrc/sanitize.sh run FOLDER     what calls it
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
step=${1:-both} scratch=${2:-}
if [ "$step" = both ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi

build() {
  # The flags of setup.py that decide bits; no optimizations, so that a report names its line.
  flags=(-std=c++17 -O0 -g1 -ffp-contract=off -fno-math-errno -Wno-psabi -Wno-maybe-uninitialized -fPIC -fvisibility=hidden
    -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all)
  read -ra includes <<<"-Icsrc $("$python" -m pybind11 --includes)"
  jobs=()
  for source in csrc/*.cpp; do
    if [[ $source == *avx512* ]] && ! grep -qsw avx512vl /proc/cpuinfo; then  # nothing here can call it: a trap in its place
      source=$scratch/no_avx512.cpp
      printf '#include "kernels.h"\nconst hdrq::Kernels& hdrq::avx512_kernels() { __builtin_trap(); }\n' >"$source"
    fi
    g++ "${flags[@]}" "${includes[@]}" -c "$source" -o "$scratch/$(basename "$source" .cpp).o" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job"; done

  g++ -fsanitize=address,undefined -shared "$scratch"/*.o -o "$scratch/_C.so"
}

mkdir -p "$scratch"
[ "$step" = run ] || build
[ "$step" != build ] || exit 0
preload=$(for runtime in libasan.so libubsan.so libstdc++.so; do g++ -print-file-name="$runtime"; done | paste -sd:)

export PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD=$preload "$python" - "$scratch/_C.so" <<'RUN'
import importlib.util
import sys

spec = importlib.util.spec_from_file_location("hdrq._C", sys.argv[1])
sys.modules["hdrq._C"] = importlib.util.module_from_spec(spec)  # before hdrq looks for its own
spec.loader.exec_module(sys.modules["hdrq._C"])

import pytest
import torch

from hdrq import _C, parity

assert _C.__file__ == sys.argv[1]
torch.set_num_threads(4)
report = parity.check(5, backends=["cpp"])
print(*(f"{t.op} on {t.backend}: {t.cases} cases" for t in report.tallies), *report.mismatches, sep="\n")
sys.exit(1 if report.mismatches else pytest.main(["-p", "no:cacheprovider", "tests/ops/test_library.py::TestNative"]))
RUN
