"""One worker of tests/integration/test_fit_mistakes.py: what goes wrong on one worker, or is wrong on all.

python -m tests.helpers.fit_mistakes KIND
"""

import os
import signal
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import dist_partial
from dist_partial import fit
from dist_partial.errors import Ending
from tests.helpers.fit_common import X, Y, compiled, model, part

SMALL = 4  # examples in a batch


def said(workers, name, call):
    """Prints what a mistake after which workers can go on is met with."""
    try:
        call()
        print(f"{name} of {workers.rank}: nothing", flush=True)
    except Ending as error:
        print(f"{name} of {workers.rank}: {type(error).__name__}: {error}", flush=True)


def go_on(workers):
    """Mistakes that all workers find together, before anything has happened."""
    x, y = part(workers, (X, Y))
    last = workers.rank == workers.workers - 1

    def fitting(made, x=x, y=y, **more):
        return lambda: made.fit(x, y, batch_size=SMALL, verbose=0, callbacks=fit.on_workers([], workers), **more)

    with workers.strategy.scope():
        made, plain, xla = ready(workers), model(), ready(workers)
        plain.compile("adam", "mse")
        xla.jit_compile = True
        batch = model()
        batch.compile(keras.optimizers.SGD(0.1), "mse")
    outside = model()
    outside.compile(dist_partial.partial("adam", [("train", ".*")], outside), "mse")
    said(workers, "plain", fitting(plain))
    said(workers, "batch", lambda: batch.train_on_batch(x[:SMALL], y[:SMALL]))  # which no callback hears of
    said(workers, "elsewhere", lambda: elsewhere(workers))
    said(workers, "xla", fitting(xla))
    said(workers, "outside", fitting(outside))
    said(workers, "epochs", fitting(made, epochs=3 if last else 2))
    said(workers, "initial_epoch", fitting(made, epochs=3, initial_epoch=1 if last else 0))
    said(workers, "fewer", fitting(made, x[:-6], y[:-6]) if last else fitting(made))
    said(workers, "right", fitting(made))
    if last:
        said(workers, "evaluation", lambda: made.evaluate(x, y, verbose=0))


def elsewhere(workers):
    """A model of another strategy, as of nobody who has read the page."""
    made = model()
    with workers.strategy.scope():
        dist_partial.partial(keras.optimizers.Adam(0.01), [("train", ".*")], made)


def without(workers):
    """No callback knows of the other workers."""
    with workers.strategy.scope():
        made = ready(workers)
    x, y = part(workers, (X, Y))
    made.fit(x, y, batch_size=SMALL, verbose=0)


def ready(workers):
    return compiled(workers, model(), keras.optimizers.Adam(0.05))


def rules(workers):
    """Other rules on the last worker."""
    train = "head/.*" if workers.rank == workers.workers - 1 else "body/.*"
    with workers.strategy.scope():
        compiled(workers, model(), keras.optimizers.Adam(0.05), [("train", train), ("freeze", ".*")])


def fewer(workers):
    """Fewer batches on the last worker, of a generator whose length nobody knows."""
    x, y = part(workers, (X, Y))

    def batches():
        for _ in range(5 if workers.rank == workers.workers - 1 else 7):
            yield x[:SMALL], y[:SMALL]

    usual(workers, batches())


def alone(workers):
    """The first worker alone fits, as for a try; the others have ended."""
    if workers.is_chief:
        usual(workers, *part(workers, (X, Y)))


def held_out(workers):
    """The first worker alone evaluates in an epoch."""
    data = part(workers, (X, Y))
    usual(workers, *data, validation_data=data if workers.is_chief else None)


class Breaks(keras.callbacks.Callback):
    """On the last worker a callback of the user's raises, or the process is killed."""

    def __init__(self, workers, killed):
        super().__init__()
        self.here, self.killed = workers.rank == workers.workers - 1, killed

    def on_train_batch_end(self, batch, logs=None):
        if self.here and batch == 1:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise LookupError("no such table")


def raises(workers):
    usual(workers, *part(workers, (X, Y)), callbacks=[Breaks(workers, killed=False)])


def killed(workers):
    """Of a model that was loaded, too, a lost worker is named."""
    usual(workers, *part(workers, (X, Y)), callbacks=[Breaks(workers, killed=True)], loaded=True)


def usual(workers, *data, callbacks=(), loaded=False, **more):
    with workers.strategy.scope():
        made = ready(workers)
        if loaded:
            path = f"{sys.argv[2]}/{workers.rank}.keras"
            made.save(path)
            made = keras.saving.load_model(path)
    on_all = fit.on_workers(list(callbacks), workers)
    size = {"batch_size": SMALL} if len(data) == 2 else {}
    made.fit(*data, epochs=3, verbose=0, callbacks=on_all, **size, **more)


KINDS = {each.__name__: each for each in (go_on, without, rules, fewer, alone, held_out, raises, killed)}

if __name__ == "__main__":
    KINDS[sys.argv[1]](dist_partial.connect())
    print("done", flush=True)
