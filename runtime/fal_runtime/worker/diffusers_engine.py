"""A diffusers pipeline as an `Engine`. The only module of the worker that imports torch, and only when it loads.

Any text-to-picture pipeline folder will do whose `model_index.json` names classes of diffusers and transformers
and whose weights are safetensors; code in the folder is never run, nothing is downloaded. An optional `fal.json`
beside it, `{"steps": 12, "guidance": 3.0}`, says what requests get that leave these out. Runs in the lane's
thread; never touches the event loop.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fal_contract.errors import Code, FalError, invalid
from fal_runtime.worker.engine import DeviceFailed, OnStep, OutOfMemory, Output, Stopped
from fal_runtime.worker.request import GUIDANCE_MAX, STEPS_MAX, InferRequest, ModelInfo

_STEPS_DEFAULT: Final = 50
_GUIDANCE_DEFAULT: Final = 7.5
# Read by the libraries when they are imported; what is set already stands.
_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
_WARM_STEPS: Final = 2
# Request field → argument of the pipeline's __call__ that obeys it.
_ARGUMENTS: Final = {"steps": "num_inference_steps", "guidance": "guidance_scale", "width": "width", "height": "height"}


def quiet_environment() -> None:
    """What the libraries read when they are imported: no network, no warnings."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@dataclass(slots=True)
class _Loaded:
    """A pipeline in memory. `adapters`: the name inside it of each LoRA."""

    pipeline: Any
    accepted: frozenset[str]
    info: ModelInfo
    adapters: dict[str, str] = field(default_factory=dict)
    adapters_made: int = 0


class DiffusersEngine:
    """Loads `model` (a folder) and its `loras` (name and folder each) onto the GPU if there is one, else the CPU.

    More models and LoRAs may come and go between requests. The first is known as "", as what `name` says, or both.
    """

    def __init__(
        self,
        model: Path,
        *,
        loras: tuple[tuple[str, Path], ...] = (),
        threads: int = 0,
        dtype: str = "auto",
        name: str = "",
    ) -> None:
        self._folder = model
        self._lora_folders = loras
        self._threads = threads
        self._dtype = dtype
        self._name = name
        self._torch: Any = None
        self._diffusers: Any = None
        self._models: dict[str, _Loaded] = {}

    @property
    def _pipeline(self) -> Any:
        """The one that has been here longest."""
        return next(iter(self._models.values())).pipeline

    def load(self, on_phase: Callable[[str], None]) -> ModelInfo:
        """Import, read, move to the device. Raises FalError NOT_FOUND, INVALID or RUNNER_FAILED."""
        index = _read_index(self._folder)
        defaults = _read_defaults(self._folder / "fal.json")
        on_phase("import")
        self._diffusers = self._import(index)
        on_phase("load")
        self._models[self._name] = loaded = self._read_model(self._folder, defaults)
        for lora, folder in self._lora_folders:
            self.add_lora(self._name, lora, folder)
        return loaded.info

    def warm(self) -> None:
        """A short run at the model's own size, without any adapter."""
        self._warm(self._name)

    def add_model(self, model: str, folder: Path) -> ModelInfo:
        """See `Engine`."""
        index, defaults = _read_index(folder), _read_defaults(folder / "fal.json")
        self._import_classes(index)
        self._models[model] = loaded = self._read_model(folder, defaults)
        try:
            self._warm(model)
        except BaseException:
            self.remove_model(model)
            raise
        return loaded.info

    def remove_model(self, model: str) -> None:
        """See `Engine`."""
        if self._models.pop(model, None) is not None:
            gc.collect()
            if self._torch.cuda.is_available():
                self._torch.cuda.empty_cache()

    def add_lora(self, model: str, lora: str, folder: Path) -> ModelInfo:
        """See `Engine`."""
        loaded = self._loaded(model)
        # A name that torch accepts as a module's, whatever the LoRA is called, and that was never used before.
        adapter = f"lora_{loaded.adapters_made}"
        loaded.adapters_made += 1
        with _load_errors(folder):
            loaded.pipeline.load_lora_weights(str(folder), weight_name=_weights(folder), adapter_name=adapter)
        loaded.adapters[lora] = adapter
        loaded.info = _with_loras(loaded)
        return loaded.info

    def remove_lora(self, model: str, lora: str) -> None:
        """See `Engine`."""
        loaded = self._models.get(model)
        if loaded is not None and (adapter := loaded.adapters.pop(lora, "")):
            loaded.pipeline.delete_adapters([adapter])
            loaded.info = _with_loras(loaded)

    def _warm(self, model: str) -> None:
        info = self._loaded(model).info
        steps = min(_WARM_STEPS, info.steps)
        request = InferRequest(prompt="warm up", seed=0, steps=steps, guidance=info.guidance, model=model)
        self.infer(request, lambda done, steps: None)

    def _read_model(self, folder: Path, defaults: dict[str, float]) -> _Loaded:
        with _load_errors(folder):
            pipeline = self._read(folder)
        pipeline.set_progress_bar_config(disable=True)
        accepted = frozenset(inspect.signature(pipeline.__call__).parameters)
        return _Loaded(pipeline, accepted, _describe(pipeline, defaults))

    def infer(self, request: InferRequest, on_step: OnStep) -> Output:
        """Draw one picture; see `Engine`."""
        began_s = time.monotonic()
        try:
            picture = self._draw(request, on_step)
            drawn_s = time.monotonic()
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
        except (FalError, Stopped):
            raise
        except Exception as error:
            raise self._failure(error) from error
        finally:
            self._loaded(request.model).pipeline.maybe_free_model_hooks()
        return Output(
            png=buffer.getvalue(),
            width_px=picture.width,
            height_px=picture.height,
            infer_s=drawn_s - began_s,
            encode_s=time.monotonic() - drawn_s,
        )

    def _import(self, index: dict[str, Any]) -> Any:
        """Import torch, diffusers and the pipeline's classes, away from the network and from read-only folders."""
        quiet_environment()
        os.environ.setdefault("HF_HOME", str(Path(tempfile.gettempdir()) / "hf"))
        self._torch = importlib.import_module("torch")
        if self._threads:
            self._torch.set_num_threads(self._threads)
        diffusers = importlib.import_module("diffusers")
        transformers = importlib.import_module("transformers")
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        self._diffusers = diffusers
        self._import_classes(index)
        return diffusers

    def _import_classes(self, index: dict[str, Any]) -> None:
        """Both libraries import a class when it is first named: do that here, so that "load" is reading only."""
        getattr(self._diffusers, str(index.get("_class_name")), None)
        for component in index.values():
            if isinstance(component, list) and component[:1] in (["diffusers"], ["transformers"]):
                getattr(importlib.import_module(component[0]), str(component[1]), None)

    def _read(self, folder: Path) -> Any:
        torch = self._torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self._dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        with warnings.catch_warnings():
            # The new name, dtype, is not known to the oldest diffusers that we support.
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            pipeline = self._diffusers.DiffusionPipeline.from_pretrained(
                str(folder),
                torch_dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                # A page fault in a file that is still arriving cannot be interrupted, and its failure is a SIGBUS.
                disable_mmap=os.environ.get("FAL_STREAM_WEIGHTS") == "1",
            )
        return pipeline.to(device)

    def _loaded(self, model: str) -> _Loaded:
        """A model; no name means the first. Raises FAILED_PRECONDITION."""
        have = self._models.get(model) or (self._models.get(self._name) if not model else None)
        if have is None:
            what = f"the model {model} is not loaded" if model else "the model is not loaded"
            raise FalError(Code.FAILED_PRECONDITION, what, remedy="Call load first.")
        return have

    def _draw(self, request: InferRequest, on_step: OnStep) -> Any:
        loaded, torch = self._loaded(request.model), self._torch
        pipeline = loaded.pipeline
        _choose_adapter(loaded, request)
        wished = {
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "width": request.width_px or None,
            "height": request.height_px or None,
            # On the CPU whatever the device, so that a seed means the same picture everywhere.
            "generator": torch.Generator("cpu").manual_seed(request.seed),
            "output_type": "pil",
        }
        arguments = {k: v for k, v in wished.items() if k in loaded.accepted and v is not None}
        with told_of_steps(pipeline, request.steps, on_step) as callback:
            result = pipeline(prompt=request.prompt, **arguments, **callback)
        images = getattr(result, "images", None)
        if not images:
            what = f"{type(pipeline).__name__} makes no pictures"
            raise FalError(Code.RUNNER_FAILED, what, remedy="Deploy a text-to-picture pipeline.")
        return images[0]

    def _failure(self, error: Exception) -> Exception:
        """What a failed inference means: out of memory and device errors are told apart from the rest."""
        torch, text = self._torch, " ".join(str(error).split())[:300]
        # The CPU allocator has no exception class of its own, only this wording.
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return OutOfMemory(f"the request did not fit into memory: {text}")
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
            return DeviceFailed(f"the GPU failed: {text}")
        return error


@contextlib.contextmanager
def told_of_steps(pipeline: Any, steps: int, on_step: OnStep) -> Iterator[dict[str, Any]]:
    """Have `on_step` called after each step of a call of `pipeline` inside; yields arguments for that call.

    By the pipeline's own callback, or around its scheduler's `step` where it has none. What `on_step` raises ends
    the call at that step.
    """
    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:

        def on_step_end(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, int(getattr(pipeline, "num_timesteps", 0) or steps))
            return tensors

        yield {"callback_on_step_end": on_step_end}
        return
    scheduler, done = pipeline.scheduler, 0
    original = scheduler.step

    def step(*positional: Any, **named: Any) -> Any:
        nonlocal done
        result = original(*positional, **named)
        done += 1
        on_step(min(done, steps), steps)  # schedulers of second order step twice
        return result

    scheduler.step = step
    try:
        yield {}
    finally:
        del scheduler.step


@contextlib.contextmanager
def _load_errors(folder: Path) -> Iterator[None]:
    """Whatever a library raises while it reads `folder`, as RUNNER_FAILED."""
    try:
        yield
    except FalError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        what = f"cannot load the pipeline in {folder}: {type(error).__name__}: {reason}"
        raise FalError(Code.RUNNER_FAILED, what, remedy="Check the folder's files and their versions.") from error


def _describe(pipeline: Any, defaults: dict[str, float]) -> ModelInfo:
    parameters = inspect.signature(pipeline.__call__).parameters
    steps = defaults.get("steps") or _default(parameters.get("num_inference_steps"), _STEPS_DEFAULT)
    guidance = defaults.get("guidance")
    if guidance is None:
        guidance = _default(parameters.get("guidance_scale"), _GUIDANCE_DEFAULT)
    multiple = int(getattr(pipeline, "vae_scale_factor", 8) or 8)
    side = _own_side(pipeline)
    return ModelInfo(
        pipeline=type(pipeline).__name__,
        options=frozenset(field for field, argument in _ARGUMENTS.items() if argument in parameters),
        steps=int(steps),
        guidance=float(guidance),
        width_px=side * multiple,
        height_px=side * multiple,
        side_multiple_px=max(8, multiple),
        bytes=_weight_bytes(pipeline),
    )


def _weight_bytes(pipeline: Any) -> int:
    """Bytes of all parameters and buffers, as loaded."""
    parts = [one for one in pipeline.components.values() if hasattr(one, "parameters") and hasattr(one, "buffers")]
    return sum(t.numel() * t.element_size() for one in parts for t in (*one.parameters(), *one.buffers()))


def _with_loras(loaded: _Loaded) -> ModelInfo:
    """What it offers with the LoRAs that are in it now."""
    options = loaded.info.options - {"lora"} | ({"lora"} if loaded.adapters else set())
    return replace(loaded.info, options=options, loras=tuple(loaded.adapters), bytes=_weight_bytes(loaded.pipeline))


def _choose_adapter(loaded: _Loaded, request: InferRequest) -> None:
    if not loaded.adapters:
        return
    if request.lora is None:
        loaded.pipeline.disable_lora()
        return
    loaded.pipeline.enable_lora()
    loaded.pipeline.set_adapters([loaded.adapters[request.lora.name]], [request.lora.scale])


def _weights(folder: Path) -> str:
    """The one safetensors file of a LoRA folder."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        what = f"LoRA folder {folder} has {len(found)} safetensors files instead of one"
        raise FalError(Code.INVALID, what, remedy="Give a folder with one LoRA.", field="lora")
    return found[0]


def _default(parameter: inspect.Parameter | None, otherwise: float) -> float:
    value = parameter.default if parameter is not None else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _own_side(pipeline: Any) -> int:
    """Side of the latent that the model was trained on, 0 where the pipeline does not say."""
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = getattr(getattr(model, "config", None), "sample_size", 0)
    return int(size) if isinstance(size, int) else 0


def _read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`: which classes a pipeline is made of."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        what = f"{folder} is no pipeline folder: model_index.json cannot be read ({error})"
        raise FalError(Code.NOT_FOUND, what, remedy="Give the folder that save_pretrained wrote.") from error
    if not isinstance(index, dict):
        what = f"{path} is not a JSON object"
        raise FalError(Code.INVALID, what, remedy="Give the folder that save_pretrained wrote.")
    return index


def _read_defaults(path: Path) -> dict[str, float]:
    """`fal.json`: steps and guidance for requests that leave them out."""
    if not path.is_file():
        return {}
    try:
        given = json.loads(path.read_bytes())
    except ValueError as error:
        raise invalid(str(path), path.name, f"is not JSON ({error})", remedy='Write {"steps": 12}.') from error
    highest = {"steps": STEPS_MAX, "guidance": GUIDANCE_MAX}
    if not isinstance(given, dict):
        raise invalid(str(path), given, "is not a JSON object", remedy='Write {"steps": 12}.')
    for name, value in given.items():
        if name not in highest:
            raise invalid(f"{path}: {name}", value, "is not a known key", remedy="Known keys: steps, guidance.")
        lowest = 1 if name == "steps" else 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest[name]:
            why = f"is not a number from {lowest} to {highest[name]:g}"
            raise invalid(f"{path}: {name}", value, why, remedy="Change it, or leave it out.")
    return given
