"""From a source to the folder of a packed image: resolve, fetch, unpack, check, pack, describe.

Everything that is made on the way lies in one folder below `work` that is removed at every end, also when cancelled; a
pack that fails leaves nothing in `output`. Nodes run this as a task in a container, operators' machines as it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fal_contract.clock import Clock, SystemClock
from fal_contract.errors import Code, FalError, invalid
from fal_contract.limits import (
    IMAGE_BYTES_MAX,
    IMAGE_BYTES_MAX_DEFAULT,
    IMAGE_CONFIG_BYTES_MAX,
    IMAGE_PACK_TIMEOUT_S,
)
from fal_runtime.images.commands import require, run
from fal_runtime.images.filesystem import ORDER_BYTES_MAX, choose_format, make_image, sort_list
from fal_runtime.images.layout import CONFIG_FILE, FORMATS, VERSION, Format, image_file, parse_layout
from fal_runtime.images.process import IDS_MAX
from fal_runtime.images.registry import Registry, RegistryAccess
from fal_runtime.images.source import Platform, Source, parse_platform, parse_source
from fal_runtime.images.tree import Growth, inspect
from fal_runtime.images.unpack import find_image, notes_of, unpack

_CLEAN_TIMEOUT_S: Final = 600.0
_HASH_BLOCK_BYTES: Final = 4 << 20
# In this order left out of a configuration that is too large: nobody here reads them.
_DISPENSABLE: Final = ("Labels", "OnBuild", "Shell", "Healthcheck", "ExposedPorts", "Volumes")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What to pack. `output` gets the image's two files and must not hold any; `work` (default: below `output`) needs
    room for the layers and the unpacked files. `order`: a file of paths in order of first use."""

    source: str
    output: Path
    work: Path | None = None
    platform: str = "linux/amd64"
    bytes_max: int = IMAGE_BYTES_MAX_DEFAULT
    format: str = "auto"
    order: Path | None = None
    access: RegistryAccess = field(default_factory=RegistryAccess)
    timeout_s: float = IMAGE_PACK_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class PackResult:
    """The facts. `bytes` of the packed file; `seconds` of each step, by name."""

    source: str
    digest: str
    format: Format
    platform: str
    layer_bytes: int
    bytes: int
    file: str
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """As the command prints them in its last line."""
        return {
            "source": self.source, "digest": self.digest, "format": self.format, "platform": self.platform,
            "layer_bytes": self.layer_bytes, "bytes": self.bytes, "file": self.file, "notes": list(self.notes),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }  # fmt: skip


async def pack(request: PackRequest, *, say: Say = lambda text: None) -> PackResult:
    """Pack one image. `say` is told each step.

    Raises INVALID naming the option, NOT_FOUND, UNAUTHENTICATED, UNAVAILABLE (registry), FAILED_PRECONDITION (cannot be
    packed), CORRUPT (hostile or damaged), NO_CAPACITY (disk full), TIMEOUT.
    """
    request = replace(request, output=request.output.absolute(), work=request.work and request.work.absolute())
    source, platform = parse_source(request.source), parse_platform(request.platform)
    if not 0 < request.bytes_max <= IMAGE_BYTES_MAX:
        raise invalid("--bytes-max", request.bytes_max, "is out of range", remedy=f"Give 1 to {IMAGE_BYTES_MAX}.")
    format_ = choose_format(request.format, ordered=request.order is not None)
    order = sort_list(_order_text(request.order)) if request.order is not None else ""
    _check_output(request.output)
    file = request.output / image_file(format_)
    try:
        async with asyncio.timeout(request.timeout_s), _work_folder(request) as work:
            return await _Pack(request, source, platform, format_, order, work, say).run(file)
    except TimeoutError:
        what = f"packing took longer than {request.timeout_s:g} s"
        raise FalError(Code.TIMEOUT, what, remedy="Make the image smaller, or look at the registry.") from None
    except OSError as exc:
        _remove(request.output, format_)
        what = f"{exc.filename or request.output} failed: {exc.strerror}"
        raise FalError(Code.FAILED_PRECONDITION, what, remedy="Look at the disk and at the source.") from None
    except BaseException:
        _remove(request.output, format_)
        raise


class _Pack:
    """One pack under way."""

    def __init__(
        self,
        request: PackRequest,
        source: Source,
        platform: Platform,
        format_: Format,
        order: str,
        work: Path,
        say: Say,
    ) -> None:
        self._request = request
        self._source = source
        self._platform = platform
        self._format: Format = format_
        self._order = order
        self._work = work
        self._say = say
        self._clock: Clock = SystemClock()
        self._seconds: dict[str, float] = {}

    async def run(self, file: Path) -> PackResult:
        request = self._request
        if self._source.kind == "rootfs":
            digest, layer_bytes, config, notes = await self._rootfs(file)
        else:
            digest, layer_bytes, config, notes = await self._layers(file)
        table = {
            "version": VERSION, "source": request.source, "digest": digest, "platform": str(self._platform),
            "format": self._format, "layer_bytes": layer_bytes, "config": config,
        }  # fmt: skip
        text = _encoded(table)
        layout = parse_layout(text, request.output)  # what a node would refuse is refused here
        notes += [f"the configuration's {note}" for note in layout.config.notes]
        (request.output / CONFIG_FILE).write_bytes(text)
        return PackResult(
            source=request.source, digest=digest, format=self._format, platform=str(self._platform),
            layer_bytes=layer_bytes, bytes=file.stat().st_size, file=file.name, notes=tuple(notes),
            seconds=self._seconds,
        )  # fmt: skip

    async def _layers(self, file: Path) -> tuple[str, int, Mapping[str, Any], list[str]]:
        """Fetch or find the image, unpack it, pack it."""
        request, bytes_max = self._request, self._request.bytes_max
        with self._timed("pull"):
            layout, tag, digest = await self._fetched()
            image = await asyncio.to_thread(find_image, layout, tag, self._platform, bytes_max=bytes_max)
        with self._timed("unpack"):
            self._say(f"unpacking {len(image.manifest.layers)} layers, {image.manifest.layer_bytes} bytes")
            tree = await unpack(
                image, self._work / "unpack", bytes_max=bytes_max, timeout_s=request.timeout_s, say=self._say
            )
        await self._make(file, tree.root, one_owner=tree.one_owner)
        return digest or image.digest, image.manifest.layer_bytes, image.config, list(tree.notes)

    async def _fetched(self) -> tuple[Path, str, str]:
        """(OCI layout on this machine, tag, digest at the registry)."""
        source, request = self._source, self._request
        if source.kind == "oci":
            return source.path, source.tag, ""
        layout = self._work / "pulled"
        if source.kind == "docker-archive":
            await self._convert(layout)
            return layout, "image", ""
        registry = Registry(source, request.access, self._work, say=self._say)
        self._say(f"asking {source.registry}")
        resolved = await registry.resolve(self._platform, bytes_max=request.bytes_max)
        self._say(f"pulling {resolved.digest}, {resolved.manifest.layer_bytes} bytes")
        await registry.copy(resolved, layout, bytes_max=request.bytes_max, timeout_s=request.timeout_s)
        return layout, "image", resolved.digest

    async def _convert(self, layout: Path) -> None:
        path, bytes_max = self._source.path.absolute(), self._request.bytes_max
        if not path.is_file():
            raise FalError(Code.NOT_FOUND, f"{path} is no file", remedy="Name an archive of `docker save`.")
        if any(char in str(path) for char in ":@"):
            raise invalid("source", str(path), "has ':' or '@' in its path", remedy="Rename it.")
        self._say("reading the archive")
        # It compresses the layers: left as they are they would be called gzip and be none.
        argv = [require("skopeo", "skopeo"), "--insecure-policy", "copy", "--quiet"]
        argv += [f"docker-archive:{path}", f"oci:{layout}:image"]
        growth = Growth(self._work, bytes_max)
        ran = await run(
            argv, timeout_s=self._request.timeout_s, folder=self._work, file_bytes_max=bytes_max, watch=growth.check
        )
        if ran.code:
            what = f"{path} cannot be read as an archive of images: {ran.last_line}"
            raise FalError(Code.CORRUPT, what, remedy="Save it again with `docker save`.", field="source")

    async def _rootfs(self, file: Path) -> tuple[str, int, Mapping[str, Any], list[str]]:
        """Pack a folder as it is."""
        root = self._source.path.absolute()
        if not root.is_dir():
            raise FalError(Code.NOT_FOUND, f"{root} is no folder", remedy="Name the folder that becomes the root.")
        root = root.resolve()
        if self._request.output.resolve().is_relative_to(root):
            remedy = "Write it somewhere else."
            raise invalid("--output", str(self._request.output), "lies in the folder that is packed", remedy=remedy)
        one_owner = os.geteuid() != 0
        with self._timed("check"):
            self._say("checking files")
            found = await asyncio.to_thread(inspect, root, bytes_max=self._request.bytes_max, ids_max=IDS_MAX)
        if not found.size.files:
            raise FalError(Code.FAILED_PRECONDITION, "the image is empty: the folder has no files", remedy="Fill it.")
        await self._make(file, root, one_owner=one_owner, excluded=found.special)
        with self._timed("hash"):
            digest = await asyncio.to_thread(_sha256, file)
        return digest, found.size.bytes, {}, notes_of(found, one_owner=one_owner)

    async def _make(self, file: Path, root: Path, *, one_owner: bool, excluded: list[str] | None = None) -> None:
        request = self._request
        with self._timed("pack"):
            self._say(f"packing as {self._format}")
            await make_image(
                root, file, self._format, folder=self._work, one_owner=one_owner, excluded=excluded or (),
                order=self._order, bytes_max=request.bytes_max, timeout_s=request.timeout_s,
            )  # fmt: skip

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began_s = self._clock.monotonic_s()
        yield
        self._seconds[step] = self._clock.monotonic_s() - began_s


# --- inside -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _work_folder(request: PackRequest) -> AsyncIterator[Path]:
    """A fresh folder below `work`; whatever is in it goes away at the end, and `work` itself where we made it."""
    parent = request.work if request.work is not None else request.output / ".work"
    made = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = Path(tempfile.mkdtemp(prefix="pack-", dir=parent)).resolve()
    try:
        yield folder
    finally:
        await asyncio.shield(asyncio.create_task(_clean(folder, parent, made=made), name="clean"))


async def _clean(folder: Path, parent: Path, *, made: bool) -> None:
    # `rm`: shutil.rmtree recurses, and a hostile tree is deep.
    argv = ["rm", "-rf", "--one-file-system", str(folder)]
    ran = await run(argv, timeout_s=_CLEAN_TIMEOUT_S, folder=parent)
    if ran.code:  # an ordinary user's folders whose modes shut their owner out
        await run(["chmod", "-R", "u+rwX", str(folder)], timeout_s=_CLEAN_TIMEOUT_S, folder=parent)
        await run(argv, timeout_s=_CLEAN_TIMEOUT_S, folder=parent)
    if made:
        with suppress(OSError):  # somebody else has put something there
            parent.rmdir()


def _check_output(output: Path) -> None:
    """Make the folder. INVALID when it cannot be, or holds an image already."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise invalid("--output", str(output), f"cannot be made: {exc.strerror}", remedy="Name a folder.") from None
    for name in (CONFIG_FILE, *(image_file(one) for one in FORMATS)):
        if (output / name).exists():
            raise invalid("--output", str(output), f"holds {name} already", remedy="Name an empty folder.")


def _remove(output: Path, format_: Format) -> None:
    for name in (CONFIG_FILE, image_file(format_)):
        with suppress(OSError):
            (output / name).unlink()


def _order_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(ORDER_BYTES_MAX + 1)
    except OSError as exc:
        raise invalid("--order", str(path), f"cannot be read: {exc.strerror}", remedy="Name a file.") from None
    if len(text) > ORDER_BYTES_MAX:
        raise invalid("--order", str(path), "is too large", remedy=f"Give at most {ORDER_BYTES_MAX >> 20} MiB.")
    return text.decode(errors="surrogateescape")


def _encoded(table: Mapping[str, Any]) -> bytes:
    """`config.json`, within its bound. FAILED_PRECONDITION."""
    config = dict(table["config"])
    for key in ("", *_DISPENSABLE):
        config.pop(key, None)
        text = json.dumps({**table, "config": config}, sort_keys=True, separators=(",", ":")).encode()
        if len(text) <= IMAGE_CONFIG_BYTES_MAX:
            return text
    what = f"the image's configuration has more than {IMAGE_CONFIG_BYTES_MAX >> 10} KiB"
    raise FalError(Code.FAILED_PRECONDITION, what, remedy="Shorten its variables and arguments.", field="source")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"
