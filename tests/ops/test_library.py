"""The ops as citizens of torch: opcheck, torch.compile, torch.func, autocast, backends."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import assert_same_bits, backend_params, device_of, sample, scales

import hdrq
from hdrq.backends import dispatch
from hdrq.ops import fakequant

OPS = torch.ops.hdrq


def tensors(axis=None, dtype=torch.float32):
    x = sample((6, 4, 3), dtype, special=False).requires_grad_()
    return x, scales(1 if axis is None else x.shape[axis]).requires_grad_()


def pairs():
    """Two weights, and their scales along axis 0."""
    return tuple(map(list, zip(tensors(0), tensors(0), strict=True)))


RNG = hdrq.rng_state(7, 1, 2)
COUNTS = torch.arange(257)


def merging(codes, mode, packed):
    grid = [[torch.ones(1)] * 2, [torch.zeros(1)] * 2, [-8, 7] * 2, -8, 7, RNG]
    return codes, *grid, [0.5, 0.5], 2, "all", None, "min-cosine", mode, [9], packed


def systematic(codes, packed):
    grid = [[torch.ones(1)] * 2, [torch.zeros(1)] * 2, [-8, 7] * 2, -8, 7, RNG]
    return codes, *grid, [0.5, 0.5], 0.1, None, [9], packed


CASES = {
    "noise_quantize": lambda: (*tensors(), -8, 7, RNG),
    "noise_quantize along an axis": lambda: (*tensors(1), -8, 7, RNG, None, 1, 0.5),
    "noise_quantize, empirical": lambda: (*tensors(dtype=torch.bfloat16), -8, 7, RNG, COUNTS),
    "noise_quantize_backward": lambda: (torch.ones(6, 4, 3), *(t.detach() for t in tensors(0)), -8, 7, RNG, None, 0),
    "error_histogram": lambda: (*(t.detach() for t in tensors()), -8, 7),
    "fake_quantize": lambda: (*tensors(-1), -8, 7, torch.ones(3), -1),
    "fake_quantize_backward": lambda: (torch.ones(6, 4, 3), *(t.detach() for t in tensors()), -8, 7),
    "quantize": lambda: (*(t.detach() for t in tensors()), -8, 7),
    "dequantize": lambda: (torch.ones(5, dtype=torch.int8), torch.ones(1)),
    "adaround": lambda: (tensors(1)[0].detach(), tensors(1)[1].detach(), tensors()[0], -8, 7, None, 1),
    "adaround, with a penalty": lambda: (*(t.detach() for t in tensors()), tensors()[0], -8, 7, torch.tensor(3.0)),
    "adaround_backward": lambda: (
        torch.ones(6, 4, 3),
        torch.ones(()),
        *(t.detach() for t in tensors()),
        tensors()[0].detach(),
        -8,
        7,
    ),
    "adaround, with a zero point": lambda: (
        *tensors(0),
        torch.zeros(6, 4, 3, requires_grad=True),
        -8,
        7,
        torch.full((), 3.0),
        0,
        False,
        torch.ones(6),
    ),
    "fake_quantize, a zero point learns": lambda: (
        *tensors(0),
        -8,
        7,
        torch.ones(6, requires_grad=True),
        0,
        0.1,
        None,
        2**16,
        "shifted",
        "clamp-first",
    ),
    "drop_mix": lambda: (tensors()[0], tensors()[0], 2**15, RNG),
    "drop_mix_backward": lambda: (torch.ones(6, 4), 2**15, RNG),
    "source_distance": lambda: (tensors()[0], torch.zeros(6, 4, 3)),
    "source_distance_backward": lambda: (torch.ones(()), torch.ones(()), torch.ones(5), torch.zeros(5)),
    "quantize_weights": lambda: (*pairs(), [-8, -2], [7, 1], [], [RNG, RNG], [], 0, [0.1, 0.2]),
    "quantize_weights, rounded, with sources": lambda: (
        *pairs(),
        [-8, -2],
        [7, 1],
        [t.detach() + 0.1 for t in pairs()[0]],
        [],
        [],
        0,
        [0.1, 0.2],
    ),
    "quantize_weights_backward": lambda: (
        [torch.ones(6, 4, 3)] * 2,
        torch.ones(2),
        torch.ones(2),
        *([t.detach() for t in ts] for ts in pairs()),
        [-8, -2],
        [7, 1],
        [],
        [],
        [],
        0,
        [0.1, 0.2],
    ),
    "search_scale": lambda: (torch.linspace(-1, 1, 50), -8, 7),
    "search_affine": lambda: (torch.linspace(-1, 1, 50).view(10, 5), -2, 1, 2.4, 10, 1),
    "merge": lambda: merging([torch.ones(9, dtype=torch.int8)] * 2, "exact", False),
    "merge_systematic": lambda: systematic([torch.ones(9, dtype=torch.int8)] * 2, False),
    "merge_systematic, packed": lambda: systematic([torch.ones(5, dtype=torch.uint8)] * 2, True),
    "merge, packed": lambda: merging([torch.ones(5, dtype=torch.uint8)] * 2, "fast", True),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    name = case.split(",")[0].split()[0]
    torch.library.opcheck(getattr(OPS, name).default, CASES[case]())


def test_every_registered_op_is_checked():
    registered = {s.name.removeprefix("hdrq::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("hdrq::")}
    assert registered == {case.split(",")[0].split()[0] for case in CASES}


def step(x, scale, rng):
    y = hdrq.ops.noise_quantize(x, scale, -8, 7, rng, noise="empirical", grad_scale=0.1)
    z = hdrq.ops.fake_quantize(hdrq.ops.drop_mix(y, x, 0.5, rng), scale, -8, 7)
    z = hdrq.ops.fake_quantize(z, scale, -2, 1, zero_point=scale, rounding="shifted", gradient="pass-through")
    return z.square().sum() + hdrq.ops.source_distance(y, torch.zeros_like(y))


def test_compile_in_one_graph_gives_the_same_bits():
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, scale = tensors()
        loss = function(x, scale, RNG)
        loss.backward()
        results.append((loss, x.grad, scale.grad))
    for compiled, eager in zip(*results, strict=True):
        assert_same_bits(compiled, eager)


class Watcher(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize("learns", [True, False])
def test_who_watches_ops_sees_them_and_their_gradients(learns):
    x, s = (t.detach().requires_grad_(learns) for t in tensors())
    with Watcher() as watcher:
        y = hdrq.ops.fake_quantize(x, s, -8, 7)
        if learns:
            y.sum().backward()
    names = ["hdrq.fake_quantize.default", "hdrq.fake_quantize_backward.default"][: 1 + learns]
    assert [name for name in watcher.seen if name.startswith("hdrq.")] == names


def test_other_tensors_go_by_the_dispatcher():
    x, s = (t.detach() for t in tensors())
    for odd in (x.as_subclass(Wrapped), torch.empty_like(x, device="meta")):
        y = hdrq.ops.fake_quantize(odd, s.to(odd.device), -8, 7)
        assert type(y) is type(odd) and y.device == odd.device
    traced = torch.jit.trace(lambda x: hdrq.ops.fake_quantize(x, s, -8, 7), x)
    assert "hdrq::fake_quantize" in str(traced.graph)
    assert torch.equal(traced(2 * x), hdrq.ops.fake_quantize(2 * x, s, -8, 7))


def test_the_short_way_and_the_dispatcher_give_the_same():
    x, s = (t.detach().requires_grad_() for t in tensors())
    short = hdrq.ops.fake_quantize(x, s, -8, 7, grad_scale=0.3)
    long = OPS.fake_quantize(x, s, -8, 7, None, None, 0.3)
    assert torch.equal(short, long)
    grad = torch.randn_like(x)
    for one, other in zip(
        torch.autograd.grad(short, (x, s), grad), torch.autograd.grad(long, (x, s), grad), strict=True
    ):
        assert torch.equal(one, other)


def test_func_grad_is_refused():
    """torch itself refuses ops whose gradient is registered with torch.library; it must not pass in silence."""
    x, scale = (t.detach() for t in tensors())
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: hdrq.ops.fake_quantize(x, scale, -8, 7).sum())(x)


@pytest.mark.parametrize("op", ["noise", "fake", "drop"])
def test_vmap_is_refused_with_a_reason(op):
    x, scale = (t.detach() for t in tensors())
    functions = {
        "noise": lambda x: hdrq.ops.noise_quantize(x, scale, -8, 7, RNG),
        "fake": lambda x: hdrq.ops.fake_quantize(x, scale, -8, 7),
        "drop": lambda x: hdrq.ops.drop_mix(x, x, 0.5, RNG),
    }
    with pytest.raises(RuntimeError, match=r"must not be called under torch.func.vmap: \w+"):
        torch.func.vmap(functions[op])(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_dtype_and_bits_alone(dtype):
    x, scale = tensors(dtype=dtype)
    plain = hdrq.ops.noise_quantize(x, scale, -8, 7, RNG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = hdrq.ops.noise_quantize(x, scale, -8, 7, RNG)
    assert_same_bits(cast, plain)
    cast.sum().backward()
    assert x.grad.dtype == dtype
    assert scale.grad.dtype == torch.float32


def test_second_derivatives_are_refused():
    x, scale = tensors()
    (gradient,) = torch.autograd.grad(hdrq.ops.fake_quantize(x, scale, -8, 7).square().sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient: second derivatives"):
        gradient.sum().backward()


class TestBackends:
    def test_all_four_are_known(self):
        assert list(hdrq.available_backends()) == ["reference", "torch", "cpp", "triton"]
        assert hdrq.available_backends()["reference"] is None

    def test_an_unknown_one_lists_those_there_are(self):
        with pytest.raises(hdrq.BackendError, match="must be one of reference, torch, cpp, triton, got 'cuda'"):
            hdrq.use_backend("cuda").__enter__()

    def test_it_is_of_its_thread(self):
        """Blocks of two threads that overlap: neither sees the other's, and nothing stays."""
        first, second, seen = threading.Event(), threading.Event(), {}

        def earlier():
            with hdrq.use_backend("reference"):
                first.set()
                second.wait(30)
                seen["earlier"] = dispatch.forced()

        def later():
            first.wait(30)
            seen["before"] = dispatch.forced()
            with hdrq.use_backend("torch"):
                second.set()
                threads[0].join(30)
                seen["later"] = dispatch.forced()
            seen["after"] = dispatch.forced()

        threads = [threading.Thread(target=run) for run in (earlier, later)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert seen == {"earlier": "reference", "before": None, "later": "torch", "after": None}
        assert dispatch.forced() is None

    def test_a_gradient_runs_with_the_backend_of_its_op(self, monkeypatch):
        """torch takes gradients of accelerators in threads of its own, in which no block is open."""
        used = []
        find = dispatch.implementation
        monkeypatch.setattr(fakequant, "implementation", lambda *args: used.append(dispatch.forced()) or find(*args))
        x = torch.ones(3, requires_grad=True)
        with hdrq.use_backend("torch"):
            y = hdrq.ops.fake_quantize(x, torch.ones(1), -8, 7)
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join(60)
        assert used == ["torch", "torch"] and torch.equal(x.grad, torch.ones(3))
        assert dispatch.forced() is None

    def test_one_without_the_op_lists_those_that_have_it(self, monkeypatch):
        module = dispatch
        monkeypatch.setattr(module, "implements", lambda name, family: name in ("reference", "torch"))
        with (
            hdrq.use_backend("cpp"),
            pytest.raises(hdrq.BackendError, match=r"implements range_errors \(reference, torch\), got 'cpp'"),
        ):
            hdrq.ops.search_scale(torch.ones(3), -8, 7)

    @pytest.mark.parametrize(
        ("environment", "code", "expected"),
        [
            (
                {"HDRQ_BACKEND": "reference"},
                "hdrq.ops.drop_mix(x, x, 1.0, r); print('hdrq.backends.reference.drop' in sys.modules)",
                "True",
            ),
            ({"HDRQ_BACKEND": "nonsense"}, "hdrq.ops.drop_mix(x, x, 1.0, r)", "must be one of reference, torch"),
            ({}, "print('triton' in sys.modules or 'hdrq._C' in sys.modules)", "False"),
        ],
    )
    def test_the_environment_chooses_and_importing_does_little(self, environment, code, expected):
        script = f"import sys, torch, hdrq; x = torch.ones(3); r = hdrq.rng_state(0); {code}"
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
        done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True)
        assert expected in done.stdout + done.stderr

    def test_without_the_extension_cpu_tensors_say_so_once(self):
        script = (
            "import sys; sys.modules['hdrq._C'] = None\n"
            "import torch, hdrq\n"
            "for _ in range(2): hdrq.ops.drop_mix(torch.ones(3), torch.ones(3), 0.5, hdrq.rng_state(0))\n"
            "print(hdrq.available_backends()['cpp'])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert "hdrq._C is not built" in done.stdout
        assert done.stderr.count("CPU tensors run in plain PyTorch") == 1


@pytest.mark.skipif(hdrq.available_backends()["cpp"] is not None, reason="the C++ path is not built")
class TestNative:
    @pytest.fixture
    def restore(self):
        from hdrq import _C

        isa, threads = _C.isa(), torch.get_num_threads()
        yield _C
        _C.use_isa(isa)
        torch.set_num_threads(threads)

    def results(self):
        x, scale = sample((700_003,)), torch.tensor([0.25])  # as many as five threads share
        grad = sample((700_003,), seed=1, special=False)
        cumulative = OPS.error_histogram(x, scale, -8, 7)
        yield cumulative
        for counts in (None, cumulative):
            yield OPS.noise_quantize(x, scale, -8, 7, RNG, counts)
            yield from OPS.noise_quantize_backward(grad, x, scale, -8, 7, RNG, counts)
        yield OPS.fake_quantize(x.half(), scale, -8, 7)
        yield from OPS.fake_quantize_backward(grad, x.nan_to_num(), scale, -8, 7)
        yield OPS.source_distance(grad, torch.zeros_like(grad))

    def test_no_number_of_threads_changes_a_bit(self, restore):
        torch.set_num_threads(1)
        alone = list(self.results())
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for got, want in zip(self.results(), alone, strict=True):
                assert_same_bits(got, want)

    def test_no_instruction_set_changes_a_bit_of_a_forward_pass(self, restore):
        first = None
        for isa in restore.isas():
            restore.use_isa(isa)
            results = [r for r in self.results() if r.numel() > 1]
            first = first or results
            for got, want in zip(results, first, strict=True):
                assert_same_bits(got, want)

    def test_half_types_round_as_torch_does(self, restore):
        """All 2¹⁶ halves in, and float32 values around every rounding boundary out."""
        halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        one = torch.ones(1)
        for isa in restore.isas():
            restore.use_isa(isa)
            for dtype in (torch.float16, torch.bfloat16):
                x = halves.view(dtype)
                assert_same_bits(hdrq.ops.drop_mix(x, x, 1.0, RNG), x)
                fine = OPS.fake_quantize(x, one * 0.3, -32768, 32767)
                with hdrq.use_backend("torch"):
                    assert_same_bits(fine, OPS.fake_quantize(x, one * 0.3, -32768, 32767))

    def test_an_unknown_instruction_set_is_refused(self, restore):
        with pytest.raises(ValueError, match=r"isa must be one of .*portable, got mmx"):
            restore.use_isa("mmx")


@pytest.mark.parametrize("wrong", [None, 3, [1.0], "x"])
def test_anything_but_a_tensor_is_a_type_error(wrong):
    x, s = torch.zeros(4), torch.ones(1)
    for call in (
        lambda: hdrq.ops.noise_quantize(wrong, s, -8, 7, RNG),
        lambda: hdrq.ops.noise_quantize(x, wrong, -8, 7, RNG),
        lambda: hdrq.ops.noise_quantize(x, s, -8, 7, wrong),
        lambda: hdrq.ops.fake_quantize(x, wrong, -8, 7),
        lambda: hdrq.ops.quantize(wrong, s, -8, 7),
        lambda: hdrq.ops.dequantize(wrong, s),
        lambda: hdrq.ops.drop_mix(x, wrong, 0.5, RNG),
        lambda: hdrq.ops.source_distance(wrong, x),
        lambda: hdrq.ops.search_scale(wrong, -8, 7),
        lambda: hdrq.ops.search_affine(wrong, -8, 7),
        lambda: hdrq.ops.merge([wrong, wrong], [s, s], -8, 7, RNG),
    ):
        with pytest.raises(TypeError, match=r"must be a tensor of .*, got \w+"):
            call()


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, of one dimension, with others between them."""
    between = torch.stack((tensor.flatten(), torch.full_like(tensor.flatten(), 3)), 1)
    return between[:, :1]


@pytest.mark.parametrize("backend", backend_params())
def test_small_tensors_may_be_views_of_any_stride(backend):
    """Backends take them by the address of their first element."""
    x, device = sample((6, 9), special=False), device_of(backend)
    scale, zero, rng = scales(6), torch.arange(-3.0, 3.0), hdrq.rng_state(5, 6, 7)
    codes = [torch.arange(54, dtype=torch.int8).reshape(6, 9) % 15 - 7 for _ in range(2)]

    def results(lay):
        s, z, r = (lay(t.to(device)) for t in (scale, zero, rng))
        r, v = r.reshape(3, -1)[:, 0], x.to(device)
        yield hdrq.ops.fake_quantize(v, s, -8, 7, zero_point=z, axis=0, keep=0.5, rng=r)
        yield hdrq.ops.noise_quantize(v, s, -8, 7, r, axis=0, noise="empirical")
        yield hdrq.ops.drop_mix(v, -v, 0.5, r)
        yield hdrq.ops.adaround(v, s, torch.zeros_like(v), -8, 7, axis=0, zero_point=z)
        yield hdrq.ops.quantize(v, s, -8, 7, axis=0, zero_point=z)
        yield hdrq.ops.dequantize(codes[0].to(device), s, axis=0, zero_point=z)
        yield from hdrq.ops.quantize_weights([v], [s], [(-8, 7)], rngs=[r], axis=0)[0]
        both = [c.to(device) for c in codes], [s, 2 * scale.to(device)], -8, 7, r
        for rule in ("noise", "systematic"):
            yield hdrq.ops.merge(*both, axis=0, rule=rule).codes
        learned = v.clone().requires_grad_(), s.clone().requires_grad_()
        y = hdrq.ops.noise_quantize(*learned, -8, 7, r, axis=0)
        yield from torch.autograd.grad(y, learned, torch.ones_like(y))

    with hdrq.use_backend(backend):
        for got, want in zip(results(_strided), results(torch.clone), strict=True):
            assert_same_bits(got.flatten(), want.flatten())
