"""How the bytes of one connection between two workers travel: as they are, or through TLS 1.3.

Both kinds of channel answer the same calls, which wait as long as the socket does: those of the handshake up to its
timeout, those of `tcp_peer` not at all. TLS works on memory here, and the sockets are plain ones: a selector sees what
there is, and one system call moves many records. What is not what the other has sent raises `ssl.SSLError`, and a
connection that ends is the loss of a worker, announced or not.
"""

import socket
import ssl
from collections.abc import Sequence
from typing import Any

from dist_partial.distributed.tls import Credentials

_AHEAD = 2**14  # bytes that are read beyond what is wanted
_READ = 2**18  # bytes of records that one system call reads


class Plain:
    """Moves bytes as they are.

    Attributes:
        socket: the connection.
        sendall: sends bytes, and waits.
        send: sends of several buffers, in order, what the system takes; returns how many bytes.

    Examples:
        >>> here, there = map(Plain, socket.socketpair())
        >>> here.sendall(b"two words")
        >>> word, rest = bytearray(3), bytearray(9)
        >>> there.receive(memoryview(word)), there.take(memoryview(rest)), word, rest.rstrip(b"\\0")
        (3, 6, bytearray(b'two'), bytearray(b' words'))
        >>> here.socket.close(), there.socket.close()
        (None, None)
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.sendall, self.send = connection.sendall, connection.sendmsg
        self._ahead = memoryview(bytearray(_AHEAD))
        self._kept = self._ahead[:0]  # what came beyond

    def receive(self, view: memoryview) -> int:
        """Fills a buffer from what one system call gives; returns how many bytes of it, and keeps what is beyond.

        Raises:
            OSError: the other side has closed; BlockingIOError: nothing has come.
        """
        count = self.socket.recvmsg_into([view, self._ahead])[0]
        if not count:
            raise ConnectionError("it closed the connection")
        filled = min(count, len(view))
        self._kept = self._ahead[: count - filled]
        return filled

    def take(self, view: memoryview) -> int:
        """Fills a buffer from what was kept; returns how many bytes of it."""
        if not self._kept:
            return 0
        count = min(len(self._kept), len(view))
        view[:count] = self._kept[:count]
        self._kept = self._kept[count:]
        return count


class Encrypted:
    """Moves bytes through TLS 1.3; has the attributes and methods of `Plain`, and `shake` comes first.

    `receive` and `take` may fill nothing although bytes have come, of a record that is not complete. A call of `send`
    that follows one that has raised BlockingIOError begins with the same bytes.
    """

    def __init__(self, connection: socket.socket, credentials: Credentials, calls: bool, host: str) -> None:
        """Begins on a connection on which both sides are to speak TLS from here on.

        Args:
            connection: the connection.
            credentials: of this worker.
            calls: whether this worker has made the connection.
            host: that it has called, as the workers' addresses name it.
        """
        self.socket = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = credentials.begin(self._incoming, self._outgoing, calls, host)
        self._scratch = memoryview(bytearray(_READ))
        self._leaving = memoryview(b"")  # records that are yet to leave
        self._taken = 0  # bytes that these hold

    def shake(self) -> bool:
        """Goes on with the handshake of TLS by what has come; returns whether it is over, on this side."""
        try:
            self._tls.do_handshake()
            return True
        except ssl.SSLWantReadError:
            return False
        finally:
            self._flush()  # why it has failed, too

    @property
    def binding(self) -> bytes:
        """What both ends of this TLS connection know, and of another one differs: the client's Finished message."""
        found = self._tls.get_channel_binding("tls-unique")
        if not found:
            raise ssl.SSLError("the handshake of TLS is not over")
        return found

    def sendall(self, data: bytes) -> None:
        """Sends bytes, and waits."""
        self._tls.write(data)
        self._flush()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.socket.sendall(data)

    def send(self, views: Sequence[memoryview]) -> int:
        """Sends several buffers; returns how many bytes of them have left, from the first on."""
        if not self._leaving:
            self._taken = sum(self._tls.write(view) for view in views)
            self._leaving = memoryview(self._outgoing.read())
        self._leaving = self._leaving[self.socket.send(self._leaving) :]
        if self._leaving:
            raise BlockingIOError
        return self._taken

    def receive(self, view: memoryview) -> int:
        """Fills a buffer as that of `Plain` does."""
        self.read()
        return self.take(view)

    def read(self) -> None:
        """Keeps what one system call gives."""
        if not (count := self.socket.recv_into(self._scratch)):
            raise ConnectionError("it closed the connection")
        self._incoming.write(self._scratch[:count])

    def take(self, view: memoryview) -> int:
        """Fills a buffer as that of `Plain` does."""
        filled = 0
        try:
            while filled < len(view):
                count: Any = self._tls.read(len(view) - filled, view[filled:])
                if not count:
                    raise ConnectionError("it closed the connection")
                filled += count
        except ssl.SSLWantReadError:  # the rest of a record has yet to come
            pass
        return filled


Channel = Plain | Encrypted
