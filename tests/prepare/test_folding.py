"""BatchNorm is folded by execution order, and left alone where it cannot be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import SamePad, data, lively
from torch import nn

import hdrq
from hdrq.prepare.folding import fold_batchnorm


def fold(model, x):
    """The folded pairs of a copy, and the copy, whose outputs are checked."""
    folded = copy.deepcopy(model)
    pairs = fold_batchnorm(folded, lambda m: m(x))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    return pairs, folded


class Scattered(nn.Module):
    """Norms are declared far from their layers and in another order; one reads the image, one a sum."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleDict({"b": nn.BatchNorm2d(6), "a": nn.BatchNorm2d(4), "sum": nn.BatchNorm2d(6)})
        self.image_norm = nn.BatchNorm2d(3)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.BatchNorm1d(5)), nn.ReLU(), nn.Linear(5, 2))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False))
        self.body = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x):
        x = F.relu(self.norms["a"](self.stem(self.image_norm(x))))
        x = self.norms["b"](self.body(x))
        x = self.norms["sum"](x + 1).mean((2, 3))
        return self.head(x)


class Branching(nn.Module):
    """A convolution whose output goes to a BatchNorm and past it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_batchnorm_folds_by_execution_order():
    model = lively(Scattered())
    pairs, folded = fold(model, data(8, 3, 8, 8))
    assert pairs == {"norms.a": "stem.0", "norms.b": "body", "head.1.0": "head.0"}
    assert isinstance(folded.norms["sum"], nn.BatchNorm2d) and isinstance(folded.image_norm, nn.BatchNorm2d)
    assert folded.stem[0].bias is not None


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (4, 5, 6)),
    ],
    ids=["no layer", "changed in place", "no statistics", "axis 1 is not the layer's channels"],
)
def test_batchnorm_that_cannot_be_folded_is_left_alone(model, shape):
    assert fold(lively(model), data(*shape))[0] == {}


def test_layer_that_runs_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.conv(x)))

    assert fold(lively(Twice()), data(4, 3, 6, 6))[0] == {}


def test_batchnorm_without_weights_folds():
    model = lively(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2)))
    assert fold(model, data(9, 6))[0] == {"1": "0"}
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    assert fold(model, data(9, 3, 5, 5))[0] == {"1": "0"}


def test_batchnorm_of_a_model_in_bfloat16_folds():
    model = lively(Scattered()).bfloat16()
    assert len(fold_batchnorm(model, lambda m: m(data(8, 3, 8, 8).bfloat16()))) == 3
    assert model.body.weight.dtype == torch.bfloat16


def test_norm_whose_input_is_read_elsewhere_stays_and_the_rest_is_folded():
    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stem_norm, self.branching = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), Branching()

        def forward(self, x):
            return self.branching(self.stem_norm(self.stem(x)))

    model = lively(Wider())
    with pytest.warns(UserWarning, match=r"'branching.norm': what 'branching.conv' returns is read elsewhere too$"):
        pairs, folded = fold(model, data(4, 3, 8, 8))
    assert pairs == {"stem_norm": "stem"}
    assert isinstance(folded.branching.norm, nn.BatchNorm2d)


def test_output_that_the_model_returns_too_is_not_folded():
    class Returning(Branching):
        def forward(self, x):
            y = self.conv(x)
            return self.norm(y), {"before": y}

    model = lively(Returning())
    with pytest.warns(UserWarning, match="read elsewhere too"):
        assert fold_batchnorm(model, lambda m: m(data(4, 3, 6, 6))) == {}


def test_sync_batchnorm_folds_as_batchnorm_does():
    plain = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)).eval()
    (pairs, a), (same, b) = (fold(model, data(4, 3, 5, 5)) for model in (plain, sync))
    assert pairs == same == {"1": "0"}
    assert torch.equal(a[0].weight, b[0].weight) and torch.equal(a[0].bias, b[0].bias)


class Activated(nn.BatchNorm2d):
    """Normalizes, then clamps from below."""

    def forward(self, x):
        return F.elu(super().forward(x)).clamp(max=2)


class Weighted(nn.BatchNorm2d):
    """Reads its own weight for something else."""

    def forward(self, x):
        return super().forward(x) + self.weight.sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_subclass_gives_its_factor_away_and_keeps_its_rest(bias, affine):
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), Activated(4, affine=affine), nn.Conv2d(4, 2, 1)))
    pairs, folded = fold(model, data(4, 3, 5, 5))
    assert pairs == {}  # a file's table is of norms with nothing left
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(folded[0].weight, model[0].weight)
    assert folded[1].running_var.allclose(torch.ones(4), rtol=1e-4)
    far = 50 * data(4, 3, 5, 5, seed=3)  # beyond what the check saw
    torch.testing.assert_close(folded(far), model(far), rtol=1e-4, atol=1e-4)


def test_subclass_that_reads_its_weight_otherwise_stays():
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), Weighted(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    with pytest.warns(UserWarning, match="got '1': Weighted does more than normalize what it reads$"):
        pairs, folded = fold(model, data(4, 3, 5, 5))
    assert pairs == {"3": "2"}
    assert torch.equal(folded[0].weight, model[0].weight)


def test_layer_whose_forward_does_more_takes_no_factor():
    class Relu(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).relu_()

    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.std(), self.bias)

    for kind in (Relu, Standardized):
        model = lively(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)))
        with pytest.warns(UserWarning, match="'1': '0' does more than its class"):
            assert fold(model, data(4, 3, 5, 5))[0] == {}
    assert fold(lively(nn.Sequential(SamePad(3, 4, 2), nn.BatchNorm2d(4))), data(4, 3, 5, 5))[0] == {"1": "0"}


def test_fold_that_changes_the_outputs_is_undone_alone():
    class Reader(nn.Module):
        """Reads the weight of its first convolution by itself, and the statistics of its last norm."""

        def __init__(self):
            super().__init__()
            for i in range(3):
                setattr(self, f"conv{i}", nn.Conv2d(3, 3, 3, padding=1))
                setattr(self, f"norm{i}", nn.BatchNorm2d(3))

        def forward(self, x):
            for i in range(3):
                x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))
            return x * self.conv0.weight.sum() + self.norm2.running_mean.sum()

    model = lively(Reader())
    with pytest.warns(UserWarning, match="'norm0': folding it into 'conv0' changes .*; 'norm2': folding it into"):
        pairs, folded = fold(model, data(4, 3, 6, 6))
    assert pairs == {"norm1": "conv1"}
    assert isinstance(folded.norm2, nn.BatchNorm2d) and torch.equal(folded.conv2.weight, model.conv2.weight)


def test_checks_run_in_full_precision_and_settings_come_back():
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = settings()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        seen = []
        fold_batchnorm(lively(Scattered()), lambda m: seen.append(settings()) or m(data(8, 3, 8, 8)))
        assert set(seen) == {("highest", False)}
        assert settings() == ("medium", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_model_whose_norms_keep_their_rest_is_saved_and_loaded(tmp_path):
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Activated(4), nn.Flatten(), nn.Linear(36, 3)))
    x = data(8, 3, 5, 5)
    q = hdrq.quantize(model, x, "rtn")
    hdrq.save(q, tmp_path / "q.safetensors")
    assert torch.equal(hdrq.load(tmp_path / "q.safetensors", model)(x), q(x))
