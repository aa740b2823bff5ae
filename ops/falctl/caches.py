"""`falctl cache`: compile caches: what is there, what is being built, builds, and what may go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from falctl.context import owned, unary
from falctl.pools import JsonFlag

group = typer.Typer(help="Compile caches: kernels that are compiled once for a kind of GPU.", no_args_is_help=True)
POLL_S: Final = 1.0
_FACTS_BYTES_MAX: Final = 256 << 10

Namespace = Annotated[str, typer.Argument(help="cluster, or team/NAME.")]
FactsFile = Annotated[
    Path | None, typer.Option("--facts", help="TOML or JSON file with what decides the content, one text a name.")
]
Facts = Annotated[list[str] | None, typer.Option("--fact", help="NAME=VALUE; wins over the file. Repeat it.")]


@group.command("list")
def list_entries(
    namespace: Annotated[str, typer.Option(help="Only of cluster, or of team/NAME.")] = "",
    key: Annotated[str, typer.Option(help="Only keys that begin so.")] = "",
    json: JsonFlag = False,
) -> None:
    """Entries, builds under way, and builds that failed."""
    from fal_contract.units import format_bytes
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, print_table, to_json

    entries = unary("ListCacheEntries", pb.ListCacheEntriesRequest(namespace=namespace, key=key)).entries
    if json:
        print_json("entries", [to_json(view) for view in entries])
        return
    print_table(
        ("NAMESPACE", "KEY", "STATE", "SIZE", "NODES", "GPU", "COMPONENT"),
        (
            (
                view.namespace, view.key[:12], view.state,
                format_bytes(view.entry.bytes) if view.HasField("entry") else "-", str(view.nodes_ready),
                view.entry.facts.get("gpu_name", "-"), view.entry.facts.get("component_class", "-"),
            )
            for view in entries
        ),
        empty="No entries. Build one: falctl cache build cluster --facts FILE -- COMMAND",
    )  # fmt: skip


@group.command("show")
def show(
    namespace: Namespace,
    key: Annotated[str, typer.Argument(help="The key, or how it begins.")],
    json: JsonFlag = False,
) -> None:
    """One entry with what its key is made of, or its build."""
    from fal_contract.errors import invalid, not_found
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, to_json

    found = unary("ListCacheEntries", pb.ListCacheEntriesRequest(namespace=namespace, key=key)).entries
    if not found:
        raise not_found("cache entry", f"{namespace}/{key}", remedy="List them with `falctl cache list`.")
    if len(found) > 1:
        raise invalid("KEY", key, f"begins {len(found)} keys", remedy="Give more of it.")
    if json:
        print_json("entry", to_json(found[0]))
        return
    _print(found[0])


def _print(view: Any) -> None:
    from fal_contract.units import format_bytes
    from falctl.output import print_facts

    entry = view.entry
    built = view.HasField("entry")
    print_facts(
        [
            ("namespace", view.namespace),
            ("key", view.key),
            ("state", view.state),
            ("reason", view.reason),
            ("size", format_bytes(entry.bytes) if built else ""),
            ("manifest", entry.manifest_digest),
            ("files", f"`falctl weights show {entry.model}`" if built else ""),
            ("nodes", str(view.nodes_ready) if built else ""),
            ("built by", entry.task or view.runner),
            *((name, value) for name, value in sorted(entry.facts.items())),
            *(("output", line) for line in view.log_tail),
        ]
    )


@group.command("lookup")
def lookup(namespace: Namespace, facts: FactsFile = None, fact: Facts = None, json: JsonFlag = False) -> None:
    """The entry for these facts: ready, building or failed; exit code 1 where there is none."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import print_json, to_json

    view = unary("BuildCache", pb.BuildCacheRequest(namespace=namespace, facts=read_facts(facts, fact or [])))
    if json:
        print_json("entry", to_json(view))
        return
    _print(view)


@group.command("build")
def build(
    namespace: Namespace,
    command: Annotated[
        list[str], typer.Argument(help="Command with arguments, after --; writes to $FAL_BUILD_OUTPUT.")
    ],
    facts: FactsFile = None,
    fact: Facts = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the task.", min=0)] = 0,
    machine_type: Annotated[str, typer.Option(help="GPU model it must run on, such as H100-80GB.")] = "",
    image: Annotated[str, typer.Option(help="Image of the namespace's team to build in; else the node's own.")] = "",
    pool: Annotated[list[str] | None, typer.Option(help="Pool that will do; repeat it. None: any.")] = None,
    size_max: Annotated[str, typer.Option(help="Refuse more output than this, such as 500MiB.")] = "4GiB",
    within: Annotated[str, typer.Option("--within", help="How long the task may run: 90s, 15m, 6h.")] = "1h",
    detach: Annotated[bool, typer.Option("--detach", help="Return at once.")] = False,
    json: JsonFlag = False,
) -> None:
    """Build an entry with a task of its own: our image, no network, no customer's code. One build runs for a key."""
    from fal_contract.units import parse_bytes, parse_duration_s
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    within_s = parse_duration_s(within, field="--within")
    request = pb.BuildCacheRequest(
        namespace=namespace,
        facts=read_facts(facts, fact or []),
        command=command,
        image=owned(image, field="--image") if image else "",
        num_gpus=gpus,
        machine_type=machine_type,
        pools=pool or [],
        bytes_max=parse_bytes(size_max, field="--size-max"),
        timeout_s=within_s,
    )
    view = unary("BuildCache", request)
    if view.state == "building" and not detach:
        view = _built(request, view, within_s)
    if json:
        print_json("entry", to_json(view))
    else:
        runner = f", runner {view.runner}" if view.runner else ""
        console().print(f"{view.namespace} {view.key} {view.state}{runner}")
    _raise_where_failed(view)


def _built(request: Any, first: Any, within_s: float) -> Any:
    """Ask until the build is over. TIMEOUT: it goes on without us."""
    import time

    from fal_contract.errors import Code, FalError
    from fal_contract.limits import BUILD_WAIT_MAX_S

    typer.echo(f"{first.runner} builds {first.key[:12]}", err=True)
    request.ClearField("command")
    deadline = time.monotonic() + within_s + BUILD_WAIT_MAX_S
    while True:
        view = unary("BuildCache", request)
        if view.state != "building":
            return view
        if time.monotonic() > deadline:
            raise FalError(
                Code.TIMEOUT,
                f"{first.runner} is not done",
                remedy=f"See `falctl explain {first.runner}`; it goes on in the background.",
            )
        time.sleep(POLL_S)


def _raise_where_failed(view: Any) -> None:
    from fal_contract.errors import Code, FalError

    if view.state == "failed":
        for line in view.log_tail:
            typer.echo(line, err=True)
        raise FalError(Code.RUNNER_FAILED, f"the build failed: {view.reason}", remedy="Correct it and build again.")


@group.command("evict")
def evict(
    namespace: Namespace, key: Annotated[str, typer.Argument(help="The whole key.")], json: JsonFlag = False
) -> None:
    """Forget an entry, so that it can be built anew; what runs keeps what it has."""
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.output import console, print_json, to_json

    view = unary("EvictCacheEntry", pb.EvictCacheEntryRequest(namespace=namespace, key=key))
    if json:
        print_json("entry", to_json(view))
        return
    console().print(f"{view.namespace} {view.key} evicted")


def read_facts(file: Path | None, given: list[str]) -> dict[str, str]:
    """Facts of a file and of options. INVALID, naming what is wrong; whether they are the right ones says the API."""
    facts = dict(_of_file(file)) if file is not None else {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            from fal_contract.errors import invalid

            raise invalid("--fact", text, "is no fact", remedy="Write NAME=VALUE.")
        facts[name] = value
    return facts


def _of_file(file: Path) -> Iterator[tuple[str, str]]:
    import json
    import tomllib

    from fal_contract.errors import invalid

    try:
        with file.open("rb") as stream:
            raw = stream.read(_FACTS_BYTES_MAX + 1)
        if len(raw) > _FACTS_BYTES_MAX:
            raise invalid("--facts", str(file), "is too large", remedy=f"At most {_FACTS_BYTES_MAX} bytes.")
        data = json.loads(raw) if file.suffix == ".json" else tomllib.loads(raw.decode())
    except OSError as error:
        raise invalid("--facts", str(file), f"cannot be read: {error.strerror}", remedy="Name another file.") from None
    except ValueError as error:
        raise invalid("--facts", str(file), f"is neither TOML nor JSON: {error}", remedy="Correct it.") from None
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise invalid("--facts", str(file), "holds more than texts by name", remedy='Write NAME = "VALUE" lines.')
    yield from data.items()
