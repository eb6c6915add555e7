"""python -m dist_partial.launch local --workers=3 -- --gin_file=F [any argument of dist_partial.train]
python -m dist_partial.launch hosts --hosts=a,b,c -- --gin_file=F ...
python -m dist_partial.launch local --workers=3 --run_dir=DIR -- mine.py [any argument of the script]

Starts all workers of a run, here or over ssh, shows what they print, and starts them again after a fault.

What workers print is kept in <run_dir>.logs. A script trains by dist_partial.train(..., folder=DIR). Where a scheduler
starts the workers, each of them is

    python -m dist_partial.launch slurm -- --gin_file=F ...    (or kubernetes)

and around all of Slurm's `begin` and `again --code=C` say by their exit codes whether the job is to start again.
"""

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dist_partial import cli
from dist_partial.distributed.cluster import SECRET
from dist_partial.errors import INTERRUPTED, UserError
from dist_partial.launch import agent, output, restarts, supervisor

_PORTS = 100  # how many ports attempts on hosts take in turn
_AGENT = ("-m", "dist_partial.launch", "agent")
_EXAMPLES = {"local": "--workers=2", "hosts": "--hosts=10.0.0.1,10.0.0.2"}

Place = tuple[str, Sequence[str], str]  # a worker's name, its agent's command, and its address


def main(argv: Sequence[str] | None = None, program: Sequence[str] = ()) -> int:
    """Runs the command; returns its exit code, see `supervisor.supervise`.

    Args:
        argv: arguments without the program's name; None takes the process's own.
        program: what workers run in place of dist_partial.train, as tests do.
    """
    kind, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if kind == "agent":  # beside a worker
        return agent.run_agent()
    if kind in ("local", "hosts"):
        return _launch(kind, rest, program)
    if kind in ("begin", "again"):
        return _count(kind, rest)
    if kind in ("slurm", "kubernetes"):
        return cli.call(None, flags.FlagValues(), [], lambda: _train(kind, rest))

    def unknown() -> int:
        raise UserError(f"no command {kind!r}: write local, hosts, slurm or kubernetes after dist_partial.launch")

    return cli.call(__doc__, flags.FlagValues(), ["--help"] if kind in ("-h", "--help") else [], unknown)


def _train(scheduler: str, argv: Sequence[str]) -> int:
    from dist_partial.distributed import cluster
    from dist_partial.train import main as train

    cli.import_tensorflow_quietly()  # cluster reads Slurm's variables by it
    config = cluster.tf_config(scheduler, os.environ)
    os.environ["TF_CONFIG"] = json.dumps(config)
    arguments = argv[1:] if argv[:1] == ["--"] else argv
    if scheduler == "slurm":
        return train(arguments)
    # Kubernetes judges a pod by its exit code alone.
    ledger, limit = _ledger(arguments, f"worker-{config['task']['index']}"), _limit()
    ledger.begin()
    code = train(arguments)
    reason, _, _ = ledger.refusal(code, limit)
    if reason and code not in (0, INTERRUPTED, *restarts.MISTAKES):
        raise UserError(f"exit code {code}, and no other pod: {reason}")
    return code


def _count(kind: str, argv: list[str]) -> int:
    """Before and after an attempt of a Slurm job: 0 if it is to start again, else the code with which it has ended."""
    values = flags.FlagValues()
    flags.DEFINE_integer("code", 0, "with which the attempt has ended", flag_values=values)
    mine, arguments = _divided(argv)

    def command() -> int:
        ledger, limit, code = _ledger(arguments, os.environ.get("SLURM_JOB_ID", "")), _limit(), values.code
        if kind == "begin":
            ledger.begin()
            return 0
        if code in (INTERRUPTED, *restarts.MISTAKES):
            return code
        reason, count, done = ledger.refusal(code, limit, int(os.environ.get("SLURM_RESTART_COUNT") or 0))
        early = "stopped before the first step: a job's --time must be longer than its start; "
        what = f"exit code {code}: {early if code == 128 + signal.SIGTERM and not done.step else ''}"
        if reason:
            print(f"{what}not again: {reason} (DIST_PARTIAL_RESTARTS={limit})", file=sys.stderr)
            return code
        print(f"{what}to go on from step {done.checkpoint}, restart {count} of {limit}", file=sys.stderr)
        return 0

    return cli.call(__doc__, values, mine, command)


def _limit() -> int:
    text = os.environ.get("DIST_PARTIAL_RESTARTS") or "20"
    if not text.isdecimal():
        raise UserError(f"DIST_PARTIAL_RESTARTS is {text!r}: write how often a job may start again")
    return int(text)


def _ledger(arguments: Sequence[str], job: str) -> restarts.Ledger:
    folder = _run_folder(arguments)
    return restarts.Ledger(_logs(folder) / f"restarts-{job}.json", folder)


def _divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's arguments, and those of dist_partial.train, which follow a "--"."""
    mine = argv[: argv.index("--")] if "--" in argv else argv
    return mine, argv[len(mine) + 1 :]


def _launch(kind: str, argv: list[str], program: Sequence[str]) -> int:
    values = flags.FlagValues()
    if kind == "local":
        flags.DEFINE_integer("workers", 0, "how many workers", flag_values=values)
    else:
        flags.DEFINE_list("hosts", [], "a worker on each; names for ssh and for the workers", flag_values=values)
        flags.DEFINE_integer("port", 2222, f"of the workers; restarts take the next {_PORTS - 1}", flag_values=values)
        flags.DEFINE_string("ssh", "ssh -T", "reaches a host, without asking for anything", flag_values=values)
        flags.DEFINE_string("python", "python", "Python on the hosts", flag_values=values)
        flags.DEFINE_string("directory", os.getcwd(), "where workers run on the hosts", flag_values=values)
    more = "that wait to come in place of lost ones" if kind == "local" else "of the hosts, the last, that wait"
    flags.DEFINE_integer("spares", 0, f"how many {more}", lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        "restarts", 10, "how often all may start again without a new checkpoint", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer("grace_seconds", 30, "for workers to end on SIGTERM", lower_bound=0, flag_values=values)
    flags.DEFINE_string("run_dir", None, "folder= of a script's run; default: runs/<its name>", flag_values=values)
    mine, arguments = _divided(argv)
    if script := bool(arguments) and not arguments[0].startswith("-"):
        arguments = arguments[1:] if re.fullmatch(r"(.*/)?python[\d.]*", arguments[0]) else arguments
    misplaced = [argument for argument in mine if re.match(r"--?gin_" if script else r"--?(gin_|run_dir)", argument)]

    def command() -> int:
        if misplaced or "--" not in argv:
            what = misplaced[0] if misplaced else "arguments of dist_partial.train"
            raise UserError(f"write {what} after a --, as in: launch/{kind} {_EXAMPLES[kind]} -- --gin_file=F")
        places = _local(values) if kind == "local" else _hosts(values)
        folder = _of_script(arguments, values.run_dir) if script else _run_folder(arguments)
        python = sys.executable if kind == "local" else values.python

        def commands(attempt: int) -> list[supervisor.Command]:
            # On hosts the names must be known from the first; later the resolver may be out of order.
            names = [host.rpartition("@")[2] for host in values.hosts] if kind == "hosts" and attempt == 0 else []
            order = {"run_dir": str(folder), "names": names, "program": list(program), "arguments": arguments}
            order |= {"module": "dist_partial.launch.script"} if script else {}
            return _commands(places(attempt), values.spares, order, python)

        return supervisor.supervise(
            commands,
            logs=_logs(folder),
            restarts=values.restarts,
            grace_seconds=values.grace_seconds,
            console=output.Console(),
        )

    return cli.call(__doc__, values, [] if misplaced else mine, command)


def _of_script(arguments: Sequence[str], run_dir: str | None) -> Path:
    """The run folder of a script."""
    if not arguments or not arguments[0].endswith(".py"):
        what = arguments[0] if arguments else "python"
        raise UserError(f"{what!r} after the -- is no Python script: write -- mine.py, or -- --gin_file=F")
    return Path(run_dir or Path("runs") / Path(arguments[0]).stem)


def _run_folder(arguments: Sequence[str]) -> Path:
    values = flags.FlagValues()
    cli.define_gin_flags(values)
    flags.DEFINE_string("run_dir", None, "", flag_values=values)
    values([sys.argv[0], *arguments], known_only=True)
    if not values.gin_file:
        raise UserError("no --gin_file after the --: try -- --gin_file=gin_configs/quickstart.gin")
    return cli.run_folder(values.run_dir, values.gin_file)


def _logs(folder: Path) -> Path:
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f"{folder.name}.logs")


def _commands(places: Sequence[Place], spares: int, order: dict[str, Any], python: str) -> list[supervisor.Command]:
    """The commands of workers and, after them, spares, which build what the last worker has."""
    count = len(places) - spares
    cluster = {"worker": [address for _, _, address in places[:count]]}
    secret = secrets.token_hex(16)  # workers know each other by it, and those of an earlier attempt do not know it
    commands = []
    for place, (name, argv, address) in enumerate(places):
        task = {"type": "worker", "index": min(place, count - 1)}
        environment = {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task}), SECRET: secret}
        mine = order | {"environment": environment}
        commands.append(supervisor.Command(name, argv, mine, python, address, spare=place >= count))
    return commands


def _local(values: flags.FlagValues) -> Callable[[int], list[Place]]:
    """Workers on this machine, for each attempt on ports that are free."""
    if values.workers < 1:
        raise UserError(f"--workers={values.workers}: write how many workers to start, such as --workers=2")
    argv = [sys.executable, *_AGENT]
    names = _names(values.workers, values.spares)
    return lambda attempt: [
        (name, argv, f"127.0.0.1:{port}") for name, port in zip(names, free_ports(len(names)), strict=True)
    ]


def _names(count: int, spares: int) -> list[str]:
    return [*(f"worker {k}" for k in range(count)), *(f"spare {k}" for k in range(spares))]


def free_ports(count: int) -> list[int]:
    """Finds ports of 127.0.0.1 that nobody uses now.

    Examples:
        >>> len(set(free_ports(3)))
        3
    """
    with contextlib.ExitStack() as stack:  # all are held at once, for they must differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _hosts(values: flags.FlagValues) -> Callable[[int], list[Place]]:
    """A worker on each host, for each attempt on the next port: the last one's may still be taken."""
    hosts, names = values.hosts, [host.rpartition("@")[2] for host in values.hosts]
    if not hosts:
        raise UserError(f"no --hosts: write {_EXAMPLES['hosts']}")
    for host, name in zip(hosts, names, strict=True):
        if not re.fullmatch(r"(\w[\w.-]*@)?\w[\w.-]*", host):
            raise UserError(
                f"--hosts has {host!r}: write names or addresses, with commas between: {_EXAMPLES['hosts']}"
            )
        if names.count(name) > 1:
            raise UserError(f"--hosts names {name} twice: write each host once, for each has one worker")
    if not 0 < values.port <= 65536 - _PORTS:
        raise UserError(f"--port={values.port}: write 1 to {65536 - _PORTS}")
    if (count := len(hosts) - values.spares) < 1:
        raise UserError(f"--spares={values.spares} leaves no worker of {len(hosts)} hosts: name more, or fewer spares")
    try:
        ssh = shlex.split(values.ssh)
    except ValueError as error:
        raise UserError(f"--ssh={values.ssh}: {error}") from None
    if not ssh:
        raise UserError("--ssh is empty: write --ssh='ssh -T'")
    folder, python = shlex.quote(values.directory), shlex.quote(values.python)
    remote = f"cd {folder} || exit 2; exec {python} {shlex.join(_AGENT)}"

    def places(attempt: int) -> list[Place]:
        port = values.port + attempt % _PORTS
        return [
            (f"{what} ({name})", [*ssh, host, remote], f"{name}:{port}")
            for what, host, name in zip(_names(count, values.spares), hosts, names, strict=True)
        ]

    return places


if __name__ == "__main__":
    sys.exit(main())
