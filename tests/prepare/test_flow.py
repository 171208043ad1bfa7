"""Values are followed through the operations that keep them, and through no other."""

import pytest
import torch
import torch.nn.functional as F

from hdrq.prepare.flow import OTHER, Flow, Values, joined

GRID = torch.arange(1, 9) * 0.25
KEEP = {
    "chunk": lambda x: x.chunk(2, 1)[1],
    "permute": lambda x: x.permute(0, 2, 3, 1).reshape(2, -1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "concatenation": lambda x: torch.cat([x, x.flip(1)], 1),
    "stack": lambda x: torch.stack([x, x.roll(1, 2)]),
    "zero padding": lambda x: F.pad(x, (1, 2, 3, 0)),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "max pooling": lambda x: F.max_pool2d(x, 3, 2, 1),
    "largest": lambda x: x.amax((2, 3)),
    "max along an axis": lambda x: x.max(1).values,
    "relu": F.relu,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "windows": lambda x: x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2),
    "patches": lambda x: F.unfold(x, 2, padding=1),
    "every second": lambda x: torch.cat([x[:, :, 0::2], x[:, :, 1::2]], 1),
    "index": lambda x: x[:, torch.tensor([3, 1])],
    "gather": lambda x: x.gather(1, torch.zeros(2, 1, 4, 4, dtype=torch.long)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "mask": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "written into zeros": lambda x: torch.zeros(4, 4, 4, 4).index_put_((torch.tensor([0, 2]),), x),
    "copied into zeros": lambda x: _written(torch.zeros(2, 8, 4, 4), x),
    "relu in place": lambda x: F.relu_(x.clone()),
    "float64": lambda x: x.double(),
}
CHANGE = {
    "sum": lambda x: x + x,
    "product": lambda x: x * 0.3,
    "gelu": F.gelu,
    "average": lambda x: F.avg_pool2d(x, 2),
    "mean": lambda x: x.mean((2, 3)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "padding with ones": lambda x: F.pad(x, (1, 1), value=0.1),
    "concatenation with another": lambda x: torch.cat([x, torch.full_like(x, 0.1)], 1),
    "filled in place": lambda x: x.clone().fill_(0.1),
    "masked with another": lambda x: x.masked_fill(x > 0, 0.1),
    "added in place": lambda x: x.clone().add_(0.1),
    "a part written": lambda x: _written(x.clone(), torch.full((2, 4, 2, 4), 0.1)),
    "a written view": lambda x: _twice_written(x.clone()),
    "clamped": lambda x: x.clamp_min(0.6),
}


def _written(base, part):
    base[:, : part.shape[1], : part.shape[2]] = part
    return base


def _twice_written(x):
    x.view(-1)[::2].mul_(0.3)
    return x


def followed(operation):
    x = GRID[torch.randint(8, (2, 4, 4, 4), generator=torch.Generator().manual_seed(0))] - 1
    with torch.no_grad(), Flow() as flow:
        flow.mark(x, "block")
        y = operation(x)
    on_grid = torch.isin(y.double(), torch.cat([GRID.double() - 1, torch.zeros(1)]))
    return flow.values(y), bool(on_grid.all())


@pytest.mark.parametrize("name", KEEP)
def test_values_that_are_kept(name):
    values, on_grid = followed(KEEP[name])
    assert values == Values(frozenset(["block"]), True) and on_grid


@pytest.mark.parametrize("name", CHANGE)
def test_values_that_are_changed(name):
    values, on_grid = followed(CHANGE[name])
    assert not values.whole and not on_grid


def test_a_concatenation_with_another_still_holds_what_it_was_given():
    for name in ("concatenation with another", "average", "padding with ones", "a part written"):
        assert followed(CHANGE[name])[0].sources == {"block"}
    assert joined([Values(frozenset("a"), True), Values(frozenset("b"), True)]) == Values(frozenset("ab"), True)


def test_integers_have_no_values():
    assert followed(lambda x: x.topk(2, 1).indices)[0] == OTHER


def test_a_tensor_is_known_by_its_elements_and_by_what_was_written():
    with torch.no_grad(), Flow() as flow:
        x = torch.randn(2, 4, 3)
        first = flow.identity(x)
        assert flow.identity(x.flatten(1)) == flow.identity(x.transpose(1, 2)) == first
        assert flow.identity(x[:, :2]) != first and flow.identity(x[:, ::2]) != flow.identity(x[:, 1::2])
        assert flow.identity(x.clone()) != first
        x[0] += 1
        assert flow.identity(x) != first
        kept = flow.identity(torch.randn(5))
        assert all(flow.identity(torch.randn(5)) != kept for _ in range(20))  # memory that is freed is taken again


@pytest.mark.parametrize("normed", [True, False])
def test_a_norm_before_any_product(normed):
    x, weight = torch.randn(2, 6), torch.randn(6, 6)
    with torch.no_grad(), Flow() as flow:
        flow.enter("block", x)
        F.layer_norm(x + 1 if normed else x + x @ weight, (6,))
        flow.leave()
        F.layer_norm(x, (6,))
        assert flow.normalized == ({"block"} if normed else set())
