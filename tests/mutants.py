"""Small changes of the package, each of which a test must notice: by hand, for they take a quarter of an hour.

    python -m tests.mutants [name ...]

Each is made in a copy of the project, where the tests that ought to notice it run. Exit code 0: all were noticed. Add
one for what could be broken unseen.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests import ROOT

SECONDS = 300  # for the tests of one change: what hangs is noticed, too
PASSED, FAILED = 0, 1  # pytest's exit codes; others say that no test could run


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change.

    Attributes:
        name: of the change.
        file: in which it is made, below dist_partial.
        before: the text that is replaced, there exactly once.
        after: what takes its place.
        tests: files of this folder, or tests in them, that ought to notice it.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, project: Path) -> None:
        path = project / "dist_partial" / self.file
        text = path.read_text()
        assert text.count(self.before) == 1, f"{self.name}: {self.before!r} is {text.count(self.before)} times there"
        path.write_text(text.replace(self.before, self.after))


def changed(name: str, file: str, before: str, after: str, *tests: str) -> Mutant:
    return Mutant(name, file, before, after, tests)


def run(tests: Sequence[str], mutant: Mutant | None = None) -> tuple[int, str]:
    """Runs tests in a copy of the project; returns pytest's exit code and the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", *(f"tests/{test}" for test in tests)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        project = Path(folder, "project")
        shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info"))
        if mutant:
            mutant.apply(project)
        process = subprocess.Popen(
            command, cwd=project, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(SECONDS if mutant else None)
        except subprocess.TimeoutExpired:
            return FAILED, f"more than {SECONDS} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what a test has started ends with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, next((line for line in output if line.startswith(("FAILED", "ERROR"))), "").strip()


def main(names: Sequence[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if mutant.name in names or not names]
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        print(f"no mutant is called {', '.join(sorted(unknown))}; there are: {', '.join(m.name for m in MUTANTS)}")
        return 2
    code, words = run(sorted({test for mutant in chosen for test in mutant.tests}))
    if code != PASSED:  # what fails by itself notices nothing
        print(f"without any change: {words or f'pytest ends with {code}'}")
        return 2
    noticed = 0
    for mutant in chosen:
        start = time.monotonic()
        code, words = run(mutant.tests, mutant)
        noticed += code == FAILED
        verdict = {PASSED: "SURVIVED", FAILED: "noticed"}.get(code, f"BROKEN {code}")
        print(f"{verdict:8} {time.monotonic() - start:4.0f} s  {mutant.name}  {words[:100]}", flush=True)
    print(f"{noticed} of {len(chosen)} noticed")
    return int(noticed < len(chosen))


FINGERPRINT = "unit/training/test_run_fingerprint.py"
MUTANTS = [
    # Steps.
    changed(
        "clipping before unscaling",
        "step/train_step.py",
        """\
    if spec.scale is not None:
        gradients = [g if g is None else g / tf.cast(loss_scale, g.dtype) for g in gradients]
    squares = unit_squares(spec.plan, gradients) if options.unit_norms else tf.zeros([0])
    gradients, norm = clip(gradients, [(e.reduction.shared, e.inside is not None) for e in trained], options.clip_norm)
""",
        """\
    squares = unit_squares(spec.plan, gradients) if options.unit_norms else tf.zeros([0])
    gradients, norm = clip(gradients, [(e.reduction.shared, e.inside is not None) for e in trained], options.clip_norm)
    if spec.scale is not None:
        gradients = [g if g is None else g / tf.cast(loss_scale, g.dtype) for g in gradients]
""",
        "unit/step/test_train_step.py::test_a_scaled_gradient_is_clipped_by_its_own_norm",
    ),
    changed(
        "good steps not reset after growth",
        "step/loss_scale.py",
        "tf.where(grow, 0, good)",
        "good",
        "unit/step/test_train_step.py::test_loss_scale_grows_after_a_row_of_good_steps",
    ),
    changed(
        "loss scale without a floor",
        "step/loss_scale.py",
        "tf.maximum(self.scale * factor, 1.0)",
        "self.scale * factor",
        "unit/step/test_train_step.py::test_loss_scale_ends_at_1",
    ),
    changed(
        "penalty once a micro-batch",
        "step/train_step.py",
        "        loss *= share\n",
        "        loss /= spec.replicas\n",
        "unit/step/test_losses.py::test_a_penalty_counts_once_however_a_batch_is_divided",
    ),
    changed(
        "clipped by the norm of all",
        "step/gradients.py",
        "use_norm=tf.cast(norm, dtype)",
        "use_norm=tf.cast(_joint(norms), dtype)",
        "unit/step/test_outer_step.py::test_what_is_shared_stays_so_beside_what_is_not",
    ),
    changed(
        "a skipped step ends the run",
        "training/failures.py",
        "bad = ~np.isfinite(losses) if scale is not None else",
        "bad = ~np.isfinite(losses) if False else",
        "integration/test_loop.py::test_a_run_in_pieces_is_the_run_in_one",
    ),
    changed(
        "probe in training mode",
        "step/probe.py",
        "model_outputs(spec.model, batch[0], False), training=False)",
        "model_outputs(spec.model, batch[0], True), training=False)",
        "unit/step/test_train_step.py::test_a_probe_measures_in_inference_mode",
    ),
    # Losses and evaluation.
    changed(
        "a mask that each replica counts for itself",
        "step/train_step.py",
        "    if not objective.counts or",
        "    if True or",
        "unit/step/test_losses.py::test_a_loss_is_that_of_fit_however_a_batch_is_divided[ignore_class-2-1]",
    ),
    changed(
        "a mask that each replica counts for itself in an evaluation",
        "step/evaluation_step.py",
        "    if spec.objective.counts and",
        "    if False and",
        "unit/step/test_losses.py::test_an_evaluation_is_that_of_keras_whatever_the_last_batch",
    ),
    changed(
        "replicas that train by themselves and divide by what all have",
        "step/train_step.py",
        "return own * spec.replicas",
        "return run_rounds(spec.collectives, [total_over_replicas(own)])[0]",
        "unit/step/test_losses.py::test_replicas_that_train_by_themselves_divide_by_what_they_have",
    ),
    changed(
        "a divisor without weights",
        "step/losses.py",
        'count = _Given(ones, self, "sum")(y_true, y_pred, weight)',
        'count = _Given(ones, self, "sum")(y_true, y_pred, None)',
        "unit/step/test_objective.py::test_the_loss_of_parts_of_any_size_is_that_of_the_whole",
    ),
    changed(
        "losses that layers add, forgotten",
        "step/objective.py",
        "with compat.fixed_losses(model), keras",
        "with keras",
        "unit/step/test_objective.py::test_the_loss_of_parts_of_any_size_is_that_of_the_whole",
    ),
    changed(
        "an activity regulariser of another replica",
        "step/evaluation_step.py",
        """\
    outputs = outputs_of(batch[0])
    if whole""",
        """\
    if whole""",
        "unit/step/test_losses.py::test_an_evaluation_is_that_of_keras_whatever_the_last_batch",
    ),
    changed(
        "examples that fill a batch up count",
        "step/evaluation_step.py",
        "tensor[: max(own, 1)]",
        "tensor[:room]",
        "unit/step/test_losses.py::test_an_evaluation_is_that_of_keras_whatever_the_last_batch",
    ),
    changed(
        "a metric that begins at 0",
        "step/objective.py",
        "value = initial + sums",
        "value = sums",
        "unit/step/test_objective.py::test_what_parts_add_to_metrics_gives_those_of_the_whole",
    ),
    changed(
        "a perplexity of what is masked",
        "step/metrics.py",
        "for each in (y_pred, values) if",
        "for each in (values,) if",
        "unit/step/test_metrics.py::test_bits_and_perplexity_are_those_of_the_weighted_mean",
    ),
    changed(
        "a target equal to the number of classes",
        "step/targets.py",
        "if high >= classes:",
        "if high > classes:",
        "unit/step/test_targets.py::test_class_ids_end_below_the_number_of_classes",
    ),
    # What is sent.
    changed(
        "place 256 of top-k in one byte",
        "reductions/encoding.py",
        "(block - 1).bit_length()",
        "(block - 2).bit_length()",
        "unit/reductions/test_compressors.py::test_a_block_of_more_than_a_byte_has_places_beyond_it",
    ),
    changed(
        "a mean over the padding",
        "reductions/encoding.py",
        "[-1, 1]) - SCALED * np.arange(length // SCALED), 0, SCALED)",
        "[-1, 1]) * 0 + SCALED, 0, SCALED).repeat(length // SCALED, axis=1)",
        "unit/reductions/test_compressors.py::test_quantized_takes_the_nearest_level",
    ),
    changed(
        "no warm start",
        "reductions/power_sgd.py",
        '        state["right"].assign(total)\n',
        "",
        "unit/reductions/test_compressors.py::test_power_sgd_is_the_papers",
    ),
    changed(
        "what was kept back, divided by the replicas",
        "step/outer_step.py",
        'start -= count * state["residual"]',
        'start -= state["residual"]',
        "unit/step/test_outer_step.py::test_what_an_exchange_leaves_out_is_trained_on_from",
    ),
    changed(
        "the outer step by the sum",
        "step/outer_step.py",
        "Term(window, own / replicas,",
        "Term(window, own,",
        "unit/step/test_outer_step.py::test_replicas_train_by_themselves_and_move_on_together",
    ),
    changed(
        "rows not given back after an evaluation",
        "step/outer_step.py",
        """\
    finally:
        for fragment in fragments:
            optimizers.write_rows(strategy, fragment.members)
""",
        """\
    finally:
        pass
""",
        "unit/step/test_outer_step.py::test_rows_are_exchanged_alone",
    ),
    changed(
        "residuals that grow with the replicas",
        "distributed/per_replica.py",
        'count if self.when_fewer == "sum" else len(array)',
        "len(array)",
        "integration/test_exchanges.py::test_the_number_of_replicas_may_change",
    ),
    changed(
        "a gather that costs its own worker",
        "selection/payload.py",
        '"gather": workers, "all-to-all"',
        '"gather": workers + 1, "all-to-all"',
        "unit/selection/test_selection.py::test_bytes_at_the_network_interface",
    ),
    changed(
        "a gather of two hops",
        "training/cost_model.py",
        '(2 if m.kind == "sum" else 1)',
        "2",
        "unit/training/test_cost_model.py::test_bytes_and_memory_are_exact",
    ),
    changed(
        "the first call timed",
        "distributed/network.py",
        "        if self._calls:\n",
        "        if True:\n",
        "integration/test_traffic.py::test_a_step_takes_the_median_of_all_calls_but_the_first",
    ),
    changed(
        "an offset that is forgotten",
        "reductions/local_sgd.py",
        "return done + 1 + (self.offset - done - 1) % self.sync_every",
        "return done + 1 + (-done - 1) % self.sync_every",
        "unit/step/test_outer_step.py::test_due_steps",
    ),
    changed(
        "statistics in all exchanges",
        "step/exchanges.py",
        "[] if shared or i else statistics",
        "[] if shared else statistics",
        "unit/step/test_outer_step.py::test_statistics_travel_with_the_first_exchange",
    ),
    # What is frozen, stored and shared.
    changed(
        "int8 for a layer whose bias is trained",
        "adapters/quantization.py",
        "if id(before) not in frozen or any(v.trainable and id(v) not in frozen for v in own):",
        "if id(before) not in frozen:",
        "unit/adapters/test_lora.py::test_a_layer_of_which_a_bias_is_trained_is_not_quantized",
    ),
    changed(
        "a merged kernel that stays frozen",
        "adapters/lora.py",
        "layer.lora_enabled, layer.lora_rank, kernel.trainable = False, None, True",
        "layer.lora_enabled, layer.lora_rank = False, None",
        "integration/test_take_home.py::test_merged_lora_is_the_same_model_and_can_be_trained",
    ),
    changed(
        "activations of another batch",
        "training/activation_cache.py",
        "& (self._met[new] == number)",
        "",
        "unit/training/test_activation_cache.py::test_a_stopped_run_goes_on_with_the_same_bits[autofreeze]",
    ),
    changed(
        "all workers draw the first one's masks",
        "step/layer_state.py",
        "enumerate(local(variable.value), topology.first)",
        "enumerate(local(variable.value))",
        "integration/test_exchanges.py::test_workers_are_the_replicas_that_are_simulated",
    ),
    changed(
        "generators alike after a resume",
        "training/build.py",
        """\
    state = state.restored(checkpoint)
    layer_state.spread(trainer.replicas.topology, trainer.layer_state.generators)
""",
        """\
    state = state.restored(checkpoint)
""",
        "unit/step/test_layer_state.py::test_masks_go_on_after_a_resume_on_any_number_of_replicas",
    ),
    changed(
        "rows of before the loading",
        "fit/optimizer.py",
        "            context.merge_call(lambda strategy: groups.read_rows(strategy, rows))\n",
        "            pass\n",
        "unit/fit/test_fit.py::test_a_loaded_model_goes_on_with_the_same_bits",
    ),
    changed(
        "slots of a unit that is left under fit",
        "fit/scheduler.py",
        "            optimizer.reset(set(active) - units)\n",
        "            pass\n",
        "unit/fit/test_scheduler.py::test_the_weights_are_the_loops[phases-reset]",
    ),
    changed(
        "norms of a schedule under fit not begun again",
        "fit/scheduler.py",
        "        squares.assign(np.zeros_like(squares))\n",
        "",
        "unit/fit/test_scheduler.py::test_the_weights_are_the_loops[autofreeze-keep]",
    ),
    changed(
        "flags of what a schedule has switched off under fit",
        "fit/scheduler.py",
        "                self._switch(frozenset(unit.name for unit in self._units), step=False)\n",
        "                pass\n",
        "unit/fit/test_scheduler.py::test_batch_norm_is_in_inference_mode_while_it_is_off",
    ),
    changed(
        "what fit has accumulated not begun again",
        "fit/optimizer.py",
        "                    own.assign(tf.zeros_like(own))\n",
        "                    pass\n",
        "unit/fit/test_accumulate.py::test_equals_a_large_batch[1-3]",
    ),
    # Checkpoints and the run fingerprint.
    changed(
        "loss scale not in the checkpoint",
        "training/state.py",
        'found |= {"loss_scale/scale": self.scale.scale, "loss_scale/good_steps": self.scale.good_steps}',
        "pass",
        "integration/test_loop.py::test_a_run_in_pieces_is_the_run_in_one",
    ),
    changed(
        "good steps not in the checkpoint",
        "training/state.py",
        '"loss_scale/scale": self.scale.scale, "loss_scale/good_steps": self.scale.good_steps',
        '"loss_scale/scale": self.scale.scale',
        "integration/test_loop.py::test_a_run_in_pieces_is_the_run_in_one",
    ),
    changed(
        "other rows not in the fingerprints",
        "checkpoints/fingerprints.py",
        'prints[f"{entry.path}[other rows]"] = digest(others)',
        "pass",
        "integration/test_loop.py::test_rows_that_are_not_selected_are_frozen",
    ),
    changed(
        "a checkpoint of [1, nan]",
        "checkpoints/files.py",
        "bool(np.isfinite(array).all())",
        "bool(np.isfinite(array).any())",
        "unit/checkpoints/test_files.py::test_one_number_that_is_not_finite_is_enough_to_save_nothing",
    ),
    changed(
        "a delta of [1, nan]",
        "export/delta.py",
        "if not np.isfinite(array).all():",
        "if not np.isfinite(array).any():",
        "unit/export/test_delta.py::test_nothing_is_assigned_of_what_is_refused",
    ),
    changed(
        "a second delta on top of the first",
        "export/delta.py",
        "for path in self._overwritten - paths}",
        "for path in ()}",
        "unit/export/test_delta.py::test_swapped_and_back_bit_for_bit",
    ),
    changed(
        "a delta whose metadata has no checksum",
        "export/delta.py",
        'rest = {name: text for name, text in metadata.items() if name != "sha256"}',
        "rest: dict[str, str] = {}",
        "unit/export/test_delta.py::test_hostile_bytes_are_refused_or_the_same_delta",
    ),
    changed(
        "digest without shape and dtype",
        "checkpoints/fingerprints.py",
        "str((array.dtype, array.shape)).encode()",
        'b""',
        "unit/checkpoints/test_files.py::test_a_digest_is_of_dtype_shape_and_values",
    ),
    changed(
        "newer checkpoints stay",
        "checkpoints/files.py",
        "], *damaged]:",
        "]]:",
        "unit/checkpoints/test_files.py::test_a_damaged_checkpoint_of_a_later_step_goes_with_the_next_that_is_saved",
    ),
    changed(
        "no fsync of a file",
        "files.py",
        "            _sync(each)\n",
        "            pass\n",
        "integration/test_checkpoint_kill.py::test_what_a_name_leads_to_is_on_the_disk_before_the_name_is",
    ),
    changed(
        "no fsync of the folder",
        "files.py",
        "        _sync(path.parent)  #",
        "        pass  #",
        "integration/test_checkpoint_kill.py::test_what_a_name_leads_to_is_on_the_disk_before_the_name_is",
    ),
    changed(
        "a folder whose files are not on the disk",
        "files.py",
        '(partial, *partial.rglob("*"))',
        "(partial,)",
        "unit/export/test_formats.py::test_what_is_exported_is_on_the_disk_before_its_name_is",
    ),
    changed(
        "0 is False",
        "validation.py",
        "type(before) is type(now) and before == now",
        "before == now",
        "unit/distributed/test_consistency.py::test_differences_that_look_equal_are_some_too",
    ),
    *(
        changed(
            f"fingerprint without {line.split(chr(34))[1]}",
            "training/run_fingerprint.py",
            f"        {line},\n",
            "",
            FINGERPRINT,
        )
        for line in (
            '"rules": [_rule(rule) for rule in plan.rules]',
            '"reduction": str(settings.reduction) + _between(settings.between_hosts)',
            '"seed": settings.seed',
            '"global_batch": settings.global_batch',
            '"precision": settings.precision',
            '"clip_norm": settings.clip_norm',
            '"statistics": settings.statistics',
            '"loss": _loss(objective)',
            '"data": {"name": data.name, "fingerprint": data.fingerprint, "functions": _functions(data)}',
            '"model": {entry.path: f"{entry.dtype}{list(entry.shape)}" for entry in plan.entries}',
            '"model_config": _model_config(model)',
            '"optimizers": [_optimizer(group) for group in optimizers]',
            '"frozen": checkpoints.frozen_fingerprints(model, plan, moving)',
        )
    ),
    *(
        changed(f"fingerprint without {name}", "training/run_fingerprint.py", before, after, FINGERPRINT)
        for name, before, after in (
            ("schedule", '{"schedule": str(settings.schedule), ', "{"),
            ("leave", ', "leave": settings.leave}', "}"),
            ("initial values", "    content[INITIAL] = checkpoints.model_fingerprints(model)\n", ""),
        )
    ),
    # Schedules.
    changed(
        "one turn later for who has waited",
        "schedules/budget.py",
        "-waits[i] if waits[i] >= starve",
        "-waits[i] if waits[i] > starve",
        "unit/schedules/test_budget.py::test_who_has_waited_comes_first",
    ),
    changed(
        "what was spent before does not count",
        "schedules/budget.py",
        "return [limit * end - used for",
        "return [limit * (end - self.step) for",
        "unit/schedules/test_budget.py::test_what_is_left_is_carried_over",
    ),
    changed(
        "the first step of a selection is timed",
        "training/schedule_runner.py",
        "return not timing or self._phase is None or",
        "return True or",
        "unit/training/test_schedule_runner.py::test_seconds_of_a_run_are_within_one_percent",
    ),
    changed(
        "what is chosen among fewer workers stays",
        "training/schedule_runner.py",
        "self._budget.outdated(trainer.units, self._state)",
        "not self._state",
        "unit/training/test_schedule_runner.py::test_the_budget_holds_on_more_replicas",
    ),
    changed(
        "nothing is saved for what is larger than the limit",
        "schedules/budget.py",
        "if before > 0 and self.fits(",
        "if before < 0 and self.fits(",
        "unit/schedules/test_budget.py::test_what_is_larger_than_the_limit_is_saved_for",
    ),
    changed(
        "norms of all intervals",
        "training/schedule_runner.py",
        "        self._squares = np.zeros_like(self._squares)\n",
        "",
        "unit/training/test_schedule_runner.py::test_equals_one_device_that_trains_the_same[autofreeze-float32-counts1]",
    ),
    changed(
        "an optimizer that is reset but for its slots",
        "step/optimizers.py",
        "            self.state[name].assign(value)\n",
        "            self.state[name].assign(value) if name.startswith('group_') else None\n",
        "unit/training/test_schedule_runner.py::test_slots_of_what_is_left[reset]",
    ),
    # Data, samples, what is exported and reported.
    changed(
        "parts that overlap",
        "data/held_out.py",
        "Part(source, count - held, held)",
        "Part(source, count - held - 1, held)",
        "unit/data/test_adapt.py::test_parts_share_all_examples_and_none_twice",
    ),
    changed(
        "a part that shuffles an order of its own",
        "data/held_out.py",
        'if trait(self.source, "own_order", False):',
        "if False:",
        "unit/data/test_own_orders.py::test_the_last_are_held_out",
    ),
    changed(
        "the rows of a batch",
        "data/py_dataset.py",
        "into[here] = array[rows[here]]",
        "into[here] = array[rows[here][::-1]]",
        "unit/data/test_own_orders.py::test_batches_are_taken_apart",
    ),
    changed(
        "a batch of another size",
        "data/py_dataset.py",
        "if rows > self._size or (rows < self._size and batch < self._count - 1):",
        "if rows > self._size:",
        "unit/data/test_own_orders.py::test_batches_unlike_the_others_are_named",
    ),
    changed(
        "columns of unlike types",
        "data/table_files.py",
        "if (before := types.setdefault(name, column.type)) != column.type:",
        "if (before := types.setdefault(name, column.type)) is None:",
        "unit/data/test_tables.py::test_mistakes_in_parquet_files_are_named",
    ),
    changed(
        "an epoch like the other",
        "data/order.py",
        "[seed, epoch], None",
        "[seed, 0 * epoch], None",
        "unit/data/test_batches.py::test_epochs_and_seeds_have_orders_of_their_own",
    ),
    changed(
        "records that are not compared with their checksums",
        "data/tfrecords.py",
        "if masked(google_crc32c.value(data)) != check:",
        "if False:",
        "unit/data/test_tfrecords.py::test_damaged_data_is_found_when_it_is_read",
    ),
    changed(
        "files of records that may change",
        "data/tfrecords.py",
        "if (now.st_size, now.st_mtime_ns) != tuple(self._index.states[file]):",
        "if False:",
        "unit/data/test_tfrecords.py::test_files_that_change_during_a_run",
    ),
    changed(
        "an index that is not compared with the files",
        "data/record_index.py",
        "{digest(states.tobytes().hex())}",
        "0",
        "unit/data/test_tfrecords.py::test_a_changed_file_is_indexed_again",
    ),
    changed(
        "an index that is not compared with the folders of images",
        "data/image_index.py",
        "st_mtime_ns != at for",
        "st_mtime_ns != at and False for",
        "unit/data/test_images.py::test_a_folder_that_has_changed_is_listed_again",
    ),
    changed(
        "pages of Parquet files whose checksums nobody compares",
        "data/table_files.py",
        "page_checksum_verification=True",
        "page_checksum_verification=False",
        "unit/data/test_tables.py::test_a_damaged_page_of_parquet_is_found_by_its_checksum",
    ),
    changed(
        "steps that wait until their batch is read, and no batch is read meanwhile",
        "data/batches.py",
        "return batches.prefetch(PREFETCHED)",
        "return batches",
        "integration/test_data.py::test_batches_are_read_while_a_step_computes_and_neither_waits_for_more",
    ),
    changed(
        "an example that draws the same in each epoch",
        "data/draws.py",
        "epochs), indices)",
        "0 * epochs), indices)",
        "unit/data/test_mapped.py::test_random_numbers_differ_between_epochs_examples_seeds_and_functions",
    ),
    changed(
        "a function of the data that may change",
        "data/functions.py",
        "_digest(_content(code)) if own else _full_name(function)",
        "_full_name(function)",
        "unit/data/test_functions.py::test_what_changes_is_named",
    ),
    changed(
        "evaluations that draw the same whatever the seed of the run",
        "training/evaluation.py",
        "seed=settings.seed, ",
        "",
        "integration/test_data.py::test_evaluations_of_a_run_draw_the_same_and_those_of_another_seed_others",
    ),
    changed(
        "a global generator that goes unnoticed where it decides by chance",
        "data/randomness.py",
        "_TRIES = 16",
        "_TRIES = 2",
        "unit/data/test_repeats.py::test_a_function_of_numpy_that_varies_is_noticed",
    ),
    changed(
        "arrays that are copied for each process",
        "data/shared.py",
        "_LEAST = 2**16",
        "_LEAST = 2**40",
        "unit/data/test_shared.py::test_an_array_is_the_same_and_its_data_is_not_in_the_pickle",
    ),
    changed(
        "a process that reads on when the run is gone",
        "data/readers.py",
        "    threading.Thread(target=_end_with_parent, daemon=True).start()\n",
        "",
        "unit/data/test_readers.py::test_processes_end_with_the_one_that_started_them",
    ),
    changed(
        "functions that draw the same",
        "data/mapped.py",
        'return 1 + trait(self.source, "depth", 0)',
        "return 1",
        "unit/data/test_mapped.py::test_random_numbers_differ_between_epochs_examples_seeds_and_functions",
    ),
    changed(
        "batches in the order in which threads are done",
        "data/batches.py",
        '"num_parallel_calls": threads, "deterministic": True',
        '"num_parallel_calls": threads, "deterministic": False',
        "unit/data/test_readers.py::test_threads_read_several_batches_at_once_in_the_same_order",
    ),
    changed(
        "a stream that each worker reads as if it were alone",
        "data/stream.py",
        ".shard(workers, worker)",
        ".shard(workers, 0)",
        "unit/data/test_stream.py::test_position_p_is_the_pth_example_on_any_number_of_workers_and_after_a_resume",
    ),
    changed(
        "sets of a mix that are shuffled alike",
        "data/mixed.py",
        "seed + (number << 32)",
        "seed",
        "unit/data/test_mixed.py::test_sets_of_one_size_are_shuffled_apart",
    ),
    changed(
        "boundary of top_p",
        "models/sampling.py",
        "(mass_before < top_p)",
        "(mass_before <= top_p)",
        "unit/models/test_sampling.py::test_the_nucleus_ends_where_its_mass_is_reached",
    ),
    changed(
        "one id more of top_k",
        "models/sampling.py",
        "ranks < top_k",
        "ranks <= top_k",
        "unit/models/test_sampling.py::test_truncate_keeps_what_numpy_keeps",
    ),
    changed(
        "an export that is not compared",
        "export/keras_file.py",
        "        return all(tf.nest.flatten(tf.nest.map_structure(same, ours, theirs)))\n",
        "        return True\n",
        "integration/test_take_home.py::test_a_file_that_loads_as_another_model_is_refused",
    ),
    changed(
        "a layer's share of another unit",
        "report/runs.py",
        "lambda v, unit=unit: v.unit == unit",
        "lambda v, unit=unit: True",
        "unit/report/test_report.py::test_a_layer_of_two_units_is_trained_in_parts",
    ),
    changed(
        "an input too many, for which its neighbour is taken",
        "models/inputs.py",
        "if others and isinstance(inputs, dict) and sorted(x)[: len(names)] != names:",
        "if False:",
        "unit/models/test_inputs.py::test_names_are_refused_where_keras_raises_or_takes_others",
    ),
    changed(
        "a failed compilation that is said to begin",
        "training/progress.py",
        "if timer is self._timer:",
        "if True:",
        "unit/training/test_progress.py::test_nothing_is_said_of_what_has_failed",
    ),
    # Workers.
    changed(
        "attempts by their number",
        "launch/supervisor.py",
        "max(taken, default=0) + 1",
        "len(taken) + 1",
        "e2e/test_supervisor.py::test_an_attempt_follows_the_last_that_is_there",
    ),
    changed(
        "the caller's rank not in what is proved",
        "distributed/handshake.py",
        "caller + listener + where",
        "caller[:26] + caller[30:] + listener + where",
        "unit/distributed/test_rendezvous.py::test_a_caller_that_is_proved_must_be_one_of_the_list_and_mean_this_worker",
    ),
    changed(
        "the listener's rank not in what is proved",
        "distributed/handshake.py",
        "caller + listener + where",
        "caller + listener[:26] + listener[30:] + where",
        "unit/distributed/test_rendezvous.py::test_a_caller_that_is_proved_must_be_one_of_the_list_and_mean_this_worker",
    ),
    changed(
        "loopback if one is",
        "distributed/rendezvous.py",
        'return all(host == "localhost"',
        'return any(host == "localhost"',
        "unit/distributed/test_rendezvous.py::test_one_worker_elsewhere_is_enough_to_be_reached_from_elsewhere",
    ),
    changed(
        "a proof that is not bound to its connection",
        "distributed/handshake.py",
        "bound = not guarded and",
        "bound = False and",
        "unit/distributed/test_rendezvous.py::test_all_meet_whoever_comes_first",
        "unit/distributed/test_rendezvous.py::test_a_caller_that_is_proved_must_be_one_of_the_list_and_mean_this_worker",
    ),
    changed(
        "a caller that needs no certificate",
        "distributed/tls.py",
        "context.verify_mode = ssl.CERT_REQUIRED",
        "context.verify_mode = ssl.CERT_OPTIONAL",
        "unit/distributed/test_tls.py::test_a_stranger_gets_no_proof",
    ),
    changed(
        "earlier versions of TLS",
        "distributed/tls.py",
        "context.minimum_version = ssl.TLSVersion.TLSv1_3",
        "context.minimum_version = ssl.TLSVersion.TLSv1_2",
        "unit/distributed/test_tls.py::test_nothing_below_tls_1_3_is_spoken",
    ),
    changed(
        "sessions of TLS that can be resumed",
        "distributed/tls.py",
        "called.num_tickets = 0",
        "called.num_tickets = 2",
        "unit/distributed/test_tls.py::test_the_key_is_what_the_secret_makes_of_it",
    ),
    changed(
        "a certificate for any host",
        "distributed/tls.py",
        "calling.check_hostname = names",
        "calling.check_hostname = False",
        "unit/distributed/test_tls.py::test_a_certificate_for_another_host_is_refused_by_who_calls",
    ),
    changed(
        "proofs that hold for any connection in TLS",
        "distributed/handshake.py",
        "transcript=talk.transcript + channel.binding",
        "transcript=talk.transcript",
        "unit/distributed/test_tls.py::test_who_passes_everything_on_gets_no_proof_though_its_certificate_is_good",
    ),
    changed(
        "TLS where only one of two workers has it",
        "distributed/handshake.py",
        "if not tls or talk.mine.tls != talk.theirs.tls:",
        "if not tls:",
        "unit/distributed/test_tls.py::test_workers_that_differ_in_tls_end_at_once_with_one_line",
    ),
    changed(
        "what comes with the last of the handshake",
        "distributed/tcp_connections.py",
        "self._receive(peer, peer.go_on)  # what has come",
        "peer.wanted = next(peer.incoming)  # what has come",
        "unit/distributed/test_tcp_connections.py::test_what_comes_with_the_last_of_the_handshake_is_read",
    ),
    changed(
        "a worker lost while nothing is waited for",
        "distributed/tcp_backend.py",
        "return self.failure or self._connections.lost(self.others)",
        "return self.failure",
        "unit/distributed/test_tcp_backend.py::test_a_worker_that_is_gone_is_known_where_nothing_waits_for_it",
    ),
    changed(
        "results before a slow reader has them",
        "distributed/tcp_backend.py",
        "return not self.waiting and not self.unsent",
        "return not self.waiting",
        "unit/distributed/test_tcp_backend.py::test_a_result_is_not_given_before_a_slow_reader_has_it",
    ),
    changed(
        "between workers the copies of all replicas",
        "distributed/worker_backend.py",
        "(len(sums), len(gathers)), level == BETWEEN",
        "(len(sums), len(gathers)), False",
        "unit/distributed/test_backends.py::test_levels",
    ),
    changed(
        "collectives of a backend in any order",
        "distributed/worker_backend.py",
        "tensor.dtype, name=name)",
        "tensor.dtype, name=name, stateful=False)",
        "unit/distributed/test_backends.py::test_ops_in_the_graph_are_counted_and_run_in_order",
    ),
    # Runs from Python.
    changed(
        "names of layers as the process has numbered them",
        "api/model.py",
        "        return names if old is None or new is not None else {}\n",
        "        return {}\n",
        "unit/api/test_train.py::test_a_cell_may_be_run_twice",
    ),
    changed(
        "the base of a delta is what a later call began with",
        "training/run_folder.py",
        "trainer.fingerprint | fingerprints.began(folder)",
        "trainer.fingerprint",
        "unit/api/test_train.py::test_a_run_that_goes_on_keeps_what_it_began_with",
    ),
    changed(
        "modes of BatchNorm that the run alone has set are saved",
        "models/copies.py",
        "self._trainable.get(id(layer), layer.trainable)",
        "layer.trainable",
        "unit/api/test_train.py::test_a_model_that_draws_and_one_with_statistics",
    ),
    changed(
        "what is left of a run is the first replica's own",
        "api/training.py",
        "with outer_step.agreed(state.topology.strategy, state.fragments):",
        "if True:",
        "unit/api/test_train.py::test_what_replicas_agree_on_is_what_is_left_between_exchanges",
    ),
    changed(
        "single variables of a copy that are no longer frozen",
        "models/copies.py",
        "if variable.trainable != trainable:",
        "if False:",
        "unit/api/test_given.py::test_what_the_user_has_frozen_stays_frozen",
    ),
    changed(
        "an optimizer without what it excludes",
        "step/optimizers.py",
        "        setattr(other, name, value)\n",
        "        pass\n",
        "unit/api/test_given.py::test_a_used_optimizer_keeps_its_exclusions",
    ),
]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
