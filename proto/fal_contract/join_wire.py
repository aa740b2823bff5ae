"""What the join listener and a joining agent say to each other: JSON over HTTPS, version 1. Pure.

    GET  /v1/ca    → the CA's certificate, PEM
    POST /v1/join  JoinRequest → JoinReply, or an error object {"error": {code, what, remedy, field}}

Unknown fields are ignored, so that a later release may add some.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from fal_contract.errors import Code, FalError
from fal_contract.limits import CSR_BYTES_MAX

CA_PATH: Final = "/v1/ca"
JOIN_PATH: Final = "/v1/join"
BODY_BYTES_MAX: Final = CSR_BYTES_MAX + 4096
REPLY_BYTES_MAX: Final = 64 << 10

HTTP_STATUS: Final[dict[Code, int]] = {
    Code.INVALID: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.CONFLICT: 409,
    Code.FAILED_PRECONDITION: 412,
    Code.BUSY: 429,
    Code.NOT_LEADER: 503,
    Code.UNAVAILABLE: 503,
    Code.TIMEOUT: 504,
}


class JoinRequest(BaseModel):
    """A machine asks to become a node."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    token_id: str = Field(max_length=64)
    secret: str = Field(max_length=128, repr=False)
    csr: str = Field(max_length=CSR_BYTES_MAX)
    node_name: str = Field(max_length=253)
    boot_id: str = Field("", max_length=64)


class JoinReply(BaseModel):
    """Its certificate and who it is from now on."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    node_id: str
    pool: str
    cluster_id: str
    certificate: str
    ca: str
    time_s: float  # the scheduler's clock, so that a skewed node can say by how much


def error_body(error: FalError) -> bytes:
    """An error as it is sent."""
    fields = {"code": str(error.code), "what": error.what, "remedy": error.remedy, "field": error.field}
    return json.dumps({"error": fields}).encode()


def error_of(status: int, body: bytes) -> FalError:
    """An error as it was sent; for anything else one that names the HTTP status."""
    try:
        fields: dict[str, Any] = json.loads(body)["error"]
        code = Code(fields["code"])
        return FalError(code, str(fields["what"]), remedy=str(fields["remedy"]), field=str(fields["field"]))
    except (ValueError, KeyError, TypeError):
        code = Code.UNAVAILABLE if status >= 500 else Code.FAILED_PRECONDITION
        return FalError(
            code, f"the join port answered HTTP {status}", remedy="Check that the address is a scheduler's join port."
        )
