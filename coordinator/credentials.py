"""Certificates for the agents' channel: a pair minted for one migration, each side pinned to the other's.

The keys exist in the memory of the coordinator and of one agent each, for as long as the migration takes.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coordinator.protocol import Credentials

#: Generous both ways, because the clocks of the hosts need not agree. What limits a certificate is that only one
#: migration's two agents accept it.
_VALID_FOR = timedelta(days=7)


def mint(migration: str) -> tuple[Credentials, Credentials]:
    """Credentials for the source and for the destination of one migration."""
    source, destination = _identity(migration, "source"), _identity(migration, "destination")
    return (
        Credentials(certificate=source[0], key=source[1], peer_certificate=destination[0]),
        Credentials(certificate=destination[0], key=destination[1], peer_certificate=source[0]),
    )


def _identity(migration: str, role: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"livemove {role} {migration}"[:64])])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID_FOR)
        .not_valid_after(now + _VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem), private
