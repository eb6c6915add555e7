"""Groups whose replicas train by themselves, against as many plain Keras models and outer optimizers in NumPy."""

import dataclasses
import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial import selection
from dist_partial.config.settings import Settings
from dist_partial.distributed import traffic
from dist_partial.distributed.collectives import Collectives
from dist_partial.distributed.per_replica import topology
from dist_partial.distributed.replicas import Replicas
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD, nesterov
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.reduce_gradients import make_states
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.rules import Rule
from dist_partial.step import batch_norm, optimizers, outer_step
from dist_partial.step.exchanges import compiled_exchanges
from dist_partial.step.train_step import StepOptions, StepSpec, train_step
from dist_partial.training.build import build
from dist_partial.training.state import TrainState
from tests.helpers import cases
from tests.helpers.cases import CASES, copies, dataset
from tests.helpers.files import same_bits
from tests.helpers.marks import quick

STEPS = 12
DENSE = CASES["two_dense"]


class Local:
    """The package's own step and exchanges, one step a call, on one model."""

    def __init__(self, strategy, case, inner, clip_norm=None, dtype="float64"):
        self.strategy = strategy
        with strategy.scope():
            self.model = cases.build(case)
            self.plan = selection.resolve(case.rules, self.model, AllReduce())
            batch_norm.set_modes(batch_norm.layers(self.model), self.plan, everywhere=False)
            self.groups = optimizers.build(self.plan, lambda: cases.optimizer(inner, cases.Options()))
            self.states = make_states(self.plan)
            self.fragments = outer_step.build(self.plan, self.groups, self.states)
            self.data = cases.batches(case, dtype, STEPS)
            objective = cases.objective(self.model, *self.data[0])
        options = StepOptions(clip_norm)
        spec = StepSpec(strategy, Collectives(), self.model, objective, self.plan, self.groups, self.states, options)
        self.train = train_step(spec).function
        self.compiled = compiled_exchanges(strategy, Collectives(), self.plan, self.fragments, [], [])
        self.exchanges = [each.function for each in self.compiled]
        self.iterator = cases.worker_iterator(strategy, self.data)
        self.done = 0

    def step(self):
        """Trains one step; returns the fragments that are due after it."""
        self.train(self.iterator, tf.constant(1))
        self.done += 1
        return [i for i, each in enumerate(self.fragments) if each.reduction.due(self.done)]

    def go(self, steps):
        for _ in range(steps):
            due = self.step()
            for each in self.compiled:
                each.apply(self.done)
            for i in due:
                self.compiled[i].begin(self.done)

    def own(self):
        """Every replica's value of every trained variable, by path."""
        return {entry.path: copies(self.strategy, entry.variable) for entry in self.plan.trained}

    def anchors(self):
        members = [member for each in self.fragments for member in each.outer.members]
        return {member.entry.path: copies(self.strategy, member.variable) for member in members}


class Average:
    def __init__(self):
        pass

    def step(self, anchor, movement):
        return anchor - movement


def constant(value):
    """Keras 3.15 turns momentum and the powers of Adam's betas into float32 before they meet a float64 variable."""
    return float(np.float32(value))


class Nesterov:
    """DiLoCo's outer optimizer, as Keras writes Nesterov momentum."""

    def __init__(self):
        self.velocity = 0.0

    def step(self, anchor, movement):
        self.velocity = constant(0.9) * self.velocity - 0.7 * movement
        return anchor + constant(0.9) * self.velocity - 0.7 * movement


class Adam:
    def __init__(self):
        self.first, self.second, self.count = 0.0, 0.0, 0

    def step(self, anchor, movement):
        self.count += 1
        self.first = 0.9 * self.first + (1 - 0.9) * movement
        self.second = 0.999 * self.second + (1 - 0.999) * movement**2
        rate = 0.01 * np.sqrt(1 - constant(0.999) ** self.count) / (1 - constant(0.9) ** self.count)
        return anchor - rate * self.first / (np.sqrt(self.second) + 1e-7)


OUTERS = {None: Average, "nesterov": Nesterov, "adam": Adam}
FACTORIES = {None: None, "nesterov": nesterov, "adam": functools.partial(keras.optimizers.Adam, 0.01)}


class Reference:
    """Plain Keras: a model and optimizers a replica, between which NumPy carries what the rules say."""

    def __init__(self, replicas, case, inner, outer=None, clip_norm=None, dtype="float64", projections=None):
        self.replicas, self.clip_norm, self.done = replicas, clip_norm, 0
        self.projections = projections or {}
        self.models = [cases.build(case) for _ in range(replicas)]
        rules = selection.parse_rules(case.rules)
        self.kinds, self.masks, self.variables = {}, {}, [{} for _ in self.models]
        for model, chosen in zip(self.models, self.variables, strict=True):
            for path, variable in zip(selection.variable_paths(model), model.trainable_variables, strict=True):
                rule = rules[selection.first_match(rules, path)]
                if rule.train:
                    chosen[path], self.kinds[path] = variable, rule.reduction or AllReduce()
                    self.masks[path] = np.ones(variable.shape)
                    if rule.rows is not None:
                        self.masks[path][: rule.rows[0]] = self.masks[path][rule.rows[1] :] = 0
        self.optimizers = [cases.optimizer(inner, cases.Options()) for _ in self.models]
        for each, chosen in zip(self.optimizers, self.variables, strict=True):
            each.build(list(chosen.values()))
        local = [path for path, kind in self.kinds.items() if isinstance(kind, LocalSGD)]
        self.anchors = {path: self.variables[0][path].numpy() for path in local}
        self.outers = {path: OUTERS[outer]() for path in local}
        self.flying = {}  # by path: when it arrives, and the movement
        self.data = cases.batches(case, dtype, STEPS)
        self.gradient_functions = [self._gradients(m, v) for m, v in zip(self.models, self.variables, strict=True)]

    @staticmethod
    def _gradients(model, chosen):
        @tf.function(autograph=False)
        def gradients(x, y):
            with tf.GradientTape() as tape:
                total = tf.reduce_mean(cases.loss(y, model(x, training=True)))
            found = tape.gradient(total, [variable.value for variable in chosen.values()])
            return [tf.convert_to_tensor(each) for each in found]

        return gradients

    def _clipped(self, gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        factor = min(1.0, self.clip_norm / norm) if self.clip_norm and gradients else 1.0
        return {path: factor * g for path, g in gradients.items()}

    def go(self, steps):
        for _ in range(steps):
            self._step()

    def _step(self):
        x, y = self.data[self.done]
        parts = zip(np.split(x, self.replicas), np.split(y, self.replicas), strict=True)
        gradients = [
            {
                path: g.numpy() * self.masks[path]
                for path, g in zip(chosen, function(tf.constant(own_x), tf.constant(own_y)), strict=True)
            }
            for function, chosen, (own_x, own_y) in zip(self.gradient_functions, self.variables, parts, strict=True)
        ]
        shared = [path for path, kind in self.kinds.items() if isinstance(kind, AllReduce)]
        mean = self._clipped({path: np.mean([g[path] for g in gradients], axis=0) for path in shared})
        for each, chosen, own in zip(self.optimizers, self.variables, gradients, strict=True):
            own = mean | self._clipped({path: g for path, g in own.items() if path not in shared})
            each.apply([tf.constant(own[path]) for path in chosen], list(chosen.values()))
        self.done += 1
        self._arrive()
        for path, kind in self.kinds.items():
            # The exchanges follow offset, offset + steps, ... and, where the offset is larger than `steps`, as if it
            # were the rest of the division.
            if not isinstance(kind, LocalSGD):
                continue
            warm = self.done <= kind.warm_up
            if warm or (self.done - kind.offset) % kind.sync_every == 0:
                movement = self.anchors[path] - np.mean([chosen[path].numpy() for chosen in self.variables], axis=0)
                begun = [chosen[path].numpy() for chosen in self.variables]
                self.flying[path] = self.done + (0 if warm else kind.delay), movement, begun
        self._arrive()

    def _arrive(self):
        arrived = {path: movement for path, (when, movement, _) in self.flying.items() if when == self.done}
        for path, movement in arrived.items():
            kind = self.kinds[path]
            *_, begun = self.flying.pop(path)
            if kind.clip_norm is not None:
                of_group = [each for other, each in arrived.items() if self.kinds[other] is kind]
                norm = np.sqrt(sum((each**2).sum() for each in of_group))
                movement = movement * min(1.0, kind.clip_norm / norm)
            anchor = self.outers[path].step(self.anchors[path], movement)
            self.anchors[path] = self.projections.get(path, lambda value: value)(anchor)
            for chosen, at in zip(self.variables, begun, strict=True):
                own = chosen[path].numpy()
                start = self.anchors[path] + (own - at if kind.keep_progress else 0)
                chosen[path].assign((1 - kind.mix) * own + kind.mix * start)

    def own(self):
        return {path: [chosen[path].numpy() for chosen in self.variables] for path in self.kinds}


def assert_close(local, reference, tolerance=1e-10):
    """Each replica's own, and the anchors on every replica."""
    for found, expected in ((local.own(), reference.own()), (local.anchors(), reference.anchors)):
        assert found.keys() == expected.keys()
        for path, values in found.items():
            wanted = expected[path] if isinstance(expected[path], list) else [expected[path]] * len(values)
            for value, want in zip(values, wanted, strict=True):
                assert np.linalg.norm(value - want) <= tolerance * np.linalg.norm(want), path


def _with(rules, case=DENSE):
    return dataclasses.replace(case, rules=list(rules))


@pytest.mark.parametrize(
    ("replicas", "inner", "outer"),
    quick([(2, "momentum", None), (3, "adam", "nesterov"), (2, "adam", "adam")], (2, "momentum", None)),
)
def test_replicas_train_by_themselves_and_move_on_together(replicas, inner, outer, mirrored):
    """Two fragments that take turns: one after the steps 3, 6, 9 and 12, one after 2, 6 and 10."""
    cases.set_precision("float64")
    factory = FACTORIES[outer]
    case = _with(
        [
            Rule("dense1/.*", reduction=LocalSGD(3, 0, factory)),
            Rule("dense2/.*", reduction=LocalSGD(4, 6, factory)),
        ]
    )
    local, reference = Local(mirrored(replicas), case, inner), Reference(replicas, case, inner, outer)
    for done in range(1, STEPS + 1):
        local.go(1)
        reference.go(1)
        exchanged = {"dense1": done in (3, 6, 9, 12), "dense2": done in (2, 6, 10)}
        anchors = local.anchors()
        for path, values in local.own().items():
            assert same_bits(anchors[path]), path
            if exchanged[path.split("/")[0]]:
                assert same_bits([*values, anchors[path][0]]), (done, path)
            else:
                assert len({value.tobytes() for value in values}) == replicas, (done, path)
        assert_close(local, reference)
    for group in local.groups:  # the slots stay on their replica
        slots = [v for v in group.optimizer.variables if "kernel" in v.path]
        assert slots and all(len({c.tobytes() for c in copies(local.strategy, v)}) == replicas for v in slots)
    for each in local.fragments:
        for variable in each.outer.optimizer.variables:
            assert same_bits(copies(local.strategy, variable)), variable.path


@pytest.mark.parametrize(
    ("replicas", "outer", "options", "other"),
    [
        (2, None, {"delay": 2}, {"delay": 4, "mix": 0.5}),  # as long as until the next one begins
        (3, "nesterov", {"delay": 1, "mix": 0.5, "clip_norm": 0.02}, {"warm_up": 3, "delay": 3}),
        (3, "nesterov", {"delay": 3, "keep_progress": True}, {"delay": 2, "mix": 0.5, "keep_progress": True}),
        (
            2,
            None,
            {"delay": 1, "keep_progress": True},
            {"delay": 3, "keep_progress": True, "warm_up": 5, "clip_norm": 0.02},
        ),
        (2, "nesterov", {"mix": 0.25}, {"warm_up": 5, "clip_norm": 0.01}),
        (4, None, {"warm_up": 12, "delay": 2}, {"delay": 2, "offset": 1}),
    ],
)
def test_exchanges_that_travel_while_steps_are_made(replicas, outer, options, other, mirrored):
    """Two fragments, after the steps 3, 6, ... and 4, 8, ..., against NumPy that keeps what travels."""
    cases.set_precision("float64")
    rules = [
        Rule("dense1/.*", reduction=LocalSGD(3, outer_optimizer=FACTORIES[outer], **options)),
        Rule("dense2/.*", reduction=LocalSGD(4, outer_optimizer=FACTORIES[outer], **other)),
    ]
    case = _with(rules)
    local, reference = Local(mirrored(replicas), case, "momentum"), Reference(replicas, case, "momentum", outer)
    flights = 0
    for _ in range(STEPS):
        local.go(1)
        reference.go(1)
        flights += len(reference.flying)
        assert_close(local, reference)
    assert (flights > 0) == any("delay" in each and each.get("warm_up") != STEPS for each in (options, other))


def test_when_exchanges_begin_and_are_applied():
    """Counted out step by step."""
    for every, offset, delay, warm_up in itertools.product((1, 3, 4), (0, 1, 5), (0, 1, 3), (0, 2, 5)):
        if delay > every:
            continue
        each = LocalSGD(every, offset, delay=delay, mix=0.5, warm_up=warm_up)
        begins = [s for s in range(1, 40) if s <= warm_up or (s - offset) % every == 0]
        applied = {s: s + (delay if s > warm_up else 0) for s in begins}
        for step in range(30):
            assert each.due(step + 1) == (step + 1 in begins)
            assert each.next_due(step) == min(s for s in begins if s > step)
            assert each.arrives(step) == any(s + delay == step for s in begins if s > warm_up and delay)
            later = [a for s, a in applied.items() if s > warm_up and a > step]
            assert each.next_arrival(step) == (min(later) if delay else None)
            assert each.last_applied(step) == max([s for s, a in applied.items() if a <= step], default=0)
        payload = selection.Payload("sum", 1, every, offset, warm_up)
        for first, last in itertools.combinations(range(0, 30, 3), 2):
            assert payload.times(first, last) == len([s for s in begins if first < s <= last])


def constrained():
    model = CASES["two_dense"].model()
    first, _, second, _ = model.trainable_variables
    first.constraint, second.constraint = keras.constraints.UnitNorm(axis=0), keras.constraints.NonNeg()
    return model


PROJECTIONS = {
    "dense1/kernel": lambda w: w / (1e-7 + np.sqrt((w**2).sum(axis=0, keepdims=True))),
    "dense2/kernel": lambda w: np.maximum(w, 0),
}


@pytest.mark.parametrize("outer", [None, "nesterov"])
def test_anchors_satisfy_the_constraints(outer, mirrored):
    """The mean of unit vectors is none."""
    cases.set_precision("float64")
    rules = [Rule("dense[12]/.*", reduction=LocalSGD(3, 0, FACTORIES[outer]))]
    case = dataclasses.replace(DENSE, model=constrained, rules=rules)
    local = Local(mirrored(2), case, "momentum")
    reference = Reference(2, case, "momentum", outer, projections=PROJECTIONS)
    for _ in range(0, STEPS, 3):
        local.go(3)
        reference.go(3)
        assert_close(local, reference)
        np.testing.assert_allclose(np.linalg.norm(local.anchors()["dense1/kernel"][0], axis=0), 1.0, rtol=1e-5)


def test_what_is_kept_back_satisfies_the_constraints(mirrored):
    cases.set_precision("float64")
    kind = LocalSGD(3, compressor=TopK(1 / 16, 64, 32), keep_residual_local=True)
    local = Local(
        mirrored(2), dataclasses.replace(DENSE, model=constrained, rules=[Rule(".*", reduction=kind)]), "adam"
    )
    for _ in range(3):
        local.go(3)
        own = local.own()
        assert not same_bits(own["dense1/kernel"])
        for values in (own, local.anchors()):
            assert all((value >= 0).all() for value in values["dense2/kernel"])
            for value in values["dense1/kernel"]:
                np.testing.assert_allclose(np.linalg.norm(value, axis=0), 1.0, rtol=1e-5)


def test_another_number_of_replicas_starts_where_the_constraints_allow(mirrored):
    cases.set_precision("float64")
    rng = np.random.default_rng(0)
    found = np.stack([PROJECTIONS["dense1/kernel"](w) for w in rng.normal(size=(3, 160, 64))])
    case = dataclasses.replace(DENSE, model=constrained, rules=[Rule(".*", reduction=LocalSGD(3))])
    local = Local(mirrored(2), case, "adam")
    made = TrainState(
        topology(local.strategy), local.model, local.plan, local.groups, local.states, local.fragments, []
    )
    state = made.variables
    state["own/dense1/kernel"].assign(found)
    expected = PROJECTIONS["dense1/kernel"](found.mean(axis=0))
    for value in local.own()["dense1/kernel"]:
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
    state["own/dense1/kernel"].assign(found[:2])  # the same number gets its own bits
    assert all(same_bits(pair) for pair in zip(local.own()["dense1/kernel"], found, strict=False))


def test_an_outer_optimizer_finds_the_names_of_the_variables(mirrored):
    """What it excludes from decay by name or one by one, against Keras on the movements of one exchange."""
    cases.set_precision("float64")
    models = []

    def outer(model=None):
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay([(model or models[0]).trainable_variables[3]], ["dense1/"])
        return optimizer

    case = dataclasses.replace(
        DENSE,
        model=lambda: models.append(DENSE.model()) or models[-1],
        rules=[Rule(".*", reduction=LocalSGD(2, outer_optimizer=outer))],
    )
    local = Local(mirrored(2), case, "momentum")
    assert local.step() == []
    assert local.step() == [0]
    own = local.own()
    plain = cases.build(DENSE)
    movements = [v.numpy() - np.mean(own[v.path], axis=0) for v in plain.trainable_variables]
    outer(plain).apply([tf.constant(m) for m in movements], plain.trainable_variables)
    local.exchanges[0]()
    for variable in plain.trainable_variables:
        for value in local.anchors()[variable.path]:
            np.testing.assert_allclose(value, variable.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("replicas", [3])
def test_every_single_step_with_a_plain_outer_is_every_step(replicas, mirrored):
    """With SGD, which is linear in the gradient, the mean of what replicas move is what their mean moves."""
    cases.set_precision("float64")
    plain = lambda: keras.optimizers.SGD(0.05)  # noqa: E731
    found = []
    for each in (AllReduce(), LocalSGD(1)):
        case = _with([Rule(".*", optimizer=plain, reduction=each)])
        local = Local(mirrored(replicas), case, "momentum")
        local.go(STEPS)
        found.append(local.own())
    for path, values in found[0].items():
        assert same_bits(values) and same_bits(found[1][path]), path
        np.testing.assert_allclose(found[1][path][0], values[0], rtol=0, atol=1e-10)


@functools.cache
def _dense_anchors():
    reference = Reference(2, _with([Rule("dense.*", reduction=LocalSGD(3))]), "momentum")
    before = dict(reference.anchors)
    reference.go(STEPS)
    return before, dict(reference.anchors)


@pytest.mark.parametrize(
    ("exchange", "tolerance"),
    [
        (AllReduce("bfloat16"), 0.01),
        (Quantized(8), 0.05),
        (Quantized(2), 0.6),
        (TopK(1 / 4, 16, 8), 0.7),
        (PowerSGD(4), 0.7),
    ],
)
def test_movements_are_compressed_and_none_is_lost(exchange, tolerance, mirrored):
    cases.set_precision("float64")
    before, dense = _dense_anchors()
    local = Local(mirrored(2), _with([Rule("dense.*", reduction=LocalSGD(3, compressor=exchange))]), "momentum")
    moved = {path: 0.0 for path in local.own()}
    for _ in range(STEPS):
        for i in local.step():
            anchors, own = local.anchors(), local.own()
            moved = {path: total + anchors[path][0] - np.mean(own[path], axis=0) for path, total in moved.items()}
            local.exchanges[i]()
            after = local.anchors()
            for path, values in local.own().items():
                assert same_bits([*values, *after[path]]), path
    for state, entry in zip(local.states, local.plan.trained, strict=True):
        anchor = local.anchors()[entry.path][0]
        gone = before[entry.path] - anchor
        left = sum(copies(local.strategy, state["residual"])) if "residual" in state else 0
        if exchange != AllReduce("bfloat16"):
            np.testing.assert_allclose(gone + left, moved[entry.path], rtol=0, atol=1e-10)
        # They go where they would go uncompressed.
        whole = before[entry.path] - dense[entry.path]
        assert np.linalg.norm(gone - whole) <= tolerance * np.linalg.norm(whole), entry.path


MIXED = [
    Rule("dense1/kernel", reduction=AllReduce()),
    Rule("dense1/bias", reduction=LocalOnly()),
    Rule("dense2/kernel", reduction=LocalSGD(4)),
    Rule("dense2/bias", reduction=LocalSGD(2, 1, nesterov)),
]


@pytest.mark.parametrize(("replicas", "clip_norm"), [(2, None), (3, 0.05)])
def test_what_is_shared_stays_so_beside_what_is_not(replicas, clip_norm, mirrored):
    """Its norm must not depend on gradients that differ between the replicas."""
    cases.set_precision("float64")
    rules = [rule for rule in MIXED if rule.match != "dense2/bias"]
    case = _with([*rules, ("freeze", ".*")])
    local = Local(mirrored(replicas), case, "adam", clip_norm)
    reference = Reference(replicas, case, "adam", clip_norm=clip_norm)
    for done in range(1, STEPS + 1):
        local.go(1)
        reference.go(1)
        own = local.own()
        assert same_bits(own["dense1/kernel"]), done
        assert not same_bits(own["dense1/bias"]), done
        assert same_bits(own["dense2/kernel"]) == (done % 4 == 0)
    assert_close(local, reference)
    shared = local.groups[0].optimizer.variables
    assert all(same_bits(copies(local.strategy, variable)) for variable in shared)


def test_rows_are_exchanged_alone(mirrored):
    cases.set_precision("float64")
    rules = [Rule("embedding/.*", rows=(2, 9), reduction=LocalSGD(3, 0, nesterov)), ("train", "head/.*")]
    case = dataclasses.replace(CASES["shared_embedding"], rules=rules)
    local, reference = Local(mirrored(2), case, "adam"), Reference(2, case, "adam", "nesterov")
    entry = local.plan.trained[0]
    before = entry.variable.numpy()
    for done in range(1, STEPS):
        local.go(1)
        reference.go(1)
        whole, expected = local.own()[entry.path], reference.own()[entry.path]
        for value, want in zip(whole, expected, strict=True):
            np.testing.assert_allclose(value, want, rtol=0, atol=1e-10)
            assert same_bits([np.delete(value, slice(2, 9), 0), np.delete(before, slice(2, 9), 0)])
        assert same_bits(whole) == (done % 3 == 0), done
        for member in (*local.fragments[0].members, *local.fragments[0].outer.members):
            assert tuple(member.variable.shape) == (7, 6)
        assert same_bits(local.own()["head/kernel"])
    assert entry.payloads(selection.Peers()) == (selection.Payload("sum", 7 * 6 * 8, every=3),)
    anchor = local.anchors()[entry.path][0]
    own = local.own()[entry.path]
    with outer_step.agreed(local.strategy, local.fragments):
        for value in local.own()[entry.path]:
            assert same_bits([value[2:9], anchor])
    assert all(same_bits(pair) for pair in zip(own, local.own()[entry.path], strict=True))


def test_agreed_lends_the_anchors_and_gives_all_back(mirrored):
    cases.set_precision("float64")
    local = Local(mirrored(3), _with(MIXED), "adam")
    local.go(7)
    anchors, own = local.anchors(), local.own()

    def inside():
        for path, values in local.own().items():
            if path in anchors:
                assert same_bits([*values, anchors[path][0]]), path
            else:
                assert all(same_bits(pair) for pair in zip(values, own[path], strict=True)), path

    def assert_given_back():
        for path, values in local.own().items():
            assert all(same_bits(pair) for pair in zip(values, own[path], strict=True)), path
        assert all(same_bits([*anchors[path], *values]) for path, values in local.anchors().items())

    assert not same_bits(own["dense2/kernel"])
    with outer_step.agreed(local.strategy, local.fragments):
        inside()
    assert_given_back()
    with pytest.raises(ZeroDivisionError), outer_step.agreed(local.strategy, local.fragments):
        inside()
        raise ZeroDivisionError
    assert_given_back()
    local.go(1)  # and the exchange of step 8 finds everything in its place
    assert same_bits(local.own()["dense2/kernel"])


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 5, 7, 23])
def test_due_steps(steps, offset):
    each = LocalSGD(steps, offset)
    # From the first step on, whatever the offset: offset, offset + steps, ..., and backwards from there.
    expected = {offset + turn * steps for turn in range(-30, 30)}
    expected = sorted(s for s in expected if s >= 1)
    assert [s for s in range(1, 25) if each.due(s)] == [s for s in expected if s < 25]
    for done in range(20):
        assert each.next_due(done) == next(s for s in expected if s > done)


@pytest.mark.parametrize(
    "rules",
    [
        [
            Rule("dense1/.*", reduction=LocalSGD(3)),
            Rule("dense2/.*", reduction=LocalSGD(2, 1, compressor=Quantized(4))),
        ],
        [Rule("dense1/.*", reduction=LocalOnly()), Rule("dense2/.*", reduction=LocalSGD(2))],
        [Rule("dense.*", reduction=LocalOnly())],
    ],
)
def test_nothing_is_sent_in_a_step(rules, mirrored):
    cases.set_precision("float64")
    local = Local(mirrored(2), _with(rules), "adam", clip_norm=1.0)
    traced = local.train.get_concrete_function(local.iterator, tf.constant(1))
    assert traffic.collectives(traced) == []
    groups = [group for group in local.plan.groups if isinstance(group.reduction, LocalSGD)]
    for group, exchange in zip(groups, local.compiled, strict=True):
        found = exchange.sent
        payloads = [m for entry in group.entries for m in entry.payloads(selection.Peers())]
        assert traffic.total(found) == traffic.total(payloads) > 0
        assert {c.kind for c in found} == {m.kind for m in payloads}
        assert {m.every for m in payloads} == {group.reduction.sync_every}
    if len(groups) == 2:  # 640 values in three scales and a half byte each, and 10 more of them in a message of words
        assert traffic.total(local.compiled[1].sent) == 6 + 320 + 2 + (2 + 5 + 1)


def _points():
    x = np.random.default_rng(0).normal(size=(24, 8, 8, 3))
    y = np.arange(24, dtype=np.int32) % 5
    return dataset("points", x, y)


def test_statistics_travel_with_the_first_exchange(mirrored):
    """Where nothing is sent in a step, BatchNorm layers drift apart until then."""
    settings = Settings(
        rules=[
            Rule("(conv1|norm1)/.*", reduction=LocalSGD(2)),
            Rule("(conv2|head)/.*", reduction=LocalSGD(2, 1)),
        ],
        model=lambda: cases.convolutional(synchronized=False),
        data=_points,
        optimizer=lambda: keras.optimizers.SGD(0.1),
        precision="float64",
    )
    strategy = mirrored(2)
    built = build(settings, Replicas(strategy, Collectives(), "two"))
    spec = StepSpec(
        strategy,
        Collectives(),
        built.model,
        built.objective,
        built.plan,
        built.optimizers,
        built.reduction_states,
        StepOptions(),
    )
    train = train_step(spec).function
    x, y = built.data.train.fetch(np.arange(24))
    iterator = cases.worker_iterator(strategy, [(x, y)])
    assert traffic.collectives(train.get_concrete_function(iterator, tf.constant(1))) == []
    statistics = batch_norm.local_statistics(built.model)
    exchanges = compiled_exchanges(strategy, Collectives(), built.plan, built.fragments, [], statistics)
    first, second = exchanges
    train(iterator, tf.constant(3))
    assert len(statistics) == 2
    before = [copies(strategy, variable) for variable in statistics]
    assert not any(same_bits(values) for values in before)
    second.function()
    assert all(np.array_equal(copies(strategy, v), values) for v, values in zip(statistics, before, strict=True))
    first.function()
    for variable, values in zip(statistics, before, strict=True):
        after = copies(strategy, variable)
        assert same_bits(after)
        np.testing.assert_allclose(after[0], np.mean(values, axis=0), rtol=1e-12)
    plan = built.plan.traced([], traffic.beyond(built.plan, [], exchanges))
    assert plan.statistics == (selection.Payload("sum", 2 * 6 * 8, every=2),)
    assert plan.wire_bytes == built.plan.wire_bytes  # which knows them from the start


def test_statistics_follow_every_step_where_a_group_does(mirrored):
    """Then they are equal everywhere after each step, whatever else the replicas do by themselves."""
    cases.set_precision("float64")
    rules = [Rule("(conv1|norm1)/.*", reduction=LocalSGD(3)), Rule(".*", reduction=AllReduce())]
    case = dataclasses.replace(CASES["batch_norm_untrained"], rules=rules)
    local = Local(mirrored(2), case, "momentum")
    local.go(2)
    assert not same_bits(local.own()["conv1/kernel"])
    assert all(same_bits(copies(local.strategy, v)) for v in batch_norm.local_statistics(local.model))


def test_one_replica_exchanges_with_itself(mirrored):
    """The outer optimizer works all the same; nothing is sent."""
    cases.set_precision("float64")
    case = _with([Rule("dense.*", reduction=LocalSGD(3, 0, nesterov))])
    local, reference = Local(mirrored(1), case, "adam"), Reference(1, case, "adam", "nesterov")
    local.go(STEPS)
    reference.go(STEPS)
    assert_close(local, reference)
    assert local.compiled[0].sent == []


def test_what_an_exchange_leaves_out_is_trained_on_from(mirrored):
    """With `keep`, anchor minus variable is what was not sent yet: nothing is lost, and nothing waits elsewhere."""
    cases.set_precision("float64")
    kind = LocalSGD(3, compressor=TopK(1 / 16, 64, 32), keep_residual_local=True)
    local = Local(mirrored(2), _with([Rule(r"dense[12]/kernel", reduction=kind), ("freeze", r".*")]), "momentum")
    for _ in range(4):
        local.go(2)
        assert local.step() == [0]
        before, anchor = local.own(), {path: values[0] for path, values in local.anchors().items()}
        local.exchanges[0]()
        after, moved = local.own(), local.anchors()
        for path, values in moved.items():
            assert same_bits(values), path
            sent = anchor[path] - values[0]
            assert np.count_nonzero(sent) <= 2 * np.ceil(sent.size / 64) * 4 + 1
            unsent = sum(values[0] - own for own in after[path])
            whole = sum(anchor[path] - own for own in before[path])
            # The mean of what was sent is the anchor's step; 32 bits a value round what is sent, and keep the rest.
            np.testing.assert_allclose(2 * sent + unsent, whole, atol=1e-12)
            assert not same_bits(after[path])
    for state in local.states:
        for residual in copies(local.strategy, state["residual"]):
            assert not residual.any()
