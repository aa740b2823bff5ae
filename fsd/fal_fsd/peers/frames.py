"""What the frames of the bulk port say. Pure. Their bytes: `fal_fsd.peers.wire`."""

from __future__ import annotations

from dataclasses import dataclass, field

from fal_fsd.core.messages import Claim, Lease


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of the dialler. `tickets`: (artifact id, ticket); one good one is enough to be let in."""

    cluster_id: str
    node_id: str
    cache_id: str
    tickets: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    version_min: int = 1
    version_max: int = 1


@dataclass(frozen=True, slots=True)
class HelloOk:
    """The dialler is let in. `a` of the frame is the version that both speak."""

    node_id: str
    cache_id: str
    version: int = 1


@dataclass(frozen=True, slots=True)
class Refused:
    """Not let in, or not into this swarm."""

    reason: str
    artifact_id: str = ""


@dataclass(frozen=True, slots=True)
class Join:
    """The sender takes part. `bitmap`: what it has (fal_contract.pieces.Bitmap); `ticket` may be empty."""

    artifact_id: str
    bitmap: bytes
    ticket: bytes = field(default=b"", repr=False)
    reply: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """The sender takes part no longer."""

    artifact_id: str


@dataclass(frozen=True, slots=True)
class Have:
    """The sender has got these."""

    artifact_id: str
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Req:
    """The sender wants these."""

    artifact_id: str
    pieces: tuple[int, ...]
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class DataHead:
    """`length` bytes of a piece follow, from `offset` on. `last`: its last ones. `aborted`: it ends here, unsent."""

    artifact_id: str
    piece: int
    offset: int
    length: int
    last: bool = False
    aborted: bool = False


@dataclass(frozen=True, slots=True)
class Busy:
    """These will not be sent; ask again after `retry_ms`."""

    artifact_id: str
    pieces: tuple[int, ...]
    retry_ms: int


@dataclass(frozen=True, slots=True)
class NotHere:
    """These are not here."""

    artifact_id: str
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """These are not wanted any more."""

    artifact_id: str
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaseTold:
    """A right to read the origin, given or ended."""

    artifact_id: str
    lease: Lease
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Cert:
    """A signer's certificate, DER; goes before its first claim."""

    der: bytes


@dataclass(frozen=True, slots=True)
class Claims:
    """Who read which pieces from the origin; goes before HAVE of them."""

    artifact_id: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class Meta:
    """Asks for a manifest (`body` None), or answers (`found` False: not here). `number` pairs them."""

    id: str
    number: int
    body: bytes | None = None
    found: bool = True


@dataclass(frozen=True, slots=True)
class Ping:
    """Is somebody there?"""


@dataclass(frozen=True, slots=True)
class Pong:
    """Yes."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The sender closes, for this reason."""

    reason: str


Frame = (
    Hello | HelloOk | Refused | Join | Leave | Have | Req | DataHead | Busy | NotHere | Cancel | LeaseTold | Cert
    | Claims | Meta | Ping | Pong | Bye
)  # fmt: skip
