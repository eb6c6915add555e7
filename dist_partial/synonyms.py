"""What names from elsewhere are called here: those of Keras's `fit`, of PyTorch's trainers and of other gin files."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from dist_partial.errors import UserError
from dist_partial.validation import nearest

# Ours, as gin files have it | what differs, after a comma or "=" | theirs, each of them once.
_TABLE = """
run.global_batch | , the examples of an update over all replicas | batch batch_size train_batch_size bs
run.global_batch | = that of one replica x replicas x run.accumulate | per_device_batch_size per_replica_batch_size
    per_device_train_batch_size micro_batch_size
run.steps | = epochs x examples / run.global_batch | epoch epochs num_epochs n_epochs max_epochs num_train_epochs
run.steps | , of the whole run, which goes on from the newest checkpoint of its folder by itself | initial_epoch
    last_epoch resume resume_from_checkpoint
run.steps | , the updates of the whole run | max_steps num_steps n_steps train_steps training_steps num_train_steps
    total_steps iterations num_iterations max_iters updates
run.steps_per_loop | , updates in one call of the compiled function | steps_per_execution
run.data | , what makes the Dataset, of training and held-out examples | dataset datasets train_data train_dataset
    train_ds training_data dataloader train_loader input_fn
run.data | , what makes the Dataset, whose evaluation these are | eval_data eval_dataset val_data val_dataset val_ds
    validation_data validation_dataset test_data
run.data | , made by dataset(..., held_out=0.2), where a tenth is too little or too much | validation_split val_split
    test_size
run.data | , whose examples are then (x, y, weight) | sample_weight sample_weights
run.data | , both as one: (x, y) | x y inputs targets
run.model | , what makes the model | net network module backbone model_fn
run.optimizer | , what makes it | optim optimiser opt
run.loss | | loss_fn loss_function criterion
run.metrics | , a list | metric
run.eval_every | , the updates between evaluations | eval_steps eval_interval eval_freq eval_frequency evaluate_every
    validation_freq validation_interval val_every val_interval val_check_interval steps_per_epoch
run.eval_examples | = batches x run.global_batch | validation_steps val_steps validation_batches val_batches
    eval_batches
run.eval_first | | eval_at_start eval_on_start evaluate_first
run.save_every | , the updates between checkpoints | checkpoint_every checkpoint_interval checkpoint_freq
    checkpoint_steps ckpt_every save_steps save_interval save_freq
run.save_async | , True or False | async_save async_checkpoint async_checkpointing enable_async_checkpointing
    save_asynchronously use_async
run.keep | , how many checkpoints | max_to_keep save_total_limit keep_checkpoints
run.best | , a number of the evaluation such as 'loss' | monitor best_metric metric_for_best_model save_best
    save_best_only
run.patience | , in evaluations, beside run.best | early_stopping early_stop early_stopping_patience
run.clip_norm | , of the whole summed gradient | clip clipping grad_clip gradient_clip gradient_clipping clipnorm
    global_clipnorm max_grad_norm clip_grad_norm gradient_clip_val
run.accumulate | , into how many micro-batches a batch is divided | grad_accum grad_accum_steps gradient_accumulation
    gradient_accumulation_steps accumulation_steps accumulate_grad_batches
run.precision | , such as 'mixed_bfloat16' | mixed_precision dtype dtype_policy compute_dtype amp autocast fp16
    bf16 floatx
run.jit_compile | | jit xla use_xla
run.seed | , from which each epoch's order is drawn; a tf.data.Dataset keeps its own | shuffle
run.profile | , (first, last) | profile_batch profiler
run.trackers | , such as [@MLflow()] | report_to tracker logger loggers log_with wandb mlflow use_wandb
run.eval_every | , the updates between the lines of an evaluation | verbose verbosity log_every logging_steps
run.seed | | random_seed rng_seed manual_seed random_state
run.rules | , lines of ('train' or 'freeze', pattern) | trainable trainable_layers layers freeze frozen unfreeze
Rule.lora | , the rank, of a rule in run.rules | lora lora_r lora_rank
Adam.learning_rate | , or that of another optimizer | lr learning_rate base_lr peak_lr
Adam.learning_rate | , a schedule such as @CosineDecay() | lr_schedule lr_scheduler scheduler warmup warmup_steps
AdamW.weight_decay | , with run.optimizer = @AdamW | weight_decay wd
Adam.use_ema | , or that of another optimizer | ema use_ema
Adam.ema_momentum | , with use_ema, or that of another optimizer | ema_decay ema_momentum
replicas.kind | , where 'mirrored' takes all GPUs of this machine | gpus num_gpus n_gpus devices accelerator strategy
replicas.cpu | , simulated on the CPU; of GPUs all are taken | num_replicas n_replicas num_devices num_cpus cpus
dist-partial launch local --workers | , which starts them | workers num_workers world_size nodes num_nodes hosts
dist-partial train --run_dir | , the run folder | run_dir output_dir out_dir log_dir logdir logging_dir model_dir
    save_dir checkpoint_dir ckpt_dir workdir
sample.length | , symbols to generate | max_tokens max_new_tokens new_tokens num_tokens n_tokens max_length
sample.count | , how many texts | n num_samples n_samples samples num_return_sequences
sample.temperature | | temp t
sample.temperature | , where 0 is greedy | greedy do_sample
sample.top_k | | k topk
sample.top_p | | p topp nucleus
sample.prompt | | text prefix start start_text seed_text
"""
_LINES = [line.split("|") for line in _TABLE.replace("\n ", " ").strip().splitlines()]
SYNONYMS = {theirs: (ours.strip(), differs.strip()) for ours, differs, names in _LINES for theirs in names.split()}
# What was called otherwise here before, in gin files and in Python.
_RENAMED = {
    "byte_budget": "budget, whose budget.bytes is an average over the run",
    "ByteBudget": "Budget, whose bytes are an average over the run",
}
# What owns such names elsewhere.
OWNERS = frozenset(["train", "trainer", "training", "fit", "loop", "args", "config", "settings", "optimizer"])


def known_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that says, of an argument that it has not, what is near.

    Examples:
        >>> @known_arguments
        ... def mine(accumulate=1):
        ...     pass
        >>> mine(accumulat=2)
        Traceback (most recent call last):
        dist_partial.errors.UserError: mine has no argument 'accumulat'; nearest: 'accumulate'
    """
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() - set(names):
            raise UserError(f"{owner} has no argument {name!r}{nearest(name, names, always=True)}")
        return function(*args, **kwargs)

    return checked


def meant(name: str) -> str:
    """Ends a message about a name that is not known here, if it is one from elsewhere, with what to write.

    Args:
        name: what was written, without an owner before it.

    Examples:
        >>> meant("epochs")
        ': write run.steps = epochs x examples / run.global_batch'
        >>> meant("stepz")
        ''
    """
    ours, differs = SYNONYMS.get(name.lower().replace("-", "_"), ("", ""))
    return ours and f": write {ours}{' ' * differs.startswith('=')}{differs}"


def renamed(name: str) -> str:
    """Ends a message about a name that is not known any more with the new one.

    Examples:
        >>> renamed("byte_budget")
        ': write budget, whose budget.bytes is an average over the run'
        >>> renamed("phases")
        ''
    """
    return f": write {_RENAMED[name]}" if name in _RENAMED else ""
