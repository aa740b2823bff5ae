"""Certificates, names, tokens' text, the seal and the CA; no network."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fal_contract.errors import Code, FalError
from fal_contract.identity import (
    Identity,
    PeerIdentity,
    Role,
    ca_fingerprint,
    new_cluster_id,
    new_csr,
    new_key,
    peer_of_pem,
    require,
)
from fal_contract.join_token import TokenText, parse_token
from fal_scheduler.ca import CertificateAuthority, Sealer

NOW_S = 1_800_000_000.0
DAY_S = 86400.0


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.create(
        tmp_path_factory.mktemp("ca") / "ca", cluster_id=new_cluster_id(Random(1)), now_s=NOW_S
    )


def node(ca: CertificateAuthority, name: str = "n-1", role: Role = Role.NODE) -> Identity:
    return ca.new_identity(role=role, name=name, now_s=NOW_S)


# --- names in certificates


def test_a_certificate_says_role_name_cluster_and_dates(ca: CertificateAuthority) -> None:
    peer = node(ca).peer
    assert (peer.role, peer.name, peer.cluster_id) == (Role.NODE, "n-1", ca.cluster_id)
    assert (peer.not_before_s, peer.not_after_s) == (NOW_S - 300, NOW_S + DAY_S)
    assert peer.issued_at_s == NOW_S
    assert peer.subject == "node/n-1"


def test_the_csrs_own_subject_and_names_count_for_nothing(ca: CertificateAuthority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "admin")]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"fal://{ca.cluster_id}/admin/root")]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = ca.issue(csr.public_bytes(serialization.Encoding.PEM), role=Role.NODE, name="n-1", now_s=NOW_S)
    assert peer_of_pem(pem).subject == "node/n-1"
    issued = x509.load_pem_x509_certificate(pem)
    assert b"admin" not in pem
    assert "admin" not in issued.subject.rfc4514_string()
    assert issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_people_get_client_certificates_only(ca: CertificateAuthority) -> None:
    def usages(role: Role) -> set[x509.ObjectIdentifier]:
        certificate = x509.load_pem_x509_certificate(node(ca, "x", role).cert_pem)
        return set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert usages(Role.ADMIN) == {ExtendedKeyUsageOID.CLIENT_AUTH}
    assert usages(Role.NODE) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}


def _tampered(csr: bytes) -> bytes:
    der = bytearray(x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER))
    der[-3] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


def _rsa_csr() -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    key = rsa.generate_private_key(65537, 1024)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: b"", "not a PEM"),
        (lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "not a PEM"),
        (lambda: _tampered(new_csr(new_key(), "n")), "not signed by its own key"),
        (_rsa_csr, "another type"),
        (lambda: b"x" * 9000, "larger"),
    ],
)
def test_bad_requests_are_refused(ca: CertificateAuthority, make: object, why: str) -> None:
    with pytest.raises(FalError, match=why) as caught:
        ca.issue(make(), role=Role.NODE, name="n", now_s=NOW_S)  # type: ignore[operator]
    assert caught.value.code is Code.INVALID
    assert caught.value.field == "csr"


@pytest.mark.parametrize("name", ["", "a/b", "a b", "é", "x" * 64, "../x", "a\n"])
def test_names_that_could_confuse_are_refused(ca: CertificateAuthority, name: str) -> None:
    with pytest.raises(FalError) as caught:
        ca.issue(new_csr(new_key(), "n"), role=Role.NODE, name=name, now_s=NOW_S)
    assert caught.value.field == "name"


def test_reserved_host_names_cannot_be_asked_for(ca: CertificateAuthority) -> None:
    with pytest.raises(FalError, match="reserved"):
        ca.new_identity(role=Role.NODE, name="n", now_s=NOW_S, hosts=[f"scheduler.{ca.cluster_id}.fal.internal"])


@pytest.mark.parametrize(
    "uris",
    [[], ["fal://c-000000000000/admin/a", "fal://c-000000000000/node/a"], ["fal://c-000000000000/king/a"], ["fal://x"]],
)
def test_certificates_with_other_names_are_not_ours(uris: list[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    empty = x509.Name([])
    start = datetime.fromtimestamp(NOW_S, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(empty)
        .issuer_name(empty)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=1))
    )
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    with pytest.raises(FalError) as caught:
        peer_of_pem(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    assert caught.value.code is Code.UNAUTHENTICATED


# --- what is required of a peer


def peer(**changes: object) -> PeerIdentity:
    values: dict[str, object] = {
        "role": Role.NODE,
        "name": "n-1",
        "cluster_id": "c-aaaaaaaaaaaa",
        "serial": "1",
        "not_before_s": NOW_S,
        "not_after_s": NOW_S + DAY_S,
    }
    return PeerIdentity(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"cluster_id": "c-bbbbbbbbbbbb"}, Code.UNAUTHENTICATED),
        ({"role": Role.SERVING}, Code.PERMISSION_DENIED),
        ({"name": "n-2"}, Code.PERMISSION_DENIED),
        ({"not_after_s": NOW_S - 299}, None),  # clocks may differ by five minutes
        ({"not_after_s": NOW_S - 301}, Code.UNAUTHENTICATED),
    ],
)
def test_require(changes: dict[str, object], code: Code | None) -> None:
    def check() -> None:
        require(peer(**changes), cluster_id="c-aaaaaaaaaaaa", roles={Role.NODE}, name="n-1", now_s=NOW_S)

    if code is None:
        check()
    else:
        with pytest.raises(FalError) as caught:
            check()
        assert caught.value.code is code


# --- own identity


def test_identity_is_saved_whole_private_and_read_back(ca: CertificateAuthority, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "identity.pem"
    identity = node(ca)
    identity.save(file)
    assert Identity.load(file) == identity
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in file.parent.iterdir()] == ["identity.pem"]
    identity.save(file)
    assert "PRIVATE" not in repr(identity)


def test_a_key_of_another_certificate_is_noticed(ca: CertificateAuthority, tmp_path: Path) -> None:
    file = tmp_path / "identity.pem"
    ours, other = node(ca), node(ca)
    Identity(cert_pem=ours.cert_pem, key_pem=other.key_pem, ca_pem=ours.ca_pem).save(file)
    with pytest.raises(FalError, match="damaged") as caught:
        Identity.load(file)
    assert caught.value.code is Code.CORRUPT


def test_every_truncation_of_an_identity_is_noticed(ca: CertificateAuthority, tmp_path: Path) -> None:
    file = tmp_path / "identity.pem"
    node(ca).save(file)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, 37):
        file.write_bytes(whole[:length])
        with pytest.raises(FalError, match="damaged"):
            Identity.load(file)


def test_no_identity_says_join(tmp_path: Path) -> None:
    with pytest.raises(FalError, match="Join first") as caught:
        Identity.load(tmp_path / "none.pem")
    assert caught.value.code is Code.NOT_FOUND


def test_own_dates_are_checked_before_dialling(ca: CertificateAuthority) -> None:
    identity = node(ca)
    identity.check(now_s=NOW_S)
    identity.check(now_s=NOW_S - 299)  # a clock up to five minutes slow
    with pytest.raises(FalError, match="clock is behind"):
        identity.check(now_s=NOW_S - 3600)
    with pytest.raises(FalError, match="expired"):
        identity.check(now_s=NOW_S + DAY_S)


# --- CA and seal


def test_the_ca_survives_reopening(tmp_path: Path) -> None:
    made = CertificateAuthority.create(tmp_path / "ca", cluster_id="c-aaaaaaaaaaaa", now_s=NOW_S)
    again = CertificateAuthority.open(tmp_path / "ca")
    assert (again.ca_pem, again.cluster_id, again.fingerprint) == (made.ca_pem, "c-aaaaaaaaaaaa", made.fingerprint)
    assert made.fingerprint == ca_fingerprint(made.ca_pem)
    x509.load_pem_x509_certificate(node(again).cert_pem).verify_directly_issued_by(
        x509.load_pem_x509_certificate(made.ca_pem)
    )
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "ca").iterdir()}
    assert modes == {"seal.key": 0o600, "ca.key.sealed": 0o600, "ca.pem": 0o644}
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700
    assert b"PRIVATE" not in (tmp_path / "ca" / "ca.key.sealed").read_bytes()


def test_creating_over_something_changes_nothing(tmp_path: Path) -> None:
    CertificateAuthority.create(tmp_path / "ca", cluster_id="c-aaaaaaaaaaaa", now_s=NOW_S)
    before = {path.name: path.read_bytes() for path in (tmp_path / "ca").iterdir()}
    with pytest.raises(FalError) as caught:
        CertificateAuthority.create(tmp_path / "ca", cluster_id="c-bbbbbbbbbbbb", now_s=NOW_S)
    assert caught.value.code is Code.ALREADY_EXISTS
    assert {path.name: path.read_bytes() for path in (tmp_path / "ca").iterdir()} == before


def test_an_interrupted_creation_leaves_no_half_ca(tmp_path: Path) -> None:
    leftover = tmp_path / ".ca.new"
    leftover.mkdir()
    (leftover / "seal.key").write_text("half")
    CertificateAuthority.create(tmp_path / "ca", cluster_id="c-aaaaaaaaaaaa", now_s=NOW_S)
    assert not leftover.exists()


def test_missing_wrong_and_damaged_key_files(tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    CertificateAuthority.create(folder, cluster_id="c-aaaaaaaaaaaa", now_s=NOW_S)
    Sealer.create(tmp_path / "other.key")
    with pytest.raises(FalError, match="cannot be opened with") as caught:
        CertificateAuthority.open(folder, seal_key=tmp_path / "other.key")
    assert caught.value.code is Code.CORRUPT
    with pytest.raises(FalError, match="cannot be read") as caught:
        CertificateAuthority.open(folder, seal_key=tmp_path / "none.key")
    assert caught.value.code is Code.FAILED_PRECONDITION
    (tmp_path / "bad.key").write_bytes(b"\xff\xfe")
    with pytest.raises(FalError, match="not a seal key"):
        CertificateAuthority.open(folder, seal_key=tmp_path / "bad.key")
    (folder / "ca.pem").unlink()
    with pytest.raises(FalError, match=r"ca\.pem does not exist"):
        CertificateAuthority.open(folder)


def test_a_certificate_of_another_ca_beside_the_key_is_noticed(tmp_path: Path, ca: CertificateAuthority) -> None:
    folder = tmp_path / "ca"
    CertificateAuthority.create(folder, cluster_id="c-aaaaaaaaaaaa", now_s=NOW_S)
    (folder / "ca.pem").write_bytes(ca.ca_pem)
    with pytest.raises(FalError, match="do not belong together"):
        CertificateAuthority.open(folder)


def test_the_seal_binds_purpose_and_every_bit(tmp_path: Path) -> None:
    sealer = Sealer.create(tmp_path / "seal.key")
    sealed = sealer.seal(b"hello", purpose="secret:team/a")
    assert sealer.unseal(sealed, purpose="secret:team/a") == b"hello"
    assert sealer.seal(b"hello", purpose="secret:team/a") != sealed
    with pytest.raises(FalError):
        sealer.unseal(sealed, purpose="secret:team/b")
    for index in range(len(sealed)):
        changed = bytearray(sealed)
        changed[index] ^= 1
        with pytest.raises(FalError):
            sealer.unseal(bytes(changed), purpose="secret:team/a")
    with pytest.raises(FalError):
        sealer.unseal(sealed[:10], purpose="secret:team/a")


def test_renewal_keeps_name_and_role_and_refuses_the_revoked(ca: CertificateAuthority) -> None:
    old = node(ca).peer
    csr = new_csr(new_key(), "someone-else")
    new = peer_of_pem(ca.renew(csr, old, revoked=False, now_s=NOW_S + DAY_S / 2))
    assert (new.subject, new.not_after_s) == (old.subject, NOW_S + 1.5 * DAY_S)
    assert new.serial != old.serial
    with pytest.raises(FalError, match="revoked"):
        ca.renew(csr, old, revoked=True, now_s=NOW_S)


def test_issuing_with_a_wrong_clock_says_so(ca: CertificateAuthority) -> None:
    with pytest.raises(FalError, match="clock"):
        ca.issue(new_csr(new_key(), "n"), role=Role.NODE, name="n", now_s=NOW_S - 30 * DAY_S)
    with pytest.raises(FalError, match="clock"):
        ca.issue(new_csr(new_key(), "n"), role=Role.NODE, name="n", now_s=NOW_S + 20 * 365 * DAY_S)


# --- the text of tokens

TOKEN = TokenText("0123456789", "abcdefghjkmnpqrstvwxyz0123", "ab" * 32)


def test_tokens_read_back_and_hide_their_secret() -> None:
    assert parse_token(f"  {TOKEN}\n") == TOKEN
    assert TOKEN.secret not in repr(TOKEN)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not start"),
        ("hello", "does not start"),
        (str(TOKEN).replace("falj1", "falj2"), "version falj2"),
        (str(TOKEN)[:-70], "parts"),
        (str(TOKEN)[:-1], "CA hash"),
        (str(TOKEN).replace("0123456789.", "01234.", 1), "id"),
        (str(TOKEN).replace("abcdefgh", "ABCDEFGH"), "secret"),
    ],
)
def test_damaged_tokens_say_which_part(text: str, why: str) -> None:
    with pytest.raises(FalError, match=why) as caught:
        parse_token(text)
    assert caught.value.code is Code.INVALID
    assert caught.value.field == "token"
    assert TOKEN.secret not in str(caught.value)
