"""The certificates of one migration: two identities, each pinned to the other."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.credentials import mint

LONGEST_ID = "20261120T061500-" + "w" * 24 + "-3f9a7c0"


def test_each_side_is_pinned_to_the_other() -> None:
    source, destination = mint("m-1")
    assert source.peer_certificate == destination.certificate
    assert destination.peer_certificate == source.certificate
    assert len({source.certificate, destination.certificate, source.key, destination.key}) == 4


def test_every_migration_has_its_own() -> None:
    first, second = mint("m-1"), mint("m-1")
    assert not {each.certificate for each in first} & {each.certificate for each in second}


def test_a_certificate_is_of_its_key_and_its_name_and_tolerates_clocks_that_differ() -> None:
    for role, side in zip(("source", "destination"), mint(LONGEST_ID), strict=True):
        certificate = x509.load_pem_x509_certificate(side.certificate)
        key = serialization.load_pem_private_key(side.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert certificate.public_key() == key.public_key()
        assert certificate.subject.rfc4514_string().startswith(f"CN=livemove {role} {LONGEST_ID}"[:64])
        now = datetime.now(UTC)
        assert certificate.not_valid_before_utc < now - timedelta(days=1)
        assert certificate.not_valid_after_utc > now + timedelta(days=1)
