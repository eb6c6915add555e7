"""Clusters on one machine: hosts of network namespaces, on which a real Slurm, or a real sshd, runs.

Debian's packages slurm-wlm, munge, openssh-server and openssh-client have what it takes.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import ROOT
from tests.helpers import hosts, launchers

CONTROLLER = "ctl"
NODES = ("n0", "n1", "n2")
# Hosts may be more than this machine is. A job that is requeued waits for its credentials to expire, else two minutes.
_SLURM = """
ClusterName=tests
SlurmctldHost={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
SchedulerParameters=sched_interval=2
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
NodeName={nodes} CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_SSHD = """
HostKey {folder}/host_{host}
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile {folder}/sshd_{host}.pid
"""


class Cluster:
    """Hosts by name, each a network and host-name namespace; this machine's files are those of all."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self._hosts = {name: hosts.name(i) for i, name in enumerate(names, 1)}
        lines = [f"{hosts.address(i)} {name}" for i, name in enumerate(self._hosts, 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def on(self, host: str, *command: str) -> list[str]:
        """The command that runs another one on a host."""
        # Within `ip netns exec`, which mounts another /sys, slurmd would find no /sys/fs/cgroup.
        inside = f'hostname {host} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        entered = ["nsenter", f"--net=/run/netns/{self._hosts[host]}", "unshare", "--uts", "--mount"]
        return [*entered, "sh", "-c", inside, "sh", *command]

    def run(self, host: str, *command: str) -> str:
        """Runs a command on a host, and returns what it prints."""
        done = subprocess.run(
            self.on(host, *command), cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def kill(self, host: str, found: str = "") -> int:
        """Kills the processes on a host whose command line has such a part; returns how many."""
        killed = 0
        for process in hosts.processes(int(self._hosts[host].removeprefix(hosts.PREFIX))):
            with contextlib.suppress(OSError):  # it has ended
                if re.search(found, Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()):
                    os.kill(process, signal.SIGKILL)
                    killed += 1
        return killed

    def start_slurmd(self, host: str) -> None:
        (self.folder / f"spool-{host}").mkdir(exist_ok=True)
        self.run(host, "slurmd", "-N", host)

    def start_sshd(self, host: str) -> None:
        sshd = shutil.which("sshd", path=_path())
        assert sshd
        self.run(host, sshd, "-f", f"{self.folder}/sshd_{host}.conf", "-E", f"{self.folder}/sshd_{host}.log")

    @property
    def ssh(self) -> str:
        """The command that reaches a host from the controller."""
        options = f"-o BatchMode=yes -o UserKnownHostsFile={self.folder}/known_hosts -i {self.folder}/id"
        return f"ssh -T {options} -o ServerAliveInterval=5 -o ServerAliveCountMax=2"


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """Starts a controller and nodes of Slurm, and ends them; skips the test where there is none."""
    _need("slurmctld", "slurmd", "munged", "sbatch")
    with named(folder, CONTROLLER, *NODES) as cluster:
        text = _SLURM.format(controller=CONTROLLER, folder=folder, nodes=",".join(NODES))
        (folder / "slurm.conf").write_text(text)
        if Path("/sys/fs/cgroup/memory").is_dir():
            (folder / "cgroup.conf").write_text("CgroupAutomount=yes\nCgroupPlugin=cgroup/v1\n")
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        munged = ["munged", "--force", f"--socket={folder}/munge.sock", *files]
        try:
            subprocess.run(munged, env=cluster.environment, check=True, timeout=60, capture_output=True)
            cluster.run(CONTROLLER, "slurmctld")
            for host in NODES:
                cluster.start_slurmd(host)
            wait_until(lambda: set(cluster.run(CONTROLLER, "sinfo", "-h", "-o", "%t").split()) == {"idle"}, 60)
            yield cluster
        finally:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((folder / "munge.pid").read_text()), signal.SIGTERM)


@contextlib.contextmanager
def ssh(folder: Path) -> Iterator[Cluster]:
    """Starts sshd on all nodes, with keys of their own, and ends it; skips the test where there is none."""
    _need("sshd", "ssh", "ssh-keygen")
    with named(folder, CONTROLLER, *NODES) as cluster:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it has no more rights
        for name in ("id", *(f"host_{host}" for host in NODES)):
            made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(made, check=True, timeout=60)
        (folder / "authorized_keys").write_text((folder / "id.pub").read_text())
        known = [f"{host} {(folder / f'host_{host}.pub').read_text()}" for host in NODES]
        (folder / "known_hosts").write_text("".join(known))
        for host in NODES:
            (folder / f"sshd_{host}.conf").write_text(_SSHD.format(folder=folder, host=host))
            cluster.start_sshd(host)
        yield cluster


# A condition may be a process of its own, such as scontrol.
wait_until = functools.partial(launchers.wait_until, pause=0.2)


@contextlib.contextmanager
def named(folder: Path, *names: str) -> Iterator[Cluster]:
    """Makes hosts that know each other by names.

    Args:
        folder: for what the cluster needs, made here.
        names: of the hosts.
    """
    folder.mkdir()
    folder.chmod(0o755)  # of a folder that others may write munged takes no key
    with hosts.hosts(len(names)):
        yield Cluster(folder, names)


def _need(*tools: str) -> None:
    if absent := [tool for tool in tools if not shutil.which(tool, path=_path())]:
        pytest.skip(f"{', '.join(absent)} not found")


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
