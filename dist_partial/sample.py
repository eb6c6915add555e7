"""python -m dist_partial.sample --run_dir=DIR [--prompt=TEXT] [--temperature=T] [--top_k=K] [--top_p=P] ...

Generates text from the newest checkpoint of a run folder, or that of --step; what no flag sets is as the run had it
bound.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from dist_partial import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    flags.DEFINE_string("run_dir", None, "run folder", flag_values=values)
    flags.DEFINE_string("step", None, "'best', or the step of a checkpoint; without it the newest", flag_values=values)
    flags.DEFINE_string("prompt", None, "what the text goes on from", flag_values=values)
    flags.DEFINE_float("temperature", None, "divides the logits; 0 is greedy", flag_values=values)
    flags.DEFINE_integer("top_k", None, "only the k likeliest symbols", flag_values=values)
    flags.DEFINE_float("top_p", None, "only the likeliest symbols of this total probability", flag_values=values)
    flags.DEFINE_integer("seed", None, "the same seed gives the same text", flag_values=values)
    flags.DEFINE_integer("length", None, "symbols to generate", flag_values=values)
    flags.DEFINE_integer("count", None, "how many texts", flag_values=values)
    flags.DEFINE_bool("allow_imports", False, "import the modules that the run's gin file names", flag_values=values)

    def command() -> int:
        folder = cli.check_run_dir(values.run_dir)
        names = ("prompt", "temperature", "top_k", "top_p", "seed", "length", "count")
        given: dict[str, Any] = {name: values[name].value for name in names if values[name].value is not None}
        cli.import_tensorflow_quietly()
        from dist_partial.export import restore
        from dist_partial.training import evaluation

        with restore.restored(folder, values.allow_imports, values.step) as (settings, built, step):
            # A run that samples nothing while it trains has texts to give, too.
            sampling = dataclasses.replace(settings.sampling, **{"count": settings.sampling.count or 1} | given)
            for row in evaluation.samples(built.model, built.data, sampling, step):
                print(f"{row['prompt']}{row['text']}\n")
        return 0

    return cli.call(__doc__, values, argv, command)


if __name__ == "__main__":
    sys.exit(main())
