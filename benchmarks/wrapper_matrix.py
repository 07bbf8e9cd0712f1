"""The same interactions with this wrapper and with its peers: which hold, which break and how.

    pip install -e ".[recipes,bench]"
    python benchmarks/wrapper_matrix.py

Each cell trains a small network for a few real steps, once in a plain loop and once in the way of its row, and
compares the weights to the bit. It prints a Markdown table; the exit code is 1 if a row of this wrapper breaks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import logging
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import schedulefree
import timm.optim
import timm.scheduler
import torch
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from pytorch_optimizer import SAM
from pytorch_optimizer import Lookahead as KozistrLookahead
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import LBFGS, SGD, AdamW, Optimizer, lr_scheduler

# The network of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

from toy import batch, loss_of, network, same, weights, wrapped

MOMENTUM = {"lr": 0.1, "momentum": 0.9}
Build = Callable[..., tuple[nn.Module, Any]]


class NotApplicable(Exception):
    """The interaction has no meaning for this wrapper."""


class Broken(Exception):
    """The interaction went on without an error, and to a wrong end."""


@dataclass(frozen=True)
class Peer:
    """A wrapper, and how one trains with it.

    Attributes:
        name: the column's title.
        wrap: (model, class of the base, options of the base) -> the wrapped optimizer.
        needs_closure: whether its step takes a closure and nothing else.
        takes_instance: whether it can be put around an optimizer that exists.
    """

    name: str
    wrap: Callable[[nn.Module, type[Optimizer], dict[str, Any]], Any]
    needs_closure: bool = False
    takes_instance: bool = True

    def build(self, kind: type[Optimizer] = SGD, seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
        """Return a new network and its wrapped optimizer, ready to train."""
        model = network(seed)
        return model, self.wrap(model, kind, options or MOMENTUM)

    def plain(self, message: str) -> None:
        """Leave out rows that need a step without a closure."""
        if self.needs_closure:
            raise NotApplicable(message)


def schedule_free(model: nn.Module, kind: type[Optimizer], options: dict[str, Any]) -> Any:
    optimizer = schedulefree.ScheduleFreeWrapper(kind(model.parameters(), **options))
    optimizer.train()
    return optimizer


OURS = Peer("InMergeOptimizer", lambda model, kind, o: wrapped(model, kind(model.parameters(), **o)))
PEERS = [
    OURS,
    Peer("timm Lookahead", lambda model, kind, o: timm.optim.Lookahead(kind(model.parameters(), **o), k=2)),
    Peer("pytorch_optimizer Lookahead", lambda model, kind, o: KozistrLookahead(kind(model.parameters(), **o), k=2)),
    Peer("pytorch_optimizer SAM", lambda model, kind, o: SAM(model.parameters(), kind, **o), True, False),
    Peer("schedulefree ScheduleFreeWrapper", schedule_free),
]

ROWS: dict[str, Callable[[Peer], str | None]] = {}


def row(title: str) -> Callable[[Callable[[Peer], str | None]], Callable[[Peer], str | None]]:
    """Register an interaction; what it returns is added to "passes"."""

    def register(interaction: Callable[[Peer], str | None]) -> Callable[[Peer], str | None]:
        ROWS[title] = interaction
        return interaction

    return register


def backward(model: nn.Module, optimizer: Any, step: int) -> torch.Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


def train(peer: Peer, model: nn.Module, optimizer: Any, steps: int | range, after: Any = None) -> None:
    """The plain loop; a closure is handed over where the step needs one."""
    for step in range(steps) if isinstance(steps, int) else steps:
        closure = functools.partial(backward, model, optimizer, step)
        closure()
        optimizer.step(*[closure] if peer.needs_closure else [])
        if after is not None:
            after()


def trained(peer: Peer, steps: int, **options: Any) -> nn.Module:
    """Return the network that a plain loop leaves."""
    model, optimizer = peer.build(**options)
    train(peer, model, optimizer, steps)
    return model


def expect_same(got: nn.Module, expected: nn.Module, what: str) -> None:
    """Raise with the largest difference of the weights, if there is one."""
    if not same(got, expected):
        pairs = zip(weights(got).values(), weights(expected).values(), strict=True)
        far = max(float((a - b).abs().max()) for a, b in pairs)
        raise Broken(f"{what}: weights off by {far:.2g}")


def expect(holds: bool, symptom: str) -> None:
    if not holds:
        raise Broken(symptom)


# Schedulers


def follow_schedule(peer: Peer, make: Callable[[Any], Any], advance: Callable[[Any, int], None]) -> None:
    """Compare rates under a scheduler, before and after a load, with those of a bare SGD."""
    bare = SGD(network().parameters(), **MOMENTUM)
    model, optimizer = peer.build()
    schedulers = [make(bare), make(optimizer)]
    for step in range(6):
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(peer, model, optimizer, range(step, step + 1))
        bare.step()
        for scheduler in schedulers:
            advance(scheduler, step)
        inner = getattr(optimizer, "base_optimizer", getattr(optimizer, "_base_optimizer", optimizer))
        rates = [part.param_groups[0]["lr"] for part in (bare, inner)]
        expect(rates[0] == rates[1], f"step {step}: the base has {rates[1]:.3g}, not {rates[0]:.3g}")


@row("scheduler of torch (StepLR), with a load half-way")
def _(peer: Peer) -> None:
    follow_schedule(peer, lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5), lambda scheduler, _: scheduler.step())


@row("OneCycleLR, with a load half-way")
def _(peer: Peer) -> None:
    make = functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20)
    follow_schedule(peer, make, lambda scheduler, _: scheduler.step())


@row("scheduler of timm (cosine), with a load half-way")
def _(peer: Peer) -> None:
    make = functools.partial(timm.scheduler.CosineLRScheduler, t_initial=8)
    follow_schedule(peer, make, lambda scheduler, step: scheduler.step(step + 1))


@row("warm-up from a rate of 0: the first step changes nothing")
def _(peer: Peer) -> None:
    model, optimizer = peer.build(lr=0.0)
    train(peer, model, optimizer, 4)
    expect_same(model, network(), "after steps at rate 0")


# Mixed precision


def overflowing(peer: Peer, kind: type[Optimizer], overflows: tuple[int, ...], **options: Any) -> None:
    peer.plain("GradScaler takes no closures")
    model, optimizer = peer.build(kind, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        for sound in (False, True) if step in overflows else (True,):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if not sound:
                for parameter in model.parameters():
                    parameter.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
    expect_same(model, trained(peer, 4, kind=kind, **options), "against a run without the overflows")


@row("GradScaler, steps that overflow")
def _(peer: Peer) -> None:
    overflowing(peer, SGD, (1, 2), **MOMENTUM)


@row("GradScaler, fused AdamW, steps that overflow")
def _(peer: Peer) -> None:
    overflowing(peer, AdamW, (1, 2), lr=0.01, fused=True)


@row("GradScaler, fused SGD, the first step overflows")
def _(peer: Peer) -> None:
    overflowing(peer, SGD, (0,), fused=True, **MOMENTUM)


@row("GradScaler, unscale_ and clip_grad_norm_")
def _(peer: Peer) -> None:
    peer.plain("GradScaler takes no closures")
    models = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.amp.GradScaler("cpu", enabled=False)):
        model, optimizer = peer.build()
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        models.append(model)
    expect_same(*models, "against unscaled training")


# accelerate


def new_accelerator(**options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


@row("accelerate: prepare, accumulate")
def _(peer: Peer) -> None:
    accelerator = new_accelerator(gradient_accumulation_steps=2)
    peer.plain("a closure sees one batch of the accumulated ones")
    model, optimizer = accelerator.prepare(*peer.build())
    for step in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            optimizer.step()
            optimizer.zero_grad()
    expected, plain = peer.build()
    for step in range(0, 8, 2):
        plain.zero_grad()
        ((loss_of(expected, step) / 2).backward(), (loss_of(expected, step + 1) / 2).backward())
        plain.step()
    expect_same(accelerator.unwrap_model(model), expected, "against a plain loop")


@row("accelerate: save_state, load_state, resumed run")
def _(peer: Peer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        accelerator = new_accelerator()
        model, optimizer = accelerator.prepare(*peer.build())
        train(peer, model, optimizer, 3)
        accelerator.save_state(folder)
        train(peer, model, optimizer, range(3, 7))
        accelerator = new_accelerator()
        resumed, other = accelerator.prepare(*peer.build(seed=1))
        accelerator.load_state(folder)
        train(peer, resumed, other, range(3, 7))
    expect_same(resumed, model, "after the resume")


# Checkpoints


@row("torch.save, torch.load, resumed run")
def _(peer: Peer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = peer.build()
        train(peer, model, optimizer, 3)
        torch.save([model.state_dict(), optimizer.state_dict()], Path(folder, "saved.pt"))
        train(peer, model, optimizer, range(3, 7))
        resumed, other = peer.build(seed=1)
        for part, state in zip((resumed, other), torch.load(Path(folder, "saved.pt")), strict=True):
            part.load_state_dict(state)
    train(peer, resumed, other, range(3, 7))
    expect_same(resumed, model, "after the resume")


@row("a checkpoint of the bare base loads")
def _(peer: Peer) -> None:
    model = network()
    bare = SGD(model.parameters(), **MOMENTUM)
    for step in range(2):
        backward(model, bare, step)
        bare.step()
    _, optimizer = peer.build()
    optimizer.load_state_dict(bare.state_dict())


@row("torch.distributed.checkpoint: a save moves no weight")
def _(peer: Peer) -> None:
    for options in (MOMENTUM, {"lr": 0.1}):
        model, optimizer = peer.build(**options)
        train(peer, model, optimizer, 3)
        optimizer.zero_grad()
        before = copy.deepcopy(model)
        get_optimizer_state_dict(model, optimizer)
        expect_same(model, before, "SGD with momentum" if "momentum" in options else "stateless SGD")
        fresh, optimizer = peer.build(**options)
        get_optimizer_state_dict(fresh, optimizer)
        expect_same(fresh, network(), "before the first step")


@row("torch.distributed.checkpoint: resumed run")
def _(peer: Peer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = peer.build()
        train(peer, model, optimizer, 3)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        train(peer, model, optimizer, range(3, 7))
        resumed, other = peer.build(seed=1)
        state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    train(peer, resumed, other, range(3, 7))
    expect_same(resumed, model, "after the resume")


# torch.compile, copies, hooks


@row("torch.compile of the step: graphs, and none after the second step")
def _(peer: Peer) -> str:
    peer.plain("its step is compiled with the closure")
    torch.compiler.reset()
    counter = CompileCounter()
    model, optimizer = peer.build()
    compiled = torch.compile(optimizer.step, backend=counter)
    frames = []
    for step in range(10):
        backward(model, optimizer, step)
        compiled()
        frames.append(counter.frame_count)
    expect_same(model, trained(peer, 10), "against the eager step")
    expect(frames[1] == frames[-1], f"{frames[1]} graphs after two steps, {frames[-1]} after ten")
    return f"{frames[-1]} graphs"


def copied_with_a_scheduler(peer: Peer, duplicate: Callable[[Any], Any]) -> None:
    model, optimizer = peer.build()
    train(peer, model, optimizer, 3)
    if not isinstance(optimizer, Optimizer):
        raise NotApplicable("it takes no scheduler")
    lr_scheduler.StepLR(optimizer, 100)
    before = copy.deepcopy(model)
    model_copy, copied = duplicate((model, optimizer))
    train(peer, model_copy, copied, range(3, 6))
    expect_same(model, before, "the copy stepped the original")
    train(peer, model, optimizer, range(3, 6))
    expect_same(model_copy, model, "against the original's steps")


@row("deepcopy with a scheduler attached")
def _(peer: Peer) -> None:
    copied_with_a_scheduler(peer, copy.deepcopy)


@row("pickle with a scheduler attached")
def _(peer: Peer) -> None:
    copied_with_a_scheduler(peer, lambda pair: pickle.loads(pickle.dumps(pair)))


@row("a step hook of the wrapper fires once, sees the final weights, and is copied")
def _(peer: Peer) -> None:
    model, optimizer = peer.build()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(copy.deepcopy(model)))
    train(peer, model, optimizer, 2)
    expect(len(seen) == 2, f"{len(seen)} calls in 2 steps")
    expect_same(seen[1], model, "in the hook")
    model_copy, copied = copy.deepcopy((model, optimizer))
    train(peer, model_copy, copied, 1)
    expect(len(seen) == 3, "lost in a deep copy")


# Bases


@row("a base with closures (LBFGS)")
def _(peer: Peer) -> None:
    if not peer.takes_instance:
        raise NotApplicable("it steps its base without a closure")
    model, optimizer = peer.build(LBFGS, lr=0.1)
    before = float(loss_of(model, 0))
    for _ in range(3):
        optimizer.step(functools.partial(backward, model, optimizer, 0))
    expect(float(loss_of(model, 0)) < before, "the loss did not fall")


@row("add_param_group reaches the base")
def _(peer: Peer) -> None:
    model, optimizer = peer.build()
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": 0.2})

    def step() -> None:
        def closure() -> torch.Tensor:
            loss = backward(model, optimizer, 0)
            added.grad = torch.ones(3)
            return loss

        closure()
        optimizer.step(*[closure] if peer.needs_closure else [])

    for _ in range(3):
        step()
    expect(bool((added != 1).all()), "its parameters do not move")


@row("around timm's Lookahead")
def _(peer: Peer) -> None:
    if not peer.takes_instance:
        raise NotApplicable("it builds its base itself")

    def lookahead(parameters: Any, **options: Any) -> Optimizer:
        return timm.optim.Lookahead(SGD(parameters, **options), k=2)

    model, optimizer = peer.build(lookahead)
    train(peer, model, optimizer, 4)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(peer, model, optimizer, 4)


@row("inside timm's Lookahead")
def _(peer: Peer) -> None:
    peer.plain("its step needs a closure, which Lookahead hands on without the first gradients")
    model, optimizer = peer.build()
    train(peer, model, timm.optim.Lookahead(optimizer, k=2), 4)


@row("train() and eval() on the optimizer")
def _(peer: Peer) -> None:
    _, optimizer = peer.build()
    optimizer.train()
    optimizer.eval()


@row("train() and eval() reach a schedule-free base")
def _(peer: Peer) -> None:
    if not peer.takes_instance:
        raise NotApplicable("it builds its base itself")
    model, optimizer = peer.build(schedulefree.SGDScheduleFree, lr=0.1)
    optimizer.train()
    train(peer, model, optimizer, 3)
    optimizer.eval()


@row("bfloat16 weights")
def _(peer: Peer) -> None:
    model = network().to(torch.bfloat16)
    optimizer = peer.wrap(model, SGD, MOMENTUM)
    train(peer, model, optimizer, 4)
    expect(all(bool(p.isfinite().all()) and p.dtype == torch.bfloat16 for p in model.parameters()), "not finite")


# Trainers


class WithLoss(nn.Module):
    """The network as Hugging Face's Trainer wants it: named inputs, and the loss in its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def images() -> list[dict[str, torch.Tensor]]:
    pairs = [batch(step) for step in range(4)]
    return [{"pixel_values": x, "labels": y} for many in pairs for x, y in zip(*many, strict=True)]


@row("Hugging Face Trainer(optimizers=...), its checkpoint, resumed run")
def _(peer: Peer) -> None:
    peer.plain("the Trainer steps without closures")

    def trainer(folder: str, seed: int = 0) -> transformers.Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        model, optimizer = peer.build(seed=seed)
        arguments = transformers.TrainingArguments(
            folder, max_steps=6, save_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no", warmup_steps=2,
        )  # fmt: skip
        return transformers.Trainer(WithLoss(model), arguments, train_dataset=images(), optimizers=(optimizer, None))

    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(folder)
        whole.train()
        resumed = trainer(folder, seed=1)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    expect(not same(whole.model.model, network()), "nothing was trained")
    expect_same(resumed.model.model, whole.model.model, "after the resume")


class Lit(lightning.LightningModule):
    """The network as Lightning wants it."""

    def __init__(self, peer: Peer, seed: int) -> None:
        super().__init__()
        self.model = network(seed)
        self.peer = peer

    def training_step(self, many: list[torch.Tensor], _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(many[0]), many[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.peer.wrap(self.model, SGD, MOMENTUM)
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


@row("Lightning configure_optimizers, its checkpoint, resumed run")
def _(peer: Peer) -> None:
    if peer.needs_closure:
        raise NotApplicable("Lightning's closure comes without the first gradients (manual optimization is left)")
    loader = torch.utils.data.DataLoader([(one["pixel_values"], one["labels"]) for one in images()], batch_size=6)

    def fit(seed: int, epochs: int, checkpoint: Path | None = None) -> tuple[nn.Module, lightning.Trainer]:
        module = Lit(peer, seed)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return module.model, trainer

    with tempfile.TemporaryDirectory() as folder:
        whole, _ = fit(0, 2)
        _, trainer = fit(0, 1)
        trainer.save_checkpoint(Path(folder, "half.ckpt"))
        resumed, _ = fit(1, 2, Path(folder, "half.ckpt"))
    expect(not same(whole, network()), "nothing was trained")
    expect_same(resumed, whole, "after the resume")


def cell(interaction: Callable[[Peer], str | None], peer: Peer) -> str:
    """Run one interaction with one wrapper, and say how it ended."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            note = interaction(peer)
    except NotApplicable as reason:
        return f"not applicable: {reason}"
    except Broken as symptom:
        return f"breaks: {symptom}"
    except Exception as error:  # whatever a wrapper raises is the symptom
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return f"breaks: {type(error).__name__}: {lines[0][:100]}"
    return f"passes ({note})" if note else "passes"


def main() -> int:
    """Print the table and the versions."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    PartialState(cpu=True)
    packages = ("torch", "timm", "accelerate", "pytorch_optimizer", "schedulefree", "transformers", "lightning")
    print("Measured with " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages) + ".\n")
    print("| interaction | " + " | ".join(peer.name for peer in PEERS) + " |")
    print("|---" * (len(PEERS) + 1) + "|")
    ours_break = False
    for title, interaction in ROWS.items():
        cells = [cell(interaction, peer) for peer in PEERS]
        ours_break |= not cells[PEERS.index(OURS)].startswith("passes")
        print(f"| {title} | " + " | ".join(text.replace("|", "\\|") for text in cells) + " |", flush=True)
    return int(ours_break)


if __name__ == "__main__":
    sys.exit(main())
