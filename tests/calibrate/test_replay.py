"""Units are learned from what the model computes: whatever is not the same in every call is captured or refused."""

from dataclasses import dataclass

import pytest
import torch
from helpers import same, state
from torch import nn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.quantizers.layers import quantized_layers

DATA = torch.randn(32, 4, 6, generator=torch.Generator().manual_seed(0))
OPTIONS = {"bits": "W4A4", "distance": 0, "iterations": 1, "progress": False}
STILL = {"weight_lr": 0.0, "activation_lr": 0.0}  # nothing moves: losses are those of rounding


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 6)

    def inner(self, x):
        return x + self.second(self.first(x).relu())

    def forward(self, x):
        return self.inner(x)


class Masked(Residual):
    def forward(self, x, mask=None):
        return self.inner(x) if mask is None else self.inner(x) * mask[..., None]


class Sized(Residual):
    def forward(self, x, batch):
        return self.inner(x.reshape(batch, -1, 6)).reshape(x.shape)


class Remembering(Residual):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def begin(self):
        self.calls = 0
        return self

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * self.calls


class Shifted(Residual):
    def forward(self, x, shift):
        return self.inner(x) + shift


class Biased(Residual):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(4, 6)

    def forward(self, x, bias=None):
        bias = self.positions(torch.arange(4)) if bias is None else bias
        return self.inner(x) + bias, bias


class First(nn.Linear):
    def forward(self, x):
        return super().forward(x[0])


class Centred(Residual):
    def forward(self, x):
        return self.inner(x - x.mean(0))


class InPlace(Residual):
    def forward(self, x):
        return self.second(self.first(x.relu_()))


class Silent(Residual):
    def forward(self, x):
        x.copy_(self.inner(x))


class Squared(Residual):
    """Writes to what the gradient of its first layer needs."""

    def forward(self, x):
        y = self.first(x).sigmoid()
        z = self.second(y)
        y.mul_(2)
        return x + z + y[..., :6]


@dataclass
class State:
    hidden: torch.Tensor
    other: torch.Tensor | None = None


class Stateful(Residual):
    def forward(self, state):
        return State(self.inner(state.hidden), state.other)


class Hidden:
    def __init__(self, x):
        self.x = x


class Opaque(Residual):
    def forward(self, hidden):
        return Hidden(self.inner(hidden.x))


class Routed(Residual):
    """A layer that reads the samples whose first number is positive."""

    def forward(self, x):
        chosen = x[:, 0, 0] > 0
        y = x.clone()
        if chosen.any():
            y[chosen] = self.first(x[chosen])[..., :6]
        return self.second(torch.cat([y, x], -1))


class Net(nn.Module):
    """Two blocks of a kind, called as ``call(block, x, mask)`` says, and a head."""

    def __init__(self, block, call):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(block() for _ in range(2))
            self.head = nn.Linear(6, 3)
        self.call = call

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = self.call(block, x, mask)
        return self.head(x if isinstance(x, torch.Tensor | tuple) else next(iter(vars(x).values())))


def drop_full_mask(block, x, mask):
    """As transformers does: a mask of ones is none."""
    return block(x, None if mask is None or mask.all() else mask)


def output(model, batches, name):
    seen = []

    def keep(module, args, out):
        seen.append((out[0] if isinstance(out, tuple) else out).clone())

    handle = model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    handle.remove()
    return torch.cat(seen)


def assert_losses_are_the_models(model, batches):
    learned = hdrq.quantize(model, batches, "hdrq", **OPTIONS, **STILL)
    nearest = hdrq.quantize(model, batches, "rtn", bits="W4A4")
    for block in report_of(learned).blocks:
        real = (output(nearest, batches, block.name) - output(model, batches, block.name)).square().sum(-1).mean()
        assert block.loss_before == pytest.approx(float(real), rel=1e-4)


def test_a_mask_that_the_first_sample_lacks_is_kept_for_the_others():
    mask = torch.ones(32, 4)
    mask[8:, :2] = 0
    assert_losses_are_the_models(Net(Masked, drop_full_mask).eval(), [(DATA, mask)])


def test_what_all_samples_share_stays_one_row():
    assert_losses_are_the_models(Net(Masked, lambda b, x, mask: b(x, mask)).eval(), [(DATA, torch.rand(1, 4))])


def test_rows_of_a_sample_may_lie_apart():
    """As where the two pictures of a Siamese network are one batch, or times lie before samples."""

    class Model(Net):
        def forward(self, x):
            return sum(super().forward(torch.cat([x, 2 * x - x.mean(0)])).chunk(2))

    assert_losses_are_the_models(Model(Residual, lambda b, x, mask: b(x)).eval(), [(DATA[:20],), (DATA[20:],)])


def test_a_constant_that_an_earlier_block_returns_is_the_quantized_models_own():
    """T5's first block returns the bias of positions that all blocks add."""
    model = Net(Biased, lambda b, x, mask: b(*x) if isinstance(x, tuple) else b(x))
    model.head = First(6, 3)
    assert_losses_are_the_models(model.eval(), [(DATA[:16],), (DATA[16:],)])


@pytest.mark.parametrize(
    ("block", "call", "batches", "message"),
    [
        (Masked, drop_full_mask, [(DATA, torch.tensor([[1.0, 0, 1, 1]] * 32)), (DATA, torch.ones(32, 4))], "blocks.0"),
        (Sized, lambda b, x, mask: b(x, len(x)), [(DATA,)], "blocks.0 must be called alike .* got 1 .* and 2"),
        (
            Remembering,
            lambda b, x, mask: b.begin()(x),
            [(DATA,)],
            "blocks.0 must return the same for the same arguments",
        ),
        (Shifted, lambda b, x, mask: b(x, float(x.sum())), [(DATA,)], "blocks.0 must be called alike"),
        (Shifted, lambda b, x, mask: b(x, x.amax((0, 1))), [(DATA,)], "blocks.0 must read the same for every batch"),
        (Centred, lambda b, x, mask: b(x), [(DATA,)], "blocks.0 must return the same for a sample .* mixes samples"),
        (
            Residual,
            lambda b, x, mask: b(x) if mask.all() else b(x).relu(),
            [(DATA, torch.ones(32, 4)), (DATA, torch.zeros(32, 4))],
            "blocks.1 must read what blocks.0 returned in every batch",
        ),
        (InPlace, lambda b, x, mask: x + b(x), [(DATA,)], "blocks.1 must read the same .* writes to what it reads"),
        (Silent, lambda b, x, mask: [b(x), x][1], [(DATA,)], "blocks.0 must return what it computes, got None"),
        (Squared, lambda b, x, mask: b(x), [(DATA,)], "blocks.0 must be differentiable to be learned"),
    ],
)
def test_what_is_no_constant_is_refused_by_name(block, call, batches, message):
    with pytest.raises(ValueError, match=f"block {message}"):
        hdrq.quantize(Net(block, call).eval(), batches, "hdrq", **OPTIONS)


def test_an_object_that_hides_tensors_is_refused_by_class():
    model = Net(Opaque, lambda b, x, mask: b(Hidden(x) if isinstance(x, torch.Tensor) else x)).eval()
    with pytest.raises(ValueError, match=r"blocks\.0 .*Hidden"):
        hdrq.quantize(model, DATA, "hdrq", **OPTIONS)


def test_a_dataclass_between_blocks_is_opened():
    plain = Net(Residual, lambda b, x, mask: b(x)).eval()
    wrapped = Net(Stateful, lambda b, x, mask: b(State(x) if isinstance(x, torch.Tensor) else x)).eval()
    learned = [hdrq.quantize(m, DATA, "hdrq", **OPTIONS | {"iterations": 5}) for m in (plain, wrapped)]
    assert same(*map(state, learned))
    assert [b.name for b in report_of(learned[1]).blocks] == ["blocks.0", "blocks.1", "head"]


def test_a_layer_that_reads_some_samples_is_no_unit():
    model = Net(Routed, lambda b, x, mask: b(x)).eval()
    names = ["blocks.0.first", "blocks.0.second", "blocks.1", "head"]
    with pytest.raises(ValueError, match=r"block blocks\.0\.first must .*routed by the data"):
        hdrq.quantize(model, DATA, "hdrq", blocks=names, **OPTIONS)
    assert len(report_of(hdrq.quantize(model, DATA, "hdrq", **OPTIONS)).blocks) == 3  # as blocks, they are units


class Dense(nn.Module):
    """Reads all that came before, in a list that grows, as DenseNet's layers do."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 6), nn.Linear(6, 6)

    def forward(self, features):
        return self.second(self.first(torch.cat(features, -1)).relu())


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Dense(6 * k) for k in (1, 2, 3)), nn.Linear(24, 3)

    def forward(self, x):
        features = [x]
        for block in self.blocks:
            features.append(block(features))
        return self.head(torch.cat(features, -1))


def test_a_list_that_grows_after_a_block_has_read_it():
    learned = hdrq.quantize(Growing().eval(), DATA, "hdrq", **OPTIONS)
    assert [block.name for block in report_of(learned).blocks] == ["blocks.0", "blocks.1", "blocks.2", "head"]


def test_positions_are_no_units_whatever_they_are_called_with():
    """BART's are called with tokens and return one row, Marian's with a size."""

    class Positions(nn.Embedding):
        def forward(self, like):
            return super().forward(torch.arange(like[1] if isinstance(like, torch.Size) else like.shape[1])[None])

    class Model(Net):
        def __init__(self):
            super().__init__(Residual, lambda b, x, mask: b(x))
            self.learned, self.fixed = Positions(4, 6), Positions(4, 6)

        def forward(self, x):
            return super().forward(x + self.learned(x) + self.fixed(x.shape))

    model = Model().eval()
    learned = hdrq.quantize(model, DATA, "hdrq", **OPTIONS)
    assert [block.name for block in report_of(learned).blocks] == ["blocks.0", "blocks.1", "head"]
    assert {"learned", "fixed"} < quantized_layers(learned).keys()
    assert_losses_are_the_models(model, [(DATA,)])  # what stands before the first unit is quantized


def test_a_layer_that_is_called_outside_its_block_too_is_quantized_there():
    """DiT's last layers read an embedding that is its first block's."""

    class Model(Net):
        def forward(self, x):
            return super().forward(self.blocks[0].second(self.blocks[0].first(x)))

    assert_losses_are_the_models(Model(Residual, lambda b, x, mask: b(x)).eval(), [(DATA,)])


def test_a_forward_that_turns_gradients_on():
    class Model(Net):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(super().forward(x).sum(), x)[0]

    plain, model = (kind(Residual, lambda b, x, mask: b(x)).eval() for kind in (Net, Model))
    assert same(*(state(hdrq.quantize(m, DATA, "hdrq", **OPTIONS | {"iterations": 5})) for m in (plain, model)))
