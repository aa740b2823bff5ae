"""Tickets and their keys: who may pass with them, for how long, and that every leader makes the same."""

from __future__ import annotations

from pathlib import Path

from fal_contract.ticket import TICKET_TTL_S, check_ticket
from fal_scheduler.ca import CertificateAuthority
from fal_scheduler.core.tickets import GENERATION_S, TICKET_PURPOSE, TicketOffice

NOON_S = 20_000 * GENERATION_S + GENERATION_S / 2
ARTIFACT = "ab" * 32


def _ticket(office: TicketOffice, now_s: float) -> bytes:
    return office.ticket(server="n-b", caller="n-a", artifact_id=ARTIFACT, expires_s=now_s + TICKET_TTL_S, wall_s=now_s)


def test_a_ticket_is_good_at_its_server_only() -> None:
    office = TicketOffice(b"s" * 32)
    ticket = _ticket(office, NOON_S)
    keys = office.keys("n-b", NOON_S)
    assert check_ticket(keys, ticket, caller="n-a", artifact_id=ARTIFACT, now_s=NOON_S) == ""
    assert check_ticket(office.keys("n-c", NOON_S), ticket, caller="n-a", artifact_id=ARTIFACT, now_s=NOON_S)
    assert check_ticket(keys, ticket, caller="n-x", artifact_id=ARTIFACT, now_s=NOON_S)
    assert check_ticket(keys, ticket, caller="n-a", artifact_id="cd" * 32, now_s=NOON_S)
    assert check_ticket(keys, ticket, caller="n-a", artifact_id=ARTIFACT, now_s=NOON_S + TICKET_TTL_S + 1)


def test_keys_told_yesterday_check_todays_tickets_and_keys_told_today_yesterdays() -> None:
    office = TicketOffice(b"s" * 32)
    midnight_s = 20_001 * GENERATION_S
    before, after = office.keys("n-b", midnight_s - 1), office.keys("n-b", midnight_s + 1)
    assert before[0] != after[0]
    assert TicketOffice.generation(midnight_s) == TicketOffice.generation(midnight_s - 1) + 1
    for now_s in (midnight_s - 1, midnight_s + 1):
        ticket = _ticket(office, now_s)
        for keys in (before, after):
            assert check_ticket(keys, ticket, caller="n-a", artifact_id=ARTIFACT, now_s=midnight_s + 2) == ""


def test_every_scheduler_with_the_cas_key_makes_the_same_keys(tmp_path: Path) -> None:
    made = CertificateAuthority.create(tmp_path / "ca", cluster_id="c-000000000000", now_s=NOON_S)
    again = CertificateAuthority.open(tmp_path / "ca")
    other = CertificateAuthority.create(tmp_path / "other", cluster_id="c-000000000000", now_s=NOON_S)
    secret = made.derive(TICKET_PURPOSE)
    assert secret == again.derive(TICKET_PURPOSE)
    assert len(secret) == 32
    assert secret not in (made.derive("another purpose"), other.derive(TICKET_PURPOSE))
    assert TicketOffice(secret).keys("n-b", NOON_S) == TicketOffice(again.derive(TICKET_PURPOSE)).keys("n-b", NOON_S)
