"""Certificates from a secret and from files, and workers that meet in TLS; by rendezvous, in one process."""

import functools
import itertools
import os
import socket
import ssl
import sys
import tempfile
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from dist_partial.distributed import handshake, rendezvous, tls
from dist_partial.distributed.hello import Worker
from dist_partial.errors import Fault, UserError
from tests import strangers
from tests.helpers.certificates import Authority
from tests.helpers.threads import at_once
from tests.helpers.workers import free_ports, loopback

SECRET = "0123456789abcdef" * 2
HOST = "127.0.0.1"


def outcome(function):
    try:
        return function()
    except Exception as error:
        return error


def meet(workers, credentials, secrets=("s", "s"), seconds=10.0):
    """What comes of workers, each with its credentials and its secret."""
    come = functools.partial(rendezvous.connect, workers=workers, seconds=seconds)
    return at_once(
        [
            functools.partial(outcome, functools.partial(come, rank, secret=secret, tls=own))
            for rank, (own, secret) in enumerate(zip(credentials, secrets, strict=True))
        ]
    )


def close(found):
    for links in found:
        for link in links.values():
            link.socket.close()


def shown(link):
    """The certificate that the other side has shown."""
    return x509.load_der_x509_certificate(link.channel._tls.getpeercert(binary_form=True))


def test_the_key_is_what_the_secret_makes_of_it():
    """By another library; and it is what both workers show, in TLS 1.3 that nobody resumes."""
    found = meet(loopback(2), [tls.from_secret(SECRET) for _ in range(2)])
    seed = Scrypt(b"dist_partial TLS 1", 32, 2**14, 8, 1).derive(SECRET.encode())
    for links in found:
        (link,) = links.values()
        assert link.channel._tls.version() == "TLSv1.3" and not link.channel._tls.session.has_ticket
        assert shown(link).public_key() == Ed25519PrivateKey.from_private_bytes(seed).public_key()
    close(found)


def test_the_key_is_on_no_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    seen, load = [], ssl.SSLContext.load_cert_chain

    def watched(context, path, **options):
        seen.append(os.readlink(path))
        load(context, path, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watched)
    tls.from_secret(SECRET)
    assert seen == ["/memfd:dist_partial certificate (deleted)"] * 2
    assert not [path for path in os.listdir("/proc/self/fd") if "certificate" in target(path)]


def target(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # that of the listing itself
        return ""


@pytest.mark.parametrize("secret", ["", "hunter2", SECRET[1:]])
def test_a_secret_that_can_be_guessed_is_refused(secret):
    with pytest.raises(
        UserError, match=rf"SECRET of {len(secret)} characters can be guessed; .*`openssl rand -hex 32`"
    ):
        tls.from_secret(secret)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(UserError, match=r"needs the package cryptography: pip install 'dist_partial\[tls\]'"):
        tls.from_secret(SECRET)


def swap(folder, name, other):
    (folder / name).write_bytes((other / name).read_bytes())


def test_mistakes_in_the_files_are_named_before_anybody_is_called(tmp_path):
    ours, theirs = Authority(), Authority("another")
    good = ours.issue(tmp_path / "good", HOST)
    assert tls.from_files(str(good), HOST).from_files
    other = theirs.issue(tmp_path / "other", HOST)
    client, server = x509.OID_CLIENT_AUTH, x509.OID_SERVER_AUTH
    made = {name: ours.issue(tmp_path / name, HOST) for name in ("no key", "a key", "an authority", "no PEM", "no CA")}
    (made["no key"] / "tls.key").unlink()
    swap(made["a key"], "tls.key", other)
    swap(made["an authority"], "ca.crt", other)
    (made["no PEM"] / "tls.crt").write_text("a certificate")
    (made["no CA"] / "ca.crt").write_text("")
    refused = "where other workers would refuse tls.crt"
    expected = {
        tmp_path / "nowhere": "where there is no tls.crt: put tls.crt, tls.key, ca.crt there, or bind True",
        made["no key"]: "where there is no tls.key",
        made["a key"]: "where tls.key does not belong to tls.crt",
        made["an authority"]: f"{refused} (unable to get local issuer certificate)",
        made["no PEM"]: "where tls.crt and tls.key cannot be read",
        made["no CA"]: "where ca.crt cannot be read",
        ours.issue(tmp_path / "locked", HOST, password=b"secret"): "where tls.key asks for a password",
        ours.issue(tmp_path / "late", HOST, days=-1): f"{refused} (certificate has expired)",
        ours.issue(tmp_path / "for servers", HOST, only=server): f"{refused} (unsuitable certificate purpose)",
        ours.issue(tmp_path / "for clients", HOST, only=client): f"{refused} (unsuitable certificate purpose)",
        ours.issue(tmp_path / "elsewhere", "10.0.0.9"): f"{refused} (IP address mismatch",
    }
    by_common_name = ours.issue(tmp_path / "by common name", "a.worker", alternative=False)
    with pytest.raises(UserError, match=r"refuse tls\.crt \(Hostname mismatch"):
        tls.from_files(str(by_common_name), "a.worker")
    for folder, words in expected.items():
        with pytest.raises(UserError) as error:
            tls.from_files(str(folder), HOST)
        assert str(error.value).startswith(f"replicas.tls is {str(folder)!r}, ") and words in str(error.value)


def from_files(authority, folder, host=HOST):
    return tls.from_files(str(authority.issue(folder, host)), host)


@pytest.mark.parametrize("hosts", [[HOST, "127.0.0.2"], ["localhost", "localhost"]])
def test_workers_with_certificates_of_their_own_meet(hosts, tmp_path):
    ours = Authority()
    workers = [f"{host}:{port}" for host, port in zip(hosts, free_ports(2), strict=True)]
    found = meet(workers, [from_files(ours, tmp_path / str(rank), host) for rank, host in enumerate(hosts)])
    for rank, links in enumerate(found):
        assert shown(links[1 - rank]).subject.rfc4514_string() == f"CN=of {hosts[1 - rank]}"
    close(found)


KINDS = {"False": lambda folder: None, "True": lambda folder: tls.from_secret(SECRET)}
KINDS["a folder"] = lambda folder: from_files(Authority(), folder)


@pytest.mark.parametrize(("first", "second"), itertools.permutations(KINDS, 2))
def test_workers_that_differ_in_tls_end_at_once_with_one_line(first, second, tmp_path):
    start = time.monotonic()
    found = meet(loopback(2), [KINDS[first](tmp_path / "0"), KINDS[second](tmp_path / "1")])
    for error in found:
        assert isinstance(error, UserError)
        assert str(error) == f"replicas.tls is {first} on worker 0 and {second} on worker 1: bind the same on all"
    assert time.monotonic() - start < 5


def test_who_knows_another_secret_is_named_on_both_sides_and_ends_nobody(capsys):
    workers, late = loopback(2), []
    right = threading.Thread(
        target=lambda: late.append(
            outcome(lambda: rendezvous.connect(0, workers, 20, SECRET, tls=tls.from_secret(SECRET)))
        )
    )
    right.start()
    other = SECRET[::-1]
    wrong = outcome(lambda: rendezvous.connect(1, workers, 1, other, tls=tls.from_secret(other)))
    ignorant = "does not know this DIST_PARTIAL_SECRET: give all workers the same"
    assert isinstance(wrong, Fault) and f"({workers[0]}: what answers at {workers[0]} {ignorant})" in str(wrong)
    assert f"worker 0 waits for worker 1: who calls from {HOST} and says that it is worker 1 {ignorant}\n" in (
        capsys.readouterr().err
    )
    links = rendezvous.connect(1, workers, 10, SECRET, tls=tls.from_secret(SECRET))
    right.join()
    close([links, *late])


def test_who_has_another_authority_is_named_on_both_sides(tmp_path, capsys):
    workers = loopback(2)
    credentials = [from_files(Authority(f"of {rank}"), tmp_path / str(rank)) for rank in range(2)]
    found = meet(workers, credentials, seconds=1)
    refused = (
        "shows a certificate that is refused here (self-signed certificate in certificate chain): see replicas.tls"
    )
    assert f"worker 0 ({workers[0]}: what answers at {workers[0]} {refused})" in str(found[1])
    refusing = "does not get through TLS (tlsv1 alert unknown ca): see replicas.tls on both"
    assert f"worker 1 ({workers[1]}: who calls from {HOST} and says that it is worker 1 {refusing})" in str(found[0])
    assert all(isinstance(each, Fault) for each in found)
    lines = capsys.readouterr().err
    assert refused in lines and refusing in lines


def test_a_certificate_for_another_host_is_refused_by_who_calls(tmp_path):
    """Though it is of the same authority, and its bearer knows the secret."""
    ours, workers = Authority(), loopback(2)
    elsewhere = from_files(ours, tmp_path / "0", "10.0.0.9")
    found = meet(workers, [elsewhere, from_files(ours, tmp_path / "1")], seconds=1)
    assert f"refused here (IP address mismatch, certificate is not valid for '{HOST}')" in str(found[1])


def test_who_passes_everything_on_gets_no_proof_though_its_certificate_is_good(tmp_path):
    """It has TLS with each side, by a certificate of their authority for the host, and does not know the secret."""
    ours, workers = Authority(), [f"{HOST}:1", f"{HOST}:2"]
    own = [Worker(rank, workers, SECRET, False, from_files(ours, tmp_path / str(rank))) for rank in (0, 1)]
    pair = ours.issue(tmp_path / "theirs", HOST)
    with socket.create_server((HOST, 0)) as real, socket.create_server((HOST, 0)) as between:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(outcome(lambda: handshake.answer(real.accept()[0], own[0])))),
            threading.Thread(
                target=lambda: found.append(
                    outcome(lambda: handshake.call(socket.create_connection(between.getsockname()), own[1], 0))
                )
            ),
        ]
        for thread in threads:
            thread.start()
        caller, listener = between.accept()[0], socket.create_connection(real.getsockname())
        listener.sendall(strangers.exactly(caller, strangers.HELLO))
        caller.sendall(strangers.exactly(listener, strangers.HELLO))
        sides = []
        for role, connection in ((ssl.PROTOCOL_TLS_SERVER, caller), (ssl.PROTOCOL_TLS_CLIENT, listener)):
            context = ssl.SSLContext(role)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.load_cert_chain(pair / "tls.crt", pair / "tls.key")
            sides.append(context.wrap_socket(connection, server_side=role == ssl.PROTOCOL_TLS_SERVER))
        caller, listener = sides
        listener.sendall(strangers.exactly(caller, 32))
        caller.sendall(strangers.exactly(listener, 33))
        for thread in threads:
            thread.join(10)
        caller.close()
        listener.close()
    assert [type(each) for each in found] == [handshake.Unproven] * 2


@pytest.mark.parametrize(("side", "certified"), [("caller", True), ("caller", False), ("listener", True)])
def test_a_stranger_gets_no_proof(side, certified, tmp_path, capsys):
    """It says the right hello, and then speaks TLS by Python's own sockets, trusting anybody."""
    workers = loopback(2)
    rank = 0 if side == "caller" else 1
    thread = threading.Thread(
        target=lambda: found.append(
            outcome(lambda: rendezvous.connect(rank, workers, 1.5, SECRET, tls=tls.from_secret(SECRET)))
        )
    )
    found, folder = [], Authority().issue(tmp_path / "own", HOST)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if side == "caller" else ssl.PROTOCOL_TLS_SERVER)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certified:
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    if side == "caller":
        thread.start()
        connection = strangers.await_call(workers[0])
        connection.sendall(strangers.hello(b"C", 1, 0, workers, wishes=2))
        strangers.exactly(connection, strangers.HELLO)
    else:
        with strangers.listen(workers[0]) as server:
            thread.start()
            connection, _ = server.accept()
        strangers.exactly(connection, strangers.HELLO)
        connection.sendall(strangers.hello(b"L", 0, 1, workers, wishes=2))
    with connection, pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
        channel = context.wrap_socket(connection, server_side=side == "listener")
        strangers.exactly(channel, 1)
    thread.join(10)
    why = "does not know this DIST_PARTIAL_SECRET" if certified else "(peer did not return a certificate)"
    assert isinstance(found[0], Fault) and why in capsys.readouterr().err


def test_nothing_below_tls_1_3_is_spoken(tmp_path):
    workers = loopback(2)
    thread = threading.Thread(
        target=lambda: outcome(lambda: rendezvous.connect(0, workers, 1.5, SECRET, tls=tls.from_secret(SECRET)))
    )
    thread.start()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with strangers.await_call(workers[0]) as connection:
        connection.sendall(strangers.hello(b"C", 1, 0, workers, wishes=2))
        strangers.exactly(connection, strangers.HELLO)
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            context.wrap_socket(connection)
    thread.join(10)
