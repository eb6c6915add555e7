"""`launch/slurm.sbatch` under a real Slurm, `launch/hosts` over a real sshd, and the Job of `launch/kubernetes`.

Hosts are network namespaces, which one test at a time has; so a test has one cluster for all that it tries. There is no
Kubernetes here: what its Job controller and the kubelet do by the manifest is done to processes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_partial import checkpoints
from tests import ROOT
from tests.helpers import clusters
from tests.helpers.clusters import CONTROLLER, Cluster, wait_until
from tests.helpers.files import assert_same_state, rows

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(900)]

STEPS, EVERY = 40, 10
KUBERNETES = ("dist-partial-0.dist-partial", "dist-partial-1.dist-partial")  # <job>-<index>.<service>
PACE = """
import time
import keras

class Pace(keras.callbacks.Callback):
    def __init__(self, seconds=0.05):
        super().__init__()
        self.seconds = seconds

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(self.seconds)
"""
GIN = f"""
import pace_module
include '{ROOT}/gin_configs/two_dense.gin'
run.callbacks = [@pace_module.Pace()]
run.steps = {STEPS}
run.save_every = {EVERY}
run.steps_per_loop = 1
run.global_batch = 32
run.eval_examples = 32
"""


class Runs:
    """Runs of one training on a cluster, whose folders lie side by side."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "pace_module.py").write_text(PACE)
        (folder / "run.gin").write_text(GIN)

    def arguments(self, name: str, *params: str) -> list[str]:
        given = [f"--gin_param={each}" for each in params]
        return [f"--gin_file={self.folder}/run.gin", f"--run_dir={self.folder / name}", *given]

    def variables(self) -> dict[str, str]:
        found = {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{self.folder}", "TF_CPP_MIN_LOG_LEVEL": "3"}
        return self.cluster.environment | found | {"CUDA_VISIBLE_DEVICES": "-1"}

    def output(self, name: str) -> str:
        # Where several tasks write a progress bar, srun may put its label amid a character.
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def saved(self, name: str) -> int:
        """The step of its newest checkpoint."""
        return max(checkpoints.steps(self.folder / name / "checkpoints"), default=0)

    def made(self, name: str) -> int:
        """The last step that it has recorded."""
        path = self.folder / name / "metrics.jsonl"
        return max((row["step"] for row in rows(path)), default=0) if path.exists() else 0

    def under_way(self, name: str, seconds: float = 120) -> None:
        """Waits until it has a checkpoint and has made more steps."""
        wait_until(lambda: 0 < self.saved(name) < self.made(name), seconds)

    def ended_like(self, name: str, other: str) -> None:
        """Its end has the same bits."""
        assert_same_state(self.folder / name, self.folder / other, STEPS)
        trained = [row["step"] for row in rows(self.folder / name / "metrics.jsonl") if row["split"] == "train"]
        assert trained == list(range(1, STEPS + 1)), name


class Jobs(Runs):
    """Jobs of Slurm."""

    def submit(self, name: str, *params: str, options: tuple[str, ...] = ()) -> str:
        command = ["sbatch", "--parsable", f"--output={self.folder / name}.out", "--nodes=2", *options]
        submitted = subprocess.run(
            self.cluster.on(CONTROLLER, *command, "launch/slurm.sbatch", *self.arguments(name, *params)),
            cwd=ROOT,
            env=self.variables(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def told(self, job: str, field: str) -> str:
        shown = self.cluster.run(CONTROLLER, "scontrol", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{field}="))

    def state(self, job: str) -> str:
        return self.told(job, "JobState")

    def waits_for(self, job: str, *states: str, seconds: float = 120) -> str:
        wait_until(lambda: self.state(job) in states, seconds)
        return self.state(job)

    def again(self, job: str, seconds: float = 120) -> None:
        """Waits until the job runs again."""
        wait_until(lambda: self.told(job, "Restarts") != "0" and self.state(job) in ("RUNNING", "COMPLETED"), seconds)

    def between(self, name: str) -> tuple[int | None, int]:
        """The step at which the first attempt says that it stopped, if it could, and that from which it went on."""
        stopped = re.search(r"stopped at step (\d+) of", self.output(name))
        found = re.search(r"going on from step (\d+)", self.output(name))
        assert found, self.output(name)
        return int(stopped[1]) if stopped else None, int(found[1])


@pytest.mark.turn(1)
def test_slurm(tmp_path):
    with clusters.slurm(tmp_path / "cluster") as cluster:
        jobs = Jobs(cluster, tmp_path)

        # To its end; a mistake; and a job that is cancelled, which does not come back.
        end = jobs.submit("end")
        assert jobs.waits_for(end, "COMPLETED", "FAILED") == "COMPLETED", jobs.output("end")
        assert jobs.saved("end") == STEPS and jobs.told(end, "Restarts") == "0"
        mistake = jobs.submit("mistake", "run.steps = 'many'")
        assert jobs.waits_for(mistake, "COMPLETED", "FAILED") == "FAILED"
        assert (jobs.told(mistake, "ExitCode"), jobs.told(mistake, "Restarts")) == ("2:0", "0")
        assert "run.steps" in jobs.output("mistake")
        cancelled = jobs.submit("cancelled", "Pace.seconds = 0.5")
        jobs.under_way("cancelled")
        cluster.run(CONTROLLER, "scancel", cancelled)
        assert jobs.waits_for(cancelled, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
        wait_until(lambda: jobs.saved("cancelled") == jobs.made("cancelled"), 60)
        assert f"stopped at step {jobs.saved('cancelled')} of" in jobs.output("cancelled")

        # Requeued by hand: it saves, and goes on.
        requeued = jobs.submit("requeued", "Pace.seconds = 0.2")
        jobs.under_way("requeued")
        cluster.run(CONTROLLER, "scontrol", "requeue", requeued)
        jobs.again(requeued)
        assert jobs.waits_for(requeued, "COMPLETED", "FAILED") == "COMPLETED", jobs.output("requeued")
        jobs.ended_like("requeued", "end")
        stopped, came_back = jobs.between("requeued")
        assert stopped == came_back

        # A node that fails in the middle of it: another takes its place.
        failed = jobs.submit("failed", "Pace.seconds = 0.2")
        jobs.under_way("failed")
        before = jobs.made("failed")
        assert cluster.kill("n1") > 0
        jobs.again(failed)
        assert jobs.waits_for(failed, "COMPLETED", "FAILED") == "COMPLETED", jobs.output("failed")
        assert jobs.told(failed, "NodeList") == "n[0,2]"
        jobs.ended_like("failed", "end")
        _, came_back = jobs.between("failed")
        print("a node fails:", before - came_back, "steps are made again")
        assert before - EVERY <= came_back, "more than the steps since the last checkpoint were lost"

        # Over its time: SIGTERM comes 45 to 75 s after the start of two minutes.
        cluster.start_slurmd("n1")
        late = jobs.submit("late", "Pace.seconds = 3", options=("--time=2", "--signal=TERM@45"))
        jobs.under_way("late")
        jobs.again(late, 150)
        stopped = jobs.saved("late")
        assert 0 < stopped < STEPS
        wait_until(lambda: jobs.made("late") > stopped, 60)
        cluster.run(CONTROLLER, "scancel", late)
        assert jobs.between("late") == (stopped, stopped)


@pytest.mark.turn(2)
def test_ssh(tmp_path):
    with clusters.ssh(tmp_path / "cluster") as cluster:
        runs = Runs(cluster, tmp_path)

        def launched(name: str, *params: str) -> "subprocess.Popen[bytes]":
            there = [f"--python={sys.executable}", f"--directory={tmp_path}"]
            command = ["launch/hosts", "--hosts=n0,n1", f"--ssh={cluster.ssh}", *there]
            with open(tmp_path / f"{name}.out", "wb") as output:
                return subprocess.Popen(
                    cluster.on(CONTROLLER, *command, "--", *runs.arguments(name, *params)),
                    cwd=ROOT,
                    env=runs.variables(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )

        assert launched("end").wait(120) == 0, runs.output("end")

        # A session that is cut off, by its end on the host; and the sshd of a host, which comes back after 8 s.
        for name, killed in (("session", "sshd: root"), ("sshd", "sshd")):
            run = launched(name, "Pace.seconds = 0.3")
            runs.under_way(name)
            assert cluster.kill("n1", killed) > 0
            if name == "sshd":
                with pytest.raises(subprocess.TimeoutExpired):
                    run.wait(8)
                cluster.start_sshd("n1")
            assert run.wait(200) == 0, runs.output(name)
            runs.ended_like(name, "end")
            lost = [row for row in rows(tmp_path / name / "metrics.jsonl") if row["split"] == "fault"]
            assert [row["workers"] for row in lost] == [[1]], lost
            assert "going on from step" not in runs.output(name)  # the other one had all steps
            print(name, json.dumps(lost))


class Pods(Runs):
    """What Kubernetes makes of `job.yaml`: a pod for each index, on a host of its name, and what follows from its end.

    See https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy.
    """

    def __init__(self, cluster: Cluster, folder: Path, job: dict[str, Any], name: str, *params: str) -> None:
        super().__init__(cluster, folder)
        self._spec, self._pod = job["spec"], job["spec"]["template"]["spec"]
        [self._container] = self._pod["containers"]
        self._name, self._params = name, params
        self._count = self._spec["completions"]
        self.failures, self.codes = 0, [[] for _ in range(self._count)]
        self.pods = [self._started(index) for index in range(self._count)]

    def _started(self, index: int) -> "subprocess.Popen[bytes]":
        python, *command = self._container["command"]
        given = [arg for arg in self._container["args"] if not arg.startswith(("--gin_file", "--run_dir"))]
        host = KUBERNETES[index]
        environment = {each["name"]: each.get("value", "a" * 64) for each in self._container["env"]}  # the secret's
        environment |= {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": host.partition(".")[0]}
        image = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{self.folder}", "CUDA_VISIBLE_DEVICES": "-1"}
        assert python == "python"
        with open(self.folder / f"{self._name}-{index}.log", "ab") as log:
            return subprocess.Popen(
                self.cluster.on(host, sys.executable, *command, *self.arguments(self._name, *self._params), *given),
                cwd=ROOT,
                env=image | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def evict(self, index: int) -> None:
        """As a drained node's kubelet does."""
        self.pods[index].send_signal(signal.SIGTERM)
        self.pods[index].wait(self._pod["terminationGracePeriodSeconds"])

    def ended(self, seconds: float = 240) -> str:
        """Does what the controller does until the job has come to its end, 'Complete' or 'Failed'."""
        until = time.monotonic() + seconds
        running = set(range(self._count))
        while running:
            assert time.monotonic() < until, "waited in vain"
            for index in [index for index in running if self.pods[index].poll() is not None]:
                code = self.pods[index].returncode
                self.codes[index].append(code if code >= 0 else 128 - code)
                if code == 0:
                    running.remove(index)
                    continue
                action = self._action(self.codes[index][-1])
                self.failures += action == "Count"
                if action == "FailJob" or self.failures > self._spec["backoffLimit"]:
                    for other in running - {index}:
                        self.evict(other)
                    return "Failed"
                self.pods[index] = self._started(index)  # by podReplacementPolicy not before it has ended
            time.sleep(0.1)
        return "Complete"

    def _action(self, code: int) -> str:
        """The first rule that matches; without one a failure counts."""
        for rule in self._spec["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", []):
                return rule["action"]
        return "Count"

    def log(self, index: int) -> str:
        return (self.folder / f"{self._name}-{index}.log").read_text()


@pytest.mark.turn(2)
def test_kubernetes(tmp_path):
    documents = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "job.yaml").read_text())
    job = next(each for each in documents if each["kind"] == "Job")
    with clusters.named(tmp_path / "cluster", *KUBERNETES) as cluster:

        def run(name: str, *params: str) -> Pods:
            return Pods(cluster, tmp_path, job, name, *params)

        end = run("end")
        assert end.ended() == "Complete", end.log(0)
        assert end.codes == [[0], [0]]

        mistake = run("mistake", "run.steps = 'many'")
        assert mistake.ended() == "Failed"
        assert 2 in mistake.codes[0] + mistake.codes[1] and "run.steps" in mistake.log(0)

        # A node is drained: both save and end with 75, and new pods go on.
        drained = run("drained", "Pace.seconds = 0.2")
        drained.under_way("drained")
        drained.evict(1)
        assert drained.ended() == "Complete", drained.log(0)
        assert (drained.codes, drained.failures) == ([[75, 0], [75, 0]], 0)
        drained.ended_like("drained", "end")

        # The kernel kills a pod that takes too much memory: this one counts, the other ends with 75.
        killed = run("killed", "Pace.seconds = 0.2")
        killed.under_way("killed")
        killed.pods[1].kill()
        assert killed.ended() == "Complete", killed.log(0)
        assert (killed.codes, killed.failures) == ([[75, 0], [137, 0]], 1)
        killed.ended_like("killed", "end")
