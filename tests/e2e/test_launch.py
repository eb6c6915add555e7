"""Real launchers: what they hand to workers, here and over a replacement for ssh."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT, strangers
from tests.helpers.files import assert_same_state
from tests.helpers.launchers import TIMEOUT, assert_gone, launched, wait_until

TRAIN = ["--", "--gin_file=gin_configs/two_dense.gin"]

# A launcher whose workers run a script.
LAUNCHER = """
import sys
from dist_partial.launch.__main__ import main
sys.exit(main(sys.argv[2:], [sys.executable, "-u", sys.argv[1]]))
"""

# A worker that writes what it was handed to a file of its attempt, and waits until it may end.
WORKER = """
import json, os, sys, time
from pathlib import Path

folder = Path({folder!r})
config = json.loads(os.environ["TF_CONFIG"])
index, attempt = config["task"]["index"], 0
while (folder / f"{{attempt}}-{{index}}.json").exists():
    attempt += 1
handed = {{"config": config, "arguments": sys.argv[1:], "cwd": os.getcwd()}}
handed["secret"] = os.environ["DIST_PARTIAL_SECRET"]
(folder / f"{{attempt}}-{{index}}.pid").write_text(f"{{os.getpid()}} {{os.getppid()}}")
path = folder / f"{{attempt}}-{{index}}.json"
path.with_suffix(".partial").write_text(json.dumps(handed))
path.with_suffix(".partial").rename(path)
while not (folder / f"end {{attempt}}").exists():
    time.sleep(0.02)
"""

# In ssh's place: takes the host's name off and runs the rest by a shell, in a session of its own as sshd does. Whatever
# ends the client ends only the stdin of what runs on the host.
SSH = """#!{python} -ES
import os, subprocess, sys, threading

option, host, command = sys.argv[1:]
assert option == "-T"
with open("{folder}/reached", "a") as file:
    file.write(host + "\\n")
with open("{folder}/" + host + ".ssh", "w") as file:
    file.write(str(os.getpid()))
remote = subprocess.Popen(["sh", "-c", command], cwd="/", stdin=subprocess.PIPE, start_new_session=True)

def relay():
    try:
        for line in open(0, "rb", buffering=0):
            remote.stdin.write(line)
            remote.stdin.flush()
        remote.stdin.close()
    except BrokenPipeError:
        pass  # it has ended, as sshd would say nothing of

threading.Thread(target=relay, daemon=True).start()
sys.exit(remote.wait())
"""


def launching(folder: Path, *argv: str):
    script, ssh = folder / "worker.py", folder / "fake ssh"
    script.write_text(WORKER.format(folder=str(folder)))
    ssh.write_text(SSH.format(folder=folder, python=sys.executable))
    ssh.chmod(0o755)
    return launched(folder, [sys.executable, "-c", LAUNCHER, str(script), *argv])


def handed(folder: Path, attempt: int, workers: int) -> list[dict]:
    paths = [folder / f"{attempt}-{index}.json" for index in range(workers)]
    wait_until(lambda: all(path.exists() for path in paths))
    return [json.loads(path.read_text()) for path in paths]


def command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return "\n".join(found)


@pytest.mark.parametrize("name", ["local", "hosts"])
def test_scripts(name):
    command = [ROOT / "launch" / name, "--no_such", *TRAIN]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2
    assert done.stderr == "error: Unknown command line flag 'no_such'\n"


@pytest.mark.slow
def test_train_is_what_workers_run(tmp_path):
    command = [
        str(ROOT / "launch" / "local"),
        "--workers=1",
        "--",
        "--gin_file=no_such.gin",
        f"--run_dir={tmp_path}/run",
    ]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=4 * TIMEOUT)
    assert done.returncode == 2
    assert re.match(r"\[0\] error: .*no_such\.gin", done.stdout)
    assert done.stderr.startswith("error: worker 0 ended with exit code 2: error: ")
    assert (tmp_path / "run.logs" / "attempt-1" / "worker-0.log").read_text().strip() in done.stderr


def test_local(tmp_path):
    arguments = [
        "--gin_file=gin_configs/two_dense.gin",
        f"--run_dir={tmp_path}/run",
        "--gin_param=run.seed = 'a b'",
        "--",
    ]
    with launching(tmp_path, "local", "--workers=3", "--restarts=1", "--", *arguments) as launcher:
        first = handed(tmp_path, 0, 3)
        addresses = first[0]["config"]["cluster"]["worker"]
        assert len(set(addresses)) == 3
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in addresses)
        for index, got in enumerate(first):
            task = {"type": "worker", "index": index}
            assert got["config"] == {"cluster": {"worker": addresses}, "task": task}
            assert got["arguments"] == arguments
            assert got["cwd"] == str(ROOT)
            assert re.fullmatch(r"[0-9a-f]{32}", got["secret"])
        assert len({got["secret"] for got in first}) == 1
        if sys.platform == "linux":
            lines = command_lines()
            assert "dist_partial.launch\0agent" in lines
            assert first[0]["secret"] not in lines

        os.kill(launcher.pids(0)[1][0], signal.SIGKILL)
        second = handed(tmp_path, 1, 3)
        assert set(second[0]["config"]["cluster"]["worker"]).isdisjoint(addresses)
        assert len({got["secret"] for got in [*first, *second]}) == 2
        (tmp_path / "end 1").touch()
        assert launcher.wait() == 0
        assert "restart 1 of 1 in 1 s: worker 1 was killed by SIGKILL\n" in launcher.out
        assert (tmp_path / "run.logs" / "attempt-2" / "worker-2.log").exists()


@pytest.mark.parametrize("flags", [[], ["--run_dir=other/"]])
def test_logs_stand_beside_the_run_folder(tmp_path, flags):
    (tmp_path / "end 0").touch()
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(tmp_path)))
    argv = ["local", "--workers=1", "--", "--gin_file=first.gin", "--gin_file=configs/second.gin", *flags]
    command = [sys.executable, "-c", LAUNCHER, str(script), *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=TIMEOUT).returncode == 0
    name = "other.logs" if flags else "runs/second.logs"
    assert (tmp_path / name / "attempt-1" / "worker-0.log").exists()


def hosts_flags(folder: Path, directory: Path) -> list[str]:
    return ["hosts", f"--ssh='{folder}/fake ssh' -T", f"--python={sys.executable}", f"--directory={directory}"]


def test_hosts(tmp_path):
    # Shells must leave the folder's name and the arguments as they are.
    directory = tmp_path / "a 'folder' $HOME"
    directory.mkdir()
    arguments = ["--gin_file=F", f"--run_dir={tmp_path}/run", "--gin_param=run.rules = [('train', r'.*')]; $HOME"]
    flags = hosts_flags(tmp_path, directory)
    with launching(tmp_path, *flags, "--hosts=localhost,me@10.0.0.2", "--port=3000", "--", *arguments) as launcher:
        first = handed(tmp_path, 0, 2)
        assert sorted((tmp_path / "reached").read_text().split()) == ["localhost", "me@10.0.0.2"]
        for index, got in enumerate(first):
            assert got["config"]["cluster"] == {"worker": ["localhost:3000", "10.0.0.2:3000"]}
            assert got["config"]["task"] == {"type": "worker", "index": index}
            assert got["arguments"] == arguments
            assert got["cwd"] == str(directory)
        if sys.platform == "linux":
            lines = command_lines()
            assert "me@10.0.0.2" in lines and first[0]["secret"] not in lines

        # The connection to a host breaks: its worker ends, and all start again, on other ports.
        victims = launcher.pids(0, workers=2)
        connection = int((tmp_path / "me@10.0.0.2.ssh").read_text())
        os.kill(connection, signal.SIGKILL)
        assert_gone(list(victims[1]))
        second = handed(tmp_path, 1, 2)
        assert second[0]["config"]["cluster"] == {"worker": ["localhost:3001", "10.0.0.2:3001"]}
        assert second[0]["secret"] != first[0]["secret"]

        (tmp_path / "end 1").touch()
        assert launcher.wait() == 0
        assert "restart 1 of 10 in 1 s: worker 1 (10.0.0.2) was killed by SIGKILL\n" in launcher.out


def test_stopping_workers_on_hosts(tmp_path):
    flags = hosts_flags(tmp_path, tmp_path)
    with launching(
        tmp_path, *flags, "--hosts=127.0.0.1,127.0.0.2", "--", "--gin_file=F", f"--run_dir={tmp_path}/run"
    ) as launcher:
        handed(tmp_path, 0, 2)
        os.killpg(launcher.process.pid, signal.SIGINT)  # as Ctrl-C does; ssh must not die of it
        assert launcher.wait() == 130
        assert launcher.out.count("KeyboardInterrupt") == 2
        assert_gone(launcher.all_pids(), 0)


@pytest.mark.parametrize(
    ("flag", "code", "said"),
    [("--directory=/no/such", 2, "/no/such"), ("--python=/no/such/python", 127, "/no/such/python")],
)
def test_mistakes_on_hosts_are_not_tried_again(tmp_path, flag, code, said):
    flags = [*hosts_flags(tmp_path, tmp_path), flag]
    with launching(tmp_path, *flags, "--hosts=one", "--", "--gin_file=F", f"--run_dir={tmp_path}/run") as launcher:
        assert launcher.wait() == code
        assert "restart" not in launcher.out
        assert launcher.err.startswith(f"error: worker 0 (one) ended with exit code {code}: ")
        assert said in launcher.err


def on_hosts(folder: Path, hosts: str, *flags: str):
    arguments = ["--gin_file=F", f"--run_dir={folder}/run"]
    return launching(folder, *hosts_flags(folder, folder), *flags, f"--hosts={hosts}", "--", *arguments)


def test_a_host_that_its_workers_do_not_know(tmp_path):
    """ssh has another name for it, or the launcher's machine has."""
    with on_hosts(tmp_path, "127.0.0.1,lokalhost") as launcher:
        assert launcher.wait() == 2
        assert "restart" not in launcher.out
        assert re.search(r"no host 'lokalhost' is known here: .*; nearest: .*localhost", launcher.err)


def test_a_host_that_ssh_does_not_know(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "ssh: Could not resolve hostname $1: Name or service not known" >&2\nexit 255\n')
    ssh.chmod(0o755)
    with on_hosts(tmp_path, "lokalhost", f"--ssh={ssh}") as launcher:
        assert launcher.wait() == 2
        assert "restart" not in launcher.out
        assert launcher.err.startswith(
            "error: worker 0 (lokalhost): ssh: Could not resolve hostname lokalhost: Name or"
        )
        assert "nearest: " in launcher.err and launcher.err.count("\n") == 1


def test_a_host_that_cannot_be_reached_now(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "ssh: connect to host $1 port 22: No route to host" >&2\nexit 255\n')
    ssh.chmod(0o755)
    with on_hosts(tmp_path, "localhost", f"--ssh={ssh}", "--restarts=2") as launcher:
        assert launcher.wait() == 255
        assert launcher.out.count("restart") == 2
        assert "No route to host" in launcher.err


def test_a_host_without_the_package(tmp_path):
    """Python says so before any code of the package has run."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -IS "$@"\n')
    bare.chmod(0o755)
    with on_hosts(tmp_path, "localhost", f"--python={bare}") as launcher:
        assert launcher.wait() == 2
        assert "restart" not in launcher.out
        assert launcher.err.startswith(f"error: worker 0 (localhost): {bare} has no module 'dist_partial': install it ")
        assert launcher.err.count("\n") == 1


@pytest.mark.slow
def test_workers_that_encrypt_train_to_the_same_bits(tmp_path):
    """The secret that a launcher draws is all they need; their certificates come from it."""
    (ssh := tmp_path / "fake ssh").write_text(SSH.format(folder=tmp_path, python=sys.executable))
    ssh.chmod(0o755)
    local, away = ["local", "--workers=2"], [*hosts_flags(tmp_path, ROOT), "--hosts=127.0.0.1,127.0.0.2"]
    for name, flags, more in (
        ("plain", local, []),
        ("local", local, ["replicas.tls = True"]),
        ("hosts", away, ["replicas.tls = True"]),
    ):
        settings = [f"--gin_param={each}" for each in (*strangers.SETTINGS, *more)]
        train = ["--", f"--gin_file={strangers.GIN}", *settings, f"--run_dir={tmp_path / name}"]
        command = [sys.executable, "-m", "dist_partial.launch", *flags, *train]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("direct connections in TLS 1.3" in done.stdout) == bool(more), done.stdout
        assert_same_state(tmp_path / "plain", tmp_path / name, 4)
