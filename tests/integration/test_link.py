"""A stranger on the link of two workers: on a host of its own it sees all that they send, and can send as they do."""

import contextlib
import json
import socket
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import ROOT
from tests.helpers import hosts

GRADIENT = np.random.default_rng(0).normal(size=8).astype(np.float32)  # eight values that both send again and again
WORDS = b"the stranger was here"

WORKER = """
import os, sys, time
import numpy as np
from dist_partial.distributed import replicas
from dist_partial.errors import Ending

gradient = np.tile(np.frombuffer(bytes.fromhex(sys.argv[1]), np.float32), 2**14)
made = replicas.create("multi_worker", tls=sys.argv[2] == "True", seal=False, patience_seconds=8)
try:
    for _ in range(4):
        assert (made.sum(gradient) == 2 * gradient).all()
    time.sleep(3)
    made.sum(gradient)
    print("all well", flush=True)
except Ending as error:
    print(type(error).__name__, error, flush=True)
os._exit(0)
"""


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(
        struct.unpack(f"!{len(data + data[: len(data) % 2]) // 2}H", data.ljust(len(data) + len(data) % 2, b"\0"))
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def parsed(frame: bytes) -> tuple[tuple[str, str], bytes] | None:
    """Who sends a TCP segment of IPv4 to whom, and its payload."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return None
    start = 14 + (frame[14] & 15) * 4
    end = 14 + int.from_bytes(frame[16:18], "big")
    payload = frame[start + (frame[start + 12] >> 4) * 4 : end]
    return (socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])), payload


def following(frame: bytes, sent: int, data: bytes) -> bytes:
    """The segment that would follow one of `sent` bytes: of the same sender and with the right numbers."""
    ip, start = bytearray(frame[14:34]), 14 + (frame[14] & 15) * 4
    tcp = bytearray(frame[start : start + (frame[start + 12] >> 4) * 4])
    tcp[4:8] = ((int.from_bytes(tcp[4:8], "big") + sent) % 2**32).to_bytes(4, "big")
    tcp[13], tcp[16:18], ip[10:12] = 0x18, bytes(2), bytes(2)
    ip[2:4] = (20 + len(tcp) + len(data)).to_bytes(2, "big")
    ip[10:12] = checksum(bytes(ip)).to_bytes(2, "big")
    pseudo = bytes(ip[12:20]) + struct.pack("!BBH", 0, 6, len(tcp) + len(data))
    tcp[16:18] = checksum(pseudo + bytes(tcp) + data).to_bytes(2, "big")
    return frame[:14] + bytes(ip) + bytes(tcp) + data


def spy(seconds: float) -> dict[str, int]:
    """Looks for the gradient in what passes; once all is quiet, sends worker 1 what would be worker 0's last words."""
    found = {"gradients": 0, "bytes": 0, "injected": 0}
    pattern, direction = GRADIENT.tobytes(), (hosts.address(1), hosts.address(2))
    last, heard, until = None, time.monotonic(), time.monotonic() + seconds
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))  # ETH_P_ALL
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)
    link.bind(("e0", 0))
    link.settimeout(0.1)
    print("looking", flush=True)
    while time.monotonic() < until and not found["injected"]:
        with contextlib.suppress(TimeoutError):
            frame = link.recv(2**17)
            if (segment := parsed(frame)) and hosts.address(3) not in segment[0]:
                heard = time.monotonic()
                found["bytes"] += len(segment[1])
                found["gradients"] += segment[1].count(pattern)
                if segment[0] == direction:
                    last = frame, len(segment[1])
        if last and found["bytes"] > 2**20 and time.monotonic() - heard > 1:
            header = struct.pack("<4sBQIQQ", b"dpm4", 3, 0, 0, len(WORDS), 0)
            link.send(following(*last, header + WORDS))
            found["injected"] = 1
    return found


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("tls", [False, True])
def test_a_stranger_on_the_link(tls):
    """Without TLS it reads gradients and ends a worker in another's name; with it neither."""
    look = ["ip", "netns", "exec", hosts.name(3), sys.executable, "-m", "tests.integration.test_link"]
    worker = [sys.executable, "-c", WORKER, GRADIENT.tobytes().hex(), str(tls)]
    with hosts.hosts(3, hub=True):
        stranger = subprocess.Popen(look, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert stranger.stdout.readline() == "looking\n"
            results = hosts.run(worker, 2, timeout=80)
            found = json.loads(stranger.communicate(timeout=80)[0])
        finally:
            stranger.kill()
    outputs = [output for _, output in results]
    assert found["bytes"] > 2**20 and found["injected"], (found, outputs)
    where = f"worker 0 ({hosts.address(1)}:{hosts.PORT})"
    if tls:
        assert found["gradients"] == 0
        assert f"Fault what comes from {where} is not what it has sent" in outputs[1], outputs
    else:
        assert found["gradients"] > 1000
        assert f"UserError {where}: {WORDS.decode()}" in outputs[1], outputs
    assert f"worker 1 ({hosts.address(2)}:{hosts.PORT})" in outputs[0], outputs


if __name__ == "__main__":
    print(json.dumps(spy(60)))
