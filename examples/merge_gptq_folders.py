"""Two language models that others quantized, merged on their integers: no float originals, memory for a few tensors.

    pip install "hdrq[cli]"
    python examples/merge_gptq_folders.py first/ second/ merged/

The folders are transformers': config.json with its quantization section, safetensors in one file or in shards. GPTQ,
AWQ and compressed-tensors are read alike; the merged folder has the form of the first, and loads where that loads.
"""

import sys

from hdrq.checkpoint.history import history
from hdrq.export.folders import Folder
from hdrq.merging.files import merge_files, readiness

first, second, out = sys.argv[1:]

# 1. Will it work? Layers are measured on their integers; models that must not be merged are refused, with what differs.
print(readiness([first, second]).verdict)

# 2. One tensor after another, from the shards of both into the shards of the result. Where the mean of two integers
#    lies half-way, systematic rounding takes up and down alike.
report = merge_files([first, second], out, seed=0, report=True)
print(f"mean rounding error {report.total.rounding_error:.3f} of the weights' norm")

# 3. The result remembers what it is made of, by the SHA-256 of every shard.
with Folder(out) as merged:
    print("\n".join(history(merged.manifest).lines()))
