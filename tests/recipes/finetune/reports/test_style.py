"""Arms can be told apart, however many there are and however long their names."""

from __future__ import annotations

from types import SimpleNamespace

from finetune.reports.style import contrast_name, difference_legend, difference_rows, in_lines, looks, new_figure

SETTINGS = "merge_prob=0.05,merge_weight=0.95,similarity_threshold=q0.5"


def test_thirty_arms_look_different() -> None:
    run = SimpleNamespace(arms=[str(k) for k in range(30)])
    found = [(look["color"], look["linestyle"], look["marker"]) for _, look in looks(run, marker=True)]
    assert len(set(found)) == 30


def test_settings_that_two_arms_share_are_told_once() -> None:
    assert contrast_name(f"inmerge@{SETTINGS}", f"norm-matched@{SETTINGS}") == f"inmerge - norm-matched@{SETTINGS}"
    assert contrast_name("inmerge@merge_prob=0.1", "norm-matched") == "inmerge@merge_prob=0.1 - norm-matched"
    assert contrast_name("inmerge", "ema") == "inmerge - ema"


def test_long_names_leave_the_picture_its_room() -> None:
    ends = [f"{kind}{end}" for kind in ("", "t_", "bootstrap_") for end in ("low", "high")]
    difference = {"mean": 0.0, "values": [-0.01, 0.01], **dict.fromkeys(ends, 0.0)}
    names = [f"inmerge@{SETTINGS}", contrast_name(f"inmerge@{SETTINGS}", f"norm-matched@{SETTINGS}")]
    figure, axes = new_figure(1.35 + 0.5 * len(names))
    difference_rows(axes, [(name, difference) for name in names], margin=0.02)
    difference_legend(figure)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(box.x0 >= 0 for box in boxes)
    assert boxes[0].y0 > boxes[1].y1, "the names of two rows overlap"
    assert axes.get_window_extent().width > figure.bbox.width / 2
    assert "".join(in_lines(names[1]).split("\n")) == names[1]
