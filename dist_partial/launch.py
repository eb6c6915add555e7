"""Starts all workers of a run, here or over ssh, shows what they print, and starts them again after a fault.

    launch/local --workers=3 -- --gin_file=F [any argument of dist_partial.train]
    launch/hosts --hosts=a,b,c -- --gin_file=F ...

What workers print is kept in <run_dir>.logs. Where a scheduler starts the workers, each of them is

    python -m dist_partial.launch slurm -- --gin_file=F ...    (or kubernetes)
"""

import contextlib
import json
import os
import re
import secrets
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from dist_partial import cli, supervisor
from dist_partial.errors import UserError

_PORTS = 100  # how many ports attempts on hosts take in turn
_KEEP = ("-m", "dist_partial.launch", "keep")
_EXAMPLES = {"local": "--workers=2", "hosts": "--hosts=10.0.0.1,10.0.0.2"}

Place = tuple[str, Sequence[str], str]  # a worker's name, its keeper's command, and its address


def main(argv: Sequence[str] | None = None, program: Sequence[str] = ()) -> int:
    """Runs the command; returns its exit code, see `supervisor.supervise`.

    Args:
        argv: arguments without the program's name; None takes the process's own.
        program: what workers run in place of dist_partial.train, as tests do.
    """
    kind, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if kind == "keep":  # beside a worker
        return supervisor.keep()
    if kind in ("local", "hosts"):
        return _launch(kind, rest, program)
    if kind in ("slurm", "kubernetes"):
        return cli.call(None, flags.FlagValues(), [], lambda: _train(kind, rest))

    def unknown() -> int:
        raise UserError(f"no command {kind!r}: write local, hosts, slurm or kubernetes after dist_partial.launch")

    return cli.call(__doc__, flags.FlagValues(), ["--help"] if kind in ("-h", "--help") else [], unknown)


def _train(scheduler: str, argv: Sequence[str]) -> int:
    from dist_partial import cluster, train

    cli.import_tensorflow_quietly()  # cluster reads Slurm's variables by it
    os.environ["TF_CONFIG"] = json.dumps(cluster.tf_config(scheduler, os.environ))
    return train.main(argv[1:] if argv[:1] == ["--"] else argv)


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
    flags.DEFINE_integer("restarts", 10, "how often all may start again", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("grace_seconds", 30, "for workers to end on SIGTERM", lower_bound=0, flag_values=values)
    mine = argv[: argv.index("--")] if "--" in argv else argv
    arguments = argv[len(mine) + 1 :]
    misplaced = [argument for argument in mine if re.match(r"--?(gin_|run_dir)", argument)]

    def command() -> int:
        if misplaced or "--" not in argv:
            what = misplaced[0] if misplaced else "arguments of dist_partial.train"
            raise UserError(f"write {what} after a --, as in: launch/{kind} {_EXAMPLES[kind]} -- --gin_file=F")
        places = _local(values) if kind == "local" else _hosts(values)
        return supervisor.supervise(
            lambda attempt: _commands(places(attempt), arguments, program),
            logs=_logs(arguments),
            restarts=values.restarts,
            grace_seconds=values.grace_seconds,
            console=supervisor.Console(),
        )

    return cli.call(__doc__, values, [] if misplaced else mine, command)


def _logs(arguments: Sequence[str]) -> Path:
    values = flags.FlagValues()
    cli.define_gin_flags(values)
    flags.DEFINE_string("run_dir", None, "", flag_values=values)
    values([sys.argv[0], *arguments], known_only=True)
    if not values.gin_file:
        raise UserError("no --gin_file after the --: try -- --gin_file=gin_configs/quickstart.gin")
    folder = Path(os.path.abspath(cli.run_folder(values.run_dir, values.gin_file)))
    return folder.with_name(f"{folder.name}.logs")


def _commands(places: Sequence[Place], arguments: Sequence[str], program: Sequence[str]) -> list[supervisor.Command]:
    cluster = {"worker": [address for _, _, address in places]}
    secret = secrets.token_hex(16)  # workers know each other by it, and those of an earlier attempt do not know it
    commands = []
    for index, (name, argv, _) in enumerate(places):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
        environment = {"TF_CONFIG": config, "DIST_PARTIAL_SECRET": secret}
        order = {"program": list(program), "arguments": list(arguments), "environment": environment}
        commands.append(supervisor.Command(name, argv, order))
    return commands


def _local(values: flags.FlagValues) -> Callable[[int], list[Place]]:
    """Workers on this machine, for each attempt on ports that are free."""
    if values.workers < 1:
        raise UserError(f"--workers={values.workers}: write how many workers to start, such as --workers=2")
    argv = [sys.executable, *_KEEP]
    return lambda attempt: [(f"worker {k}", argv, f"127.0.0.1:{p}") for k, p in enumerate(free_ports(values.workers))]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses now."""
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
    try:
        ssh = shlex.split(values.ssh)
    except ValueError as error:
        raise UserError(f"--ssh={values.ssh}: {error}") from None
    if not ssh:
        raise UserError("--ssh is empty: write --ssh='ssh -T'")
    folder, python = shlex.quote(values.directory), shlex.quote(values.python)
    remote = f"cd {folder} || exit 2; exec {python} {shlex.join(_KEEP)}"

    def places(attempt: int) -> list[Place]:
        port = values.port + attempt % _PORTS
        return [
            (f"worker {k} ({name})", [*ssh, host, remote], f"{name}:{port}")
            for k, (host, name) in enumerate(zip(hosts, names, strict=True))
        ]

    return places


if __name__ == "__main__":
    sys.exit(main())
