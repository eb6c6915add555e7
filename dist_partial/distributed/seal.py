"""The tags of what two workers send each other, by which a change on the way is noticed."""

import hmac
import struct

_NUMBER = struct.Struct("!Q")
_TAG = 16  # bytes


class Seal:
    """Computes the tags of the records of one direction, as their bytes come; for one thread.

    Attributes:
        length: bytes of a tag; 0 where nothing is sealed.

    Examples:
        >>> def tag(seal):
        ...     seal.update(memoryview(b"a record"))
        ...     return seal.tag()
        >>> sending, receiving = Seal(b"key"), Seal(b"key")
        >>> first = tag(sending)
        >>> tag(receiving) == first, tag(receiving) == first  # the second record differs by its number
        (True, False)
    """

    def __init__(self, key: bytes | None) -> None:
        self.length = _TAG if key else 0
        self._keyed = hmac.new(key, digestmod="sha256") if key else None
        self._count = 0
        self._begin()

    def _begin(self) -> None:
        if self._keyed:
            self._record = self._keyed.copy()
            self._record.update(_NUMBER.pack(self._count))
            self._count += 1

    def update(self, data: memoryview) -> None:
        """Takes the next bytes of the record."""
        if self._keyed:
            self._record.update(data)

    def tag(self) -> bytes:
        """The tag of the record, which ends with it; b"" where nothing is sealed."""
        if not self._keyed:
            return b""
        tag = self._record.digest()[:_TAG]
        self._begin()
        return tag
