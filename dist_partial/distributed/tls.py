"""Certificates for the connections between workers: from the secret that all of them know, or from files.

From the secret every worker derives one private key (scrypt, RFC 7914; Ed25519, RFC 8032) and one certificate, the same
to the byte, shows it, and trusts it alone. To have it is to know the secret: nothing is moved, no clock and no name is
compared, and it is valid as long as its secret. TLS 1.3 shows certificates to nobody who only listens. Whoever calls a
worker is shown this one, and can try out secrets on it, at 16 MiB and some hundredths of a second each: hence the
length that a secret must have.

From files each worker has a certificate of its own. A worker trusts the authority in its folder; one that calls wants
the certificate to be valid for the host that it has called, and one that is called wants any: which worker it talks to
is proved by the secret (`handshake`).

Keys of the connection come from a key exchange that is forgotten: who learns the secret later reads nothing of before.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import ssl
from collections.abc import Callable
from pathlib import Path

from dist_partial.errors import UserError

CERTIFICATE, KEY, AUTHORITY = FILES = ("tls.crt", "tls.key", "ca.crt")  # as Kubernetes and cert-manager name them
_SHORTEST = 32  # characters of a secret: 16 bytes in hexadecimal
_SALT = b"dist_partial TLS 1"


@dataclasses.dataclass(frozen=True)
class Credentials:
    """Holds what a worker shows, and what it trusts.

    Attributes:
        calling: for connections that it makes.
        called: for those that it accepts.
        from_files: whether they come from files.
    """

    calling: ssl.SSLContext
    called: ssl.SSLContext
    from_files: bool

    def begin(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, calls: bool, host: str) -> ssl.SSLObject:
        """Makes one side of a TLS connection over memory.

        Args:
            incoming: what has come.
            outgoing: what is to leave.
            calls: whether this is the calling side.
            host: that is called.
        """
        if calls:
            return self.calling.wrap_bio(incoming, outgoing, server_hostname=host if self.from_files else None)
        return self.called.wrap_bio(incoming, outgoing, server_side=True)

    def doubt(self, error: ssl.SSLError) -> str:
        """What is said of a worker with which TLS has failed, after who it is."""
        refused = isinstance(error, ssl.SSLCertVerificationError)
        if not self.from_files and (refused or "UNKNOWN_CA" in (error.reason or "")):
            return "does not know this DIST_PARTIAL_SECRET: give all workers the same"
        if refused:
            return f"shows a certificate that is refused here ({_reason(error)}): see replicas.tls"
        return f"does not get through TLS ({_reason(error)}): see replicas.tls on both"


def credentials(wanted: bool | str, secret: str, host: str) -> Credentials | None:
    """Makes what `replicas.tls` says: True is `from_secret`, a folder `from_files`, False none.

    Examples:
        >>> print(credentials(False, "", "10.0.0.1"))
        None
    """
    if wanted is False:
        return None
    return from_secret(secret) if wanted is True else from_files(wanted, host)


def from_secret(secret: str) -> Credentials:
    """Makes the credentials that all workers with this secret share.

    Raises:
        UserError: the secret is too short, or the package `cryptography` is not installed.

    Examples:
        >>> from_secret("hunter2")
        Traceback (most recent call last):
        dist_partial.errors.UserError: replicas.tls = True: a DIST_PARTIAL_SECRET of 7 characters can be guessed; ...
    """
    if len(secret) < _SHORTEST:
        raise UserError(
            f"replicas.tls = True: a DIST_PARTIAL_SECRET of {len(secret)} characters can be guessed; give all workers "
            f"one of at least {_SHORTEST}, such as `openssl rand -hex 32` draws"
        )
    certificate, key = _derived(secret)

    def load(context: ssl.SSLContext) -> None:
        context.load_verify_locations(cadata=certificate.decode())
        # Python takes keys from files alone: this one is in memory, and has no name.
        with os.fdopen(os.memfd_create("dist_partial certificate"), "wb") as file:
            file.write(certificate + key)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")

    return Credentials(*_contexts(load, names=False), from_files=False)


def from_files(folder: str, host: str) -> Credentials:
    """Reads a worker's own certificate, its key and the authority that it trusts.

    Args:
        folder: holds `tls.crt`, `tls.key` and `ca.crt`, in PEM.
        host: of this worker, as the workers' addresses name it.

    Raises:
        UserError: a file is missing or is something else, or other workers with this authority would refuse it.

    Examples:
        >>> from_files("nowhere", "10.0.0.1")
        Traceback (most recent call last):
        dist_partial.errors.UserError: replicas.tls is 'nowhere', where there is no tls.crt: ...
    """
    paths = [Path(folder, name) for name in FILES]
    start = f"replicas.tls is {folder!r}"
    if missing := next((path.name for path in paths if not os.path.isfile(path)), None):
        raise UserError(f"{start}, where there is no {missing}: put {', '.join(FILES)} there, or bind True")

    def ask() -> str:  # in place of OpenSSL, which would wait for a terminal
        raise UserError(f"{start}, where {KEY} asks for a password: store it without one")

    def load(context: ssl.SSLContext) -> None:
        what = AUTHORITY
        try:
            context.load_verify_locations(paths[2])
            what = f"{CERTIFICATE} and {KEY}"
            context.load_cert_chain(paths[0], paths[1], password=ask)
        except ssl.SSLError as error:
            if "MISMATCH" in (error.reason or ""):
                raise UserError(f"{start}, where {KEY} does not belong to {CERTIFICATE}") from None
            raise UserError(f"{start}, where {what} cannot be read ({_reason(error)}): write them as PEM") from None
        except OSError as error:
            raise UserError(f"{start}, where {what} cannot be read: {error.strerror}") from None

    credentials = Credentials(*_contexts(load, names=True), from_files=True)
    try:
        _rehearse(credentials, host)
    except ssl.SSLError as error:
        raise UserError(
            f"{start}, where other workers would refuse {CERTIFICATE} ({_reason(error)}): it must be signed by an "
            f"authority of {AUTHORITY}, valid now, for {host}, and for servers and clients"
        ) from None
    return credentials


def _derived(secret: str) -> tuple[bytes, bytes]:
    """The certificate, and its key, as PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise UserError(
            "replicas.tls = True needs the package cryptography: pip install 'dist_partial[tls]', or bind the folder "
            f"of {', '.join(FILES)}"
        ) from None
    key = Ed25519PrivateKey.from_private_bytes(
        hashlib.scrypt(os.fsencode(secret), salt=_SALT, n=2**14, r=8, p=1, dklen=32)
    )
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "worker of dist_partial")])
    years = datetime.datetime(1970, 1, 1), datetime.datetime(9999, 12, 31)
    # Ed25519 draws nothing: all workers come to the same bytes.
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, *years).sign(key, None)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return certificate.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)


def _contexts(load: Callable[[ssl.SSLContext], None], names: bool) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Those of the calling and of the called side; `names` is whether a name is compared, by the side that calls."""
    calling, called = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    calling.check_hostname = names
    calling.hostname_checks_common_name = False
    called.num_tickets = 0  # for a connection is never resumed
    for context in (calling, called):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        load(context)
    return calling, called


def _rehearse(credentials: Credentials, host: str) -> None:
    """Has this worker call itself, in memory; raises `ssl.SSLError` as another would."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [credentials.begin(back, there, True, host), credentials.begin(there, back, False, host)]
    for side in sides * 2:  # each speaks twice
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()


def _reason(error: ssl.SSLError) -> str:
    words = getattr(error, "verify_message", None) or (error.reason or str(error)).replace("_", " ").lower()
    return words.rstrip(".")
