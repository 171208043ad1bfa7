"""Two networks adapted to two domains: quantized, merged on their integers, exported, and run by ONNX Runtime.

    pip install "hdrq[demo,export]"
    python examples/export_a_merge.py --iterations 400 merged.onnx

The networks and images are the demo's, inside the package; nothing is downloaded.
"""

import argparse

import onnxruntime
import torch

import hdrq
import hdrq.export
from hdrq.demo.data import load
from hdrq.demo.model import load_model

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("out", help="the ONNX file to write")
arguments.add_argument("--iterations", type=int, default=400, help="of reconstruction, for each block")
arguments.add_argument("--samples", type=int, default=1024, help="unlabelled images for each domain")
options = arguments.parse_args()

# 1. Each network is quantized on unlabelled images of its own domain. The distance pulls it towards the source, so that
#    the quantized networks stay near enough to be averaged.
source, domains = load_model("source"), ("mnist", "photos")
images = {domain: load(domain, "train")[0][: options.samples] for domain in domains}
quantized = [
    hdrq.quantize(load_model(domain), images[domain], "hdrq", bits="W4A4", source=source, iterations=options.iterations)
    for domain in domains
]

# 2. The merge reads integers and scales only: no data, no training.
merged = hdrq.merge(quantized)

# 3. ONNX with integer weights. ONNX Runtime wants ranges of the outputs of convolutions too, which data tells.
calibration = torch.cat(list(images.values()))[:: len(domains)]
print(hdrq.export.to_onnx(merged, calibration, options.out, runtime="onnxruntime", data=calibration, allow_float=True))

# 4. The same answers, from integer kernels.
session = onnxruntime.InferenceSession(options.out, providers=["CPUExecutionProvider"])
(name,) = [argument.name for argument in session.get_inputs()]
for domain in domains:
    x, labels = (tensor[:1000] for tensor in load(domain, "test"))
    answers = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    here, there = hdrq.evaluate.accuracy(merged, x, labels), float((answers.argmax(1) == labels).float().mean()) * 100
    print(f"{domain}: accuracy {here:.1f}% in PyTorch, {there:.1f}% in ONNX Runtime")
