"""What two workers say first of themselves, before either believes the other: see `handshake`."""

import dataclasses
import hashlib
import json
import secrets
import struct
from collections.abc import Sequence

from dist_partial.distributed.tls import Credentials

CALLER, LISTENER = b"C", b"L"
_LABEL = b"dist_partial handshake 1"
_FIELDS = struct.Struct("!24scBII16s32s32s")
HELLO_BYTES = _FIELDS.size
_SEALED, _TLS_BY_SECRET, _TLS_BY_FILES = 1, 2, 4
_TLS_IN_WORDS = {0: "False", _TLS_BY_SECRET: "True", _TLS_BY_FILES: "a folder"}


@dataclasses.dataclass(frozen=True)
class Hello:
    """Holds a hello that has come, or gone; the fields are those of `handshake`.

    Examples:
        >>> worker = Worker(1, ["a:2222", "b:2222"], "secret", sealed=True)
        >>> hello = Hello.read(worker.hello(CALLER, other=0), CALLER)
        >>> hello.rank, hello.other, hello.sealed, hello.tls
        (1, 0, True, 'False')
    """

    label: bytes
    role: bytes
    wishes: int
    rank: int
    other: int
    process: bytes
    nonce: bytes
    digest: bytes

    @classmethod
    def read(cls, data: bytes, role: bytes) -> "Hello":
        """Reads what somebody in this role has sent; raises ValueError where it is no hello."""
        hello = cls(*_FIELDS.unpack(data))
        if (hello.label, hello.role) != (_LABEL, role):
            raise ValueError("it does not speak as a worker of this version does")
        return hello

    @property
    def sealed(self) -> bool:
        """Whether its records are to have tags."""
        return bool(self.wishes & _SEALED)

    @property
    def tls(self) -> str:
        """What `replicas.tls` is there, in words."""
        return _TLS_IN_WORDS.get(self.wishes & ~_SEALED, "unknown")


@dataclasses.dataclass(frozen=True)
class Worker:
    """Describes what a worker is to the others.

    Attributes:
        rank: its rank.
        workers: 'host:port' of all, in rank order.
        secret: what all of them know.
        sealed: whether records are to have tags.
        tls: what it shows and trusts, or None for no TLS.
        process: what this process has drawn.

    Examples:
        >>> worker = Worker(0, ["a:2222", "b:2222"], "secret", sealed=True)
        >>> len(worker.hello(CALLER, other=1)), worker.addresses
        (114, b'["a:2222", "b:2222"]')
    """

    rank: int
    workers: Sequence[str]
    secret: str
    sealed: bool
    tls: Credentials | None = None
    process: bytes = dataclasses.field(default_factory=lambda: secrets.token_bytes(16))

    @property
    def addresses(self) -> bytes:
        return json.dumps(list(self.workers)).encode()

    def hello(self, role: bytes, other: int) -> bytes:
        digest = hashlib.sha256(self.addresses).digest()
        nonce = secrets.token_bytes(32)
        wishes = _SEALED * self.sealed
        if self.tls:
            wishes += _TLS_BY_FILES if self.tls.from_files else _TLS_BY_SECRET
        return _FIELDS.pack(_LABEL, role, wishes, self.rank, other, self.process, nonce, digest)
