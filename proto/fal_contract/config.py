"""Configuration of a process: TOML file, then environment, then flags; the later wins.

A process describes its configuration as one pydantic model derived from `ConfigModel`. `load_config` merges the
three sources and validates once, so that a typing mistake anywhere is one `FalError(INVALID)` naming the source, the
key, the value and the remedy, before the process does anything. Manifests use `pydantic_error` for the same.

The environment variable of the key `log.level` under the prefix `FAL_AGENT` is `FAL_AGENT_LOG_LEVEL`. Text in it is
read as the field's type: a list is comma separated or a TOML array, a table is a TOML inline table. Variables
that start with the prefix and name no key are refused too, so a prefix must belong to one process only.

Called once at the start of every process. Must not read the environment or the clock by itself.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, Union

from pydantic import BaseModel, ConfigDict, SecretBytes, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import CONFIG_BYTES_MAX

_VALUE_CHARS_MAX: Final = 80
_LEGAL_KEYS_SHOWN_MAX: Final = 12
_SECRET_KEY: Final = re.compile(r"secret|password|passphrase|token|private|api_?key", re.IGNORECASE)
_ARM: Final = re.compile(r"(function-\w+|literal)\[.*\]|constrained-\w+|\[key\]")
_MISSING_TYPES: Final = frozenset({"missing", "missing_argument"})


class ConfigModel(BaseModel):
    """Base of configuration models: unknown keys refused, values frozen, defaults checked like input."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True)


ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One key of a model, for documentation and `--help`."""

    path: str  # dotted, as in the TOML file
    type: str  # for a reader, not for a program
    default: str  # TOML-like text; "required" when there is none
    help: str
    env: str  # the environment variable, empty without a prefix


def load_config(
    model_cls: type[ModelT],
    *,
    file: Path | None,
    env: Mapping[str, str],
    prefix: str,
    flags: Mapping[str, object],
) -> ModelT:
    """Merge file, environment and flags (in rising precedence) and validate.

    `flags` maps dotted keys to values; None means that the flag was not given. Raises FalError(INVALID).
    """
    data: dict[str, Any] = {}
    origins: dict[tuple[str, ...], str] = {}
    if file is not None:
        data = _read_toml(file)
    for path, variable in _env_names(model_cls, prefix).items():
        if variable in env:
            field = _field_at(model_cls, path)
            _put(data, path, _from_text(env[variable], field, variable), origins, f"environment variable {variable}")
    _refuse_unknown_variables(model_cls, env, prefix)
    for key, value in flags.items():
        if value is not None:
            _put(data, tuple(key.split(".")), value, origins, f"flag --{key.replace('.', '-').replace('_', '-')}")
    try:
        return model_cls.model_validate(data)
    except ValidationError as exc:
        loc = tuple(str(part) for part in exc.errors(include_url=False, include_context=False)[0]["loc"])
        source = next((origins[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origins), None)
        raise pydantic_error(exc, source or (str(file) if file else "configuration"), model=model_cls) from None


def pydantic_error(exc: ValidationError, source: str, *, model: type[BaseModel] | None = None) -> FalError:
    """The first validation error as one FalError(INVALID).

    `source` says where the input came from (a file, a variable); `model` gives the legal keys for "did you mean".
    Values of secret fields are not shown.
    """
    first = exc.errors(include_url=False)[0]
    loc = tuple(first["loc"])
    path = _dotted(loc)
    if first["type"] == "extra_forbidden":
        return _unknown_key(source, path, str(loc[-1]), _legal_keys(model, loc[:-1]))
    if first["type"] in _MISSING_TYPES:
        field = _field_at(model, tuple(str(part) for part in loc)) if model else None
        about = f" ({_type_text(field.annotation)}: {field.description})" if field and field.description else ""
        return FalError(Code.INVALID, f"{source}: {path} is missing", remedy=f"Set {path}{about}.", field=path)
    why = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    value = _shown(first.get("input"), path)
    if not path:
        return FalError(Code.INVALID, f"{source}: {why}", remedy="Correct the values named.", field="")
    expected = f"Give {path} as {_expected(model, loc)}." if model else f"Correct {path}."
    return FalError(Code.INVALID, f"{source}: {path} = {value} is refused: {_lower(why)}", remedy=expected, field=path)


def describe(model_cls: type[BaseModel], prefix: str = "") -> Iterator[ConfigKey]:
    """Every key of the model, nested tables flattened, in the order of definition."""
    names = _env_names(model_cls, prefix) if prefix else {}
    for path, field in _leaves(model_cls):
        yield ConfigKey(
            path=".".join(path),
            type=_type_text(field.annotation),
            default=_default_text(field),
            help=field.description or "",
            env=names.get(path, ""),
        )


def nearest(word: str, legal: Sequence[str]) -> str | None:
    """The legal word that looks most like `word`, or None when none is near."""
    near = difflib.get_close_matches(word, legal, n=1, cutoff=0.6)
    return near[0] if near else None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            raw = stream.read(CONFIG_BYTES_MAX + 1)
    except OSError as exc:
        why = exc.strerror or str(exc)
        raise invalid(
            "config", str(file), f"cannot be read: {why}", remedy="Give a readable TOML file, or none."
        ) from None
    if len(raw) > CONFIG_BYTES_MAX:
        raise invalid(
            "config",
            str(file),
            f"is larger than {CONFIG_BYTES_MAX} bytes",
            remedy="This is not a configuration file; name another.",
        )
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise invalid("config", str(file), f"is not TOML: {exc}", remedy="Correct the line named.") from None


def _put(
    data: dict[str, Any], path: tuple[str, ...], value: object, origins: dict[tuple[str, ...], str], origin: str
) -> None:
    """Set `path` in nested tables; a scalar in the way is replaced by a table."""
    table = data
    for part in path[:-1]:
        below = table.get(part)
        if not isinstance(below, dict):
            below = table[part] = {}
        table = below
    table[path[-1]] = value
    origins[path] = origin


def _leaves(model_cls: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in model_cls.model_fields.items():
        path = (*above, field.alias or name)
        nested = _model_in(field.annotation)
        if nested is not None and not _is_container(field.annotation):
            yield from _leaves(nested, path)
        else:
            yield path, field


def _env_names(model_cls: type[BaseModel], prefix: str) -> dict[tuple[str, ...], str]:
    names: dict[tuple[str, ...], str] = {}
    for path, _ in _leaves(model_cls):
        variable = f"{prefix}_{'_'.join(path)}".upper().replace("-", "_")
        assert variable not in names.values(), f"two keys of {model_cls.__name__} share {variable}"
        names[path] = variable
    return names


def _refuse_unknown_variables(model_cls: type[BaseModel], env: Mapping[str, str], prefix: str) -> None:
    legal = sorted(_env_names(model_cls, prefix).values())
    for variable in sorted(env):
        if variable.startswith(f"{prefix}_") and variable not in legal:
            near = nearest(variable, legal)
            remedy = f"Did you mean {near}?" if near else f"Unset it, or use one of {_listed(legal)}."
            raise FalError(
                Code.INVALID, f"environment variable {variable} names no setting", remedy=remedy, field=variable
            )


def _from_text(text: str, field: FieldInfo | None, variable: str) -> object:
    """An environment variable as the field's shape; scalars stay text, pydantic reads them."""
    annotation = field.annotation if field else str
    if not _is_container(annotation):
        return text
    stripped = text.strip()
    if stripped.startswith(("[", "{")):
        try:
            return tomllib.loads(f"value = {stripped}")["value"]
        except tomllib.TOMLDecodeError as exc:
            raise invalid(
                variable, _clip(text), f"is not a TOML value: {exc}", remedy="Write it as in the configuration file."
            ) from None
    return [part.strip() for part in stripped.split(",") if part.strip()]


def _unwrap(annotation: Any) -> list[Any]:
    """The alternatives of an annotation without None and Annotated."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _unwrap(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for arm in typing.get_args(annotation) if arm is not type(None) for inner in _unwrap(arm)]
    return [annotation]


def _is_container(annotation: Any) -> bool:
    roots = [typing.get_origin(arm) or arm for arm in _unwrap(annotation)]
    return any(isinstance(root, type) and issubclass(root, list | tuple | set | frozenset | Mapping) for root in roots)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation is, or holds as element or value."""
    for arm in _unwrap(annotation):
        if isinstance(arm, type) and issubclass(arm, BaseModel):
            return arm
        for inner in typing.get_args(arm):
            if inner is not Ellipsis and (found := _model_in(inner)) is not None:
                return found
    return None


def _field_at(model: type[BaseModel] | None, loc: Sequence[object]) -> FieldInfo | None:
    """The field that a location ends in; indexes, dict keys and union tags on the way are stepped over."""
    field: FieldInfo | None = None
    for part in loc:
        known = _fields_by_key(model).get(str(part)) if model else None
        if known is not None:
            field = known
            model = _model_in(known.annotation)
    return field


def _fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _legal_keys(model: type[BaseModel] | None, loc: Sequence[object]) -> list[str]:
    for part in loc:
        known = _fields_by_key(model).get(str(part)) if model else None
        if known is not None:
            model = _model_in(known.annotation)
    return sorted(_fields_by_key(model)) if model else []


def _unknown_key(source: str, path: str, key: str, legal: list[str]) -> FalError:
    near = nearest(key, legal)
    if near:
        remedy = f"Did you mean {near!r}?"
    elif legal:
        remedy = f"Legal here: {_listed(legal)}."
    else:
        remedy = "Remove it."
    return FalError(Code.INVALID, f"{source}: unknown key {path!r}", remedy=remedy, field=path)


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - _LEGAL_KEYS_SHOWN_MAX} more" if len(words) > _LEGAL_KEYS_SHOWN_MAX else ""
    return ", ".join(words[:_LEGAL_KEYS_SHOWN_MAX]) + more


def _dotted(loc: Sequence[object]) -> str:
    """`rollout.canary_perc`, `loras[0]`; without the words by which pydantic tells the arms of a union apart."""
    text = ""
    for part in loc:
        if text and isinstance(part, str) and _ARM.fullmatch(part):
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _expected(model: type[BaseModel] | None, loc: Sequence[object]) -> str:
    field = _field_at(model, loc)
    if field is None:
        return "the type documented"
    text = _type_text(field.annotation)
    return f"{text} ({field.description})" if field.description else text


def _type_text(annotation: Any) -> str:
    """`list[int]`, `"a" or "b"`, `int or none`: what a reader may type."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_text(args[0])
    if origin is typing.Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else _type_text(arg) for arg in args)
    if origin is not None:
        inner = ", ".join("…" if arg is Ellipsis else _type_text(arg) for arg in args)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return {"str": "text", "Path": "path", "SecretStr": "text"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, SecretStr | SecretBytes):
        return "(secret)" if value.get_secret_value() else '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return f'"{value}"'
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _shown(value: object, path: str) -> str:
    if isinstance(value, SecretStr | SecretBytes) or _SECRET_KEY.search(path.rsplit(".", 1)[-1]):
        return "(secret)"
    return _clip(repr(value))


def _clip(text: str) -> str:
    return text if len(text) <= _VALUE_CHARS_MAX else text[: _VALUE_CHARS_MAX - 1] + "…"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
