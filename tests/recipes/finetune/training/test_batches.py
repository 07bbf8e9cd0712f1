"""What reaches the model: order, flips and normalisation."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from finetune.data.images import Split
from finetune.training.batches import channel_statistics, eval_loader, flip_mask, model_input, train_loader

CONFIG = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}


def some_split(cases: int = 50, channels: int = 1) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (cases, channels, 6, 6), dtype=np.uint8)
    return Split(images, rng.integers(0, 3, cases), [str(k) for k in range(cases)])


def rows_of(split: Split, epoch: int, *, seed: int = 0, stage: str = "arm", steps: int = 1, workers: int = 0) -> list:
    loader = train_loader(split, batch_size=16, grad_accum_steps=steps, seed=seed, stage=stage, num_workers=workers)
    loader.batch_sampler.sampler.set_epoch(epoch)
    return [batch["rows"].tolist() for batch in loader]


def test_order_depends_on_seed_stage_and_epoch_alone() -> None:
    split = some_split()
    np.random.default_rng(0).random()
    first = rows_of(split, 0)
    torch.manual_seed(3)
    assert rows_of(split, 0) == first
    assert rows_of(split, 0, workers=2) == first
    assert rows_of(split, 1) != first
    assert rows_of(split, 0, seed=1) != first
    assert rows_of(split, 0, stage="backbone") != first


def test_an_epoch_is_whole_optimizer_steps() -> None:
    """50 cases in steps of 16: three steps, no case twice; accumulation cuts the same order finer."""
    split = some_split()
    batches = rows_of(split, 0)
    assert [len(rows) for rows in batches] == [16, 16, 16]
    assert len({row for rows in batches for row in rows}) == 48
    assert list(chain(*rows_of(split, 0, steps=4))) == list(chain(*batches))


def test_batches_hold_the_rows_they_name() -> None:
    split = some_split()
    train = train_loader(split, batch_size=16, grad_accum_steps=1, seed=0, stage="arm")
    for batch in [*train, *eval_loader(split, batch_size=7)]:
        rows = batch["rows"].numpy()
        np.testing.assert_array_equal(batch["images"].numpy(), split.images[rows])
        np.testing.assert_array_equal(batch["labels"].numpy(), split.labels[rows])


def test_flips_are_mirror_images_of_the_masked_rows_alone() -> None:
    images = torch.from_numpy(some_split().images)
    mask = flip_mask(50, 0.5, seed=0, stage="arm", epoch=0)
    mean, std = channel_statistics(CONFIG, 3)
    plain, flipped = model_input(images, mean, std), model_input(images, mean, std, mask)
    assert 10 < mask.sum() < 40
    torch.testing.assert_close(flipped[mask], plain[mask].flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(flipped[~mask], plain[~mask], rtol=0, atol=0)
    assert not torch.equal(mask, flip_mask(50, 0.5, seed=0, stage="arm", epoch=1))
    assert not flip_mask(50, 0.0, seed=0, stage="arm", epoch=0).any()
    assert flip_mask(50, 1.0, seed=0, stage="arm", epoch=0).all()


def test_grey_images_are_expanded_and_normalised_per_channel() -> None:
    images = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
    three = model_input(images, *channel_statistics(CONFIG, 3))
    expected = torch.tensor([(0.2 - 0.5) / 0.2, (0.2 - 0.4) / 0.25, (0.2 - 0.3) / 0.5])
    torch.testing.assert_close(three[0, :, 0, 0], expected)
    one = model_input(images, *channel_statistics(CONFIG, 1))
    assert one.shape == (2, 1, 4, 4)
