#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than 8 minutes: the ops' tests, the sanitizer, the benches.
#
# Needs Python with torch, triton, numpy and (for the tests) pytest; no network, and no hdrq: it installs its own into a
# temporary folder, with the C++ path if that can be built. A step that fails is recorded and the rest still runs.
#
#   PYTHON=python3 OUT=benchmarks/results benchmarks/gpu.sh
#
# SIZES, DTYPES and TESTS (like "ops/noise methods/graph") narrow it. HDRQ_BENCH_DEVICE=cpu rehearses it where there is no GPU.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${OUT:=$root/benchmarks/results}"
OUT=$(cd "$OUT" && pwd)
python=$(command -v "${PYTHON:-python3}")
sizes=${SIZES:-67108864 65536 4096 16777216} # what the targets speak of comes first: time may run out
limit=470                                    # seconds for everything
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
summary=$OUT/gpu-summary.txt
status=0

# Away from the checkout: there, hdrq/ would shadow what was installed. Kernels run as they are, not interpreted.
cd "$work"
unset TRITON_INTERPRET HDRQ_BACKEND
export PYTHONPATH=$work/site TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor

# step NAME SECONDS COMMAND...: run it under a time limit, keep what it says in $OUT/gpu-NAME.txt, record how it ended.
step() {
    local name=$1 seconds=$2 code=0 start=$SECONDS
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$OUT/gpu-$name.txt" 2>&1 || code=$?
    if [ "$code" -ne 0 ]; then
        status=1
        tail -n 5 "$OUT/gpu-$name.txt"
    fi
    printf '%-10s exit status %d, %d s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$summary"
}

date -u +'taken %Y-%m-%dT%H:%M:%SZ' | tee "$summary"
git -C "$root" describe --always --dirty 2>/dev/null | sed 's/^/commit /' | tee -a "$summary" || true

# pip builds the C++ path, where it can; the Python and Triton parts need only to be put together.
install() {
    mkdir source
    (cd "$root" && cp -r hdrq kernels benchmarks csrc setup.py pyproject.toml README.md LICENSE MANIFEST.in "$OLDPWD/source")
    "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index --target site ./source && return
    rm -rf site && mkdir site && cp -r source/hdrq site/ && cp -r source/kernels source/benchmarks site/hdrq/
}
export -f install
export root python
step install 90 bash -c install

cat >check.py <<'PYTHON'
"""Verify every bench and run each of our providers once, on sizes that end inside a block."""
import sys

import torch

from hdrq.benchmarks.harness import families, load, name

for family in sys.argv[2:] or families():
    bench = load(family)
    for dtype in bench.dtypes:
        for shape in ((1029,), (7, 5, 3, 3)):
            tensors = bench.inputs(shape, sys.argv[1], dtype)
            bench.verify(*tensors)
            for providers in bench.operations.values():
                for provider in providers(*tensors):
                    if provider.ours:
                        provider.run()
        print(family, name(dtype), "verified")
if sys.argv[1] == "cuda":
    torch.cuda.synchronize()
PYTHON
device=${HDRQ_BENCH_DEVICE:-cuda}

show_facts='from hdrq.backends import info; print(info.__file__, *(f"{k}: {v}" for k, v in info.facts().items()), sep="\n")'
step facts 30 "$python" -c "$show_facts"
grep -h '^gpu\|^torch\|^triton\|^backend\|^hdrq' "$OUT/gpu-facts.txt" | tee -a "$summary" || true
command -v nvidia-smi >/dev/null && step device 20 nvidia-smi -q -d CLOCK,POWER,MEMORY

step verify 60 "$python" check.py "$device"

# The ops first, then what stands on them: reconstruction, attention, the propagated activations, CUDA graphs; all under
# PyTorch's default flags. A name that is no file ends the script, so that nothing is left out unseen.
tests=()
for name in ${TESTS:-ops/noise ops/fakequant ops/drop ops/distance ops/rounding ops/ranges ops/merging ops/systematic \
    ops/weights ops/library backends/gpu methods/graph methods/accuracy methods/repeatable prepare/attention \
    calibrate/propagate}; do
    tests+=("$root/tests/${name%/*}/test_${name##*/}.py")
    [ -e "${tests[-1]}" ] || { echo "TESTS must name files of tests/, got $name" | tee -a "$summary"; exit 2; }
done
step tests 240 "$python" -m pytest -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" "${tests[@]}"
tail -n 1 "$OUT/gpu-tests.txt" | tee -a "$summary"

if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
    step sanitizer 45 compute-sanitizer --error-exitcode 9 "$python" check.py "$device"
else
    echo "sanitizer  left out: no compute-sanitizer, or no GPU" | tee -a "$summary"
fi

left=$((limit - SECONDS))
# shellcheck disable=SC2086  # lists of words
step benches "$left" "$python" -m hdrq.benchmarks --device "$device" --out "$OUT" \
    --sizes $sizes --dtypes ${DTYPES:-float32 bfloat16} --seconds $((left > 60 ? left - 40 : left / 2))
if [ "$device" = cuda ]; then
    step predicted 30 "$python" -m hdrq.benchmarks.predicted "$OUT"
    tee -a "$summary" <"$OUT/gpu-predicted.txt"
fi
sed -n '/^Where we lose/,$p' "$OUT/gpu-benches.txt" | tee -a "$summary"

echo "all of it in $SECONDS s, under $OUT, exit status $status" | tee -a "$summary"
exit "$status"
