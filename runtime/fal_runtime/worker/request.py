"""What `POST /infer` may say. Pure: text in, a checked `InferRequest` or one INVALID error out.

A request is checked completely before it reaches the model, so that a bad one costs nothing and breaks nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fal_contract.errors import FalError, invalid

PROMPT_CHARS_MAX: Final = 4096
SEED_MAX: Final = 2**63 - 1
STEPS_MAX: Final = 200
GUIDANCE_MAX: Final = 50.0
SIDE_PX_MAX: Final = 4096
LORA_SCALE_MAX: Final = 8.0
BODY_BYTES_MAX: Final = 1 << 20
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_SHOWN_CHARS_MAX: Final = 80
FORMATS: Final = ("png", "json")
FIELDS: Final = ("prompt", "seed", "steps", "guidance", "width", "height", "lora", "format", "model")
_ALWAYS: Final = ("prompt", "seed", "format", "model")  # whatever the pipeline can obey


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter that the worker was started with, and how strongly it acts (1.0: as trained)."""

    name: str
    scale: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the loaded model offers; requests are checked against it.

    `options` are the request fields, beyond those that all know, that the pipeline can obey. `bytes`: of its weights,
    as loaded.
    """

    pipeline: str
    options: frozenset[str]
    steps: int
    guidance: float
    width_px: int
    height_px: int
    side_multiple_px: int
    loras: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One picture to make. `width_px` and `height_px` are 0 where the model's own size is meant.

    `model`: of those that are loaded, as the worker names it; empty: the one it began with.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    width_px: int = 0
    height_px: int = 0
    lora: Lora | None = None
    format: str = ""
    model: str = ""


def parse_request(body: bytes, model: ModelInfo, *, seed_default: int, name: str = "") -> InferRequest:
    """Check a JSON body against `model`, loaded as `name`. INVALID names field, value and remedy."""
    given = _object(body)
    for key in given:
        if key not in FIELDS:
            raise _refused(key, given[key], "is not a known key", remedy=f"Known keys: {', '.join(FIELDS)}.")
        if key not in _ALWAYS and key not in model.options and given[key] is not None:
            raise _refused(key, given[key], f"is not offered by {model.pipeline}", remedy="Leave it out.")
    steps = _integer(given, "steps", low=1, high=STEPS_MAX, default=model.steps)
    return InferRequest(
        prompt=_prompt(given),
        seed=_integer(given, "seed", low=0, high=SEED_MAX, default=seed_default),
        steps=steps,
        guidance=_number(given, "guidance", "guidance", low=0.0, high=GUIDANCE_MAX, default=model.guidance),
        width_px=_side(given, "width", model),
        height_px=_side(given, "height", model),
        lora=_lora(given.get("lora"), model),
        format=_format(given.get("format")),
        model=name,
    )


def check_request_id(value: str) -> str:
    """Return `value` when it can name a request, else raise INVALID."""
    if not REQUEST_ID.fullmatch(value):
        raise _refused(
            "x-fal-request-id",
            value,
            "is not a request id",
            remedy="Use 1 to 128 of letters, digits, '.', '_', ':', '-'.",
        )
    return value


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        given = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _refused("body", _shown(body), f"is not JSON ({error})", remedy='Send {"prompt": "…"}.') from error
    if not isinstance(given, dict):
        raise _refused("body", _shown(body), "is not a JSON object", remedy='Send {"prompt": "…"}.')
    return given


def _refused(field: str, value: object, why: str, *, remedy: str) -> FalError:
    """INVALID, whatever the client sent kept short enough to print."""
    if len(repr(value)) > _SHOWN_CHARS_MAX:
        value = repr(value)[:_SHOWN_CHARS_MAX] + "…"
    return invalid(field[:_SHOWN_CHARS_MAX], value, why, remedy=remedy)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _shown(body: bytes) -> str:
    return body[:60].decode("utf-8", "replace")


def _prompt(given: Mapping[str, Any]) -> str:
    if "prompt" not in given:
        raise _refused("prompt", None, "is missing", remedy='Send {"prompt": "…"}.')
    prompt = given["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise _refused("prompt", prompt, "is not a text", remedy="Say what to draw.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise _refused("prompt", prompt, "holds half a surrogate pair", remedy="Send well-formed Unicode.")
    if len(prompt) > PROMPT_CHARS_MAX:
        raise _refused("prompt", prompt, f"has {len(prompt)} characters", remedy=f"Use at most {PROMPT_CHARS_MAX}.")
    return prompt


def _integer(given: Mapping[str, Any], name: str, *, low: int, high: int, default: int) -> int:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refused(name, value, f"is not a whole number from {low} to {high}", remedy="Change it, or leave it out.")
    return value


def _number(given: Mapping[str, Any], name: str, field: str, *, low: float, high: float, default: float) -> float:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _refused(field, value, f"is not a number from {low:g} to {high:g}", remedy="Change it, or leave it out.")
    return float(value)


def _side(given: Mapping[str, Any], name: str, model: ModelInfo) -> int:
    multiple = model.side_multiple_px
    value = _integer(given, name, low=multiple, high=SIDE_PX_MAX, default=0)
    if value % multiple:
        near = max(multiple, round(value / multiple) * multiple)
        raise _refused(name, value, f"is not a multiple of {multiple}", remedy=f"Use {near}, for instance.")
    return value


def _lora(value: object, model: ModelInfo) -> Lora | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _refused("lora", value, "is not an object", remedy='Send {"name": "…", "scale": 1.0} or null.')
    for key in value:
        if key not in ("name", "scale"):
            raise _refused(f"lora.{key}", value[key], "is not a known key", remedy="Known keys: name, scale.")
    name = value.get("name")
    if name not in model.loras:
        known = ", ".join(model.loras) or "none"
        raise _refused("lora.name", name, "is not loaded here", remedy=f"Loaded: {known}.")
    scale = _number(value, "scale", "lora.scale", low=-LORA_SCALE_MAX, high=LORA_SCALE_MAX, default=1.0)
    return Lora(name, scale)


def _format(value: object) -> str:
    if value is None:
        return ""
    if value not in FORMATS or not isinstance(value, str):
        raise _refused("format", value, "is not a format", remedy=f"Use one of {', '.join(FORMATS)}.")
    return value
