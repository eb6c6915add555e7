"""The launcher's command line: what it refuses, and what it does within a scheduler."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from dist_partial.distributed import cluster
from dist_partial.launch import __main__ as launch
from tests import ROOT
from tests.helpers.launchers import TIMEOUT

COMMAND = importlib.import_module("dist_partial.train")  # the name in the package is the function
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
    assert "python -m dist_partial.launch local --workers=3 -- --gin_file=F" in capsys.readouterr().out


def test_agents_are_light():
    code = "import sys, dist_partial.launch.__main__; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=TIMEOUT).returncode == 0


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
@pytest.mark.parametrize("dashes", [[], ["--"]])
def test_within_a_scheduler(kind, dashes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", "")
    monkeypatch.setattr(cluster, "tf_config", lambda found, environ: config if found == kind else None, raising=False)
    trained = []
    monkeypatch.setattr(COMMAND, "main", lambda argv: trained.append((list(argv), os.environ["TF_CONFIG"])) or 75)
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

        monkeypatch.setattr(COMMAND, "main", main)
        return launch.main(["kubernetes", "--", "--gin_file=F", f"--run_dir={tmp_path}/run"])

    for expected in (75, 75, 2):
        assert pod(75) == expected
    assert (
        "error: exit code 75, and no other pod: restarts without a new checkpoint have reached their limit of 2"
        in capsys.readouterr().err
    )
    assert [pod(75, step) for step in (1, 2, 3, 4)] == [75] * 4
    assert pod(1) == 2
    assert "an exception before any step is on record would come again" in capsys.readouterr().err
    assert [pod(code) for code in (75, 75, 0, 75, 75, 2, 75, 75, 130)] == [75, 75, 0, 75, 75, 2, 75, 75, 130]


def test_mistakes_within_a_scheduler(monkeypatch, capsys):
    def refuse(kind, environ):
        raise launch.UserError(f"no {kind} here")

    monkeypatch.setattr(cluster, "tf_config", refuse, raising=False)
    assert launch.main(["slurm", "--", "--gin_file=F"]) == 2
    assert capsys.readouterr().err == "error: no slurm here\n"


def test_ports_of_hosts_wrap():
    values = launch.flags.FlagValues()
    launch.flags.DEFINE_list("hosts", ["a"], "", flag_values=values)
    launch.flags.DEFINE_integer("port", 65436, "", flag_values=values)
    launch.flags.DEFINE_integer("spares", 0, "", flag_values=values)
    for name, default in [("ssh", "ssh -T"), ("python", "python"), ("directory", "/")]:
        launch.flags.DEFINE_string(name, default, "", flag_values=values)
    values(["program"])
    places = launch._hosts(values)
    assert [places(attempt)[0][2] for attempt in (0, 1, 99, 100)] == ["a:65436", "a:65437", "a:65535", "a:65436"]
