"""A LoRA adapter put into the integers of a quantized model: nothing is dequantized for good, and nothing is trained.

    pip install "hdrq[cli]"
    python examples/add_an_adapter.py quantized.safetensors adapter/ adapted.safetensors

The adapter is a folder of peft. A change smaller than half a step is lost where it is rounded to nearest; systematic
rounding keeps it in the mean, and adds noise elsewhere. This prints what each of the two keeps.
"""

import sys

from hdrq.merging.adding import add_file

model, adapter, out = sys.argv[1:]

# Nothing is written with out=None: what would become of the change is only measured.
nearest = add_file(model, adapter, None, rule="nearest")
kept = add_file(model, adapter, out, rule="systematic", seed=0)
for name, report in (("to nearest", nearest), ("systematic", kept)):
    print(f"{name}: keeps {report.kept:.0%} of the change, off by {report.error:.2f} of its size")
