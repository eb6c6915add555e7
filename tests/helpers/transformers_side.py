"""What test_hugging_face has transformers and PEFT do, in an environment that has them and PyTorch, and no Keras.

python transformers_side.py make FOLDER    # small models of random weights: FOLDER/<kind>, and FOLDER/<kind>.npz
python transformers_side.py adapt FOLDER   # adapters of three of them, by PEFT: FOLDER/<kind>.adapted and .npy
python transformers_side.py read FOLDER    # for each FOLDER/<kind>.<what>.asked.npz the outputs: .npy
python transformers_side.py tokens FOLDER  # ids of FOLDER/text.txt by the tokenizer in FOLDER/smollm2
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}


def models() -> dict:
    t = transformers
    text = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "max_position_embeddings")}
    gpt2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt2 |= {"bos_token_id": 0, "eos_token_id": 0}
    llama = {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3, "rope_theta": 5000.0}
    image = {"image_size": 32, "patch_size": 8, "num_labels": 3}
    return {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **llama)),
        "gpt2": t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
        "gemma": t.GemmaForCausalLM(t.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8)),
        "mistral": t.MistralForCausalLM(t.MistralConfig(**SIZES, num_key_value_heads=2)),
        "qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, num_key_value_heads=2)),
        "qwen3": t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
        # As KerasHub's; with transformers' own default, which is no approximation, logits differ by up to 1e-4.
        "bert": t.BertForSequenceClassification(t.BertConfig(**SIZES, num_labels=3, hidden_act="gelu_new")),
        "vit": t.ViTForImageClassification(t.ViTConfig(**text, **image)),
    }


def outputs(model, x: np.ndarray) -> np.ndarray:
    inputs = torch.tensor(x)
    if x.ndim == 4:  # channels are first here
        inputs = inputs.permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.eval()(inputs).logits.numpy()


def make(folder: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for kind, model in models().items():
        with torch.no_grad():
            for parameter in model.parameters():  # biases too; and in few digits, as most models are published
                parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.bfloat16().float())
        model.save_pretrained(folder / kind)
        x = rng.normal(size=(2, 32, 32, 3)).astype("f") if kind == "vit" else rng.integers(5, 60, (2, 9))
        np.savez(folder / f"{kind}.npz", x=x, y=outputs(model, x))


def read(folder: Path) -> None:
    """Outputs of FOLDER/<kind>.peft on the base FOLDER/<kind>, and of the whole model FOLDER/<kind>.huggingface."""
    import peft

    of_kind = {
        "bert": transformers.AutoModelForSequenceClassification,
        "vit": transformers.AutoModelForImageClassification,
    }
    for asked in sorted(folder.glob("*.asked.npz")):
        kind, what, _, _ = asked.name.split(".")
        auto = of_kind.get(kind, transformers.AutoModelForCausalLM)
        if what == "peft":
            labels = {"num_labels": 3} if kind == "bert" else {}
            model = auto.from_pretrained(folder / kind, **labels)
            model = peft.PeftModel.from_pretrained(model, folder / f"{kind}.peft")
        else:
            model = auto.from_pretrained(folder / f"{kind}.{what}")
        np.save(folder / f"{kind}.{what}.npy", outputs(model, np.load(asked)["x"]))


def tokens(folder: Path) -> None:
    """Ids of a text by the tokenizer in a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "smollm2")
    np.save(folder / "ids.npy", tokenizer((folder / "text.txt").read_text())["input_ids"])


def adapt(folder: Path) -> None:
    """Adapters that PEFT itself has made: one with every option that is read, and its outputs."""
    import peft

    torch.manual_seed(1)
    made = {
        "llama": {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"q_proj": 5},
        },
        "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True},
        "vit": {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
    }
    for kind, options in made.items():
        auto = transformers.AutoModelForImageClassification if kind == "vit" else transformers.AutoModelForCausalLM
        config = peft.LoraConfig(r=2, lora_alpha=7, init_lora_weights=False, **options)
        model = peft.get_peft_model(auto.from_pretrained(folder / kind), config)
        if kind == "vit":
            with torch.no_grad():
                model.classifier.modules_to_save["default"].weight.add_(0.1)
        model.save_pretrained(folder / f"{kind}.adapted")
        x = np.load(folder / f"{kind}.npz")["x"]
        np.save(folder / f"{kind}.adapted.npy", outputs(model, x))


if __name__ == "__main__":
    {"make": make, "read": read, "adapt": adapt, "tokens": tokens}[sys.argv[1]](Path(sys.argv[2]))
