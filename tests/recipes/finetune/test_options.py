"""Options from a config file and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from finetune.options import as_plain, parse_options
from finetune.sources.source import DatasetOptions

CONFIGS = Path(__file__).parents[3] / "recipes" / "configs"


def parse(*argv: str) -> DatasetOptions:
    return parse_options(DatasetOptions, list(argv))


def test_config_values_get_the_types_of_their_options(tmp_path: Path) -> None:
    """YAML reads 1e-4 as text and 1 as an integer; both become floats."""
    (tmp_path / "c.yaml").write_text(
        "dataset: digits\nweight-decay: 1e-4\nlr: 1\nseeds: [3, 4]\npretrained: false\nskip_layers: 10\n"
        "clip_grad: null\noutput: some/where\n"
    )
    options = parse("--config", str(tmp_path / "c.yaml"))
    assert options.weight_decay == 1e-4
    assert isinstance(options.lr, float)
    assert options.seeds == (3, 4)
    assert options.pretrained is False
    assert options.skip_layers == 10
    assert isinstance(options.skip_layers, int)
    assert options.clip_grad is None
    assert options.output == Path("some/where")


def test_command_line_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dataset: digits\nlr: 0.5\nseeds: [3, 4]\npretrained: false\n")
    options = parse("--lr", "0.1", "--config", str(tmp_path / "c.yaml"), "--seeds", "7", "--pretrained")
    assert (options.lr, options.seeds, options.pretrained) == (0.1, (7,), True)


def test_skip_layers_is_a_count_or_a_fraction() -> None:
    assert parse("--dataset", "digits", "--skip-layers", "0.5").skip_layers == 0.5
    assert isinstance(parse("--dataset", "digits", "--skip-layers", "3").skip_layers, int)


def test_similarity_threshold_is_a_number_or_a_text(tmp_path: Path) -> None:
    found = parse("--dataset", "digits", "--similarity-threshold", "1").similarity_threshold
    assert isinstance(found, float)
    assert parse("--dataset", "digits", "--similarity-threshold", "4sd").similarity_threshold == "4sd"
    for text, expected in (("q0.9", "q0.9"), ("1", 1.0), ("3e-1", 0.3)):
        (tmp_path / "c.yaml").write_text(f"dataset: digits\nsimilarity_threshold: {text}\n")
        found = parse("--config", str(tmp_path / "c.yaml")).similarity_threshold
        assert (found, type(found)) == (expected, type(expected))


def test_config_of_a_wrong_type_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("dataset: digits\nepochs: many\n")
    with pytest.raises(SystemExit) as exit_:
        parse("--config", str(tmp_path / "c.yaml"))
    assert exit_.value.code == 2
    assert "--epochs" in capsys.readouterr().err


def test_options_written_to_a_run_folder_are_a_config(tmp_path: Path) -> None:
    """config.yaml of a run, given as --config, means the same run."""
    options = parse("--dataset", "digits", "--seeds", "1", "2", "--output", "x", "--sched", "cosine")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({k: v for k, v in as_plain(options).items() if k != "config"}))
    again = parse("--config", str(tmp_path / "c.yaml"))
    assert as_plain(again) == {**as_plain(options), "config": str(tmp_path / "c.yaml")}


def test_paper_settings() -> None:
    options = parse("--dataset", "bloodmnist", "--config", str(CONFIGS / "paper_medmnist.yaml"))
    assert (options.model, options.batch_size, options.epochs, options.inmerge_epochs) == ("vgg19", 1024, 20, 5)
    assert (options.merge_weight, options.merge_prob, options.similarity_threshold) == (0.8, 0.3, 0.3)
    assert options.skip_layers == 10
