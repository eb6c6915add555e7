"""What a run trains and has trained so far, for those who use it: `sample`, `export` and who has a delta."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from dist_partial import checkpoints
from dist_partial.config import gin_files
from dist_partial.config.settings import Settings
from dist_partial.distributed import replicas
from dist_partial.errors import UserError
from dist_partial.export.delta import Base
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.session import put_back
from dist_partial.step import outer_step
from dist_partial.training.build import Trainer, build, restore
from dist_partial.training.events import BEST


@contextlib.contextmanager
def restored(folder: Path, imports: bool, step: str | None = None) -> Iterator[tuple[Settings, Trainer, int]]:
    """Builds a run's model in this process, on one replica, with the weights of a checkpoint.

    The data may have changed since, as long as the run's model takes it: only training goes on from it.

    Args:
        folder: the run folder.
        imports: whether the modules that its gin file names may be imported.
        step: which checkpoint: 'best', the number of a step, or None for the newest.

    Yields:
        The run's settings, what they build, and the checkpoint's step.

    Raises:
        UserError: there is no such checkpoint, or the factories do not make the model that was trained.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    place, wanted = find(folder, step)
    settings = _settings(folder / "operative_config.gin", imports)
    with put_back():
        trainer = build(settings, replicas.create("default"))
        state = restore(trainer, folder, say, may_differ=("data",), place=place, at_most=wanted)
        if state.checkpoint is None:
            raise UserError(f"{folder} has no checkpoint yet: let the run save one first")
        if wanted not in (None, state.step):
            raise UserError(f"the checkpoint of step {wanted} in {folder} is damaged: give another --step")
        if alone := [entry.path for entry in trainer.plan.trained if isinstance(entry.reduction, LocalOnly)]:
            say(f"{alone[0]!r} and what else @local_only() trains differs between replicas: this is the first one's")
        with outer_step.agreed(trainer.replicas.strategy, trainer.fragments):
            yield settings, trainer, state.step


def find(folder: Path, step: str | None) -> tuple[str, int | None]:
    """Finds the checkpoint that --step asks for: where in the run folder it is, and its step; None is the newest.

    Raises:
        UserError: it is not there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for place, number in (("checkpoints", 10), ("checkpoints", 20), ("best", 15)):
        ...         _ = checkpoints.save(Path(folder, place), number, {}, {}, keep=2)
        ...     [find(Path(folder), step) for step in (None, "20", "best", "15")]
        [('checkpoints', None), ('checkpoints', 20), ('best', 15), ('best', 15)]
    """
    if step is None:
        return "checkpoints", None
    best, others = checkpoints.steps(folder / BEST), checkpoints.steps(folder / "checkpoints")
    if step == "best" and best:
        return BEST, best[-1]
    if step.isdecimal():
        for place, known in (("checkpoints", others), (BEST, best)):
            if int(step) in known:
                return place, int(step)
    if not (best or others):
        raise UserError(f"{folder} has no checkpoint yet: let the run save one first")
    there = ", ".join([*map(str, others), *(f"best (step {number})" for number in best[-1:])])
    more = "; bind run.best to have a run keep the best one" if step == "best" else ""
    raise UserError(f"--step={step}: {folder} has no such checkpoint; there are {there}{more}")


def base(gin_file: str | Path, imports: bool = False) -> Base:
    """Builds the base of a run's deltas: its model as it was before the run, with LoRA's factors and quantized weights.

    Sets all random seeds to the run's, as the run itself does.

    Args:
        gin_file: such as the `operative_config.gin` of its folder, or the file that it was started with.
        imports: whether the modules that the file names may be imported.

    Raises:
        UserError: every mistake in the file, and data or weights that it reads and that are gone.

    Examples:
        >>> import tempfile
        >>> lines = ["run.rules = [('train', 'dense2/.*'), ('freeze', '.*')]", "run.model = @two_dense"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "mine.gin")
        ...     _ = file.write_text("\\n".join([*lines, "run.data = @stdlib_shapes", "stdlib_shapes.window = 16"]))
        ...     base(file).model.name
        'two_dense'
    """
    with put_back():
        return Base(build(_settings(Path(gin_file), imports), replicas.create("default")).model)


def _settings(file: Path, imports: bool) -> Settings:
    # A run from Python has these beside its configuration, which names the place where they were written at first.
    own = {"model/keras_file.path": "model.keras", "data/kept_examples.path": "examples.npz"}
    there = {name: file.parent / path for name, path in own.items() if (file.parent / path).is_file()}
    return gin_files.load([file], [f"{name} = {str(path)!r}" for name, path in there.items()], imports).settings
