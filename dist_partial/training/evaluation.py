"""Evaluation: on all replicas, when it is due, made up for where it failed; and samples after it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from dist_partial import checkpoints
from dist_partial.config.settings import Sampling
from dist_partial.data import Dataset, evaluation_batches, started, trait
from dist_partial.errors import UserError, calling
from dist_partial.models.sampling import Generation, generate
from dist_partial.step import outer_step
from dist_partial.step.evaluation_step import EvaluationSpec, evaluation_step
from dist_partial.step.layer_state import untouched
from dist_partial.step.objective import Objective
from dist_partial.trackers import Following
from dist_partial.training.build import Trainer
from dist_partial.training.events import Every, Saving
from dist_partial.training.failures import connected, explained
from dist_partial.training.judge import Judge
from dist_partial.training.metric_writer import MetricWriter
from dist_partial.training.progress import Progress
from dist_partial.training.run_folder import held
from dist_partial.training.state import TrainState


class Evaluation:
    """Evaluates every `run.eval_every` steps and at the end, on all workers; then samples.

    Attributes:
        trainer: of the run.

    Args:
        trainer: of the run.
        progress: says that it is compiled; None says nothing.
    """

    def __init__(self, trainer: Trainer, progress: Progress | None = None) -> None:
        self.trainer = trainer
        self._every = Every(trainer.settings.eval_every, trainer.settings.steps)
        self._progress = progress or Progress(active=False)
        self._evaluate: Callable[[], dict[str, float]] | None = None
        for name in ("evaluation", "averages"):  # of another, which is no longer called
            trainer.replicas.forget(name)
        # Between two exchanges replicas have statistics of their own, too; what is evaluated is one model.
        apart = bool(trainer.fragments) and not any(group.reduction.shared for group in trainer.plan.groups)
        self._average: Callable[[], None] = lambda: None
        if apart and trainer.averaged:
            replicas = trainer.replicas
            self._average = outer_step.averages(replicas.strategy, replicas.collectives, trainer.averaged)

    def compile(self) -> None:
        """Compiles it, if it is not yet: a mistake in the model or the loss shows here."""
        if self._evaluate is not None:
            return
        settings, replicas = self.trainer.settings, self.trainer.replicas
        source = self.trainer.data.evaluation
        self._progress.begin("compiling the evaluation")
        spec = EvaluationSpec(replicas.strategy, replicas.collectives, self.trainer.model, self.trainer.objective)
        batches = functools.partial(
            evaluation_batches, source, seed=settings.seed, context=replicas.topology.input_context
        )
        with replicas.tracing("evaluation"):
            self._evaluate = prepare_evaluation(
                self.trainer.objective,
                evaluation_step(spec),
                replicas.sum,
                batches,
                examples=min(settings.eval_examples or len(source), len(source)),
                global_batch=settings.global_batch,
                again=trait(source, "streamed", False),
            )
        self._progress.end()

    def due(self, step: int) -> bool:
        return self._every.due(step)

    def next_due(self, step: int) -> int:
        return self._every.next_due(step)

    def __call__(self, state: TrainState, writer: MetricWriter) -> dict[str, float]:
        trainer, strategy = self.trainer, self.trainer.replicas.strategy
        self.compile()
        assert self._evaluate is not None
        # Nothing but a step moves a state: recurrent layers with dropout draw random numbers in inference, too.
        with outer_step.agreed(strategy, trainer.fragments), untouched(strategy, trainer.layer_state.states):
            with trainer.replicas.tracing("averages"):
                self._average()
            # The others wait here, and what fails must not wait for them.
            with connected(trainer.replicas, stays=True), explained():
                metrics = self._evaluate()
            writer.evaluation(state.step, metrics, state.sent)
            if trainer.replicas.is_chief and trainer.data.codec is not None and trainer.settings.sampling.count:
                self._sample(state, writer)
        return metrics

    def _sample(self, state: TrainState, writer: MetricWriter) -> None:
        trainer = self.trainer
        try:
            texts = samples(trainer.model, trainer.data, trainer.settings.sampling, state.step)
        except UserError as error:  # of the first worker alone; the others train on
            writer.say(f"step {state.step}: no sample: {error}")
        else:
            writer.samples(texts)


def make_up(trainer: Trainer, folder: Path, state: TrainState, following: Following | None = None) -> TrainState:
    """Makes the evaluation that the restored checkpoint owes, if it is still due, and notes it in the checkpoint."""
    if state.evaluated:
        return state
    settings, active = trainer.settings, trainer.replicas.is_chief
    trainer.replicas.say(f"step {state.step}: making up the evaluation that is owed")
    evaluate = Evaluation(trainer)
    if not evaluate.due(state.step):  # by settings that have changed since
        return state
    judge = Judge(trainer, state)
    with (
        held(folder, active),
        MetricWriter(folder, state.step, settings.steps, active, False, following=following) as writer,
        judge.training(),
    ):
        with judge.weights():
            held_out: dict[str, float] = {}
            with judge.testing(held_out):
                held_out |= evaluate(state, writer)
            better = judge.evaluated(state.step, held_out)
            state = dataclasses.replace(state, evaluated=True, judged=judge.to_json())
            if better:
                with Saving(trainer, folder, state) as save:
                    save.best(state)
        if active:
            checkpoint = checkpoints.newest(folder / "checkpoints", lambda _: None, state.step)
            assert checkpoint is not None
            metadata = state.metadata() | {"frozen": trainer.fingerprint["frozen"]}
            checkpoints.save(folder / "checkpoints", state.step, checkpoint.arrays, metadata, settings.keep)
    return state


def prepare_evaluation(
    objective: Objective,
    step: Any,
    total: Callable[[Any], Any],
    batches: Callable[..., tf.data.Dataset],
    *,
    examples: int,
    global_batch: int,
    again: bool = False,
) -> Callable[[], dict[str, float]]:
    """Prepares the evaluation on the first `examples` held-out examples, each exactly once.

    Args:
        objective: the loss and the metrics.
        step: from `step.evaluation_step`.
        total: sums a vector over the workers, from `Replicas.sum`.
        batches: makes this worker's batches, `evaluation_batches` of the held-out examples.
        examples: how many examples.
        global_batch: examples a step over all replicas.
        again: whether each pass begins by `batches`, as a stream does by the user's function.

    Returns:
        A function that makes one pass and returns `loss`, the metrics by name, and `examples`. As in `Model.evaluate`
        the loss is the mean over the examples of the loss of their batch, the last of which may be shorter.
    """
    whole, rest = divmod(examples, global_batch)
    make = functools.partial(batches, examples=examples, global_batch=global_batch)
    made = [make()]
    # Batches of so many examples, and how many such batches there are.
    passes = [(own, tf.constant(count)) for own, count in ((global_batch, whole), (rest, 1)) if own and count]
    for own, count in passes:
        # A mistake in the model or the loss shows before the training.
        step.get_concrete_function(tf.data.IteratorSpec(made[0].element_spec), count, own)

    def evaluate() -> dict[str, float]:
        iterator = started(made[0] if made else make())
        if again:
            made.clear()
        # The sum over batches of their losses, each of as many examples as the pass has in a batch.
        sums = total(tf.concat([step(iterator, count, own) for own, count in passes], axis=0).numpy())
        sums = sums.reshape(len(passes), -1)
        loss = sum(row[0] * own for row, (own, _) in zip(sums, passes, strict=True)) / examples
        return {"loss": float(loss), **objective.results(sums[:, 1:].sum(axis=0), training=False), "examples": examples}

    return evaluate


def samples(model: Any, data: Dataset, sampling: Sampling, step: int) -> list[dict[str, Any]]:
    """Generates `sampling.count` texts, on one device, without a word to the other replicas.

    Returns:
        Rows of samples.jsonl: `{"step", "temperature", "prompt", "text"}`; the text goes on from the prompt.

    Raises:
        UserError: the data set has no text to sample, or see `sampling.generate`.
        Raised: its codec raised an exception.

    Examples:
        >>> from dist_partial.data import stdlib_corpus
        >>> from dist_partial.models import byte_transformer
        >>> sampling = Sampling(temperature=0.5, prompt="def ", length=3, count=2)
        >>> rows = samples(byte_transformer(layers=1, width=16, heads=2), stdlib_corpus(), sampling, step=10)
        >>> [(row["step"], row["prompt"]) for row in rows], rows[0].keys() == {"step", "temperature", "prompt", "text"}
        ([(10, 'def '), (10, 'def ')], True)
    """
    if data.codec is None:
        raise UserError(
            f"data set {data.name!r} has no text to sample: its codec is None, as that of all data but text is; if it "
            "is of text, give its Dataset a codec, which turns text into ids and back"
        )
    if tf.nest.is_nested(data.train.spec[0]):
        raise UserError(
            f"data set {data.name!r} has examples of several inputs, and text is sampled from a model of one, its ids"
        )
    with calling("run.data"):
        prompt = data.codec.encode(sampling.prompt)
    generation = Generation(
        count=sampling.count,
        length=sampling.length,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    ids = generate(model, prompt, generation, window=data.window)
    row = {"step": step, "temperature": sampling.temperature, "prompt": sampling.prompt}
    with calling("run.data"):
        return [{**row, "text": data.codec.decode(text)} for text in ids]
