"""The digits model's training: an interrupted run ends where an uninterrupted one does; prompts reach the tokenizer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[2] / "ops" / "models"

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the worker extra"),
]


@pytest.fixture(autouse=True)
def _models_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(MODELS), *sys.path])


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    import torch
    from training_run import SAVE_EVERY_STEPS, Run, train

    total = 2 * SAVE_EVERY_STEPS + 10

    def fit(work: Path, *, stop_at: int | None) -> tuple[list[float], int]:
        """Fit a line to noise from scratch or from what lies in `work`; returns its parameters and the steps done."""
        work.mkdir(exist_ok=True)
        torch.manual_seed(1)
        model, steps = torch.nn.Linear(3, 1), 0

        def loss_at(generator: torch.Generator) -> torch.Tensor:
            nonlocal steps
            if steps == stop_at:
                raise Interrupted
            steps += 1
            inputs = torch.randn(8, 3, generator=generator)
            return ((model(inputs) - inputs.sum(dim=1, keepdim=True)) ** 2).mean()

        train(Run(work, {"line": total}), "line", {"line": model}, loss_at, rate=0.05, average=0.9)
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach().tolist(), steps

    whole, steps = fit(tmp_path / "whole", stop_at=None)
    assert steps == total
    assert all(abs(weight - 1) < 0.2 for weight in whole[:3]), "it learns"
    with pytest.raises(Interrupted):
        fit(tmp_path / "cut", stop_at=SAVE_EVERY_STEPS + 7)
    resumed, steps = fit(tmp_path / "cut", stop_at=None)
    assert steps == total - SAVE_EVERY_STEPS, "it went on from the last saved step"
    assert resumed == whole
    again, steps = fit(tmp_path / "cut", stop_at=None)
    assert (again, steps) == (whole, 0)


def test_what_a_scanner_reads_from_a_drawn_real_digit_is_that_digit() -> None:
    """The ruler itself: real digits, drawn in each look and read back, are still named right."""
    from digits_data import load_real, paint, read_cells, strokes
    from score_digits import fit

    images, labels = load_real()
    half = len(images) // 2
    classifier = fit(images[:half], labels[:half])
    for look in ("paper", "neon"):
        read = read_cells(paint(strokes(images[half : half + 200]), look))
        right = (classifier.predict(read.flatten(1).numpy()) == labels[half : half + 200].numpy()).mean()
        assert right > 0.9, look
        blank = read_cells(paint(strokes(0 * images[:1]), look))
        assert float(blank.max()) < 0.05, "nothing drawn, nothing read"


def test_unseen_wordings_are_not_among_the_training_prompts() -> None:
    import torch
    from digits_data import TEMPLATES, TEMPLATES_UNSEEN, random_prompt, wording

    assert not set(TEMPLATES) & set(TEMPLATES_UNSEEN)
    generator = torch.Generator().manual_seed(1)
    drawn = {random_prompt(digit, generator) for digit in range(10) for _ in range(200)}
    assert not drawn & {wording(template, digit) for template in TEMPLATES_UNSEEN for digit in range(10)}
    assert len(drawn) > 800
