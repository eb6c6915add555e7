"""Certificates and keys in files, as people who have an authority of their own bring them."""

import datetime
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dist_partial.distributed import tls

# What connections between workers can be guarded by, as `rendezvous.connect` takes it.
GUARDS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "sealed": lambda: {"sealed": True},
    "tls": lambda: {"tls": tls.from_secret("s" * 32)},
    "both": lambda: {"sealed": True, "tls": tls.from_secret("s" * 32)},
}
PEM = serialization.Encoding.PEM


class Authority:
    """Signs certificates with a key of its own."""

    def __init__(self, name: str = "an authority") -> None:
        self.name = _named(name)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = _built(self.name, self.name, self.key, days=10).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.certificate = self.certificate.sign(self.key, hashes.SHA256())

    def issue(
        self,
        folder: Path,
        host: str,
        days: int = 10,
        only: x509.ObjectIdentifier | None = None,
        password: bytes = b"",
        alternative: bool = True,
    ) -> Path:
        """Fills a folder for one worker.

        Args:
            folder: is made.
            host: for which the certificate is valid: a name or an address.
            days: until it expires; below 0 it has expired.
            only: what it may be used for alone.
            password: under which the key is stored.
            alternative: whether the host is its SubjectAltName; otherwise its common name alone.
        """
        folder.mkdir(parents=True)
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        built = _built(_named(f"of {host}" if alternative else host), self.name, key, days)
        if alternative:
            built = built.add_extension(x509.SubjectAlternativeName([name]), critical=False)
        if only:
            built = built.add_extension(x509.ExtendedKeyUsage([only]), critical=False)
        (folder / "tls.crt").write_bytes(built.sign(self.key, hashes.SHA256()).public_bytes(PEM))
        stored = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        (folder / "tls.key").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, stored))
        (folder / "ca.crt").write_bytes(self.certificate.public_bytes(PEM))
        return folder


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _built(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=days)
    since = min(now, until) - datetime.timedelta(days=1)
    return x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(), since, until)
