"""python -m dist_partial.export --run_dir=DIR --format=FORMAT --output=PATH [--overwrite] ...

Takes the newest checkpoint of a run folder home, or that of --step: what was trained alone (safetensors; see
dist_partial.export.delta), or LoRA as an adapter of PEFT (peft), or the whole model, for Keras (keras), for TensorFlow
Serving (savedmodel), or for Hugging Face's transformers (huggingface).
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from dist_partial import cli
from dist_partial.files import replacing

if TYPE_CHECKING:
    from dist_partial.training.build import Trainer
FORMATS = {"safetensors": ".safetensors", "keras": ".keras", "savedmodel": "", "peft": "", "huggingface": ""}
# What a folder of the format has in it, without which it is not replaced.
_INSIDE = {"savedmodel": "saved_model.pb", "peft": "adapter_config.json", "huggingface": "config.json"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    flags.DEFINE_string("run_dir", None, "run folder", flag_values=values)
    flags.DEFINE_enum("format", None, list(FORMATS), "what to write", flag_values=values)
    flags.DEFINE_string("output", None, "the file, or folder, to write", flag_values=values)
    flags.DEFINE_string("step", None, "'best', or the step of a checkpoint; without it the newest", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace an output of the same format", flag_values=values)
    flags.DEFINE_integer("max_length", None, "savedmodel: ids that a cache of `generate` holds", flag_values=values)
    flags.DEFINE_bool("allow_imports", False, "import the modules that the run's gin file names", flag_values=values)

    def command() -> int:
        folder = cli.check_run_dir(values.run_dir)
        if not values.format:
            raise cli.UserError(f"no --format: write one of {', '.join(f'--format={name}' for name in FORMATS)}")
        output = _checked_output(values.output, values.format, values.overwrite)
        if values.max_length is not None and values.max_length < 2:
            raise cli.UserError(
                f"--max_length={values.max_length}: it must be at least 2, a prompt and what follows it"
            )
        cli.import_tensorflow_quietly()
        from dist_partial.export import delta, hugging_face, keras_file, peft, restore, saved_model
        from dist_partial.step import batch_norm

        with restore.restored(folder, values.allow_imports, values.step) as (_, built, step):
            if values.format == "safetensors":
                changed = delta.of(built.model, built.plan, _base(folder, built), step)
                delta.write(output, changed)
                notes = f", {len(changed.arrays)} of {len(changed.base)} variables"
            elif values.format == "peft":
                notes = f", {_put(output, lambda path: peft.write(path, built.model, built.plan))}"
            else:
                for layer in built.batch_norms:
                    batch_norm.set_mode(
                        layer, True
                    )  # as the factory made it: the run alone had put it into inference mode
                writers: dict[str, Callable[[Path], str]] = {
                    "keras": lambda path: keras_file.write_keras(path, built),
                    "savedmodel": lambda path: saved_model.write_saved_model(path, built, values.max_length),
                    "huggingface": lambda path: hugging_face.write(path, built.model, built.plan, built.data.codec),
                }
                notes = _put(output, writers[values.format])
        print(f"{output}: step {step} of {folder}, {_bytes(output):,} bytes{notes}")
        if values.format == "savedmodel":
            versions = output.parent if output.name.isdecimal() else Path("SOMEWHERE") / output.name
            move = "" if output.name.isdecimal() else f"move it to {versions}/1 and "
            print(f"TensorFlow Serving reads a folder of numbered versions: {move}give it --model_base_path={versions}")
        return 0

    return cli.call(__doc__, values, argv, command)


def _checked_output(given: str | None, form: str, overwrite: bool) -> Path:
    """The path of the output, at which there may be something only if it may be replaced."""
    suffix = FORMATS[form]
    if not given:
        raise cli.UserError(f"no --output: name what to write, such as --output=exported{suffix}")
    output = Path(os.path.abspath(given))
    if suffix and output.suffix != suffix:
        raise cli.UserError(f"--output={given} does not end in {suffix}: write --output={given}{suffix}")
    folder = next(parent for parent in output.parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):  # said now, and not after the work
        raise cli.UserError(f"cannot write {given}: {folder} is no folder that can be written; choose another --output")
    if not os.path.lexists(output):
        return output
    if not overwrite:
        raise cli.UserError(f"{given} is there already: choose another --output, or give --overwrite to replace it")
    if not (output.is_file() if suffix else (output / _INSIDE[form]).is_file()):
        what = "file" if suffix else f"folder with {_INSIDE[form]}"
        raise cli.UserError(f"{given} is there and is no {what}, so it is not replaced: choose another --output")
    return output


def _base(folder: Path, built: "Trainer") -> dict[str, str]:
    """Digests of the values that the run began with, which the model as it was built has, too.

    Raises:
        UserError: the factories make others by now, so that no base would be known by them.
    """
    from dist_partial import validation
    from dist_partial.checkpoints import fingerprints

    began = json.loads((folder / fingerprints.RUN_FILE).read_text()).get(fingerprints.INITIAL, {})
    if changed := validation.differences(began, built.fingerprint[fingerprints.INITIAL]):
        names = ", ".join(repr(name) for name, _, _ in changed[:3])
        raise cli.UserError(
            f"run.model does not make the weights that {folder} began with: {names} differ, so that no base would be "
            "known by this delta; restore what it reads, or export the whole model by --format=keras"
        )
    return began


def _put(output: Path, write: Callable[[Path], str]) -> str:
    """Has a file or a folder written atomically; returns what `write` does."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as partial:
            return write(partial)
    except OSError as error:
        reason = error.strerror or str(error)
        raise cli.UserError(f"cannot write {output}: {reason}; free some space, or choose another --output") from None


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


if __name__ == "__main__":
    sys.exit(main())
