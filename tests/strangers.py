"""Programs that try to pass for workers, in the bytes that `dist_partial.distributed.handshake` describes.

    python -m tests.strangers [--tries=20] [--attacks=relay,reflection,impostor,ambush,middle]

attacks real trainings of two workers while they start: each must end with exit code 0 and the bits of a run that nobody
has attacked, and no stranger may be taken in. Nothing here is the package's own code but the command of the workers.
"""

import argparse
import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.numpy import load_file

from tests import ROOT
from tests.helpers.workers import loopback, run_workers

HELLO, PROOF, VERDICT = 114, 32, 33  # bytes
SECONDS = 1.0  # until a stranger gives up a connection


def hello(role: bytes, rank: int, other: int, workers: Sequence[str], wishes: int = 0, **fields: bytes) -> bytes:
    digest = hashlib.sha256(json.dumps(list(workers)).encode()).digest()
    label = b"dist_partial handshake 1"
    start = label + role + struct.pack(">BII", wishes, rank, other)
    drawn = fields.get("process", secrets.token_bytes(16)) + fields.get("nonce", secrets.token_bytes(32))
    return start + drawn + digest


def as_caller(hello: bytes, rank: int, other: int) -> bytes:
    """A listener's hello in the other role."""
    return b"".join([hello[:24], b"C", hello[25:26], struct.pack(">II", rank, other), hello[34:]])


def proof(secret: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.new(secret, role + transcript, hashlib.sha256).digest()


def ends(connection: socket.socket, calls: bool) -> bytes:
    own, other = connection.getsockname(), connection.getpeername()
    caller, listener = (own, other) if calls else (other, own)
    return json.dumps([*caller[:2], *listener[:2]]).encode()


def key(secret: bytes, role: bytes, transcript: bytes) -> bytes:
    """HKDF-SHA256 of RFC 5869, the first block."""
    nonces = transcript[50:82] + transcript[HELLO + 50 : HELLO + 82]
    extracted = hmac.new(nonces, secret, hashlib.sha256).digest()
    return hmac.new(extracted, role + transcript + b"\x01", hashlib.sha256).digest()


def record(key: bytes, number: int, data: bytes) -> bytes:
    return data + hmac.new(key, struct.pack(">Q", number) + data, hashlib.sha256).digest()[:16]


def call(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), SECONDS)


def exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := connection.recv(count - len(data))):
            raise EOFError
        data += more
    return data


def greet(
    connection: socket.socket,
    rank: int,
    other: int,
    workers: Sequence[str],
    secret: bytes,
    sealed: bool = False,
    **fields: bytes,
) -> tuple[int, bytes]:
    """The caller's part of a handshake; returns the verdict and the transcript, of which it has checked the proof."""
    mine = hello(b"C", rank, other, workers, sealed, **fields)
    connection.sendall(mine)
    theirs = exactly(connection, HELLO)
    transcript = mine + theirs + (b"" if sealed and theirs[25] else ends(connection, True))
    connection.sendall(proof(secret, b"C", transcript))
    answer = exactly(connection, VERDICT)
    assert answer[0] != 1 or hmac.compare_digest(answer[1:], proof(secret, b"L", transcript))
    return answer[0], transcript


def listen(address: str, seconds: float = 30) -> socket.socket:
    host, _, port = address.rpartition(":")
    server = socket.create_server((host, int(port)))
    server.settimeout(seconds)
    return server


def await_call(address: str) -> socket.socket:
    """Calls a worker that may not listen yet."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return call(address)
        time.sleep(0.01)


def welcome(
    connection: socket.socket, rank: int, other: int, workers: Sequence[str], secret: bytes, sealed: bool = False
) -> bytes:
    """The listener's part of a handshake; returns the transcript, of which it has checked the proof."""
    theirs, mine = exactly(connection, HELLO), hello(b"L", rank, other, workers, sealed)
    connection.sendall(mine)
    transcript = theirs + mine + (b"" if sealed and theirs[25] else ends(connection, False))
    assert hmac.compare_digest(exactly(connection, PROOF), proof(secret, b"C", transcript))
    connection.sendall(b"\x01" + proof(secret, b"L", transcript))
    return transcript


class Attack:
    """Attacks the workers again and again, until it is stopped.

    Attributes:
        proofs: how often a worker was handed something as a proof.
        admitted: how often a worker has then taken a stranger in.
    """

    def __init__(self, kind: str, workers: Sequence[str]) -> None:
        self.workers, self.proofs, self.admitted = list(workers), 0, 0
        self._over = threading.Event()
        attempts = [attempt for name in kind.split("+") for attempt in ATTACKS[name]]
        self._threads = [threading.Thread(target=self._repeat, args=(each,), daemon=True) for each in attempts]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, attempt: Callable[["Attack", contextlib.ExitStack], None]) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError, EOFError), contextlib.ExitStack() as stack:
                attempt(self, stack)
            time.sleep(0.005)

    def call(self, rank: int, stack: contextlib.ExitStack) -> socket.socket:
        return stack.enter_context(call(self.workers[rank]))

    def judge(self, connection: socket.socket) -> None:
        """Reads the verdict about a proof that was handed over."""
        self.proofs += 1
        if exactly(connection, VERDICT)[0] == 1:
            self.admitted += 1


def relay(attack: Attack, stack: contextlib.ExitStack) -> None:
    """Calls two starting workers, tells each what the other says, and hands on what could be a proof."""
    zero, one = attack.call(0, stack), attack.call(1, stack)
    zero.sendall(hello(b"C", 1, 0, attack.workers))
    asked = exactly(zero, HELLO)
    one.sendall(as_caller(asked, 0, 1))
    answered = exactly(one, HELLO)
    one.sendall(asked[-PROOF:])
    zero.sendall(exactly(one, VERDICT)[-PROOF:] if secrets.randbelow(2) else answered[-PROOF:])
    attack.judge(zero)


def reflect(attack: Attack, stack: contextlib.ExitStack) -> None:
    """Two connections to one worker, each of which is sent what the other hears."""
    left, right = attack.call(0, stack), attack.call(0, stack)
    left.sendall(hello(b"C", 1, 0, attack.workers))
    heard = exactly(left, HELLO)
    right.sendall(as_caller(heard, 1, 0))
    right.sendall(exactly(right, HELLO)[-PROOF:])
    left.sendall(exactly(right, VERDICT)[-PROOF:])
    attack.judge(left)


def pretend(attack: Attack, stack: contextlib.ExitStack) -> None:
    """Says to be worker 1, with the right addresses and a secret of its own."""
    connection = attack.call(0, stack)
    attack.proofs += 1
    verdict, _ = greet(connection, 1, 0, attack.workers, secrets.choice([b"", b"guessed"]))
    attack.admitted += verdict == 1


def lie_in_wait(attack: Attack, stack: contextlib.ExitStack) -> None:
    """Listens at worker 0's address before it does, and says that all is well, or that nothing is."""
    if attack.proofs == 6:  # worker 0 needs the address, too
        return
    server = stack.enter_context(listen(attack.workers[0], SECONDS))
    connection = stack.enter_context(server.accept()[0])
    server.close()  # or other calls would be taken as well, and nobody answer them
    connection.settimeout(SECONDS)
    exactly(connection, HELLO)
    connection.sendall(hello(b"L", 0, 1, attack.workers))
    exactly(connection, PROOF)
    attack.proofs += 1
    connection.sendall(bytes([attack.proofs % 3]) + secrets.token_bytes(32))
    with contextlib.suppress(ConnectionResetError):
        try:
            assert not connection.recv(1)
        except TimeoutError:  # it has not closed the connection
            attack.admitted += 1


def stand_between(attack: Attack, stack: contextlib.ExitStack) -> None:
    """Takes worker 1's call at worker 0's address, leaves the address to worker 0, and passes all bytes on."""
    with listen(attack.workers[0], SECONDS) as server:
        caller = stack.enter_context(server.accept()[0])
    caller.settimeout(30)
    data = exactly(caller, HELLO)
    listener, until = None, time.monotonic() + 4  # the worker has 5 seconds
    while listener is None and time.monotonic() < until:
        with contextlib.suppress(ConnectionRefusedError):
            listener = attack.call(0, stack)
    if listener is None:
        return
    listener.sendall(data)
    caller.sendall(exactly(listener, HELLO))
    listener.sendall(exactly(caller, PROOF))
    attack.proofs += 1
    verdict = exactly(listener, VERDICT)
    attack.admitted += verdict[0] == 1
    caller.sendall(verdict)


ATTACKS: dict[str, list[Callable[[Attack, contextlib.ExitStack], None]]] = {
    "relay": [relay] * 2,
    "reflection": [reflect] * 2,
    "impostor": [pretend] * 2,
    "ambush": [lie_in_wait],
    "middle": [stand_between],
}


GIN = f"{ROOT}/gin_configs/two_dense.gin"
SETTINGS = ("run.steps = 4", "run.eval_examples = 64", "run.global_batch = 32", "run.steps_per_loop = 2")


def train(run_dir: Path, kind: str | None) -> tuple[Attack | None, list[tuple[int, str]]]:
    """Trains with two workers, while strangers attack; returns what came of both."""
    workers = loopback(2)
    attack = Attack(kind, workers) if kind else None
    command = ["-m", "dist_partial.train", f"--gin_file={GIN}", f"--run_dir={run_dir}"]
    command += [f"--gin_param={each}" for each in SETTINGS]
    environment = {"DIST_PARTIAL_SECRET": secrets.token_hex(16)}
    try:
        results = run_workers(command, 2, 120, addresses=workers, environments={0: environment, 1: environment})
    finally:
        if attack:
            attack.stop()
    return attack, results


def weights(run_dir: Path) -> dict[str, bytes]:
    (file,) = (run_dir / "checkpoints").glob("*.safetensors")
    return {name: array.tobytes() for name, array in load_file(file).items()}


def attempt(kind: str, folder: Path, expected: dict[str, bytes]) -> tuple[Attack, str]:
    """Attacks one training; returns the attack, and what went wrong or ""."""
    attack, results = train(folder, kind)
    assert attack is not None
    for code, output in results:
        if code or "Traceback" in output:
            return attack, f"exit code {code}: {output}"
    if attack.admitted:
        return attack, f"taken in {attack.admitted} times"
    return attack, "" if weights(folder) == expected else "other weights"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.strangers")
    parser.add_argument("--tries", type=int, default=20, help="trainings, for each attack")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="which, with commas between")
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder, "alone"), None)
        expected = weights(Path(folder, "alone"))
        for kind in options.attacks.split(","):
            attacked = missed = unharmed = proofs = 0
            while attacked < options.tries and missed < 2 * options.tries:
                attack, wrong = attempt(kind, Path(folder, f"{kind}-{attacked + missed}"), expected)
                if wrong:
                    print(f"{kind}: {wrong}", flush=True)
                attacked, missed = (attacked + 1, missed) if attack.proofs or wrong else (attacked, missed + 1)
                unharmed, proofs = unharmed + (not wrong and attack.proofs > 0), proofs + attack.proofs
            words = f"of {attacked} trainings unharmed by {proofs} proofs; {missed} more had started before any"
            print(f"{kind}: {unharmed} {words}", flush=True)
            failures += options.tries - unharmed
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
