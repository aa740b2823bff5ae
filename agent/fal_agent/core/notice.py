"""What clouds announce for a machine, read: AWS, GCP, Azure, and a file of an operator's own. Pure.

Each reader takes the body of one answer and gives what is announced for this machine, or None. Whatever has not the
vendor's shape raises ValueError. What is announced for later than AHEAD_S is nothing to act on yet: a cloud names
reboots two weeks before, and the machine is good until then; what takes it away for good counts at once.

Sources: AWS "Spot Instance interruption notices", "EC2 instance rebalance recommendations", "Scheduled events"; Google
"Preemption process", "Handle GPU host maintenance events"; Azure "Scheduled Events" 2020-07-01.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from fal_contract.errors import invalid

SPOT: Final = "spot"
NOTICE: Final = "notice"
AHEAD_S: Final = 3600.0  # as long as `falctl node drain` gives runners by default
GCP_PREEMPTED_S: Final = 30.0
GCP_GPU_MAINTENANCE_S: Final = 3600.0
BASES: Final = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
_AZURE_KINDS: Final = {"Preempt": SPOT, "Terminate": SPOT, "Reboot": NOTICE, "Redeploy": NOTICE}
_AWS_OVER: Final = ("[completed]", "[canceled]")
_AWS_GONE: Final = ("instance-retirement", "instance-stop")


@dataclass(frozen=True, slots=True)
class Announced:
    """`kind`: SPOT (the machine is taken back) or NOTICE (something is done to it). `at_s`: Unix seconds; None: nobody
    says when."""

    kind: str
    at_s: float | None
    reason: str

    def text(self, now_s: float) -> str:
        """For events and logs."""
        when = "some time" if self.at_s is None else f"{max(0.0, self.at_s - now_s):.0f} s"
        return f"{self.kind} in {when}: {self.reason}"


def urgent(announced: Iterable[Announced], *, now_s: float) -> Announced | None:
    """What is to be acted on now: the loss of the machine before work on it, the earliest of either."""
    due = [one for one in announced if one.kind == SPOT or one.at_s is None or one.at_s - now_s <= AHEAD_S]
    return min(due, key=lambda one: (one.kind != SPOT, one.at_s is None, one.at_s or 0.0, one.reason), default=None)


def aws_action(body: str) -> Announced | None:
    """`spot/instance-action`: {"action": "terminate", "time": "2017-09-18T08:22:00Z"}."""
    found = _table(body)
    return Announced(SPOT, _time(found.get("time")), f"AWS: spot interruption ({_word(found, 'action')})")


def aws_rebalance(body: str) -> Announced | None:
    """`events/recommendations/rebalance`: {"noticeTime": …}. It is likelier than before to be taken back."""
    since = _word(_table(body), "noticeTime")
    return Announced(SPOT, None, f"AWS: rebalance recommendation of {since}")


def aws_events(body: str) -> Announced | None:
    """`events/maintenance/scheduled`: a list of events; those that are over stay in it for days."""
    found = []
    for event in _list(json.loads(body)):
        text = str(event.get("Description", ""))
        if event.get("State", "active") != "active" or text.lower().startswith(_AWS_OVER):
            continue
        code, at_s = _word(event, "Code"), _time(event.get("NotBefore"))
        found.append(Announced(NOTICE, at_s, f"AWS: {code}{'; it will not come back' if code in _AWS_GONE else ''}"))
    return min(found, key=lambda one: one.at_s or 0.0, default=None)


def gcp_preempted(body: str, *, now_s: float) -> Announced | None:
    """`instance/preempted`: TRUE or FALSE; 30 s are left when it changes."""
    match body.strip():
        case "TRUE":
            return Announced(SPOT, now_s + GCP_PREEMPTED_S, "Google: preempted")
        case "FALSE":
            return None
    raise ValueError(f"{body[:80]!r} is neither TRUE nor FALSE")


def gcp_maintenance(body: str, *, now_s: float) -> Announced | None:
    """`instance/maintenance-event`: machines with GPUs cannot migrate; they are told an hour before they end."""
    word = body.strip()
    if word == "TERMINATE_ON_HOST_MAINTENANCE":
        return Announced(NOTICE, now_s + GCP_GPU_MAINTENANCE_S, "Google: host maintenance")
    if word == "NONE" or word.startswith("MIGRATE"):  # a migration stops nothing
        return None
    raise ValueError(f"{body[:80]!r} is no maintenance event")


def azure_events(body: str, *, name: str, now_s: float) -> Announced | None:
    """`scheduledevents`: events of all machines that belong together, of which those with our `name` in Resources
    count. A Freeze lasts seconds and is none of ours."""
    found = []
    for event in _list(_table(body).get("Events", [])):
        kind = _AZURE_KINDS.get(str(event.get("EventType")))
        resources = event.get("Resources", [])
        if not isinstance(resources, list):
            raise ValueError("Resources is no list")
        ours = name.lower() in (str(one).lstrip("_").lower() for one in resources)
        if kind is None or not ours or event.get("EventStatus") in ("Completed", "Canceled"):
            continue
        at_s = _time(event["NotBefore"]) if event.get("NotBefore") else now_s  # none once it has started
        found.append(Announced(kind, at_s, f"Azure: {event['EventType']} {event.get('Description') or ''}".rstrip()))
    return min(found, key=lambda one: (one.kind != SPOT, one.at_s or 0.0), default=None)


def file_notice(body: str, *, written_s: float) -> Announced | None:
    """{"kind": "spot" or "notice", "in_s": N after the file was written, or "at": RFC 3339, "reason": …}."""
    found = _table(body)
    if unknown := sorted(found.keys() - {"kind", "in_s", "at", "reason"}):
        raise ValueError(f"{unknown[0]} is not known; write kind, in_s or at, reason")
    kind = found.get("kind")
    if kind not in (SPOT, NOTICE):
        raise ValueError(f"kind {kind!r} is neither spot nor notice")
    if "in_s" in found and "at" in found:
        raise ValueError("in_s and at exclude each other")
    in_s = found.get("in_s")
    if in_s is not None and (isinstance(in_s, bool) or not isinstance(in_s, int | float) or not 0 <= in_s < 1e9):
        raise ValueError(f"in_s {in_s!r} is no number of seconds")
    at_s = written_s + in_s if in_s is not None else _time(found["at"]) if "at" in found else None
    return Announced(kind, at_s, str(found.get("reason") or "announced by a file"))


def check_source(text: str) -> tuple[str, str]:
    """ "aws", "gcp", "azure", each with another "=URL", or "file:PATH" → name and address. Raises INVALID."""
    name, _, address = text.partition("=")
    if name in BASES:
        if address and not address.startswith(("http://", "https://")):
            raise invalid("notices", text, "is no URL", remedy=f"Write {name}, or {name}=http://HOST:PORT.")
        return name, address or BASES[name]
    name, _, path = text.partition(":")
    if name == "file" and path.startswith("/"):
        return name, path
    raise invalid("notices", text, "is no source of notices", remedy="Use aws, gcp, azure or file:/PATH.")


def _table(body: str) -> dict[str, Any]:
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError(f"{body[:80]!r} is no JSON object")
    return found


def _list(found: object) -> Sequence[dict[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError("it is no list of events")
    return found


def _word(found: dict[str, Any], name: str) -> str:
    word = found.get(name)
    if not isinstance(word, str) or not word:
        raise ValueError(f"{name} is missing")
    return word


def _time(text: object) -> float:
    """Unix seconds of "2017-09-18T08:22:00Z", or of "21 Jan 2019 09:00:43 GMT" with or without its weekday."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no time")
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = parsedate_to_datetime(text)
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


__all__ = [
    "AHEAD_S",
    "NOTICE",
    "SPOT",
    "Announced",
    "aws_action",
    "aws_events",
    "aws_rebalance",
    "azure_events",
    "check_source",
    "file_notice",
    "gcp_maintenance",
    "gcp_preempted",
    "urgent",
]
