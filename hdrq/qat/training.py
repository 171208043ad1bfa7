"""Training with one domain left out: seeded, resumed to the bit, its rule of selection said."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq._version import __version__
from hdrq.calibrate.data import spread
from hdrq.calibrate.progress import Step, bars
from hdrq.checkpoint.files import csv_text, write_atomically
from hdrq.checkpoint.saving import check_storable
from hdrq.checkpoint.workdir import Workdir, state_hash
from hdrq.evaluate.metrics import accuracy_of
from hdrq.prepare.copying import copy_model
from hdrq.prepare.float_model import check_module, device_of
from hdrq.qat.domains import Labelled, Part, Stream, labelled, split, words_seed
from hdrq.qat.flatness import ASAM, SAGM, SAM
from hdrq.qat.freezing import DisorderFreezer
from hdrq.qat.lsq import collapsed, convert, prepare, quantizers
from hdrq.qat.settings import SAID, Training
from hdrq.quantizers.provenance import origin, set_origin

KINDS: dict[str, type[SAM]] = {"sam": SAM, "asam": ASAM, "sagm": SAGM}
OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
LOOK = 50  # steps between two looks at the loss on a device that a look makes wait
EVALUATED = 256  # samples at a time

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass
class Trained:
    """What training made.

    Attributes:
        model: of the epoch that was selected: as of :func:`hdrq.quantize`, or in full precision with ``bits="float"``.
        target: the domain that was left out.
        epoch: the one that was selected, from 1.
        rows: for each epoch ``epoch``, ``steps`` so far, the mean ``loss`` of its steps; in percent the accuracies
            ``validation/NAME`` of each training domain, their mean ``validation``, ``target`` and
            ``target_validation``; and how many are ``frozen``.
        history: the freezer's.
    """

    model: nn.Module
    target: str
    settings: Training
    epoch: int
    rows: list[dict[str, Any]]
    history: list[dict[str, Any]]

    @property
    def in_domain(self) -> float:
        """Mean accuracy on the training domains' held-out samples, percent. ``"source"`` selects on the same."""
        return float(self.rows[self.epoch - 1]["validation"])

    @property
    def out_of_domain(self) -> float:
        """Accuracy on the domain that was left out, percent: on those samples that ``"oracle"`` does not select on."""
        return float(self.rows[self.epoch - 1]["target"])

    @property
    def caption(self) -> str:
        """What a table of these numbers must say."""
        return f"{self.settings.caption}; left out: {self.target}"


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: nn.Module,
    domains: Mapping[str, Any],
    target: str,
    settings: Training | None = None,
    *,
    loss: Loss | None = None,
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
    workdir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: Callable[[Step], None] | bool = True,
    **knobs: Any,
) -> Trained:
    """Train a model with quantizers on all domains but one, and measure it on that one.

    Each domain is cut in two at random, by the seed. From a share ``validation`` of the training domains, one sample of
    each at least, nothing is learned. Nor is it from the domain that is left out, at the smaller part of which
    ``"oracle"`` alone looks. A step reads ``batch_size`` samples of each training domain.

    Args:
        model: in full precision, trained without the target's data for an honest number; in evaluation mode, float32;
            left as it was. It returns the logits, (N, classes).
        domains: for each name a pair of tensors, samples and labels, or a dataset of (sample, label) with a length.
            The target is among them.
        target: the name of the domain that is left out.
        settings: None for the defaults; ``knobs`` are fields of :class:`Training` in the place of what it says.
        loss: of the model's output and the labels, a mean over samples; None for cross-entropy.
        augment: of a batch of samples, on the device; it draws from torch's generators alone.
        workdir: a folder for the state after each epoch and ``epochs.csv``; None for none.
        resume: go on with the run in ``workdir``, if there is one: it ends with the bits of one that was not stopped.
        progress: called with a :class:`hdrq.calibrate.progress.Step` from time to time; True for bars on a terminal.

    Raises:
        TypeError, ValueError: "X must be …, got …": one domain only, data without labels, an unknown target.
        FloatingPointError: the loss is not finite, or a scale sank to a thousandth of where it began.
        OSError: ``workdir`` cannot be written.

    Source: LSQ (arXiv 1902.08153); the protocol is DomainBed's (Gulrajani and Lopez-Paz, ICLR 2021).
    """
    names = {f.name for f in fields(Training)}
    for knob in knobs:
        checks.choice("knob", knob, tuple(sorted(names)))
    settings = replace(settings or Training(), **knobs)
    if resume and workdir is None:
        raise ValueError("workdir must be the folder of the run to resume, got None")
    data = labelled(domains)
    checks.choice("target", target, tuple(data))
    check_module("model", model)
    folder = None
    if workdir is not None:
        check_storable(model)
        facts = {f"settings.{key}": value for key, value in asdict(settings).items()}
        facts |= {"hdrq": __version__, "torch": torch.__version__, "device": device_of(model).type, "target": target}
        facts |= {"model": state_hash(model.state_dict())} | {f"domain.{n}": d.fingerprint for n, d in data.items()}
        folder = Workdir(workdir, facts, resume)
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        bars(target, "epoch") if progress is True else nullcontext(progress or None) as show,
    ):
        run = _Run(model, data, target, settings, loss, augment)
        first = run.load(folder) if folder is not None else 0
        for epoch in range(first, settings.epochs):
            run.epoch(epoch, show)
            if folder is not None:
                run.save(folder)
        return run.finished()


class _Run:
    """The state of a run, and how it goes on."""

    def __init__(self, model, data: dict[str, Labelled], target: str, settings: Training, loss, augment) -> None:
        self.settings, self.target, self.device, self.augment = settings, target, device_of(model), augment
        self.loss: Loss = loss or self._cross_entropy
        parts = {name: split(each, settings.validation, settings.seed) for name, each in data.items()}
        self.held_out: dict[str, Part] = {name: few for name, (_, few) in parts.items() if name != target}
        self.target_parts = parts[target]
        sources = {name: rest for name, (rest, _) in parts.items() if name != target}
        self.streams = [Stream(part, settings.batch_size, settings.seed) for part in sources.values()]
        self.steps = max(-(-len(part) // settings.batch_size) for part in sources.values())  # of an epoch
        self.model = self._prepared(model, sources)
        self.freezer = None
        if settings.freeze is not None:
            self.freezer = DisorderFreezer(self.model, settings.freeze, **settings.rule)
        self.scaler = torch.amp.GradScaler(self.device.type) if settings.autocast == "float16" else None
        self.optimizer = self._optimizer()
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.stepper = self._stepper()
        self.rows: list[dict[str, Any]] = []
        self.best: tuple[int, dict[str, torch.Tensor]] = (0, {})  # epoch, state

    def epoch(self, number: int, show: Callable[[Step], None] | None) -> None:
        """Train for an epoch, the first of which is 0, measure, and keep the state where it is the one to select."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.train()
        for k in range(self.steps):
            step = number * self.steps + k
            try:
                total += self._step(step).double()
            except ValueError as error:  # an op's, of a scale that is not finite
                if low := collapsed(self.model):
                    raise _sunk(low, number) from error
                raise
            look = self.device.type == "cpu" or (k + 1) % LOOK == 0 or k + 1 == self.steps
            if look and not bool(total.isfinite()):
                raise FloatingPointError(
                    f"loss must be finite, got {float(total)} in step {k + 1} of epoch {number + 1}; a lower lr or "
                    "scale_lr, or more bits"
                )
            if show is not None and ((k + 1) % LOOK == 0 or k + 1 == self.steps):
                show(Step("step", number, self.settings.epochs, k + 1, self.steps, float(total) / (k + 1)))
        if low := collapsed(self.model):
            raise _sunk(low, number)
        self.rows.append(self._measured(number, float(total) / self.steps))
        if selected(self.rows, self.settings.select) == number + 1:
            state = self.model.state_dict()
            self.best = number + 1, {name: value.detach().clone() for name, value in state.items()}

    def finished(self) -> Trained:
        epoch, state = self.best
        self.model.load_state_dict(state)
        settings = asdict(self.settings)
        history = [] if self.freezer is None else self.freezer.history
        if self.settings.quantizes:
            model = convert(self.model)
            facts = {"settings": settings, "target": self.target, "epoch": epoch, "result": self.rows[epoch - 1]}
            set_origin(model, {**origin(model), "qat": facts})
        else:
            model = self.model.requires_grad_(False).eval()
        return Trained(model, self.target, self.settings, epoch, self.rows, history)

    def save(self, folder: Workdir) -> None:
        """Everything that decides what follows; and the rows as a table."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best[1].items()}
        plain: dict[str, dict] = {}
        for number, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{number}/{key}"] = value
                else:
                    plain.setdefault(str(number), {})[key] = value
        facts: dict[str, Any] = {"index": 0, "rows": self.rows, "best": self.best[0], "optimizer": plain}
        if self.freezer is not None:
            frozen = self.freezer.state_dict()
            tensors["freezer/signs"] = frozen.pop("signs")
            facts["freezer"] = frozen
        if self.scaler is not None:
            facts["scaler"] = self.scaler.state_dict()
        folder.save_current(tensors, facts)
        write_atomically(folder.path / "epochs.csv", csv_text(self.rows, list(self.rows[0])))

    def load(self, folder: Workdir) -> int:
        """Go back to the state in a folder; how many epochs are done."""
        found = folder.load_current(0)
        if found is None:
            return 0
        tensors, facts = found

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(under("model/"))
        self.best = facts["best"], {name: value.to(self.device) for name, value in under("best/").items()}
        self.rows = facts["rows"]
        state: dict[int, dict] = {int(number): dict(values) for number, values in facts["optimizer"].items()}
        for name, value in under("optimizer/").items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.freezer is not None:
            self.freezer.load_state_dict({**facts["freezer"], "signs": tensors["freezer/signs"]})
        if self.scaler is not None:
            self.scaler.load_state_dict(facts["scaler"])
        return len(self.rows)

    def _prepared(self, model: nn.Module, sources: Mapping[str, Part]) -> nn.Module:
        chosen = self.settings
        if not chosen.quantizes:
            return copy_model("model", model)
        each = -(-chosen.calibration // len(sources))
        samples = [part.data.batch(part.index[spread(len(part), each)].tolist())[0] for part in sources.values()]
        return prepare(
            model,
            torch.cat(samples),
            bits=chosen.bits,
            edges=chosen.edges,
            per_channel=chosen.per_channel,
            init=chosen.init,
            grad_factor=chosen.grad_factor,
            batchnorm=chosen.batchnorm,
            seed=chosen.seed,
            **{"range_samples": chosen.calibration, **chosen.placement},
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        chosen = self.settings
        scales = {id(quantizer.scale) for quantizer in quantizers(self.model).values()}
        learned = [p for p in self.model.parameters() if p.requires_grad]
        if not learned:
            raise ValueError("model must have parameters that require gradients to be trained, got none")
        groups: list[dict[str, Any]] = [{"params": [p for p in learned if id(p) not in scales], "lr": chosen.lr}]
        if mine := [p for p in learned if id(p) in scales]:
            lr = chosen.lr if chosen.scale_lr is None else chosen.scale_lr
            groups.append({"params": mine, "lr": lr, "weight_decay": 0.0})
        options = {"momentum": chosen.momentum} if chosen.optimizer == "sgd" else {}
        return OPTIMIZERS[chosen.optimizer](groups, weight_decay=chosen.weight_decay, **options)

    def _stepper(self) -> SAM | None:
        chosen = self.settings
        if chosen.flatness is None:
            return None
        options: dict[str, Any] = {} if chosen.rho is None else {"rho": chosen.rho}
        options |= {"alpha": chosen.alpha} if chosen.flatness == "sagm" else {}
        return KINDS[chosen.flatness](
            self.optimizer,
            self.model,
            perturb=chosen.perturb,
            perturb_scales=chosen.perturb_scales,
            freezer=self.freezer,
            scaler=self.scaler,
            **options,
        )

    def _step(self, step: int) -> torch.Tensor:
        """One step; the loss before it. Random numbers are a function of seed and step."""
        batches = [stream.batch(step) for stream in self.streams]
        x = torch.cat([x for x, _ in batches]).to(self.device)
        y = torch.cat([y for _, y in batches]).to(self.device)
        torch.manual_seed(words_seed(self.settings.seed, "step", step))
        if self.augment is not None:
            x = self.augment(x)
        done = step / (self.settings.epochs * self.steps)
        factor = 0.5 * (1 + math.cos(math.pi * done)) if self.settings.schedule == "cosine" else 1.0
        for group, lr in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = lr * factor

        def closure() -> torch.Tensor:
            total = torch.zeros((), device=self.device)
            for some, labels in zip(x.chunk(self.settings.parts), y.chunk(self.settings.parts), strict=True):
                with self._autocast():
                    part = self.loss(self.model(some), labels) * (len(some) / len(x))
                (part if self.scaler is None else self.scaler.scale(part)).backward()
                total = total + part.detach().float()
            return total

        if self.stepper is not None:
            return self.stepper.step(closure)
        self.optimizer.zero_grad(set_to_none=True)
        loss = closure()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss

    def _autocast(self):
        if self.settings.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.autocast))

    def _cross_entropy(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        if not isinstance(logits, torch.Tensor):
            got = type(logits).__name__
            raise TypeError(
                f"model must return its logits, a tensor, got {got}; give loss=, which takes what it returns"
            )
        return nn.functional.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)

    def _measured(self, number: int, loss: float) -> dict[str, Any]:
        """The row of an epoch."""
        self.model.eval()
        found = {f"validation/{name}": self._accuracy(part) for name, part in self.held_out.items()}
        most, few = self.target_parts
        return {
            "epoch": number + 1,
            "steps": (number + 1) * self.steps,
            "loss": loss,
            **found,
            "validation": sum(found.values()) / len(found),
            "target": self._accuracy(most),
            "target_validation": self._accuracy(few),
            "frozen": 0 if self.freezer is None else len(self.freezer.frozen),
        }

    def _accuracy(self, part: Part) -> float:
        return accuracy_of(self.model, part.batches(EVALUATED))


def leave_one_out(
    model: nn.Module,
    domains: Mapping[str, Any],
    settings: Training | None = None,
    *,
    targets: list[str] | None = None,
    workdir: str | os.PathLike | None = None,
    **options: Any,
) -> dict[str, Trained]:
    """:func:`train` with each domain left out in turn, or each of ``targets``; work folders have the domains' names.

    ``model`` is one that has seen none of them; where it was trained on some, call :func:`train` with each one's own.
    """
    names = list(labelled(domains)) if targets is None else targets
    folders = {name: None if workdir is None else os.path.join(workdir, name) for name in names}
    return {name: train(model, domains, name, settings, workdir=folders[name], **options) for name in names}


def selected(rows: list[dict[str, Any]], rule: str) -> int:
    """The epoch, from 1, that a rule selects among the rows of a run; of equal ones the first."""
    if checks.choice("rule", rule, tuple(SAID)) == "last":
        return len(rows)
    column = {"source": "validation", "oracle": "target_validation"}[rule]
    return 1 + max(range(len(rows)), key=lambda k: (rows[k][column], -k))


def _sunk(names: list[str], number: int) -> FloatingPointError:
    return FloatingPointError(
        f"scales must be finite and above a thousandth of where they began, got others in {checks.listed(names)} in "
        f"epoch {number + 1}; a lower lr or scale_lr"
    )
