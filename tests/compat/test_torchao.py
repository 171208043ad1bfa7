"""Our FakeQuantize in the place of torchao's, in its prepare and convert of exported programs."""

import warnings

import pytest
import torch
from helpers import assert_same_bits, sample
from torch import nn

pytest.importorskip("torchao.quantization.pt2e")
from torchao.quantization.pt2e import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.fake_quantize import FakeQuantize as TheirFakeQuantize
from torchao.quantization.pt2e.learnable_fake_quantize import (
    LearnableFakeQuantize as TheirLearnableFakeQuantize,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from hdrq.compat.torchao import FakeQuantize, LearnableFakeQuantize

X = sample((6, 3, 8, 8), special=False)
AFFINE = {"observer": MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 255}
CHANNELS = {"observer": MovingAveragePerChannelMinMaxObserver, "quant_min": -128, "quant_max": 127}
CHANNELS |= {"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, UserWarning, FutureWarning))
        yield


@pytest.mark.parametrize("options", [AFFINE | {"dtype": torch.uint8}, CHANNELS])
def test_values_gradients_and_state_are_torchaos(options):
    results = []
    for kind in (FakeQuantize, TheirFakeQuantize):
        module, x = kind(**options), X.clone().requires_grad_()
        y = module(x)
        y.backward(torch.ones_like(y))
        results.append((y, x.grad, module.state_dict()))
    (y, grad, state), (want, expected, theirs) = results
    assert_same_bits(y, want)
    assert_same_bits(grad, expected)
    assert list(state) == list(theirs)
    assert all(torch.equal(state[name], theirs[name]) for name in state)


def test_a_script_runs_torchaos_own_pass():
    module = FakeQuantize(**AFFINE | {"dtype": torch.uint8})
    assert_same_bits(torch.jit.script(module)(X), module(X))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("options", [AFFINE | {"dtype": torch.uint8}, CHANNELS | {"use_grad_scaling": True}])
def test_learned_grids_are_torchaos(options, sign):
    results = []
    for kind in (LearnableFakeQuantize, TheirLearnableFakeQuantize):
        module = kind(**options)
        module(X)
        module.enable_range_learning()
        module.scale.data[-1] *= sign
        x = X.clone().requires_grad_()
        y = module(x)
        y.backward(sample(X.shape, seed=1, special=False))
        results.append((y.detach(), x.grad, module.scale.grad, module.zero_point.grad))
    (y, *gradients), (want, *expected) = results
    assert_same_bits(y, want)
    for got, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-2)


class EveryConvolution(Quantizer):
    """Our fake-quantize on the inputs and weights of all convolutions and linear layers."""

    def annotate(self, model):
        shared = {"qscheme": torch.per_tensor_affine, "is_dynamic": False}
        inputs = QuantizationSpec(
            torch.uint8, FakeQuantize.with_args(**AFFINE | {"dtype": torch.uint8}), 0, 255, **shared
        )
        weights = QuantizationSpec(
            torch.int8, FakeQuantize.with_args(**CHANNELS), -128, 127, qscheme=torch.per_channel_symmetric, ch_axis=0
        )
        for node in model.graph.nodes:
            if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
                specs = {node.args[0]: inputs, node.args[1]: weights}
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    input_qspec_map=specs, output_qspec=None, _annotated=True
                )
        return model

    def validate(self, model):
        pass


def test_an_exported_program_is_prepared_trained_and_converted():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    program = torch.export.export(network, (X,)).module()
    model = prepare_qat_pt2e(program, EveryConvolution())
    ours = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    assert len(ours) == 4
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for module in ours:
        module.disable_observer()
    expected = model(X).detach()
    converted = convert_pt2e(model)
    names = {str(node.target) for node in converted.graph.nodes}
    assert any("dequantize_per_channel" in name for name in names)
    torch.testing.assert_close(converted(X), expected, rtol=1e-5, atol=1e-5)
