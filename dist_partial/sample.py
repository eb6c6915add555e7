"""python -m dist_partial.sample --run_dir=DIR [--prompt=TEXT] [--temperature=T] [--top_k=K] [--top_p=P] ...

Generates text from the newest checkpoint of a run folder; what no flag sets is as the run had it bound.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dist_partial import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    flags.DEFINE_string("run_dir", None, "run folder", flag_values=values)
    flags.DEFINE_string("prompt", None, "what the text goes on from", flag_values=values)
    flags.DEFINE_float("temperature", None, "divides the logits; 0 is greedy", flag_values=values)
    flags.DEFINE_integer("top_k", None, "only the k likeliest symbols", flag_values=values)
    flags.DEFINE_float("top_p", None, "only the likeliest symbols of this total probability", flag_values=values)
    flags.DEFINE_integer("seed", None, "the same seed gives the same text", flag_values=values)
    flags.DEFINE_integer("length", None, "symbols to generate", flag_values=values)
    flags.DEFINE_integer("count", None, "how many texts", flag_values=values)
    flags.DEFINE_bool("allow_imports", False, "import the modules that the run's gin file names", flag_values=values)

    def command() -> int:
        if not values.run_dir:
            raise cli.UserError("no --run_dir: name the folder of a run, such as --run_dir=runs/quickstart")
        cli.import_tensorflow_quietly()
        from dist_partial import config, evaluation, local_sgd, replicas
        from dist_partial.build import build, restore

        folder = Path(values.run_dir)
        if not (folder / "operative_config.gin").is_file():
            raise cli.UserError(f"{folder} is no run folder: it has no operative_config.gin")
        settings = config.load([folder / "operative_config.gin"], imports=values.allow_imports).settings
        names = ("prompt", "temperature", "top_k", "top_p", "seed", "length", "count")
        given: dict[str, Any] = {name: values[name].value for name in names if values[name].value is not None}
        sampling = dataclasses.replace(settings.sampling, **given)
        built = build(settings, replicas.create("default"))
        checkpoint = restore(built, folder, lambda line: print(line, file=sys.stderr))
        if checkpoint is None:
            raise cli.UserError(f"{folder} has no checkpoint yet: let the run save one first")
        with local_sgd.agreed(built.replicas.strategy, built.fragments):
            for row in evaluation.samples(built.model, built.data, sampling, checkpoint.step):
                print(f"{row['prompt']}{row['text']}\n")
        return 0

    return cli.call(__doc__, values, argv, command)


if __name__ == "__main__":
    sys.exit(main())
