"""The wrappers that are compared, how each is trained, and the table's rows."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import schedulefree
import timm.optim
import torch
from pytorch_optimizer import SAM
from pytorch_optimizer import Lookahead as KozistrLookahead
from torch import nn
from torch.optim import SGD, Optimizer

# The network of the tests.
sys.path.append(str(Path(__file__).parents[2] / "tests"))

from toy import batch, loss_of, network, same, weights, wrapped  # noqa: F401

MOMENTUM = {"lr": 0.1, "momentum": 0.9}


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

    def ours(self, message: str) -> None:
        """Leave out rows on what this wrapper alone does."""
        if self is not OURS:
            raise NotApplicable(message)

    def around(self, message: str = "it builds its base itself") -> None:
        """Leave out rows that hand over an optimizer that exists."""
        if not self.takes_instance:
            raise NotApplicable(message)

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


def expect_same(got: nn.Module, expected: nn.Module | dict[str, torch.Tensor], what: str, within: float = 0.0) -> None:
    """Raise with the largest difference of the weights, if it is more than ``within``: by default to the bit."""
    if not same(got, expected):
        theirs = weights(expected) if isinstance(expected, nn.Module) else expected
        far = max(float((value - theirs[name]).abs().max()) for name, value in weights(got).items())
        expect(0 < far <= within, f"{what}: weights off by {far:.2g}")


def expect(holds: bool, symptom: str) -> None:
    if not holds:
        raise Broken(symptom)
