"""Callbacks that log what was merged, for the Hugging Face Trainer and for Lightning.

Each class is made when it is first asked for, from its own library alone, so that neither needs the other's:

    from inmerge_optim.callbacks import TrainerMergeCallback
    trainer.add_callback(TrainerMergeCallback(trainer))

    from inmerge_optim.callbacks import LightningMergeCallback
    trainer = lightning.Trainer(callbacks=[LightningMergeCallback()])

Both log, since the last time that they did, ``merge/drawn`` and ``merge/merged`` (pairs of kernels), ``merge/share``
(merged / drawn) and ``merge/mean_cosine`` (of the merged pairs, where there are any), and nothing where nothing was
drawn. With ``per_layer`` the same follows for each layer, as in ``merge/layer4.1.conv2/share``.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch.optim import Optimizer

from inmerge_optim.optimizer import InMergeOptimizer, _chain


class _MergeLog:
    """What was merged since it was last read, under the names that are logged."""

    def __init__(self, optimizer: InMergeOptimizer, prefix: str, per_layer: bool) -> None:
        self.optimizer, self.prefix, self.per_layer = optimizer, prefix, per_layer
        self._seen = self._tallies()

    def read(self) -> dict[str, float]:
        """Return the figures since the last call; it waits for the device."""
        tallies = self._tallies()
        since = {name: _difference(tally, self._seen.get(name, (0, 0, 0.0))) for name, tally in tallies.items()}
        self._seen = tallies
        drawn, merged, cosines = (sum(column) for column in zip(*since.values(), strict=True)) if since else (0, 0, 0.0)
        figures = _figures(self.prefix, int(drawn), int(merged), cosines)
        if self.per_layer:
            for name, tally in since.items():
                figures |= _figures(f"{self.prefix}/{name}", *tally)
        return figures

    def _tallies(self) -> dict[str, tuple[int, int, float]]:
        """Return by layer the numbers of drawn and merged pairs, and the sum of the cosines of the merged."""
        counts = self.optimizer.merge_counts()
        return {
            name: (count["drawn"], count["merged"], count["merged"] * (count["mean_cosine"] or 0.0))
            for name, count in counts.items()
        }


def _difference(now: tuple[int, int, float], then: tuple[int, int, float]) -> tuple[int, int, float]:
    return now[0] - then[0], now[1] - then[1], now[2] - then[2]


def _figures(prefix: str, drawn: int, merged: int, cosines: float) -> dict[str, float]:
    if not drawn:
        return {}
    figures = {f"{prefix}/drawn": drawn, f"{prefix}/merged": merged, f"{prefix}/share": merged / drawn}
    return figures | ({f"{prefix}/mean_cosine": cosines / merged} if merged else {})


def _merge_logs(optimizers: Iterable[Optimizer], per_layer: bool) -> list[_MergeLog]:
    """Return a log for each InMergeOptimizer among optimizers and those that they wrap (accelerate's do)."""
    inner = [one for optimizer in optimizers for one in _chain(optimizer)]
    found = [one for one in inner if isinstance(one, InMergeOptimizer)]
    if not found:
        raise ValueError(
            f"the trainer trains with {', '.join(type(one).__name__ for one in inner) or 'no optimizer'}, and nothing "
            "is merged that could be logged: give it an InMergeOptimizer, or leave the callback out"
        )
    prefixes = ["merge"] if len(found) == 1 else [f"merge_{index}" for index in range(len(found))]
    return [_MergeLog(one, prefix, per_layer) for one, prefix in zip(found, prefixes, strict=True)]


class _TrainerEvents:
    """Log what was merged with the Hugging Face Trainer's own logs, at the steps at which it logs.

    Args:
        trainer: the Trainer, through whose ``log`` every reporter gets the figures.
        per_layer: whether each layer's are logged too.

    Raises:
        ValueError: at the start of the training, that the Trainer's optimizer is no InMergeOptimizer.
    """

    def __init__(self, trainer: Any, per_layer: bool = False) -> None:
        self.trainer, self.per_layer = trainer, per_layer
        self._logs: list[_MergeLog] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._logs = _merge_logs([kwargs["optimizer"]], self.per_layer)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What is logged here comes back here, and finds nothing that was drawn since.
        for log in self._logs:
            if figures := log.read():
                self.trainer.log(figures)


class _LightningEvents:
    """Log what was merged at the steps at which Lightning's Trainer logs, and the rest at the end of each epoch.

    Args:
        per_layer: whether each layer's figures are logged too.

    Raises:
        ValueError: at the start of the training, that none of the module's optimizers is an InMergeOptimizer.
    """

    def __init__(self, per_layer: bool = False) -> None:
        self.per_layer = per_layer
        self._logs: list[_MergeLog] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._logs = _merge_logs(trainer.optimizers, self.per_layer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer._logger_connector.should_update_logs:  # Lightning's own monitors ask it, too
            self._log(pl_module, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(pl_module, on_step=False, on_epoch=True)

    def _log(self, pl_module: Any, **when: bool) -> None:
        for log in self._logs:
            pl_module.log_dict(log.read(), batch_size=1, **when)


# By the name of the callback: its events, where the class to derive from may lie, and what that is called.
_CALLBACKS: dict[str, tuple[type, tuple[str, ...], str]] = {
    "LightningMergeCallback": (_LightningEvents, ("lightning.pytorch", "pytorch_lightning"), "Callback"),
    "TrainerMergeCallback": (_TrainerEvents, ("transformers",), "TrainerCallback"),
}


def __dir__() -> list[str]:
    return sorted(_CALLBACKS)


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    events, libraries, base = _CALLBACKS[name]
    made = type(name, (events, _base(name, libraries, base)), {"__doc__": events.__doc__, "__module__": __name__})
    globals()[name] = made  # one class, which pickle finds by its name
    return made


def _base(callback: str, libraries: tuple[str, ...], base: str) -> type:
    for library in libraries:
        try:
            found: type = getattr(import_module(library), base)
            return found
        except ModuleNotFoundError as error:
            if error.name is None or not library.startswith(error.name):  # something that the library needs itself
                raise
    package = libraries[0].partition(".")[0]
    raise ImportError(f"{callback} needs {package}, which is not installed: pip install {package}")
