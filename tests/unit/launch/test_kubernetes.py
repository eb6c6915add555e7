"""The Kubernetes manifests: against Kubernetes' and Kubeflow's own schemas, and what no schema sees."""

import copy
import re

import kubeflow.training
import kubernetes_validate
import pytest
import yaml

from dist_partial.distributed.cluster import read_tf_config, tf_config
from dist_partial.errors import AGAIN
from tests import ROOT

FOLDER = ROOT / "launch" / "kubernetes"
OBJECTS = {
    (document["kind"], path.name): document
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
}
SERVICE, JOB, POLICY, CLAIM, TFJOB = (
    OBJECTS[key]
    for key in (
        ("Service", "job.yaml"),
        ("Job", "job.yaml"),
        ("NetworkPolicy", "network-policy.yaml"),
        ("PersistentVolumeClaim", "volume-claim.yaml"),
        ("TFJob", "tfjob.yaml"),
    )
)
WORKER = TFJOB["spec"]["tfReplicaSpecs"]["Worker"]
PODS = {"job": JOB["spec"]["template"], "tfjob": WORKER["template"]}
VERSIONS = ("1.31", "1.34", kubernetes_validate.latest_version())  # podFailurePolicy is stable from 1.31 on


def container(template) -> dict:
    (only,) = template["spec"]["containers"]
    return only


def environment(template) -> dict:
    return {variable["name"]: variable for variable in container(template)["env"]}


def named_port(template, name: str) -> int:
    (port,) = [port for port in container(template)["ports"] if port["name"] == name]
    return port["containerPort"]


def test_every_manifest_is_tested():
    assert len(OBJECTS) == 5
    assert {name for _, name in OBJECTS} == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("key", [key for key in OBJECTS if key[0] != "TFJob"], ids=":".join)
def test_kubernetes_schemas(key, version):
    kubernetes_validate.validate(OBJECTS[key], version, strict=True)


def test_a_misspelt_field_is_seen():
    wrong = copy.deepcopy(JOB)
    wrong["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["value"] = [2]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def check_kubeflow(data, kind: str) -> None:
    """Checks that data has the fields and types of a model of Kubeflow's SDK; its pods, of Kubernetes' schema."""
    if found := re.fullmatch(r"dict\(str, (\w+)\)", kind):
        for value in data.values():
            check_kubeflow(value, found[1])
    elif kind.startswith("KubeflowOrgV1"):
        model = getattr(kubeflow.training, kind)
        fields = {json_name: name for name, json_name in model.attribute_map.items()}
        assert set(data) <= set(fields), f"{kind} has no {set(data) - set(fields)}"
        model(**{fields[name]: value for name, value in data.items()})  # raises where a required one is missing
        for name, value in data.items():
            check_kubeflow(value, model.openapi_types[fields[name]])
    elif kind == "V1PodTemplateSpec":
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": data}
        kubernetes_validate.validate(pods, VERSIONS[-1], strict=True)
    else:
        assert type(data) is {"str": str, "int": int, "bool": bool, "V1ObjectMeta": dict}[kind]


def test_kubeflow_schema():
    check_kubeflow(TFJOB, "KubeflowOrgV1TFJob")


@pytest.mark.parametrize("path", [["spec"], ["spec", "runPolicy"], ["spec", "tfReplicaSpecs", "Worker", "template"]])
def test_a_misspelt_kubeflow_field_is_seen(path):
    wrong = copy.deepcopy(TFJOB)
    inner = wrong
    for name in path:
        inner = inner[name]
    inner["replica"] = 2
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check_kubeflow(wrong, "KubeflowOrgV1TFJob")


def test_kubeflow_values():
    """What the models leave open: pkg/apis/kubeflow.org/v1 and pkg/webhooks/tensorflow of the training operator 1.9."""
    assert TFJOB["apiVersion"] == "kubeflow.org/v1"
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", TFJOB["metadata"]["name"])  # a label of DNS: pods are named by it
    assert set(TFJOB["spec"]["tfReplicaSpecs"]) == {"Worker"}  # the trainer knows no PS and no Evaluator
    assert TFJOB["spec"]["successPolicy"] == "AllWorkers"
    assert TFJOB["spec"]["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    # IsRetryableExitCode: 128 and more, which 75 is not.
    assert AGAIN < 128 and WORKER["restartPolicy"] == "OnFailure"
    assert TFJOB["spec"]["runPolicy"]["backoffLimit"] > WORKER["replicas"]
    assert "restartPolicy" not in WORKER["template"]["spec"]  # it would be overwritten
    assert container(WORKER["template"])["name"] == "tensorflow"
    assert named_port(WORKER["template"], "tfjob-port") == 2222
    assert container(WORKER["template"])["command"] == ["python", "-m", "dist_partial.train"]


def test_the_tf_config_of_kubeflow_is_understood():
    """As genTFConfigJSONStr of the training operator 1.9 writes it."""
    workers = ["dist-partial-worker-0.ns.svc:2222", "dist-partial-worker-1.ns.svc:2222"]
    text = (
        f'{{"cluster":{{"worker":["{workers[0]}","{workers[1]}"]}},"task":{{"type":"worker","index":1}},'
        '"environment":"cloud"}'
    )
    assert read_tf_config(text) == {"cluster": {"worker": workers}, "task": {"type": "worker", "index": 1}}


def test_each_pod_of_the_job_has_the_name_by_which_the_others_know_it():
    spec, template = JOB["spec"], PODS["job"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    hosts = environment(template)["DIST_PARTIAL_HOSTS"]["value"]
    service, port = template["spec"]["subdomain"], named_port(template, "worker")
    expected = [f"{JOB['metadata']['name']}-{index}.{service}:{port}" for index in range(spec["completions"])]
    for index in range(spec["completions"]):
        made = tf_config("kubernetes", {"JOB_COMPLETION_INDEX": str(index), "DIST_PARTIAL_HOSTS": hosts})
        assert made == {"cluster": {"worker": expected}, "task": {"type": "worker", "index": index}}
    assert container(template)["command"] == ["python", "-m", "dist_partial.launch", "kubernetes", "--"]


def test_the_service_gives_these_names():
    assert SERVICE["metadata"]["name"] == PODS["job"]["spec"]["subdomain"]
    assert SERVICE["spec"]["clusterIP"] == "None" and SERVICE["spec"]["publishNotReadyAddresses"] is True
    assert SERVICE["spec"]["selector"].items() <= PODS["job"]["metadata"]["labels"].items()
    assert [port["port"] for port in SERVICE["spec"]["ports"]] == [named_port(PODS["job"], "worker")]


def test_the_job_goes_on_after_75_and_not_after_2():
    # Stated in the documentation of Jobs and checked by the API server, not by the schema.
    assert PODS["job"]["spec"]["restartPolicy"] == "Never"
    assert JOB["spec"]["podReplacementPolicy"] == "Failed"
    actions = {}
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container(PODS["job"])["name"]
            assert rule["onExitCodes"]["operator"] == "In"
            for code in rule["onExitCodes"]["values"]:
                actions.setdefault(code, rule["action"])  # the first that matches
        else:
            for condition in rule["onPodConditions"]:
                actions.setdefault((condition["type"], condition["status"]), rule["action"])
    assert actions == {2: "FailJob", AGAIN: "Ignore", ("DisruptionTarget", "True"): "Ignore"}
    assert JOB["spec"]["activeDeadlineSeconds"] and JOB["spec"]["backoffLimit"]  # what is ignored ends, too


@pytest.mark.parametrize("name", PODS)
def test_only_pods_of_the_job_reach_each_other(name):
    label, template = POLICY["spec"]["podSelector"], PODS[name]
    assert label["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert set(POLICY["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    workers = [{"protocol": "TCP", "port": 2222}]
    assert POLICY["spec"]["ingress"] == [{"from": [{"podSelector": label}], "ports": workers}]
    to_workers, to_dns = POLICY["spec"]["egress"]
    assert to_workers == {"to": [{"podSelector": label}], "ports": workers}
    assert to_dns["ports"] == [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    assert [port["containerPort"] for port in container(template)["ports"]] == [2222]


@pytest.mark.parametrize("name", PODS)
def test_pods_share_the_run_folder_and_a_secret(name):
    template = PODS[name]
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(template)["volumeMounts"]}
    assert mounts["/runs"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    assert any(argument.startswith("--run_dir=/runs/") for argument in container(template)["args"])
    assert "emptyDir" in mounts[environment(template)["HOME"]["value"]]
    secret = environment(template)["DIST_PARTIAL_SECRET"]["valueFrom"]["secretKeyRef"]
    # The command at the head of job.yaml makes it; no manifest has one.
    assert f"create secret generic {secret['name']} --from-file={secret['key']}=" in (FOLDER / "job.yaml").read_text()
    assert not any(kind == "Secret" for kind, _ in OBJECTS)


@pytest.mark.parametrize("name", PODS)
def test_pods_are_restricted(name):
    """Kubernetes' Pod Security Standards, profile "restricted"; and a root file system that is only read."""
    spec, inner = PODS[name]["spec"], container(PODS[name])
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inner["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all(set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim"} for volume in spec["volumes"])
    assert spec["automountServiceAccountToken"] is False
    assert spec["terminationGracePeriodSeconds"] > 30  # the default, too short for a checkpoint
    assert inner["resources"]["requests"].keys() == {"cpu", "memory"}
    assert inner["resources"]["limits"]["memory"] == inner["resources"]["requests"]["memory"]


def test_the_two_kinds_of_pods_differ_only_in_what_starts_them():
    def common(template) -> dict:
        template = copy.deepcopy(template)
        for name in ("restartPolicy", "subdomain"):
            template["spec"].pop(name, None)
        inner = container(template)
        for name in ("name", "command", "ports"):
            del inner[name]
        inner["env"] = [variable for variable in inner["env"] if variable["name"] != "DIST_PARTIAL_HOSTS"]
        return template

    assert common(PODS["job"]) == common(PODS["tfjob"])


def test_the_arguments_are_the_trainers():
    from dist_partial.config import gin_files

    for template in PODS.values():
        arguments = dict(argument.removeprefix("--").split("=", 1) for argument in container(template)["args"])
        assert arguments.keys() == {"gin_file", "run_dir", "gin_param"}
        loaded = gin_files.load([str(ROOT / arguments["gin_file"])], [arguments["gin_param"]])
        assert loaded.settings.steps
