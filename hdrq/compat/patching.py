"""Another package's quantizer functions, replaced by ours while it runs."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from hdrq import checks
from hdrq.compat import classes
from hdrq.compat.clamping import stops_at_bounds
from hdrq.compat.classes import Form, Verdict
from hdrq.compat.conventions import NAMES, NOISY, Convention, Noise, Unlike, refuse_to_draw_again, roles_of
from hdrq.compat.source import fused
from hdrq.compat.surroundings import surroundings, values_of
from hdrq.compat.trial import Refused, agrees, check_noise, noise_probe, recognised
from hdrq.ops._library import watched

_trying: ContextVar[bool] = ContextVar("hdrq_compat_trying", default=False)  # an original runs to be compared
FORM = ("x", "scale", "quant_min", "quant_max", "zero_point", "ch_axis", "grad_factor")  # as forms take them
DEFAULTS = {"zero_point": None, "ch_axis": None, "grad_factor": 1.0}
UNSEEN = "a tensor has no values, or a class of its own"  # the original is called, and nothing counted
FACTS_OF_X, FACTS = (attrgetter("dtype", "requires_grad", "device", last) for last in ("ndim", "shape"))
BOUNDS = (
    "what is replaced passes gradients of codes at the ends of their range, as torch before 2.14 does; this torch's "
    "clamp stops them in what is left, unless hdrq.compat.closed_clamp() is around it"
)
PLAIN = {torch.Tensor, nn.Parameter}
VERDICTS = 64  # of one class, beyond which calls under new conditions are left: something counts in its objects


@dataclass
class Replaced:
    """A function that is ours now."""

    name: str
    form: Convention | Noise
    original: Any
    now: Any = None
    places: list[tuple[ModuleType, str]] = field(default_factory=list)
    calls: int = 0
    undone: bool = False
    passed_on: Counter[str] = field(default_factory=Counter)  # calls that the original computed: by why

    def __str__(self) -> str:
        passed = "".join(f"; {n} computed by the original: {why}" for why, n in self.passed_on.items())
        return f"replaced {self.name}: {self.form}; {self.calls} calls{passed}"


@dataclass
class ReplacedClass:
    """A class of modules whose forward pass is ours where an object computes what we know."""

    name: str
    original: type[nn.Module]
    forward: Callable  # the original's
    package: str
    forms: Counter[str] = field(default_factory=Counter)  # calls, by what was computed
    passed_on: Counter[str] = field(default_factory=Counter)
    now: Callable | None = None

    def __str__(self) -> str:
        ours = "".join(f"; {n} calls {form}" for form, n in self.forms.items())
        passed = "".join(f"; {n} computed by the original: {why}" for why, n in self.passed_on.items())
        return f"watched {self.name}: each object is compared at its first call{ours}{passed}"


@dataclass
class Patch:
    """What :func:`patch` did. As a context manager it is undone at the end."""

    package: str
    replaced: list[Replaced] = field(default_factory=list)
    classes: list[ReplacedClass] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # by name: why
    undone: bool = False

    def report(self) -> str:
        """A line for each function: what it is now and how often it was called, or why it was left; and one for each
        place where the package computes a term that we have fused, with the name of ours."""
        lines = [f"{self.package}: {len(self.replaced)} replaced, {len(self.left)} left"]
        if stops_at_bounds():
            lines.append(f"  {BOUNDS}")
        lines += [f"  {r}" for r in (*self.replaced, *self.classes)]
        lines += [f"  left {name}: {why}" for name, why in self.left.items()]
        lines += [f"  {place}" for name, module in _modules(self.package) for place in _fused_in(name, module)]
        return "\n".join(lines)

    def undo(self) -> None:
        """Put the originals back, in modules that imported ours meanwhile too.

        Raises:
            RuntimeError: something was replaced again since: what came later must be undone first. Nothing is undone.
        """
        if self.undone:
            return
        for r in self.replaced:
            for module, name in r.places:
                if getattr(module, name, None) is not r.now:
                    raise RuntimeError(
                        f"{module.__name__}.{name} must be as the patch left it to be undone, got another one: "
                        "undo what came later first"
                    )
        for c in self.classes:
            if vars(c.original).get("forward") is not c.now:
                raise RuntimeError(
                    f"{c.name}.forward must be as the patch left it to be undone, got another one: "
                    "undo what came later first"
                )
        _put({id(r.now): r.original for r in self.replaced})
        for c in self.classes:
            c.original.forward = c.forward  # type: ignore[method-assign]
        for r in self.replaced:
            r.undone = True
        self.undone = True

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def patch(package: str | ModuleType, *, seed: int = 0) -> Patch:
    """Replace the quantizer functions of a package that is imported by fused ones that compute the same.

    A function, or an ``autograd.Function``, is replaced where its name speaks of quantization or LSQ, all its
    arguments are known by name (``x, scale, zero_point, quant_min, quant_max, ch_axis, grad_factor`` and the like), and
    it computes on small numbers what one of our conventions computes: values bit for bit, gradients within round-off,
    and those of ``torch.clamp`` on its bounds as torch before 2.14 has them (:func:`hdrq.compat.closed_clamp`).
    Functions of noise must clip and differentiate as the released HDRQ's, and have its distribution. A function is
    replaced in every module that holds it, until :meth:`Patch.undo` or the end of a ``with`` block.

    A module class is watched where its name speaks of quantization, rounding or LSQ and its ``forward`` takes x alone.
    An object with a scale and a range of its own is compared with our forms, AdaRound among them, on copies, at the
    first call under each set of conditions: whatever its pass reads (:mod:`hdrq.compat.classes`).

    The first call of each kind (dtypes, dimensions, shapes of scale and zero point, range, axis, which tensors learn)
    runs the original as well, on copies, and is compared with it. A kind that differs, and a call that our op refuses,
    such as one of a negative scale, is computed by the original, and counted with the reason; so are calls under
    ``torch.compile``.

    Args:
        package: a package or a module, or its name.
        seed: of the noise. Calls are counted, so a run repeats itself.

    Raises:
        ValueError: it is not imported, or is patched already.

    Example::

        import hdrq.compat
        import qdrop.quantization

        with hdrq.compat.patch("qdrop") as patched:
            reconstruct(...)
        print(patched.report())
    """
    checks.integer("seed", seed, 0, 2**63 - 1)
    name = package.__name__ if isinstance(package, ModuleType) else package
    if name not in sys.modules:
        raise ValueError(f"package must be imported before it is patched, got {name!r}")
    result = Patch(name)
    for original in _candidates(name):
        own = f"{original.__module__}.{original.__qualname__}"
        try:
            result.replaced.append(_replaced(own, original, Noise(seed, zlib.crc32(own.encode())), name))
        except Unlike as reason:
            result.left[own] = str(reason)
    result.classes = _watched(name)
    places = _put({id(r.original): r.now for r in result.replaced})
    for r in result.replaced:
        r.places = places[id(r.original)]
    return result


def _modules(package: str) -> list[tuple[str, ModuleType]]:
    """Those of a package, by name, as far as they are imported."""
    found = ((name, module) for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}."))
    return sorted((pair for pair in found if isinstance(pair[1], ModuleType)), key=lambda pair: pair[0])


def _fused_in(name: str, module: ModuleType) -> list[str]:
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):  # it has no source
        return []
    return [f"{name}, line {line}: {form}" for line, form in fused(tree)]


def _candidates(package: str) -> list[Any]:
    """Functions and autograd functions of the package whose name speaks of quantization."""
    found: dict[int, Any] = {}
    for name, module in _modules(package):
        for key, value in list(vars(module).items()):
            if not _is_function(value):
                continue
            if "_hdrq_patched" in vars(value):
                raise ValueError(f"{name}.{key} must not be patched twice: undo the first patch")
            if f"{value.__module__}.".startswith(f"{package}.") and NAMES.search(value.__name__):
                found[id(value)] = value
    return list(found.values())


def _watched(package: str) -> list[ReplacedClass]:
    """Module classes of the package, whose forward pass is ours from now on, where it may."""
    found: dict[int, ReplacedClass] = {}
    for _, module in _modules(package):
        for value in list(vars(module).values()):
            if (
                isinstance(value, type)
                and issubclass(value, nn.Module)
                and f"{value.__module__}.".startswith(f"{package}.")
                and classes.NAMES.search(value.__name__)
                and inspect.isfunction(forward := vars(value).get("forward"))
                and _takes_x_alone(forward)
                and id(value) not in found
            ):
                if hasattr(forward, "_hdrq_patched"):
                    raise ValueError(f"{value.__qualname__} must not be patched twice: undo the first patch")
                record = ReplacedClass(f"{value.__module__}.{value.__qualname__}", value, forward, package)
                record.now = _forward(record)
                value.forward = record.now  # type: ignore[method-assign]
                found[id(value)] = record
    return list(found.values())


def _takes_x_alone(forward: Callable) -> bool:
    parameters = list(inspect.signature(forward).parameters.values())
    return len(parameters) == 2 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _forward(record: ReplacedClass) -> Callable:
    """What is called in the place of a class's forward pass."""
    original = record.forward
    (_, argument) = inspect.signature(original).parameters
    verdicts: list[Verdict] = []
    places = surroundings(original, record.package, record.original)

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        given = args if not kwargs else tuple(kwargs.values()) if not args and argument in kwargs else ()
        x = given[0] if len(given) == 1 else None
        if type(x) not in PLAIN or x.is_meta or not _unobserved() or not classes.is_quantizer(self, x):
            return original(self, *args, **kwargs)
        around = values_of(places)
        verdict = next((v for v in verdicts if v.holds(self, x, around)), None)
        if verdict is None and len(verdicts) < VERDICTS:
            with _originals():
                verdict = classes.judge(self, original, x, around)
            verdicts.append(verdict)
        form = "it is in ever new states" if verdict is None else verdict.form
        if isinstance(form, Form):
            try:
                y = form(self, x)
                record.forms[str(form.kind)] += 1
                return y
            except (TypeError, ValueError) as refused:
                form = _without_values(refused)
        record.passed_on[form] += 1
        return original(self, *args, **kwargs)

    forward._hdrq_patched = True  # type: ignore[attr-defined]
    return forward


def _unobserved() -> bool:
    """Whether nothing records or transforms a call, so that it may be compared and computed."""
    return not (_trying.get() or watched() or torch.is_inference_mode_enabled() or forward_ad._current_level >= 0)


def _without_values(error: Exception) -> str:
    """A message without what it got, which is another one at each call."""
    return str(error).partition(", got ")[0]


@contextmanager
def _originals() -> Iterator[None]:
    """What is replaced is the original inside."""
    token = _trying.set(True)
    try:
        yield
    finally:
        _trying.reset(token)


def _is_function(value: Any) -> bool:
    return inspect.isfunction(value) or (isinstance(value, type) and issubclass(value, torch.autograd.Function))


def _put(now: dict[int, Any]) -> dict[int, list[tuple[ModuleType, str]]]:
    """Put each object in the place of the one with this id, in all modules that hold that: the places."""
    places: dict[int, list[tuple[ModuleType, str]]] = {identity: [] for identity in now}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if id(value) in now:
                places[id(value)].append((module, key))
                setattr(module, key, now[id(value)])
    return places


def _replaced(name: str, original: Any, noise: Noise, package: str) -> Replaced:
    is_class = isinstance(original, type)
    function = original.apply if is_class else original
    signature = _read(original.forward if is_class else original)
    if is_class:  # ctx is no argument of apply
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    roles = roles_of(signature.parameters)
    by_role = _by_role(function, signature, roles)
    if NOISY.search(original.__name__):
        check_noise(by_role, noise_probe(roles.values()), chance=1e-3)
        record = Replaced(name, noise, original)
    else:
        record = Replaced(name, recognised(by_role, roles.values()), original)
    places = surroundings(original.forward if is_class else original, package)
    call = _call(record, function, by_role, signature, roles, places)
    if is_class:

        def apply(cls, *args):
            """Ours; a class that was derived from it meanwhile has a forward and a backward of its own."""
            return call(*args) if cls is record.now else super(record.now, cls).apply(*args)

        record.now = type(original.__name__, (original,), {"apply": classmethod(apply), "_hdrq_patched": True})
    else:
        record.now = functools.wraps(original)(call)
        record.now._hdrq_patched = True
    return record


def _read(function: Callable) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise Unlike("its arguments cannot be read") from error


def _by_role(function: Callable, signature: inspect.Signature, roles: dict[str, str]) -> Callable:
    """The function, called by the roles of its arguments."""

    def call(**given):
        bound = inspect.BoundArguments(signature, {name: given[role] for name, role in roles.items()})  # type: ignore[arg-type]
        return function(*bound.args, **bound.kwargs)

    return call


def _call(
    record: Replaced, function: Callable, by_role: Callable, signature: inspect.Signature, roles: dict, places: list
) -> Callable:
    """What is called in a function's place."""
    order = tuple(roles.values())
    positional = all(p.kind is not p.KEYWORD_ONLY for p in signature.parameters.values())
    as_form, rest = itemgetter(*((*order, *DEFAULTS).index(role) for role in FORM)), tuple(DEFAULTS.values())
    level = 3 if isinstance(record.original, type) else 2  # of the line that called, for warnings
    verdicts: dict[tuple, Convention | Noise | str] = {}  # by the kind of call: ours, or why it is the original

    def call(*args, **kwargs) -> torch.Tensor:
        if record.undone or not _unobserved():
            return function(*args, **kwargs)
        values: Sequence = args
        if kwargs or len(args) != len(order) or not positional:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = [bound.arguments[name] for name in signature.parameters]
        kind = _kind(order, values)
        if places:
            kind += values_of(places)
        try:
            if kind not in verdicts:
                verdicts[kind] = _compared(record.form, by_role, dict(zip(order, values, strict=True)))
            verdict = verdicts[kind]
            if not isinstance(verdict, str):
                y = verdict(*as_form((*values, *rest)))
                record.calls += 1
                return y
        except Refused as refused:  # a kind that our op never takes, else values that it does not take
            verdict = _without_values(refused)
            if isinstance(refused.__cause__, TypeError):
                verdicts[kind] = verdict
        except (TypeError, ValueError) as refused:
            verdict = _without_values(refused)
        if verdict is UNSEEN:
            return function(*args, **kwargs)
        if verdict not in record.passed_on:
            text = f"{record.name}, patched by hdrq.compat, is computed by the original: {verdict}"
            warnings.warn(text, stacklevel=level)
        record.calls += 1
        record.passed_on[verdict] += 1
        return function(*args, **kwargs)

    return call


def _compared(form: Convention | Noise, by_role: Callable, given: dict[str, Any]) -> Convention | Noise | str:
    """What computes such calls, or why the original does. Functions that it calls are originals too."""
    if any(isinstance(v, torch.Tensor) and (type(v) not in PLAIN or v.is_meta) for v in given.values()):
        return UNSEEN
    if isinstance(form, Noise):
        refuse_to_draw_again()
    else:
        form = form.direct(**given)
    with _originals():
        return agrees(form, by_role, given) or form


def _kind(order: Sequence[str], values: Sequence) -> tuple:
    """What calls share that are compared with the original once: all but numbers and the lengths of x."""
    parts: list = [torch.is_grad_enabled()]
    for role, value in zip(order, values, strict=True):
        kind = type(value)
        if kind in PLAIN:
            parts.append(FACTS_OF_X(value) if role == "x" else FACTS(value))
        else:
            parts.append(value if isinstance(value, int) else kind)
    return tuple(parts)
