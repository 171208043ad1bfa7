"""The integers of models in memory and in files; tests/export/test_folders.py has those of folders."""

import pytest
import torch
from networks import mergeable, quantized

import hdrq
from hdrq.quantizers.layers import quantized_layers


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"affine_weights": True}, {"group_size": 3}])
@pytest.mark.parametrize("bits", ["W3A4", "W8A8", "W10A8"])
def test_integers_stand_for_the_weights(tmp_path, bits, options):
    samples = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = hdrq.quantize(mergeable(0), samples, "rtn", bits={"*": bits}, **options)
    hdrq.save(model, tmp_path / "a.safetensors")
    found = hdrq.integers(model)
    assert list(found) == ["a", "b", "head"]
    again = hdrq.integers(tmp_path / "a.safetensors")
    for name, layer in quantized_layers(model).items():
        own = found[name]
        assert own.codes.dtype == (torch.int16 if bits == "W10A8" else torch.int8)
        assert own.qmin <= int(own.codes.min()) and int(own.codes.max()) <= own.qmax
        weight = hdrq.ops.dequantize(
            own.codes, own.scale, zero_point=own.zero_point, axis=own.axis, group_size=own.group_size
        )
        assert torch.equal(weight, layer.latent)
        assert torch.equal(again[name].codes, own.codes) and torch.equal(again[name].scale, own.scale)


def test_they_are_copies():
    model = quantized(0)
    before = {name: layer.latent.clone() for name, layer in quantized_layers(model).items()}
    scales = {name: layer.weight_quantizer.scale.clone() for name, layer in quantized_layers(model).items()}
    for each in hdrq.integers(model).values():
        each.codes.zero_()
        each.scale.zero_()
    assert all(torch.equal(layer.latent, before[name]) for name, layer in quantized_layers(model).items())
    assert all(
        torch.equal(layer.weight_quantizer.scale, scales[name]) for name, layer in quantized_layers(model).items()
    )


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match=r"models must be results of hdrq\.quantize, got a plain Mergeable"):
        hdrq.integers(mergeable(0))
