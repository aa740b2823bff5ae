"""The parts of the diffusers engine that need no torch: step hooks, folder checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fal_contract.errors import Code, FalError
from fal_runtime.worker.diffusers_engine import DiffusersEngine, told_of_steps
from fal_runtime.worker.engine import Stopped


class WithCallback:
    """Calls back as diffusers' pipelines do; `num_timesteps` may differ from the steps that were asked for."""

    num_timesteps = 3

    def __call__(self, prompt: str, callback_on_step_end: Any = None) -> int:
        for step in range(self.num_timesteps):
            assert callback_on_step_end(self, step, 0, {"latents": step}) == {"latents": step}
        return self.num_timesteps


class Scheduler:
    def __init__(self) -> None:
        self.steps = 0

    def step(self, sample: int) -> int:
        self.steps += 1
        return sample + 1


class WithoutCallback:
    """A pipeline whose steps show only in its scheduler."""

    def __init__(self, calls: int) -> None:
        self.scheduler = Scheduler()
        self._calls = calls

    def __call__(self, prompt: str) -> int:
        sample = 0
        for _ in range(self._calls):
            sample = self.scheduler.step(sample)
        return sample


def test_steps_by_the_pipelines_callback() -> None:
    seen: list[tuple[int, int]] = []
    pipeline = WithCallback()
    with told_of_steps(pipeline, 9, lambda done, steps: seen.append((done, steps))) as arguments:
        pipeline("x", **arguments)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_steps_by_the_scheduler_where_there_is_no_callback() -> None:
    seen: list[tuple[int, int]] = []
    pipeline = WithoutCallback(calls=3)
    with told_of_steps(pipeline, 2, lambda done, steps: seen.append((done, steps))) as arguments:
        assert pipeline("x", **arguments) == 3
    assert seen == [(1, 2), (2, 2), (2, 2)]
    assert pipeline("x") == 3
    assert len(seen) == 3, "the scheduler is as it was"


@pytest.mark.parametrize("pipeline", [WithCallback(), WithoutCallback(calls=5)], ids=["callback", "scheduler"])
def test_stopping_ends_the_call_at_that_step(pipeline: Any) -> None:
    seen: list[int] = []

    def on_step(done: int, steps: int) -> None:
        seen.append(done)
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped), told_of_steps(pipeline, 5, on_step) as arguments:
        pipeline("x", **arguments)
    assert seen == [1, 2]


def refused(folder: Path) -> FalError:
    phases: list[str] = []
    with pytest.raises(FalError) as caught:
        DiffusersEngine(folder).load(phases.append)
    assert phases == [], "it is refused before anything is imported"
    return caught.value


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=["missing", "no JSON", "no object"])
def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "model_index.json").write_text(text)
    error = refused(tmp_path)
    assert error.code in (Code.NOT_FOUND, Code.INVALID)
    assert str(tmp_path) in error.what
    assert "save_pretrained" in error.remedy


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "fal.json"),
        ("[]", "fal.json"),
        ('{"step": 3}', "fal.json: step"),
        ('{"steps": 0}', "fal.json: steps"),
        ('{"steps": true}', "fal.json: steps"),
        ('{"guidance": "much"}', "fal.json: guidance"),
        ('{"guidance": 99}', "fal.json: guidance"),
    ],
)
def test_bad_defaults_are_refused_by_name(tmp_path: Path, text: str, field: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "fal.json").write_text(text)
    error = refused(tmp_path)
    assert (error.code, error.field) == (Code.INVALID, str(tmp_path / field))
