"""What is evaluated of a stage, and how: predictions of whole splits, and their scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ..data import tasks
from ..errors import Diverged
from ..judging.metrics import choose, score
from .averages import recalibrate_batch_norm
from .randomness import seed_globals
from .session import Session


@dataclass(frozen=True)
class Evaluation:
    """Probabilities and scores per split, by what is chosen on validation."""

    probabilities: dict[str, np.ndarray]
    scores: dict[str, dict[str, float | None]]


def evaluate(session: Session, parts: tuple[str, ...]) -> Evaluation:
    """Score the model as it is on these splits, of which "val" is one."""
    data = session.data
    probabilities = {part: tasks.probabilities(data.task, predict(session, part)) for part in parts}
    chosen = choose(data.task, data.val.labels, probabilities["val"])
    scores = {
        part: score(data.task, data.splits[part].labels, values, chosen) for part, values in probabilities.items()
    }
    if "test" in parts and data.own_scores is not None:
        scores["test"] |= data.own_scores(probabilities["test"])
    return Evaluation(probabilities, scores)


def use_evaluated_weights(session: Session) -> None:
    """Put into the model what is evaluated and kept: the average, and batch norm statistics that fit the weights."""
    accelerator, train = session.accelerator, session.loaders["train"]
    if session.average is not None:
        session.bare_model.load_state_dict(session.average.module.state_dict())
    if session.recalibrates:
        # Dropout ahead of a batch norm draws.
        seed_globals(session.stage.seed, "batch norm", 0, accelerator.process_index)
        train.set_epoch(0)
        recalibrate_batch_norm(accelerator, session.bare_model, (session.as_input(batch) for batch in train))


@contextmanager
def trained_weights_put_back(session: Session) -> Iterator[None]:
    """Training goes on from its own weights and statistics, whatever was evaluated meanwhile."""
    if session.average is None and not session.recalibrates:
        yield
        return
    model = session.bare_model
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    model.load_state_dict(trained)


def predict(session: Session, part: str) -> torch.Tensor:
    """Logits of every case of the split in order, float32 on the host, the same on every process.

    Each case is checked to be there once: gathering pads the last batch, and a padded case counted twice would shift
    every metric.
    """
    accelerator, model, loader = session.accelerator, session.model, session.loaders[part]
    model.eval()
    logits, rows = [], []
    with torch.inference_mode():
        for batch in loader:
            gathered = accelerator.gather_for_metrics((model(session.as_input(batch)).float(), batch["rows"]))
            logits.append(gathered[0].cpu())
            rows.append(gathered[1].cpu())
    cases = len(loader.dataset)
    if not torch.equal(torch.cat(rows), torch.arange(cases)):
        raise RuntimeError(
            f"the processes gathered {sum(map(len, rows))} predictions of {cases} cases, or in another order"
        )
    gathered_logits = torch.cat(logits)
    if not gathered_logits.isfinite().all():
        raise Diverged("the model's predictions are not finite")
    return gathered_logits
