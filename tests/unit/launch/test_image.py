"""The lock of versions, and the file that makes an image with it."""

import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FILE = (ROOT / "launch" / "Containerfile").read_text()


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            one = Requirement(line)
            found.setdefault(canonicalize_name(one.name), []).append(one)
    return found


def applies(marker: Marker | None, python: str) -> bool:
    return marker is None or marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"})


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_dependency_has_one_version_that_pyproject_allows(python):
    found = pins()
    wanted = [
        Requirement(text) for text in [*PROJECT["dependencies"], *(one for each in EXTRAS.values() for one in each)]
    ]
    for requirement in wanted:
        if canonicalize_name(requirement.name) == canonicalize_name(PROJECT["name"]):
            continue
        own = [each for each in found[canonicalize_name(requirement.name)] if applies(each.marker, python)]
        [specifier] = [str(each.specifier) for each in own]
        assert re.fullmatch(r"==[^*,]+", specifier), specifier
        assert requirement.specifier.contains(specifier.removeprefix("=="), prereleases=True), (requirement, specifier)


def test_no_address_is_in_the_lock():
    assert not re.search(r"://|@ |--", "\n".join(map(str, (one for each in pins().values() for one in each))))


def test_the_commands_of_the_readme_take_the_locked_versions():
    installing = [line for line in (ROOT / "README.md").read_text().splitlines() if "pip install" in line]
    assert len(installing) == 2 and all("pip install -c launch/constraints.txt -e " in line for line in installing)


def test_what_the_image_copies_and_installs_is_there():
    copied = [line.split()[1:-1] for line in FILE.splitlines() if line.startswith("COPY")]
    assert copied and all((ROOT / source).exists() for sources in copied for source in sources)
    [extras] = re.findall(r"^ARG EXTRAS=(\S+)$", FILE, re.M)
    assert set(extras.split(",")) <= EXTRAS.keys()
    assert "--constraint launch/constraints.txt" in FILE
    for line in re.findall(r"^FROM \S+/python:(\S+)-slim$", FILE, re.M):
        assert line in ("3.11", "3.12", "3.13")
    manifest = (ROOT / "launch" / "kubernetes" / "job.yaml").read_text()
    [user] = re.findall(r"^USER (\d+):\d+$", FILE, re.M)
    [image] = re.findall(r"-t (registry\.example\S+)", FILE)
    assert f"runAsUser: {user}\n" in manifest and f"image: {image} " in manifest


@pytest.mark.slow
def test_the_image_is_built_and_trains(tmp_path):
    builders = [name for name in ("podman", "docker") if shutil.which(name)]
    works = [name for name in builders if not subprocess.run([name, "info"], capture_output=True).returncode]
    if not works:
        pytest.skip(f"nothing that builds images works here ({', '.join(builders) or 'neither podman nor docker'})")
    build = [works[0], "build", "-q", "-f", "launch/Containerfile", "-t", "dist_partial_test", "."]
    subprocess.run(build, cwd=ROOT, check=True, timeout=380)
    train = ["train", "--gin_file=gin_configs/two_dense.gin", "--run_dir=/tmp/run", "--gin_param=run.steps = 5"]
    subprocess.run([works[0], "run", "--rm", "dist_partial_test", *train], check=True, timeout=120)
