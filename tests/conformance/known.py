"""The cases that do not come to what Keras comes to, and why. The tests see to it that each still does not."""

import dataclasses

EXACT = 1e-9  # relative to max(1, |value|): all is computed in float64
PARTS = ("weights", "losses", "evaluations")


@dataclasses.dataclass(frozen=True)
class Known:
    """Says what is known of a case.

    Attributes:
        reason: why it differs, in words.
        differs: the parts of PARTS that do; all others are equal.
        within: how far these are at the most.
        refused: words of the error, if it is not trained at all.
        least: the fewest replicas on which it is so.
    """

    reason: str
    differs: tuple[str, ...] = ()
    within: float = float("inf")
    refused: str = ""
    least: int = 2


_SUM = Known(
    "Keras trains on the sum of the losses and reports their mean; a run reports what it trains on",
    differs=("losses", "evaluations"),
    least=1,
)

_NORM = Known("KerasHub computes norms and softmax of these models in float32", differs=PARTS, within=1e-6)

KNOWN: dict[str, Known] = {
    "reduction_none": _SUM,
    "reduction_none_by_none": _SUM,
    "hub_bert_lora": Known("Keras makes the factors of LoRA in float32", differs=("weights",), within=1e-5),
    "hub_llama3": _NORM,
    "hub_gemma": _NORM,
    "ctc_transcriber": Known("Keras computes CTC in float32", differs=PARTS, within=1e-6),
    "optimizer_adam_accumulates": Known(
        "Keras cannot accumulate gradients on several replicas", refused="run.accumulate", least=1
    ),
    "optimizer_adam_average_overwrites": Known(
        "Keras cannot overwrite weights by their averages on several replicas", refused="ema_overwrite_frequency"
    ),
}


def known(name: str, replicas: int) -> Known | None:
    """What is known of a case on that many replicas."""
    found = KNOWN.get(name)
    return found if found and replicas >= found.least else None
