"""Models of KerasHub and Keras Applications end where plain Keras on one device ends, and send what is planned."""

import sys

import keras
import numpy as np
import pytest

from dist_partial.config import gin_files
from dist_partial.data import tokenized_text
from dist_partial.errors import UserError
from dist_partial.models import hub_model, hub_tokenizer
from dist_partial.models.hub import single_input
from dist_partial.models.sampling import Generation, generate
from dist_partial.training.split_model import split
from tests.helpers import cases
from tests.helpers.cases import Case, Options
from tests.helpers.marks import in_turns, quick

ARGUMENTS = {
    "GPT2": {
        **{"vocabulary_size": 31, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16},
        **{"dropout": 0.0, "max_sequence_length": 24},
    },
    "Gemma": {
        **{"vocabulary_size": 31, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1},
        **{"hidden_dim": 8, "intermediate_dim": 16, "head_dim": 4},
    },
}
RULES = {
    # A bias of keys moves all scores of a query alike: its gradient is nothing but rounding errors.
    "GPT2": [
        ("freeze", r".*/key/bias"),
        ("train", r"transformer_layer_1/.*"),
        ("train", r"layer_norm/.*"),
        ("freeze", r".*"),
    ],
    "Gemma": [("train", r"decoder_block_1/.*"), ("train", r"token_embedding/embeddings"), ("freeze", r".*")],
}


def text_case(name):
    ids = lambda rng, n: rng.integers(0, 31, (n, 6)).astype(np.int32)  # noqa: E731
    return Case(lambda: hub_model(architecture=name, arguments=ARGUMENTS[name]), RULES[name], ids, ids)


def image_case(factory, rules, **arguments):
    def model():
        made = factory(input_shape=(32, 32, 3), weights=None, classes=5, classifier_activation=None, **arguments)
        # With fresh statistics the signal dies out in inference mode, and all gradients with it.
        for layer in made._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.moving_variance.assign(0.05 * keras.ops.ones_like(layer.moving_variance))
            if isinstance(layer, keras.layers.Dropout):  # stochastic depth draws on each replica
                layer.rate = 0.0
        return made

    return Case(
        model,
        [*[("train", rule) for rule in rules], ("freeze", ".*")],
        lambda rng, n: rng.uniform(0, 255, (n, 32, 32, 3)),
        lambda rng, n: rng.integers(0, 5, n).astype(np.int32),
    )


HUB = ["GPT2", "Gemma"]
IMAGES = {
    "MobileNetV3Small": image_case(
        keras.applications.MobileNetV3Small,
        [r"expanded_conv_10_project/.*", r"conv_1/.*", r"logits/.*"],
    ),
    "EfficientNetB0": image_case(keras.applications.EfficientNetB0, [r"top_conv/.*", r"predictions/.*"]),
}


@pytest.mark.parametrize("name", in_turns(quick(HUB, "Gemma")))
def test_language_models_equal_one_device(name, mirrored):
    pytest.importorskip("keras_hub")
    cases.set_precision("float64")
    trained = cases.train(mirrored(2), text_case(name), "adam", Options(clip_norm=0.5))
    # Some of KerasHub computes in float32 whatever the policy: softmax, norms, rotary angles.
    cases.assert_equal(trained.after, cases.reference(text_case(name), "adam", Options(clip_norm=0.5), "float64"), 1e-5)
    cases.assert_replicas_agree(trained)
    cases.assert_nothing_else_moved(trained)
    assert trained.bytes_per_step == trained.plan.wire_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(IMAGES))
def test_image_models_equal_one_device(name, mirrored, monkeypatch):
    cases.set_precision("float64")
    case, steps = IMAGES[name], 3
    original = cases.batches
    monkeypatch.setattr(cases, "batches", lambda case, dtype: original(case, dtype, steps))
    data = cases.batches(case, "float64")
    keras.utils.clear_session(free_memory=False)  # EfficientNet's first layer is numbered
    expected = cases.reference(case, "momentum", Options(), "float64")
    keras.utils.clear_session(free_memory=False)
    trained = cases.train(mirrored(2), case, "momentum", data=data)
    cases.assert_equal(trained.after, expected, 1e-8)
    cases.assert_replicas_agree(trained)
    cases.assert_nothing_else_moved(trained)
    assert trained.bytes_per_step == trained.plan.wire_bytes > 0


@pytest.mark.parametrize("name", HUB)
def test_the_model_is_the_task_with_its_own_paths(name):
    hub = pytest.importorskip("keras_hub")
    backbone = getattr(hub.models, f"{name}Backbone")(**ARGUMENTS[name])
    task = getattr(hub.models, f"{name}CausalLM")(backbone=backbone, preprocessor=None)
    model = single_input(task, "model")
    ids = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)
    expected = task({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    np.testing.assert_allclose(model(ids), expected, atol=1e-6)
    assert [v.path for v in model.variables] == [v.path for v in task.variables]
    # The graph is flat, so that what is frozen from the input up can be cut off.
    trained = [v for v in model.variables if "_1/" in v.path]
    part = split(model, trained)
    assert part is not None and 8 in [tensor.shape[-1] for tensor in keras.tree.flatten(part.lower(ids))]


@pytest.mark.parametrize("name", in_turns(quick(HUB, "GPT2")))
def test_generation_with_the_cache_equals_that_without(name):
    pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(4)
    model = hub_model(architecture=name, arguments=ARGUMENTS[name])
    for variable in model.variables:  # fresh weights would give all ids about the same logits
        variable.assign(variable + 0.3 * keras.random.normal(variable.shape, seed=1))
    generation = Generation(2, 9, 0.7, seed=3)
    cached = generate(model, [3, 4, 5], generation)
    np.testing.assert_array_equal(cached, generate(model, [3, 4, 5], generation, use_cache=False))
    assert len(set(cached.ravel().tolist())) > 3


def test_longer_than_the_positions_is_refused():
    pytest.importorskip("keras_hub")
    model = hub_model(architecture="GPT2", arguments=ARGUMENTS["GPT2"])
    with pytest.raises(UserError, match="25 tokens, and the model reads 24"):
        generate(model, [3] * 10, Generation(1, 15, 0.0))


def test_a_text_classifier_masks_padding():
    hub = pytest.importorskip("keras_hub")
    arguments = {"vocabulary_size": 31, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
    model = hub_model(task="TextClassifier", architecture="Bert", arguments=arguments, classes=3)
    assert model(np.ones((2, 5), np.int32)).shape == (2, 3)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    tokenizer = hub.tokenizers.BertTokenizer(vocabulary=vocabulary)
    task = hub.models.BertTextClassifier(
        backbone=hub.models.BertBackbone(**arguments),
        num_classes=3,
        preprocessor=hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8),
    )
    model = single_input(task, "model")
    short, padded = np.array([[2, 5, 6, 3]]), np.array([[2, 5, 6, 3, 0, 0, 0]])
    np.testing.assert_allclose(model(short), model(padded), atol=1e-6)
    assert not np.allclose(model(short), model(np.array([[2, 5, 6, 3, 5, 5, 5]])), atol=1e-6)


def test_a_preset_folder(tmp_path):
    """A local preset gives the model with its weights, its tokenizer, and a data set in its tokens."""
    hub = pytest.importorskip("keras_hub")
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *"abcdefghij", "ab"])}
    tokenizer = hub.tokenizers.GPT2Tokenizer(vocabulary=letters, merges=["a b"])
    task = hub.models.GPT2CausalLM(
        backbone=hub.models.GPT2Backbone(**{**ARGUMENTS["GPT2"], "vocabulary_size": 12}),
        preprocessor=hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8),
    )
    task.save_to_preset(str(tmp_path / "preset"))
    model = hub_model(preset=str(tmp_path / "preset"))
    for mine, its in zip(model.variables, task.variables, strict=True):
        np.testing.assert_array_equal(mine, its)
    codec = hub_tokenizer(str(tmp_path / "preset"))
    assert codec.size == 12
    assert codec.encode("abcab").tolist() == [11, 3, 11] and codec.decode(np.array([11, 3, 11])) == "abcab"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("abcdefghij" * 1500)
    arguments = {"window": 8, "root": tmp_path / "text", "evaluation_share": 0.4}
    data = tokenized_text(lambda: codec, **arguments)
    x, y = data.train.fetch(np.arange(4))
    assert x.dtype == np.int32 and x.shape == (4, 8) and data.codec is codec
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    assert x[0].tolist() == [11, 3, 4, 5, 6, 7, 8, 9]
    assert data.fingerprint == tokenized_text(lambda: codec, **arguments).fingerprint
    (tmp_path / "text" / "a.txt").write_text("abcdefghia" * 1500)
    assert data.fingerprint != tokenized_text(lambda: codec, **arguments).fingerprint


def test_an_image_preset_folder_brings_its_preprocessing(tmp_path):
    hub = pytest.importorskip("keras_hub")
    converter = hub.layers.ImageConverter(image_size=(16, 16), scale=1 / 127.5, offset=-1.0)
    task = hub.models.ViTImageClassifier(
        backbone=hub.models.ViTBackbone(
            image_shape=(16, 16, 3), patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16
        ),
        num_classes=3,
        preprocessor=hub.models.ViTImageClassifierPreprocessor(image_converter=converter),
        activation=None,
    )
    images = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    model = single_input(task, "model")
    np.testing.assert_allclose(model(images), task(images / 127.5 - 1), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one of preset and architecture"),
        ({"architecture": "GTP2"}, "nearest: 'GPT2'"),
        ({"architecture": "GPT2", "arguments": {"layers": 1}}, "GPT2Backbone takes vocabulary_size"),
        ({"architecture": "ResNet", "task": "Classifier"}, "'ImageClassifier'"),
        ({"architecture": "Bert", "task": "TextClassifier"}, "hub_model.classes is not bound"),
        ({"preset": "./no_such_folder"}, "no preset folder"),
        ({"preset": "gpt2_base_em"}, "gpt2_base_en"),
    ],
)
def test_mistakes(arguments, words):
    pytest.importorskip("keras_hub")
    with pytest.raises(UserError, match=words) as error:
        hub_model(**arguments)
    assert "\n" not in str(error.value)


def test_without_keras_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(UserError, match=r"pip install 'dist_partial\[hub\]'"):
        hub_model(architecture="GPT2")


def test_gin_binds_models_of_both(tmp_path):
    (tmp_path / "a.gin").write_text(
        "run.rules = [('train', '.*')]\nrun.data = @stdlib_corpus\nrun.model = @keras.applications.MobileNetV3Small\n"
        "MobileNetV3Small.weights = None\nMobileNetV3Small.classes = 5\nMobileNetV3Small.input_shape = (32, 32, 3)\n"
    )
    model = gin_files.load([tmp_path / "a.gin"]).settings.model()
    assert model.output_shape == (None, 5)
    params = ["run.model = @hub_model", "hub_model.architecture = 'GPT2'", f"hub_model.arguments = {ARGUMENTS['GPT2']}"]
    pytest.importorskip("keras_hub")
    assert gin_files.load([tmp_path / "a.gin"], params).settings.model().name == "hub_model"


class Shifted:
    """A codec of bytes whose ids begin at `first`."""

    size = 256

    def __init__(self, first):
        self.first = first

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self.first

    def decode(self, ids):
        return ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, r"tokenized_text\.limit is 0"),
        ({"limit": -1}, r"tokenized_text\.limit is -1"),
        ({"limit": 5}, r"tokenized_text\.limit = 5 .* 15000 bytes"),
        ({"window": 0}, r"tokenized_text\.window is 0"),
        ({"evaluation_share": 2}, r"tokenized_text\.evaluation_share is 2: .* above 0 and below 1"),
        ({"evaluation_share": 0.02}, r"tokenized_text\.evaluation_share=0\.02 of 15,000 tokens .* at least 0\.334"),
        ({"pattern": "/*.txt"}, r"tokenized_text\.pattern is '/\*\.txt'"),
        ({"root": "a" * 300}, r"tokenized_text\.root 'a{300}' is no folder"),
        ({"root": "~/none"}, r"tokenized_text\.root .*/none' is no folder"),
        ({"tokenizer": "smollm2"}, r"tokenized_text\.tokenizer is 'smollm2': .* @smollm2_tokenizer"),
        ({"tokenizer": lambda: Shifted(70_000)}, r"Shifted.* ids from 70097 to 70106, .* 0 to 255"),
        ({"tokenizer": lambda: Shifted(-200)}, r"Shifted.* ids from -103 to -94, .* 0 to 255"),
    ],
)
def test_mistakes_with_text(options, words, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 1500)
    right = {"tokenizer": lambda: Shifted(0), "root": tmp_path, "window": 8, "evaluation_share": 0.5}
    tokenized_text(**right)
    with pytest.raises(UserError, match=words) as caught:
        tokenized_text(**{**right, **options})
    assert "\n" not in str(caught.value)


def test_text_that_cannot_be_read(tmp_path, monkeypatch):
    file = tmp_path / "text" / "a.txt"
    file.parent.mkdir()
    file.write_text("abcdefghij" * 1500)
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = {"tokenizer": lambda: Shifted(0), "root": "~/text", "window": 8, "evaluation_share": 0.5}
    assert tokenized_text(**arguments).train.fetch(np.array([0]))[0].tolist() == [list(b"abcdefgh")]
    file.write_bytes(b"abc\xff" * 5000)
    with pytest.raises(UserError, match=r"a\.txt is not text in UTF-8 \(byte 0xff at 3\)"):
        tokenized_text(**arguments)
    file.write_text("too little")
    with pytest.raises(UserError, match=r"has 10 tokens of text and needs 8,193"):
        tokenized_text(**arguments)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "read_bytes", refuse)
    with pytest.raises(UserError, match=r"tokenized_text\.root: cannot read .*a\.txt \(Permission denied\)"):
        tokenized_text(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", 0), ("num_heads", 0), ("hidden_dim", -8), ("vocabulary_size", 0), ("max_sequence_length", -1)],
)
def test_sizes_below_one(name, value):
    pytest.importorskip("keras_hub")
    with pytest.raises(UserError, match=rf"hub_model\.arguments has '{name}': {value}"):
        hub_model(architecture="GPT2", arguments={**ARGUMENTS["GPT2"], name: value})
    with pytest.raises(UserError, match=r"hub_model\.classes is 0"):
        hub_model("TextClassifier", architecture="Bert", arguments=ARGUMENTS["GPT2"], classes=0)
