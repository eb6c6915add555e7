"""Four simulated CPU replicas for every test; Keras's global switches are put back after each. Marks that skip.

Garbage is collected between tests alone: where a test leaves an iterator of tf.data in a cycle of references, such as
one that an exception refers to, and a thread that reads for it happens to collect it, TensorFlow 2.21 waits there for
that thread itself, and no test goes on. Runs of the project end theirs by themselves: see `data.readers.started`.
"""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import pytest
import tensorflow as tf

from tests.helpers import hosts, strategies
from tests.helpers.browser import CHROMIUM
from tests.helpers.letters import letters  # noqa: F401 - a fixture
from tests.helpers.marks import waits_for_its_turn

_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 4)


def pytest_runtest_setup(item):
    """Skips what this machine cannot run, and says why."""
    if item.get_closest_marker("network") and (reason := hosts.available()):
        pytest.skip(f"hosts on one machine: {reason}")
    if item.get_closest_marker("browser") and CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")


def pytest_collection_modifyitems(config, items):
    """Leaves out, where TURN is set, what has another one; gives those time that wait for each other's hosts."""
    for item in items:
        if item.get_closest_marker("network") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
    if turn := os.environ.get("TURN"):
        config.hook.pytest_deselected(items=[item for item in items if waits_for_its_turn(item, int(turn))])
        items[:] = [item for item in items if not waits_for_its_turn(item, int(turn))]


@pytest.fixture
def mirrored():
    return strategies.mirrored


@pytest.fixture
def no_cluster(monkeypatch):
    """No TF_CONFIG, whatever the tests run in."""
    monkeypatch.delenv("TF_CONFIG", raising=False)


def pytest_collection_finish():
    """Leaves what was imported out of every later collection: TensorFlow and Keras alone take 0.2 s of each."""
    gc.collect()
    gc.freeze()


gc.disable()
_alive = 0  # objects, after garbage was last collected everywhere
_new = 0  # of them, at least, since then


@pytest.fixture(autouse=True)
def garbage():
    global _alive, _new
    yield
    _new += gc.get_count()[0]
    _new -= gc.collect(0)
    if _new > max(700_000, _alive // 4):  # as Python itself does it: all in all, each object is looked at a few times
        gc.collect()
        _alive, _new = len(gc.get_objects()), 0


@pytest.fixture(autouse=True)
def keras_defaults():
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)  # collecting garbage takes longer than most tests
