"""What share of a model is quantized, against numbers counted by hand."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hdrq
from hdrq.checkpoint.inspection import contents
from hdrq.prepare import coverage
from hdrq.prepare.coverage import Coverage
from hdrq.report import report_of


def covered(model, *shape, **options):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return report_of(hdrq.quantize(model.eval(), x, "rtn", **options)).coverage


def test_convolutions_and_a_layer_in_float():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6),  # folded: six biases
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 5),
    )
    convolution, transposed, linear = 6 * 2 * 9, 6 * 4 * 4, 256 * 5
    parameters = convolution + 6 + transposed + 4 + linear + 5
    macs = [convolution * 4 * 4, transposed * 4 * 4, linear]
    every = covered(model, 3, 4, 6, 6)
    assert every == Coverage((convolution + transposed + linear, parameters), (sum(macs), sum(macs)))
    some = covered(model, 3, 4, 6, 6, bits={"4": "float", "*": "W4A4"})
    assert some == Coverage((convolution + transposed, parameters), (sum(macs[:2]), sum(macs)))
    assert str(some) == "13.6% of 1,499 parameters, 71.8% of 4,544 multiply-adds of a sample"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def test_a_weight_that_layers_share_counts_once_and_a_lookup_multiplies_nothing():
    model = hdrq.quantize(Tied().eval(), torch.randint(0, 10, (4, 3)), "rtn", bits={"*": "W4A8"})
    assert report_of(model).coverage == Coverage((80, 80), (3 * 80, 3 * 80))


@pytest.mark.parametrize(("options", "products"), [({}, 2), ({"attention": False}, 0)])
def test_products_of_an_attention_are_quantized_with_their_operands(options, products):
    layers, product = 4 * 16 * 16 + 2 * 16 * 32, 5 * 5 * 16  # of a position; of one product
    found = covered(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3, 5, 16, **options)
    assert found.macs == (5 * layers + products * product, 5 * layers + 2 * product)


class Sdpa(nn.Module):
    """An attention of timm's form, whose softmax no quantizer sees."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.fused_attn = 2, True
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm, self.attn_drop = nn.Identity(), nn.Identity(), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_of_a_fused_attention_the_product_with_the_softmax_stays_in_float():
    found = covered(nn.Sequential(nn.Linear(8, 8), Sdpa(), nn.Linear(8, 8)), 3, 5, 8)
    layers, product = 5 * (64 + 192 + 64 + 64), 5 * 5 * 8
    assert found.macs == (layers + product, layers + 2 * product)


class Gram(nn.Module):
    """Two products of activations by a name of their own: one in a child, one in the module itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(8, 8), nn.Linear(8, 8), nn.Identity()
        self.inner.forward = lambda pair: pair[0] @ pair[1].mT

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.inner((a, b)) @ b


def test_products_that_no_attention_of_a_known_structure_has_are_named():
    model, product = nn.Sequential(nn.Linear(8, 8), Gram()), 5 * 5 * 8
    with pytest.warns(UserWarning, match=r"29\.4% of the multiply-adds are products .*, in '1'; '1\.inner': att"):
        found = covered(model, 3, 5, 8)
    assert found.products == {"1": product, "1.inner": product}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        covered(model, 3, 5, 8, attention=False)  # as it is meant
        covered(model, 3, 5, 8, bits={"1": "float", "*": "W4A4"})
        covered(nn.Sequential(nn.Linear(8, 8), Sdpa()), 3, 5, 8)  # a known one


class Mixed(nn.Module):
    """What PyTorch's counter does not know."""

    def __init__(self):
        super().__init__()
        self.lstm, self.bilinear, self.head = nn.LSTM(8, 4, batch_first=True), nn.Bilinear(4, 4, 3), nn.Linear(3, 2)

    def forward(self, x):
        y = self.lstm(x)[0][:, -1]
        return self.head(self.bilinear(y, y))


def test_recurrent_and_bilinear_layers_count():
    found = covered(Mixed(), 3, 5, 8, bits={"head": "W4A4", "*": "float"})
    assert found.macs == (6, 5 * (8 * 16 + 4 * 16) + 48 + 6)


def test_a_model_that_cannot_be_counted_is_quantized_all_the_same(monkeypatch):
    monkeypatch.setattr(coverage, "_macs", lambda *_: 1 / 0)
    found = covered(nn.Sequential(nn.Linear(4, 2)), 3, 4)
    assert found == Coverage((8, 10), None) and str(found) == "80.0% of 10 parameters"


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.unused, self.place = nn.Linear(4, 2), nn.Linear(10, 10), nn.Parameter(torch.zeros(3, 3))

    def forward(self, x):
        return self.head(x)


def test_much_in_float_is_said_unless_a_pattern_means_it():
    with pytest.warns(UserWarning, match=r"6\.2% of the parameters are quantized; .* 'unused.weight' \(100\)") as seen:
        covered(Auxiliary(), 3, 4)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        covered(Auxiliary(), 3, 4, bits={"unused": "float", "*": "W4A4"})
        covered(nn.Sequential(nn.Linear(2, 2)), 3, 2)  # a third of it is biases


def test_files_and_merged_files_say_it(tmp_path):
    pytest.importorskip("safetensors")
    from hdrq.merging.files import merge_files

    model = hdrq.quantize(nn.Sequential(nn.Linear(4, 2)).eval(), torch.randn(6, 4), "rtn")
    hdrq.save(model, tmp_path / "a")
    merge_files([tmp_path / "a"] * 2, tmp_path / "b", draws=1)
    hdrq.save(hdrq.load(tmp_path / "b", nn.Sequential(nn.Linear(4, 2))), tmp_path / "c")
    for name in "abc":
        assert contents(tmp_path / name).facts["quantized"].startswith("80.0% of 10 parameters, 100.0% of 8 mult")
    del model.hdrq_origin["coverage"]  # as in a file of an earlier version
    hdrq.save(model, tmp_path / "old")
    assert "quantized" not in contents(tmp_path / "old").facts


@pytest.mark.parametrize("facts", [None, 3, [], {}, {"parameters": 3}, {"parameters": [1, "2"]}, {"macs": [1, 2]}])
def test_what_is_no_coverage_in_a_file_is_left_out(facts):
    assert Coverage.of_dict(facts) is None
