"""The command line of the launcher: what it refuses, and what it hands to workers, here and over a stand-in for ssh."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_partial import train
from dist_partial.distributed import cluster
from dist_partial.launch import __main__ as launch
from tests.e2e.test_supervisor import TIMEOUT, assert_gone, launched, wait_until
from tests.workers import ROOT

TRAIN = ["--", "--gin_file=gin_configs/two_dense.gin"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command '': write local, hosts, slurm or kubernetes"),
        (["remote"], "no command 'remote': write local, hosts, slurm or kubernetes"),
        (
            ["local", "--workers=2"],
            "write arguments of dist_partial.train after a --, as in: launch/local --workers=2 -- ",
        ),
        (["hosts", "--hosts=a"], "as in: launch/hosts --hosts=10.0.0.1,10.0.0.2 -- --gin_file=F"),
        (["local", "--workers=2", "--gin_file=F"], "write --gin_file=F after a --"),
        (["local", "--workers=2", "--run_dir=x", *TRAIN], "write --run_dir=x after a --"),
        (["local", "--workers=2", "--"], "no --gin_file after the --: try -- --gin_file="),
        (["local", "--workers=2", "--", "--gin_file"], "Missing value for flag --gin_file"),
        (["local", *TRAIN], "--workers=0: write how many workers to start, such as --workers=2"),
        (["local", "--workers=0", *TRAIN], "--workers=0: write how many workers"),
        (["local", "--workers=-1", *TRAIN], "--workers=-1: write how many workers"),
        (["local", "--workers=two", *TRAIN], "flag --workers=two"),
        (["local", "--worker=2", *TRAIN], "Unknown command line flag 'worker'. Did you mean: workers"),
        (["local", "2", *TRAIN], "unexpected argument '2'"),
        (["local", "--workers=2", "--restarts=-1", *TRAIN], "flag --restarts=-1: -1 is not a non-negative integer"),
        (["local", "--workers=2", "--grace_seconds=-1", *TRAIN], "flag --grace_seconds=-1: -1 is not a non-negative"),
        (["local", "--workers=2", "--hosts=a", *TRAIN], "Unknown command line flag 'hosts'"),
        (["hosts", *TRAIN], "no --hosts: write --hosts=10.0.0.1,10.0.0.2"),
        (["hosts", "--hosts=", *TRAIN], "no --hosts: write"),
        (["hosts", "--hosts=a,,b", *TRAIN], "--hosts has '': write names or addresses"),
        (["hosts", "--hosts=a,b:22", *TRAIN], "--hosts has 'b:22': write names or addresses"),
        (["hosts", "--hosts=me@", *TRAIN], "--hosts has 'me@': write names or addresses"),
        (["hosts", "--hosts=-oProxyCommand=x", *TRAIN], "--hosts has '-oProxyCommand=x': write names"),
        (["hosts", "--hosts=a,b,a", *TRAIN], "--hosts names a twice"),
        (["hosts", "--hosts=me@a,you@a", *TRAIN], "--hosts names a twice"),
        (["hosts", "--hosts=a", "--port=0", *TRAIN], "--port=0: write 1 to 65436"),
        (["hosts", "--hosts=a", "--port=65500", *TRAIN], "--port=65500: write 1 to 65436"),
        (["hosts", "--hosts=a", "--ssh=", *TRAIN], "--ssh is empty: write --ssh='ssh -T'"),
        (["hosts", "--hosts=a", "--ssh=ssh 'x", *TRAIN], "--ssh=ssh 'x: No closing quotation"),
        (["hosts", "--hosts=a", "--ssh=/no/such", *TRAIN], "cannot start '/no/such': No such file or directory"),
    ],
)
def test_mistakes(argv, message, capsys, tmp_path):
    if "--" in argv[:-1]:
        argv = [*argv, *([] if argv[-1] == "--gin_file" else [f"--run_dir={tmp_path / 'run'}"])]
    assert launch.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["local", "--help"], ["hosts", "-h"]])
def test_help(argv, capsys):
    assert launch.main(argv) == 0
    assert "launch/local --workers=3 -- --gin_file=F" in capsys.readouterr().out


def test_keepers_are_light():
    code = "import sys, dist_partial.launch; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=TIMEOUT).returncode == 0


@pytest.mark.parametrize("name", ["local", "hosts"])
def test_scripts(name):
    command = [ROOT / "launch" / name, "--no_such", *TRAIN]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2
    assert done.stderr == "error: Unknown command line flag 'no_such'\n"


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
    assert (tmp_path / "run.logs" / "attempt-1" / "worker-0.log").read_text() in done.stderr


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
@pytest.mark.parametrize("dashes", [[], ["--"]])
def test_within_a_scheduler(kind, dashes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", "")
    monkeypatch.setattr(cluster, "tf_config", lambda found, environ: config if found == kind else None, raising=False)
    trained = []
    monkeypatch.setattr(train, "main", lambda argv: trained.append((list(argv), os.environ["TF_CONFIG"])) or 75)
    assert launch.main([kind, *dashes, "--gin_file=F", "--gin_param=run.steps=3"]) == 75
    assert trained == [(["--gin_file=F", "--gin_param=run.steps=3"], json.dumps(config))]


def test_pods_that_are_not_to_be_replaced(monkeypatch, tmp_path, capsys):
    """Kubernetes goes by the exit code, and takes 2 for the last."""
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", "")
    monkeypatch.setenv("DIST_PARTIAL_RESTARTS", "2")
    monkeypatch.setattr(cluster, "tf_config", lambda found, environ: config)

    def pod(code: int, checkpoint: int = 0) -> int:
        def main(argv):
            if checkpoint:
                (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
                (tmp_path / "run" / "checkpoints" / f"step-{checkpoint:010d}.safetensors").touch()
            return code

        monkeypatch.setattr(train, "main", main)
        return launch.main(["kubernetes", "--", "--gin_file=F", f"--run_dir={tmp_path}/run"])

    for expected in (75, 75, 2):
        assert pod(75) == expected
    assert (
        "error: exit code 75, and no other pod: restarts without a new checkpoint have reached their limit of 2"
        in capsys.readouterr().err
    )
    assert [pod(75, step) for step in (1, 2, 3, 4)] == [75] * 4
    assert pod(1) == 2
    assert "an exception before the first step would come again" in capsys.readouterr().err
    assert [pod(code) for code in (75, 75, 0, 75, 75, 2, 75, 75, 130)] == [75, 75, 0, 75, 75, 2, 75, 75, 130]


def test_mistakes_within_a_scheduler(monkeypatch, capsys):
    def refuse(kind, environ):
        raise launch.UserError(f"no {kind} here")

    monkeypatch.setattr(cluster, "tf_config", refuse, raising=False)
    assert launch.main(["slurm", "--", "--gin_file=F"]) == 2
    assert capsys.readouterr().err == "error: no slurm here\n"


# A launcher whose workers run a script.
LAUNCHER = """
import sys
from dist_partial import launch
sys.exit(launch.main(sys.argv[2:], [sys.executable, "-u", sys.argv[1]]))
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
    for line in open(0, "rb", buffering=0):
        remote.stdin.write(line)
        remote.stdin.flush()
    remote.stdin.close()

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
            assert "dist_partial.launch\0keep" in lines
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


def test_ports_of_hosts_wrap():
    values = launch.flags.FlagValues()
    launch.flags.DEFINE_list("hosts", ["a"], "", flag_values=values)
    launch.flags.DEFINE_integer("port", 65436, "", flag_values=values)
    for name, default in [("ssh", "ssh -T"), ("python", "python"), ("directory", "/")]:
        launch.flags.DEFINE_string(name, default, "", flag_values=values)
    values(["program"])
    places = launch._hosts(values)
    assert [places(attempt)[0][2] for attempt in (0, 1, 99, 100)] == ["a:65436", "a:65437", "a:65535", "a:65436"]


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
