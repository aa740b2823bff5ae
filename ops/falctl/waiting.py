"""Progress while runners come up or go: which phase each is in, until all are ready or the time is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from fal_contract.errors import Code, FalError
from falctl.context import unary

_POLL_S: Final = 0.25


def wait_until_ready(app: str, *, timeout_s: float, quiet: bool = False, revision: int = 0) -> Any:
    """Poll the app until as many runners of its current revision are ready as it wants. Returns its view.

    Raises FalError(TIMEOUT) with the reason that the scheduler gives; FAILED_PRECONDITION where `revision` (0: any) was
    rolled back meanwhile. Without a terminal each change of phase is one
    line on stderr; with one, a line that is rewritten.
    """
    from fal_contract.v1 import cluster_pb2 as pb
    from falctl.apps import ready_runners

    deadline = time.monotonic() + timeout_s
    with _progress(quiet) as show:
        while True:
            view = unary("GetApp", pb.GetAppRequest(id=app))
            _check_not_rolled_back(view, revision)
            if len(ready_runners(view)) >= view.wanted:
                return view
            show(_phases(view))
            if time.monotonic() > deadline:
                raise FalError(
                    Code.TIMEOUT,
                    f"{len(ready_runners(view))} of {view.wanted} runners of {app} are ready after {timeout_s:g} s: "
                    f"{view.reason or 'no reason given'}",
                    remedy=f"See `falctl explain {app}`; it goes on in the background.",
                )
            time.sleep(_POLL_S)


def _check_not_rolled_back(view: Any, revision: int) -> None:
    app = view.app
    if revision and app.revision < revision:
        why = app.rollout.reason if app.HasField("rollout") else "see `falctl events`"
        raise FalError(
            Code.FAILED_PRECONDITION,
            f"revision {revision} of {app.id} was rolled back to {app.revision}: {why}",
            remedy="See `falctl runner logs` of its runners, which `falctl events` names; mend it, apply again.",
        )


def wait_until_gone(app: str, *, timeout_s: float) -> None:
    """Poll until the app is forgotten. Raises FalError(TIMEOUT)."""
    from fal_contract.v1 import cluster_pb2 as pb

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            view = unary("GetApp", pb.GetAppRequest(id=app))
        except FalError as error:
            if error.code is Code.NOT_FOUND:
                return
            raise
        if time.monotonic() > deadline:
            raise FalError(
                Code.TIMEOUT,
                f"{len(view.runners)} runners of {app} are still there after {timeout_s:g} s: "
                f"{view.reason or 'no reason given'}",
                remedy=f"See `falctl explain {app}`; it goes on in the background.",
            )
        time.sleep(_POLL_S)


def _phases(view: Any) -> str:
    """`digits-7k2m SETUP, digits-9x1c PENDING (no free GPU)`."""
    from fal_contract.ids import name_of
    from falctl.runners import state_text

    words = [
        f"{name_of(runner.runner.id)} {state_text(runner)}" + (f" ({runner.reason})" if runner.reason else "")
        for runner in view.runners
    ]
    return ", ".join(words) or view.reason or "no runner yet"


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    if quiet:
        yield lambda text: None
        return
    from rich.console import Console

    from falctl.output import status_line

    console = Console(stderr=True, highlight=False, markup=False)
    if console.is_terminal:
        with status_line("waiting", stderr=True) as say:
            yield say
        return
    last = ""

    def line(text: str) -> None:
        nonlocal last
        if text != last:
            console.print(text, soft_wrap=True)
            last = text

    yield line
