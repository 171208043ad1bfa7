"""How much of the output survives: accumulated error of every recipe on a trained network, block by block.

``python -m hdrq.benchmarks.reconstruct_error --bits W4A4 --iterations 300``: the demo's ResNet, adapted to one domain;
relative squared error on data held out, as :func:`hdrq.evaluate.accumulated_errors` defines it.
"""

from __future__ import annotations

import argparse

import torch

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.demo.data import TARGETS, load
from hdrq.demo.model import load_model
from hdrq.methods.job import parse_setting

ROUNDING = {"weight_lr": 1e-2, "activation_lr": 1e-3, "rounding_weight": 1e-3}
WEIGHTS = {"weight_lr": 1.0, "weight_step": 0.02, "fake_quant_fraction": 0.5, "activation_lr": 1e-3}
RATES = {"brecq": ROUNDING, "qdrop": ROUNDING, "hdrq": WEIGHTS}  # a preset's are for 20,000 iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="W4A4")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--domain", default="mnist", choices=TARGETS)
    parser.add_argument("--samples", type=int, default=1024, help="of calibration")
    parser.add_argument("--recipes", nargs="+", default=list(RATES))
    parser.add_argument("--set", nargs="*", default=[], help="knobs of the recipes: name=value")
    parser.add_argument("--preset-rates", action="store_true", help="rates as the presets have them")
    options = parser.parse_args()
    knobs = dict(map(parse_setting, options.set))
    torch.set_num_threads(1)
    model, source = load_model(options.domain), load_model("source")
    images, held_out = load(options.domain, "train")[0][: options.samples], load(options.domain, "test")[0][:512]
    columns = {}
    for recipe in options.recipes:
        quantized = hdrq.quantize(
            model,
            images,
            recipe,
            bits=options.bits,
            source=source if recipe == "hdrq" else None,
            iterations=options.iterations,
            held_out=held_out,
            **({} if options.preset_rates else RATES[recipe]) | knobs,
        )
        report = report_of(quantized)
        columns.setdefault("rtn", report.nearest)
        columns[recipe] = report.errors
        print(f"{recipe}: {report.seconds:.1f} s")
    print(
        f"{'':12}"
        + "".join(f"{name:>10}" for name in columns)
        + "".join(f"{name + '/rtn':>12}" for name in options.recipes)
    )
    for block, nearest in columns["rtn"].items():
        errors = [errors[block] for errors in columns.values()]
        print(
            f"{block:12}" + "".join(f"{e:10.4f}" for e in errors) + "".join(f"{e / nearest:12.2f}" for e in errors[1:])
        )


if __name__ == "__main__":
    main()
