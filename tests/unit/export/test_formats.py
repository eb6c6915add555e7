"""What is taken home from a run folder, loaded as others would: in a process that cannot import this package."""

import contextlib
import io
import os
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from dist_partial import Base, files, train
from dist_partial.errors import UserError
from dist_partial.export import __main__ as export
from dist_partial.export import delta, saved_model
from dist_partial.models import byte_transformer, sampling, two_dense
from tests.helpers.files import contents, durable, state
from tests.helpers.marks import quick

MODULE = """
import keras, numpy as np
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.models import byte_transformer

class Letters:
    size = 256
    def encode(self, text): return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    def decode(self, ids): return bytes(np.asarray(ids, np.uint8)).decode("latin-1")

class Numbers(Letters):
    size = 10
    def encode(self, text): return super().encode(text) % 10

def dataset(name, x, y, *codec):
    return Dataset(name, ArraySource(x[8:], y[8:]), ArraySource(x[:8], y[:8]), fingerprint(x, y), *codec)

def letters():
    ids = np.random.default_rng(0).choice(np.frombuffer(b"abcabcabd", np.uint8), (40, 13)).astype(np.int32)
    return dataset("letters", ids[:, :-1], ids[:, 1:], Letters(), "byte")

def next_letters():
    ids = np.random.default_rng(0).integers(0, 10, (40, 5)).astype(np.int32)
    return dataset("next letters", ids[:, :-1], ids[:, -1], Numbers(), "symbol")

def digits():
    rng = np.random.default_rng(0)
    return dataset("digits", rng.integers(0, 10, (40, 4)).astype(np.int32), rng.integers(0, 3, 40).astype(np.int32))

def images():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 32, 32, 3)).astype(np.float32)
    return dataset("images", x, rng.integers(0, 5, 24).astype(np.int32))

def tied(): return byte_transformer(1, 16, 2, tied=True, dropout=0.1)

class Nameless(keras.Model):
    "A model that says nothing of how to make it again."
    def __init__(self, units):
        super().__init__()
        self.embedding, self.head = keras.layers.Embedding(10, 4), keras.layers.Dense(units)
    def call(self, x): return self.head(keras.ops.mean(self.embedding(x), 1))

def nameless(): return Nameless(3)

def person():
    age, name = keras.Input((2,), name="age"), keras.Input((3,), dtype="int32", name="name")
    both = keras.layers.Concatenate()([age, keras.layers.Flatten()(keras.layers.Embedding(10, 4)(name))])
    outputs = {"tall": keras.layers.Dense(1, name="t")(both), "kind": keras.layers.Dense(3, name="k")(both)}
    return keras.Model({"age": age, "name": name}, outputs, name="person")

def people():
    rng = np.random.default_rng(0)
    x = {"age": rng.normal(size=(24, 2)).astype(np.float32), "name": rng.integers(0, 10, (24, 3)).astype(np.int32)}
    y = {"tall": rng.normal(size=(24, 1)).astype(np.float32), "kind": rng.integers(0, 3, 24).astype(np.int32)}
    source = ArraySource(x, y)
    return Dataset("people", source, source, fingerprint(x, y))

def person_losses():
    return {"tall": "mse", "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}

class Scored(keras.Model):
    "Has a loss of its own."
    def __init__(self, units=3, **more):
        super().__init__(**more)
        self.units, self.head = units, keras.layers.Dense(units)
    def build(self, shape): self.head.build(shape)
    def call(self, x): return self.head(x)
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y_pred - keras.ops.mean(x)))
    def get_config(self): return {**super().get_config(), "units": self.units}

def scored(): return Scored(name="scored")

def unlabelled():
    source = ArraySource(np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32))
    return Dataset("unlabelled", source, source, "0")
"""

COMMON = """
import export_module
run.optimizer = @keras.optimizers.Adam
Adam.learning_rate = 0.05
run.steps = 6
run.global_batch = 8
run.steps_per_loop = 3
replicas.cpu = 2
sample.length = 4
"""

RUNS = {
    "rows": """
run.model = @two_dense
two_dense.window = 4
two_dense.hidden = 8
run.data = @export_module.next_letters
run.rules = [@some/Rule(), ('train', r'dense2/bias'), ('freeze', r'.*')]
some/Rule.match = r'dense1/kernel'
some/Rule.rows = (10, 25)
""",
    "local": """
run.model = @two_dense
two_dense.window = 4
two_dense.hidden = 8
two_dense.classes = 3
run.data = @export_module.digits
run.rules = [('train', r'dense2/.*'), ('freeze', r'.*')]
run.reduction = @local_sgd()
local_sgd.sync_every = 4
run.precision = 'float64'
""",
    "tied": """
run.model = @export_module.tied
run.data = @export_module.letters
run.rules = [('train', r'embedding/.*'), ('train', r'final_norm/.*'), ('freeze', r'.*')]
run.precision = 'mixed_bfloat16'
""",
    "images": """
run.model = @keras.applications.MobileNet
MobileNet.input_shape = (32, 32, 3)
MobileNet.alpha = 0.25
MobileNet.weights = None
MobileNet.classes = 5
MobileNet.classifier_activation = None
run.data = @export_module.images
run.rules = [('train', r'conv_pw_13_bn/.*'), ('train', r'conv_preds/.*'), ('freeze', r'.*')]
run.steps = 3
""",
}

# What someone does with a model who has never heard of this package: numbers out of files.
ELSEWHERE = """
import sys
sys.modules["dist_partial"] = None  # any import of it fails
import keras, numpy as np, tensorflow as tf
folder, out = sys.argv[1:]
inputs, found = np.load(folder + "/inputs.npz"), {}
for name in ("rows", "local", "images"):
    model = keras.saving.load_model(f"{folder}/{name}.keras")
    found[f"{name}.keras"] = model(inputs[name], training=False)
    found[f"{name}.flags"] = np.array([layer.trainable for layer in model.layers])
    found[f"{name}.dtypes"] = np.array([v.dtype for v in model.variables])
for name in ("rows", "local", "images", "tied"):
    loaded = tf.saved_model.load(f"{folder}/{name}.saved")
    serve = loaded.signatures["serving_default"]
    for count in (1, 3):
        found[f"{name}.saved.{count}"] = tf.cast(serve(x=tf.constant(inputs[name][:count]))["outputs"], tf.float64)
    if "generate" in loaded.signatures:
        found[f"{name}.text"] = np.stack([
            loaded.signatures["generate"](
                prompt=tf.constant(inputs[f"{name}.prompt"]), length=tf.constant(9), seed=tf.constant(seed, tf.int64),
                temperature=tf.constant(temperature),
            )["ids"]
            for seed, temperature in ((0, 0.0), (3, 0.7), (4, 1.5))
        ])
np.savez(out, **found)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains runs by name, each once; returns the folder that has `<name>` and its exports in every format."""
    root = tmp_path_factory.mktemp("runs")
    (root / "export_module.py").write_text(MODULE)

    def made(*names: str) -> Path:
        for name in names:
            if (root / name).exists():
                continue
            (root / f"{name}.gin").write_text(COMMON + RUNS[name])
            keras.utils.clear_session()
            # Any test can be the first, and those that read what a command says want that command's alone.
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = train.main([f"--gin_file={root / name}.gin", f"--run_dir={root / name}"])
                for form, suffix in (("safetensors", "safetensors"), ("keras", "keras"), ("savedmodel", "saved")):
                    code = code or main(root, name, form, f"{name}.{suffix}")
            assert code == 0, said.getvalue()
            keras.config.set_floatx("float32")
            keras.config.set_dtype_policy("float32")
        return root

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        patch.delenv("TF_CONFIG", raising=False)
        yield made
    sys.modules.pop("export_module", None)


def main(root: Path, run: str, form: str, output: str, *more: str) -> int:
    keras.utils.clear_session()
    arguments = [f"--run_dir={root / run}", f"--format={form}", f"--output={root / output}", "--allow_imports", *more]
    return export.main(arguments)


def _mobilenet() -> keras.Model:
    return keras.applications.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=5, classifier_activation=None)


FACTORIES = {
    "rows": lambda: two_dense(window=4, hidden=8),
    "local": lambda: two_dense(window=4, hidden=8, classes=3),
    "images": _mobilenet,
    "tied": lambda: byte_transformer(1, 16, 2, tied=True, dropout=0.1),
}
POLICIES = {"local": "float64", "tied": "mixed_bfloat16"}


def base_model(name: str) -> keras.Model:
    """As the run's factory makes it, with its seed and precision."""
    policy = POLICIES.get(name, "float32")
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    return FACTORIES[name]()


def trained_model(folder: Path, name: str) -> keras.Model:
    """The base with the checkpoint's arrays written over it by hand."""
    model = base_model(name)
    variables = {v.path.removeprefix(f"{model.name}/"): v for v in model.variables}
    for key, array in state(folder / name, 3 if name == "images" else 6).items():
        kind, path = key.split("/", 1)
        if kind in ("variables", "statistics"):
            if name == "rows" and path == "dense1/kernel":
                whole = variables[path].numpy()
                whole[10:25] = array
                array = whole
            variables[path].assign(array)
    return model


@pytest.fixture(scope="module")
def elsewhere(runs):
    """Numbers from the exports, as `ELSEWHERE` reads them, and what it was given."""
    folder = runs(*RUNS)
    rng = np.random.default_rng(1)
    inputs = {name: rng.integers(0, 10, (3, 4)).astype(np.int32) for name in ("rows", "local")}
    inputs["tied"] = rng.integers(97, 101, (3, 7)).astype(np.int32)
    inputs["images"] = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    # Rows of one prompt are what `sampling.generate` makes of `count`.
    inputs |= {
        "tied.prompt": np.array([[97, 98, 99]] * 2, np.int32),
        "rows.prompt": np.array([[7, 2, 9]] * 2, np.int32),
    }
    np.savez(folder / "inputs.npz", **inputs)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(folder / "found.npz")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return inputs, dict(np.load(folder / "found.npz"))


@pytest.mark.parametrize("name", quick(RUNS, "rows", "local", "tied"))
def test_the_delta_is_what_the_checkpoint_holds(name, runs):
    folder = runs(name)
    step = 3 if name == "images" else 6
    saved = {
        key.split("/", 1)[1]: array
        for key, array in state(folder / name, step).items()
        if key.split("/", 1)[0] in ("variables", "statistics")
    }
    found = delta.read(folder / f"{name}.safetensors")
    keys = {"dense1/kernel": "dense1/kernel[10:25]"} if name == "rows" else {}
    assert {keys.get(path, path) for path in saved} == found.arrays.keys()
    for path, array in saved.items():
        key = keys.get(path, path)
        assert found.arrays[key].tobytes() == array.tobytes() and found.arrays[key].shape == array.shape
        assert found.arrays[key].dtype == ("float64" if name == "local" else "float32")
    assert found.step == step and found.versions["keras"] == keras.__version__
    assert found.rules[-1] == "freeze .*"
    if name == "rows":
        assert found.rows == {"dense1/kernel[10:25]": ("dense1/kernel", 10, 25)}
    if name == "images":
        assert "conv_pw_13_bn/moving_mean" in found.arrays and "conv_pw_12_bn/moving_mean" not in found.arrays


def test_an_anchor_is_what_replicas_agree_on(runs):
    """The last exchange of `local` was two steps before its end, and replicas have gone apart since then."""
    folder = runs("local")
    saved = state(folder / "local", 6)
    found = delta.read(folder / "local.safetensors").arrays["dense2/kernel"]
    for replica in saved["own/dense2/kernel"]:
        assert not np.array_equal(found, replica)


@pytest.mark.parametrize("name", quick(RUNS, "rows", "local", "tied"))
def test_base_and_delta_are_the_trained_model(name, runs):
    folder = runs(name)
    model = base_model(name)
    before = [np.array(v) for v in model.variables]
    base = Base(model)
    base.use(delta.read(folder / f"{name}.safetensors"))
    for mine, theirs in zip(model.variables, trained_model(folder, name).variables, strict=True):
        assert mine.name == "seed_generator_state" or mine.numpy().tobytes() == theirs.numpy().tobytes(), mine.path
    base.use(None)
    assert all(old.tobytes() == new.numpy().tobytes() for old, new in zip(before, model.variables, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "local", "images"])
def test_keras_alone_loads_the_whole_model(name, runs, elsewhere):
    folder = runs(name)
    inputs, found = elsewhere
    model = trained_model(folder, name)
    np.testing.assert_allclose(found[f"{name}.keras"], model(inputs[name], training=False), rtol=1e-6, atol=1e-6)
    assert found[f"{name}.flags"].all()  # though the run had put layers into inference mode
    assert found[f"{name}.dtypes"].tolist() == [v.dtype for v in model.variables]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_tensorflow_alone_serves_any_batch(name, runs, elsewhere):
    folder = runs(name)
    inputs, found = elsewhere
    model = trained_model(folder, name)
    for count in (1, 3):
        expected = keras.ops.cast(model(inputs[name][:count], training=False), "float64")
        tolerance = 1e-2 if name == "tied" else 1e-5
        np.testing.assert_allclose(found[f"{name}.saved.{count}"], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "rows"])
def test_tensorflow_alone_generates_what_sampling_does(name, runs, elsewhere):
    folder = runs(name)
    inputs, found = elsewhere
    model = trained_model(folder, name)
    prompt = inputs[f"{name}.prompt"]
    for ids, (seed, temperature) in zip(found[f"{name}.text"], ((0, 0.0), (3, 0.7), (4, 1.5)), strict=True):
        generation = sampling.Generation(count=2, length=9, temperature=temperature, seed=seed)
        np.testing.assert_array_equal(ids, sampling.generate(model, prompt[0], generation))


def test_serving_needs_no_op_of_xla(runs):
    folder = runs("tied")
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "tied.saved" / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    ops = {
        node.op
        for part in (graph, *attrgetter("library.function")(graph))
        for node in (part.node if part is graph else part.node_def)
    }
    assert "TensorStridedSliceUpdate" in ops and not [op for op in ops if op.startswith("Xla")]


@pytest.mark.slow
def test_a_model_without_text_has_no_generate(elsewhere):
    assert "local.text" not in elsewhere[1] and "tied.text" in elsewhere[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(length=0), "length must be at least 1"),
        (dict(temperature=-1.0), "temperature must be 0"),
        (dict(temperature=np.nan), "temperature must be 0"),
        (dict(length=1022), "more than the 1024 ids of the cache"),
        (dict(prompt=np.zeros((1, 0), np.int32)), "the prompt is empty"),
    ],
)
def test_generate_refuses(arguments, words, runs):
    folder = runs("tied")
    generate = tf.saved_model.load(folder / "tied.saved").signatures["generate"]
    given = dict(prompt=np.array([[97, 98, 99]], np.int32), length=2, temperature=1.0, seed=0) | arguments
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        generate(
            prompt=tf.constant(given["prompt"]),
            length=tf.constant(given["length"]),
            temperature=tf.constant(given["temperature"], tf.float32),
            seed=tf.constant(given["seed"], tf.int64),
        )


def test_generate_refuses_logits_that_are_not_finite(runs):
    folder = runs("tied")
    loaded = tf.saved_model.load(folder / "tied.saved")
    for variable in loaded.variables:
        if variable.dtype.is_floating:
            variable.assign(tf.fill(variable.shape, tf.cast(np.nan, variable.dtype)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="logits are not finite"):
        loaded.signatures["generate"](
            prompt=tf.constant([[97, 98, 99]]),
            length=tf.constant(2),
            temperature=tf.constant(1.0),
            seed=tf.constant(0, tf.int64),
        )


def test_a_keras_file_of_classes_of_our_own(runs, capsys):
    folder = runs("tied")
    assert main(folder, "tied", "keras", "again.keras") == 0
    said = capsys.readouterr().out
    assert "set_dtype_policy('mixed_bfloat16')" in said and "import dist_partial.models.byte_transformer before" in said
    model = trained_model(folder, "tied")
    keras.config.set_dtype_policy("mixed_bfloat16")
    loaded = keras.saving.load_model(folder / "again.keras")
    (folder / "again.keras").unlink()
    x = np.random.default_rng(0).integers(0, 256, (2, 5)).astype(np.int32)
    np.testing.assert_array_equal(*(keras.ops.cast(m(x, training=False), "float32") for m in (loaded, model)))


@pytest.mark.parametrize("form", ["safetensors", "keras", "savedmodel"])
def test_what_is_there_is_replaced_only_when_told_to(form, runs, capsys):
    folder = runs("rows")
    output = "rows.saved" if form == "savedmodel" else f"rows.{form}"
    target = folder / output
    before = contents(folder)
    assert main(folder, "rows", form, output) == 2
    assert f"{target} is there already" in capsys.readouterr().err
    assert contents(folder) == before
    (target / "leftover" if target.is_dir() else target).write_bytes(b"old")
    assert main(folder, "rows", form, output, "--overwrite") == 0
    after = contents(folder)
    assert after.keys() == before.keys()  # nothing beside it, and nothing old in it
    if form == "safetensors":
        assert delta.read(target).step == 6


def test_a_folder_that_is_no_saved_model_is_never_replaced(runs, tmp_path, capsys):
    folder = runs("rows")
    (tmp_path / "precious").write_text("mine")
    assert (
        export.main([f"--run_dir={folder / 'rows'}", "--format=savedmodel", f"--output={tmp_path}", "--overwrite"]) == 2
    )
    assert (
        "is no folder with saved_model.pb" in capsys.readouterr().err and (tmp_path / "precious").read_text() == "mine"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format=keras", "--output={}/a.keras"], "no --run_dir"),
        (["--run_dir={}/rows", "--output={}/a.keras"], "no --format: write one of --format=safetensors"),
        (["--run_dir={}/rows", "--format=onnx", "--output={}/a"], "<safetensors|keras|savedmodel|peft|huggingface>"),
        (["--run_dir={}/rows", "--format=keras"], "no --output"),
        (["--run_dir={}/rows", "--format=keras", "--output={}/a.h5"], "does not end in .keras"),
        (["--run_dir={}/rows", "--format=safetensors", "--output={}/a"], "write --output="),
        (["--run_dir={}/rows", "--format=savedmodel", "--output={}/a", "--max_length=1"], "--max_length=1"),
        (["--run_dir={}/absent", "--format=keras", "--output={}/a.keras"], "no run folder"),
        (["--run_dir={}/rows", "--format=keras", "--output={}/a.keras"], "give --allow_imports"),
        (["--run_dir={}/rows", "--format=keras", "--output=/dev/null/a.keras", "--allow_imports"], "cannot write"),
    ],
)
def test_mistakes_in_the_flags(arguments, words, runs, capsys):
    folder = runs("rows")
    before = contents(folder)
    assert export.main([argument.format(folder) for argument in arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert words in message and "\n" not in message
    assert contents(folder) == before


def test_a_model_that_cannot_be_made_again_is_no_keras_file(runs, capsys):
    folder = runs()
    (folder / "nameless.gin").write_text(
        COMMON + "run.model = @export_module.nameless\nrun.data = @export_module.digits\n"
        "run.rules = [('train', r'.*')]\nreplicas.cpu = 1\n"
    )
    assert train.main([f"--gin_file={folder}/nameless.gin", f"--run_dir={folder}/nameless"]) == 0
    before = contents(folder)
    capsys.readouterr()
    assert main(folder, "nameless", "keras", "nameless.keras") == 2
    message = capsys.readouterr().err.strip()
    assert "model 'nameless' cannot be written" in message and "--format=savedmodel" in message and "\n" not in message
    assert contents(folder) == before
    assert main(folder, "nameless", "savedmodel", "nameless.saved") == 0


def test_several_inputs_and_outputs_are_taken_home(runs):
    """As dicts, in every format; the .keras file is of no training, and loads without the losses of the run."""
    folder = runs()
    (folder / "person.gin").write_text(
        COMMON + "run.model = @export_module.person\nrun.data = @export_module.people\n"
        "run.loss = @export_module.person_losses\nrun.metrics = {'tall': ['mae'], 'kind': ['accuracy']}\n"
        "run.rules = [('train', r'[tk]/.*'), ('freeze', r'.*')]\n"
    )
    assert train.main([f"--gin_file={folder}/person.gin", f"--run_dir={folder}/person"]) == 0
    for form, suffix in (("safetensors", "safetensors"), ("keras", "keras"), ("savedmodel", "saved")):
        assert main(folder, "person", form, f"person.{suffix}") == 0, form
    loaded = keras.saving.load_model(folder / "person.keras")
    assert not loaded.compiled
    values = {v.path: v.numpy() for v in loaded.variables}
    for path, array in delta.read(folder / "person.safetensors").arrays.items():
        np.testing.assert_array_equal(values[path], array)
    rng = np.random.default_rng(1)
    x = {"age": rng.normal(size=(5, 2)).astype(np.float32), "name": rng.integers(0, 10, (5, 3)).astype(np.int32)}
    archive = tf.saved_model.load(folder / "person.saved")
    served = archive.serving_default(tf.nest.map_structure(tf.constant, x))
    expected = loaded(x, training=False)
    assert served.keys() == expected.keys() == {"tall", "kind"}
    for name, value in expected.items():
        np.testing.assert_allclose(served[name], value, rtol=1e-5, atol=1e-6)


def test_a_model_with_a_loss_of_its_own_and_no_targets(runs):
    folder = runs()
    (folder / "scored.gin").write_text(
        COMMON + "run.model = @export_module.scored\nrun.data = @export_module.unlabelled\n"
        "run.rules = [('train', r'.*')]\n"
    )
    assert train.main([f"--gin_file={folder}/scored.gin", f"--run_dir={folder}/scored"]) == 0
    for form, suffix in (("safetensors", "safetensors"), ("savedmodel", "saved")):
        assert main(folder, "scored", form, f"scored.{suffix}") == 0
    x = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    archive = tf.saved_model.load(folder / "scored.saved")
    served = archive.signatures["serving_default"](x=tf.constant(x))["outputs"]
    arrays = delta.read(folder / "scored.safetensors").arrays
    kernel, bias = (next(array for path, array in arrays.items() if path.endswith(name)) for name in ("kernel", "bias"))
    np.testing.assert_allclose(served, x @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_a_wrong_base_is_refused(runs):
    folder = runs("rows")
    keras.utils.set_random_seed(1)
    other = FACTORIES["rows"]()
    with pytest.raises(UserError, match=r"is of another base: 'dense1/kernel', 'dense2/kernel' differ"):
        Base(other).use(delta.read(folder / "rows.safetensors"))


class Reads:
    """A cache of at most `most` ids."""

    def __init__(self, most: int) -> None:
        self.most = most

    def make_cache(self, batch: int, length: int) -> None:
        if length > self.most:
            raise UserError(f"reads {self.most} ids")

    def decode(self) -> None: ...


def test_a_cache_holds_what_the_model_can():
    assert [saved_model._capacity(Reads(most), None) for most in (5000, 1024, 512, 100)] == [1024, 1024, 512, 64]
    assert saved_model._capacity(Reads(100), 90) == 90 and saved_model._capacity(object(), 90) is None
    with pytest.raises(UserError, match="reads 100 ids"):
        saved_model._capacity(Reads(100), 200)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "saved_model.pb").write_text("old")
    before = os.replace

    def failing(old, new):
        if Path(new).name == "old" and "replaced" not in Path(old).name:
            raise OSError("full")
        before(old, new)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="full"), files.replacing(tmp_path / "old") as partial:
        partial.mkdir()
    assert contents(tmp_path) == {".": None, "old": None, "old/saved_model.pb": b"old"}


def test_what_is_exported_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    def write(path):
        (path / "variables").mkdir(parents=True)
        for name in ("saved_model.pb", "variables/data"):
            (path / name).write_text(name)
        return ""

    calls = durable(monkeypatch)
    export._put(tmp_path / "model", write)
    *inside, renamed, folder = calls
    partial = f".partial-{os.getpid()}-model"
    files = [("fsync", "data", b"variables/data"), ("fsync", "saved_model.pb", b"saved_model.pb")]
    assert sorted(inside) == sorted([*files, ("fsync", partial, b""), ("fsync", "variables", b"")])
    assert (renamed, folder) == (("replace", "model", b""), ("fsync", tmp_path.name, b""))
