"""Values of the core as bytes and back, exactly: what the decision log is written in.

Pure. One generic codec instead of one mapping a class: every dataclass, enum and plain class of `fal_scheduler.core` is
known by module, name and names of fields, so that a new event or table needs no line here. The bytes are msgpack:

    array                     a list
    map without the key nil   a dict (keys of any kind, order kept)
    {nil: [number, …]}        a tuple (0), or an object of the class that was defined under `number`
    [number, kind, name, fields]   at the top level: the definition of a class, before its first use

Reading an older log: a field that the log lacks takes its default, a class that was renamed stands in `RENAMED`, a
field that went is let go when it stands in `DROPPED`. Anything else is a FalError (VERSION_MISMATCH) that names class
and field. Floats, integers up to 64 bits, order of dicts: all come back as they were, so that what is decided from
them does, too. Sets have no order and are refused; a frozenset is written in order of its members.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cache
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Final

import msgpack
import numpy as np

from fal_contract.errors import Code, FalError

Build = Callable[[list[Any]], Any]

RENAMED: Final[Mapping[str, str]] = {}  # "module.Class" in older logs -> "module.Class" of today
# Class -> fields that older logs have and nobody needs.
DROPPED: Final[Mapping[str, frozenset[str]]] = {"State": frozenset({"reboots"})}
ITEM_BYTES_MAX: Final = 1 << 30  # of one value read back: a snapshot of the largest cluster is well below

_PREFIX: Final = "fal_scheduler.core."
_TUPLE: Final = 0
_EMPTY: Final = {None: [_TUPLE]}
_OBJECT, _ENUM, _PLAIN, _FROZENSET, _DEQUE, _ARRAY = "object", "enum", "plain", "frozenset", "deque", "array"


class UnknownType(TypeError):
    """A value of a type that the log cannot hold."""


def known_classes() -> Mapping[str, type]:
    """Every class of the core's modules that are loaded, as "module.Class"; also as "Class" where that is one only, so
    that a class may move to another module."""
    return _classes_of(tuple(sorted(name for name in sys.modules if name.startswith(_PREFIX))))


@cache
def _classes_of(modules: tuple[str, ...]) -> Mapping[str, type]:
    found: dict[str, type] = {}
    bare: dict[str, list[type]] = {}
    for module in modules:
        for name, value in vars(sys.modules[module]).items():
            if isinstance(value, type) and value.__module__ == module and value.__name__ == name:
                found[name_of(value)] = value
                bare.setdefault(name, []).append(value)
    return {**{name: one[0] for name, one in bare.items() if len(one) == 1}, **found}


def name_of(cls: type) -> str:
    """A class of the core as logs name it."""
    return f"{cls.__module__.removeprefix(_PREFIX)}.{cls.__name__}"


def _slots(cls: type) -> list[str]:
    return [name for one in reversed(cls.__mro__) for name in getattr(one, "__slots__", ()) if name != "__weakref__"]


class Packer:
    """Writes values. Classes are numbered in order of first use; their definitions come before the value."""

    def __init__(self) -> None:
        self._encoders: dict[type, Callable[[Any], object]] = {
            tuple: lambda value: {None: [_TUPLE, *value]} if value else _EMPTY,
            MappingProxyType: dict,
        }
        self._numbers: dict[type, int] = {}
        self._definitions: list[list[object]] = []
        self._packer = msgpack.Packer(
            default=self._default, strict_types=True, use_bin_type=True, unicode_errors="surrogatepass", autoreset=True
        )

    def pack(self, value: object) -> bytes:
        """The bytes of `value`, after those of definitions that it needs. Raises UnknownType."""
        definitions, packed = self.pack_apart(value)
        return definitions + packed

    def pack_apart(self, value: object) -> tuple[bytes, bytes]:
        """The bytes of definitions that are needed now, and those of `value`."""
        packed = bytes(self._packer.pack(value))
        if not self._definitions:
            return b"", packed
        definitions, self._definitions = self._definitions, []
        return b"".join(bytes(self._packer.pack(one)) for one in definitions), packed

    def _default(self, value: Any) -> object:
        encode = self._encoders.get(type(value))
        if encode is None:
            encode = self._encoders[type(value)] = self._encoder(type(value))
        return encode(value)

    def _define(self, cls: type, kind: str, name: str, fields: list[str]) -> int:
        number = self._numbers[cls] = len(self._numbers) + 1
        self._definitions.append([number, kind, name, fields])
        return number

    def _encoder(self, cls: type) -> Callable[[Any], object]:
        if issubclass(cls, np.ndarray):
            number = self._define(cls, _ARRAY, _ARRAY, [])
            return lambda value: {None: [number, value.dtype.str, list(value.shape), value.tobytes()]}
        if cls is frozenset:
            number = self._define(cls, _FROZENSET, _FROZENSET, [])
            return lambda value: {None: [number, *sorted(value)]}
        if cls is deque:
            number = self._define(cls, _DEQUE, _DEQUE, [])
            return lambda value: {None: [number, value.maxlen, *value]}
        name = name_of(cls)
        if known_classes().get(name) is not cls:
            raise UnknownType(
                f"{cls.__module__}.{cls.__name__} cannot be in a decision log: it is no dataclass, enum or class of "
                f"a module of fal_scheduler.core, and no int, float, str, bytes, tuple, list, dict or deque"
            )
        if issubclass(cls, Enum):
            number = self._define(cls, _ENUM, name, [])
            return lambda value: {None: [number, value.value]}
        if dataclasses.is_dataclass(cls):
            return self._fields(cls)
        number = self._define(cls, _PLAIN, name, [])
        names = _slots(cls)
        if names:
            return lambda value: {None: [number, {name: getattr(value, name) for name in names}]}
        return lambda value: {None: [number, vars(value)]}

    def _fields(self, cls: type) -> Callable[[Any], object]:
        names = [one.name for one in dataclasses.fields(cls)]
        number = self._define(cls, _OBJECT, name_of(cls), names)
        if not names:
            return lambda value: {None: [number]}
        take = attrgetter(*names)
        if len(names) == 1:
            return lambda value: {None: [number, take(value)]}
        return lambda value: {None: [number, *take(value)]}


class Unpacker:
    """Reads values back, in the order in which they were written. `release`: who wrote them, for errors."""

    def __init__(self, *, release: str = "another release") -> None:
        self._release = release
        self._builders: dict[int, Build] = {_TUPLE: lambda values: tuple(values[1:])}

    def unpack(self, data: bytes) -> Iterator[Any]:
        """Every value in `data`. Raises FalError: VERSION_MISMATCH, or CORRUPT where it is no such bytes."""
        unpacker = msgpack.Unpacker(
            object_hook=self._hook,
            strict_map_key=False,
            unicode_errors="surrogatepass",
            max_buffer_size=ITEM_BYTES_MAX,
        )
        unpacker.feed(data)
        while True:
            try:
                value = next(unpacker)
            except StopIteration:
                return
            except (ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
                raise FalError(
                    Code.CORRUPT, f"a value of the log cannot be read: {error!r}", remedy="Take another log."
                ) from error
            if isinstance(value, list):
                self._learn(value)
            else:
                yield value

    def _hook(self, value: dict[Any, Any]) -> Any:
        if None not in value:
            return value
        parts = value[None]
        return self._builders[parts[0]](parts)

    def _learn(self, definition: list[Any]) -> None:
        number, kind, name, fields = definition
        self._builders[number] = self._builder(kind, name, fields)

    def _builder(self, kind: str, name: str, fields: list[str]) -> Build:
        if kind == _FROZENSET:
            return lambda parts: frozenset(parts[1:])
        if kind == _DEQUE:
            return lambda parts: deque(parts[2:], maxlen=parts[1])
        if kind == _ARRAY:
            return lambda parts: np.frombuffer(parts[3], np.dtype(parts[1])).reshape(parts[2]).copy()
        name = RENAMED.get(name, name)
        known = known_classes()
        cls = known.get(name) or known.get(name.rpartition(".")[2])
        if cls is None:
            raise self._strange(f"{name}, which this release does not know")
        if kind == _ENUM:
            return lambda parts: cls(parts[1])
        if kind == _PLAIN:
            return lambda parts: self._plain(cls, parts[1])
        return self._dataclass(cls, fields)

    def _dataclass(self, cls: Any, fields: list[str]) -> Build:
        known = {one.name: one for one in dataclasses.fields(cls)}
        if list(known) == fields:
            return lambda parts: cls(*parts[1:])
        dropped = DROPPED.get(cls.__name__, frozenset())
        for name in fields:
            if name not in known and name not in dropped:
                raise self._strange(f"field {name} of {cls.__name__}, which this release does not know")
        for one in known.values():
            has_default = one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING
            if one.name not in fields and not has_default:
                raise self._strange(f"{cls.__name__} without its field {one.name}")
        take = [(at, name) for at, name in enumerate(fields, start=1) if name in known]
        return lambda parts: cls(**{name: parts[at] for at, name in take})

    def _plain(self, cls: Any, attributes: dict[str, Any]) -> Any:
        """An object of a class without declared fields: what its constructor makes, with what was written on top."""
        made = cls()
        known = set(_slots(cls) or vars(made))
        for name, value in attributes.items():
            if name in known:
                setattr(made, name, value)
            elif name not in DROPPED.get(cls.__name__, frozenset()):
                raise self._strange(f"attribute {name} of {cls.__name__}, which this release does not know")
        return made

    def _strange(self, what: str) -> FalError:
        return FalError(
            Code.VERSION_MISMATCH,
            f"the log holds {what}",
            remedy=f"It was written by {self._release}: replay it with that release.",
        )


__all__ = ["DROPPED", "RENAMED", "Packer", "UnknownType", "Unpacker", "known_classes"]
