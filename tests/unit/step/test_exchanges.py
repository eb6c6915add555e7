"""Whether what travels has a thread, and what a worker says that waits for one that has gone on."""

import contextlib
import functools
import threading

import keras
import pytest
import tensorflow as tf

from dist_partial.distributed import rendezvous
from dist_partial.distributed.collectives import Collectives
from dist_partial.distributed.tcp_backend import TCPBackend
from dist_partial.errors import Fault
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.reduce_gradients import make_states
from dist_partial.selection import resolve
from dist_partial.step import optimizers, outer_step
from dist_partial.step.exchanges import compiled_exchanges
from tests.helpers.threads import at_once
from tests.helpers.workers import loopback


@pytest.mark.parametrize("bound", ["1", "2"])
def test_a_worker_that_has_gone_on_is_named_where_what_travels_has_no_thread(bound, monkeypatch):
    """With a thread others may well exchange something else meanwhile; without one it is as in a step."""
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", bound)
    workers = loopback(2)
    links = at_once([functools.partial(rendezvous.connect, k, workers=workers, seconds=10) for k in range(2)])
    backends = [TCPBackend(k, workers, links[k], 60) for k in range(2)]
    made = [delayed_exchange(backend) for backend in backends]
    (first, second), flights = backends, [each.flight for each in at_once(made)]
    assert [each.thread is not None for each in flights] == [bound == "2"] * 2

    def go_on():
        with contextlib.suppress(Fault):
            second.gather(b"")

    going_on = threading.Thread(target=go_on, daemon=True)
    going_on.start()
    closing = threading.Timer(20 if bound == "1" else 1, first.close)  # what waits without a word has an end
    closing.start()
    with pytest.raises(tf.errors.UnknownError, match="has gone on" if bound == "1" else "has closed its connections"):
        flights[0].travel()
    closing.cancel()
    first.close()
    second.close()
    going_on.join(10)


def delayed_exchange(backend):
    """What compiles the exchange of a bias, which travels for a step."""
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(2)])
    plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, LocalSGD(2, delay=1))
    fragments = outer_step.build(plan, optimizers.build(plan, keras.optimizers.SGD), make_states(plan))
    strategy = tf.distribute.get_strategy()
    return lambda: compiled_exchanges(strategy, Collectives(backend), plan, fragments, [], [])[0]
