"""Run folders whose models are unusual: what comes back out of them is what was trained."""

import dataclasses
import functools

import keras
import numpy as np
import pytest

from dist_partial import Base, sample, train
from dist_partial.adapters import lora
from dist_partial.config.settings import Settings
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.data.codecs import ByteCodec
from dist_partial.distributed import replicas
from dist_partial.errors import UserError
from dist_partial.export import __main__ as export
from dist_partial.export import delta, restore
from dist_partial.export import keras_file as keras_export
from dist_partial.models import keras_file
from dist_partial.selection.rules import Rule
from dist_partial.training import build, loop
from tests.helpers.cases import dataset
from tests.helpers.files import state
from tests.helpers.strategies import in_process


def towers() -> keras.Model:
    """Two submodels whose layers have the same names, so that variables have the same paths."""

    def tower():
        x = keras.Input((6,))
        norm = keras.layers.BatchNormalization(center=False, scale=False, name="bn")
        return keras.Model(x, norm(keras.layers.Dense(4, trainable=False, name="emb")(x)))

    x = keras.Input((6,))
    both = keras.layers.Concatenate()([tower()(x), tower()(x[:, ::-1])])
    return keras.Model(x, keras.layers.Dense(3, name="head")(both))


def points() -> Dataset:
    rng = np.random.default_rng(0)
    return dataset("points", rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 3, 40).astype(np.int32))


def told(rate: float = 0.05, **more) -> Settings:
    given = {
        "model": towers,
        "data": points,
        "rules": [("train", ".*")],
        "optimizer": functools.partial(keras.optimizers.Adam, rate),
        "steps": 4,
        "global_batch": 8,
        "statistics": "all",
        "replicas": in_process,
    }
    return Settings(**given | more)


def restored(settings, folder):
    keras.utils.clear_session(free_memory=False)
    built = build.build(settings, replicas.create("default"))
    base = delta.model_fingerprints(built.model)
    found = build.restore(built, folder, lambda _: None)
    return built, base, found


def test_variables_of_one_path_are_kept_apart(tmp_path):
    loop.run(told(), tmp_path)
    built, base, found = restored(told(), tmp_path)
    statistics = [name for name in found.variables if name.startswith("statistics/")]
    assert len(statistics) == 4
    norms = [layer for layer in built.model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    means = [np.array(layer.moving_mean) for layer in norms]
    assert all(np.abs(mean).min() > 0 for mean in means) and not np.allclose(*means)
    assert len(built.fingerprint["frozen"]) == 4  # kernels and biases of both towers
    changed = delta.of(built.model, built.plan, base, 4)
    assert {key.split("/")[0] for key in changed.arrays if key.endswith("bn/moving_mean")} == {
        "functional",
        "functional_1",
    }


def named_towers(frozen: str = "") -> keras.Model:
    def tower(name):
        x = keras.Input((6,))
        return keras.Model(x, keras.layers.Dense(4, "tanh", name="hidden")(x), name=name, trainable=name != frozen)

    x = keras.Input((6,))
    both = keras.layers.Concatenate()([tower("left")(x), tower("right")(x[:, ::-1])])
    return keras.Model(x, keras.layers.Dense(3, name="head")(both))


@pytest.mark.parametrize("frozen", ["", "left"])
def test_a_tower_is_trained_resumed_and_taken_home(frozen, tmp_path):
    """Its layers have the names, and in Keras the paths, of the other tower's."""
    rules = [("train", r"right/.*"), ("freeze", ".*")]
    settings = told(model=functools.partial(named_towers, frozen), rules=rules, statistics="trained")
    loop.run(settings, tmp_path / "whole")
    loop.run(dataclasses.replace(settings, steps=2), tmp_path / "parts")
    loop.run(settings, tmp_path / "parts")
    whole, parts = (state(tmp_path / name, 4) for name in ("whole", "parts"))
    assert {name for name in whole if name.startswith("variables/")} == {
        "variables/right/hidden/kernel",
        "variables/right/hidden/bias",
    }
    assert all(value.tobytes() == parts[name].tobytes() for name, value in whole.items())
    built, base, _ = restored(settings, tmp_path / "whole")
    changed = delta.of(built.model, built.plan, base, 4)
    keras.utils.set_random_seed(0)
    mine = Base(named_towers())
    before = np.array(mine.model.get_layer("left").get_layer("hidden").kernel)
    mine.use(changed)
    assert np.array(mine.model.get_layer("left").get_layer("hidden").kernel).tobytes() == before.tobytes()
    kernel = np.array(mine.model.get_layer("right").get_layer("hidden").kernel)
    assert kernel.tobytes() == whole["variables/right/hidden/kernel"].tobytes()


def test_before_the_first_checkpoint_a_folder_takes_another_configuration(tmp_path):
    with pytest.raises(UserError, match="is not finite"):
        loop.run(told(rate=1e38, steps=40), tmp_path)
    assert not list(tmp_path.glob("checkpoints/step-*"))
    keras.utils.clear_session(free_memory=False)
    loop.run(told(), tmp_path)
    with pytest.raises(UserError, match=r"belongs to another run: optimizers\.0\.learning_rate was 0\.05"):
        loop.run(told(rate=0.01, steps=8), tmp_path)


def test_other_exclusions_from_weight_decay_are_another_run(tmp_path):
    """No config of Keras's has them."""

    def adamw():
        optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.1)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    loop.run(told(optimizer=adamw), tmp_path)
    loop.run(told(optimizer=adamw), tmp_path)
    with pytest.raises(
        UserError, match=r"belongs to another run: optimizers\.0\.exclude_from_weight_decay was .*'bias'"
    ):
        loop.run(told(optimizer=lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1)), tmp_path)


def adapted() -> keras.Model:
    layers = [keras.layers.Dense(5, "relu", name="a"), keras.layers.Dense(3, name="d")]
    return keras.Sequential([keras.Input((6,)), *layers])


def test_merged_lora_is_the_same_model_and_can_be_trained(tmp_path):
    settings = told(model=adapted, rules=[Rule("./kernel", lora=2), ("freeze", ".*")], steps=20, statistics="trained")
    loop.run(settings, tmp_path / "run")
    built, _, _ = restored(settings, tmp_path / "run")
    x = points().train.x
    before = built.model(x).numpy()
    lora.merge(built.model)
    built.model.save(tmp_path / "whole.keras")
    for model in (built.model, keras_file(str(tmp_path / "whole.keras"))):
        np.testing.assert_allclose(model(x), before, atol=1e-5)
        assert [v.name for v in model.trainable_variables if "lora" not in v.name] == ["kernel", "bias"] * 2
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        kernel = np.array(model.get_layer("a").kernel)
        model.fit(x, points().train.y, verbose=0)
        assert np.abs(np.array(model.get_layer("a").kernel) - kernel).max() > 0
    assert [v.name for v in model.variables] == ["kernel", "bias"] * 2  # of what is loaded


@keras.saving.register_keras_serializable(package="tests")
class Times(keras.layers.Layer):
    """Whose config forgets its factor."""

    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return self.factor * x

    def get_config(self):
        return {"name": self.name}


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_file_that_loads_as_another_model_is_refused(factor, tmp_path):
    layers = [keras.layers.Dense(3, name="d"), Times(factor)]
    settings = told(model=lambda: keras.Sequential([keras.Input((6,)), *layers]), statistics="trained")
    built = build.build(settings, replicas.create("default"))
    if factor == 1:
        assert keras_export.write_keras(tmp_path / "whole.keras", built).endswith("before loading it")
    else:
        with pytest.raises(UserError, match=r"is another model when its \.keras file is loaded"):
            keras_export.write_keras(tmp_path / "whole.keras", built)


def test_what_training_has_moved_is_not_rounded_away(tmp_path):
    """Beside a base in bfloat16 small factors would vanish in the kernels that they are merged into."""
    rules = [Rule("./kernel", lora=2), ("freeze", ".*")]
    settings = told(rate=1e-4, model=adapted, rules=rules, steps=20, statistics="trained", frozen_dtype="bfloat16")
    keras.utils.set_random_seed(0)
    loop.run(settings, tmp_path / "run")
    keras.utils.clear_session(free_memory=False)
    built = build.build(settings, replicas.create("default"))
    x = points().train.x
    before = built.model(x).numpy()
    build.restore(built, tmp_path / "run", lambda _: None)
    after = built.model(x).numpy()
    assert keras_export.write_keras(tmp_path / "whole.keras", built) == ""
    whole = keras.saving.load_model(tmp_path / "whole.keras")
    assert np.abs(whole(x) - after).max() < 0.01 * np.abs(after - before).max()
    assert {v.dtype for v in whole.variables} == {"float32"}


def test_a_delta_with_factors_says_what_its_base_lacks(tmp_path):
    rules = [Rule("./kernel", lora=2), ("freeze", ".*")]
    settings = told(model=adapted, rules=rules, statistics="trained")
    loop.run(settings, tmp_path)
    built, base, _ = restored(settings, tmp_path)
    changed = delta.of(built.model, built.plan, base, 4)

    def fresh():
        keras.utils.set_random_seed(0)
        return adapted()

    with pytest.raises(UserError, match=r"call dist_partial\.adapters\.lora\.enable\(rules, model, seed\)"):
        Base(fresh()).use(changed)
    model = fresh()
    lora.enable(rules, model)
    Base(model).use(changed)
    np.testing.assert_allclose(model(points().train.x), built.model(points().train.x), atol=1e-6)


def test_a_delta_of_weights_that_have_been_replaced_is_refused(tmp_path):
    """Another file in the place of the one that a run began with would make a base that the run never had."""
    adapted().save(tmp_path / "base.keras")
    model = functools.partial(keras_file, str(tmp_path / "base.keras"))
    settings = told(model=model, rules=[("train", "d/.*"), ("freeze", ".*")], statistics="trained")
    loop.run(settings, tmp_path / "run")
    built, _, _ = restored(settings, tmp_path / "run")
    export._base(tmp_path / "run", built)
    other = keras_file(str(tmp_path / "base.keras"))
    other.get_layer("d").kernel.assign_add(np.ones((5, 3)))
    other.save(tmp_path / "base.keras")
    built, _, found = restored(settings, tmp_path / "run")
    assert found.step == 4  # what is trained comes from the checkpoint, so that the run itself can go on
    with pytest.raises(UserError, match=r"does not make the weights that .* began with: 'd/kernel' differ"):
        export._base(tmp_path / "run", built)


class Broken(keras.Model):
    def call(self, x):
        raise ValueError("never mind")


def test_an_error_in_the_users_own_code_says_where():
    line = Broken.call.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"float32 \[6\]: never mind \({__file__}, line {line}\); bind"):
        build.build(told(model=Broken), replicas.create("default"))


def test_a_base_without_variables():
    with pytest.raises(UserError, match="has no variables yet: build it, or call it once"):
        Base(keras.Sequential([keras.layers.Dense(2)]))


def test_a_model_with_fewer_logits_than_the_data_has_symbols():
    ids = np.zeros((20, 4), np.int32)
    source = ArraySource(ids, ids)
    data = Dataset("letters", source, source, fingerprint(ids), ByteCodec())

    def model():
        return keras.Sequential([keras.Input((4,)), keras.layers.Embedding(256, 2), keras.layers.Dense(100)])

    with pytest.raises(UserError, match=r"letters has 256 symbols and run\.model gives logits for 100: bind"):
        build.build(told(model=model, data=lambda: data), replicas.create("default"))


def test_what_was_trained_on_data_that_has_changed_since(tmp_path, capsys):
    """Training must not go on from other data; what has been trained can be used."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("to be, or not to be\n" * 800)
    gin_file = tmp_path / "words.gin"
    gin_file.write_text(f"""
import dist_partial.data.codecs
run.model = @byte_transformer
byte_transformer.layers = 1
byte_transformer.width = 8
byte_transformer.heads = 2
run.data = @tokenized_text
tokenized_text.tokenizer = @dist_partial.data.codecs.ByteCodec
tokenized_text.window = 16
tokenized_text.root = {str(text)!r}
tokenized_text.evaluation_share = 0.5
run.rules = [('train', r'head/.*'), ('freeze', r'.*')]
run.optimizer = @keras.optimizers.SGD
SGD.learning_rate = 0.1
run.reduction = @local_only()
run.steps = 2
run.global_batch = 4
run.eval_examples = 4
replicas.cpu = 2
sample.length = 5
""")
    folder = tmp_path / "run"
    again = [f"--gin_file={gin_file}", f"--run_dir={folder}"]
    assert train.main(again) == 0
    (text / "a.txt").write_text("that is the question\n" * 900)
    capsys.readouterr()
    assert train.main([*again, "--gin_param=run.steps=4"]) == 2
    assert "belongs to another run: the data has other examples" in capsys.readouterr().err
    assert sample.main([f"--run_dir={folder}", "--prompt=to be", "--allow_imports"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("to be") and "differs between replicas: this is the first one's" in err
    output = tmp_path / "a.safetensors"
    assert export.main([f"--run_dir={folder}", "--format=safetensors", f"--output={output}", "--allow_imports"]) == 0
    changed = delta.read(output)
    assert list(changed.arrays) == ["head/kernel"]
    base = restore.base(folder / "operative_config.gin", imports=True)
    before = np.array(base.model.get_layer("head").kernel)
    base.use(changed)
    np.testing.assert_array_equal(base.model.get_layer("head").kernel, changed.arrays["head/kernel"])
    assert np.abs(changed.arrays["head/kernel"] - before).max() > 0
