"""The training job: settings in; checkpoints, metrics and samples out. Fine-tuning is a caller of it."""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from ternlm.checkpoint.folders import remove_incomplete
from ternlm.config import Config, render
from ternlm.config.layout import resolve_layout
from ternlm.config.section import ConfigError, UserError
from ternlm.data.atomic import write_atomically
from ternlm.data.tokenizer import Tokenizer
from ternlm.model.decoder import CausalLM
from ternlm.monitor.peak import device_memory_gib, device_name, device_peak
from ternlm.monitor.sinks import Sink, open_sinks
from ternlm.parallel.group import process_group
from ternlm.parallel.launch import find_launch, log_from
from ternlm.parallel.mesh import Mesh, make_mesh
from ternlm.planner.auto import cluster_of, known_cluster, take_best
from ternlm.planner.cluster import Cluster
from ternlm.planner.plan import make_plan
from ternlm.train.lock import run_lock
from ternlm.train.loop import Every, out_of_patience, train_loop, why_out_of_patience
from ternlm.train.precision import choose_device
from ternlm.train.report import Reporter
from ternlm.train.run import Run, check_alike, set_up
from ternlm.train.shortage import ShortageGuard
from ternlm.train.validate import judge, validate
from ternlm.train.watch import PlanWatch

logger = logging.getLogger(__name__)

SHOWN_SECONDS = 10.0
"""How long a network file system may take to show a new file to other nodes."""

Continue = Callable[[CausalLM, Tokenizer, Sequence[str], int, float], list[str]]
"""`(model, tokenizer, prompts, max_new_tokens, temperature) -> continuations`."""


def pretrain(
    config: Config,
    resume: str = "auto",
    continue_texts: Continue | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Run:
    """Train to the end of `config`, or until something stops the run; return it with its trained model.

    resume, facts: see `set_up`. continue_texts: how to sample, needed only where `sample.every_steps` is set.
    Every error in the settings or the data is raised before the first step.
    """
    if config.sample.every_steps and continue_texts is None:
        raise ConfigError("sample.every_steps needs a sampler; pass continue_texts")
    launch = find_launch()
    log_from(launch)
    if not config.parallel.auto:  # before a device is touched
        resolve_layout(config, launch.world)
    device = choose_device(config.compute.device, launch.local_rank if launch.world > 1 else None)
    seen = device_name(device), launch.node_size, device_memory_gib(device)
    config = take_best(config, launch.world, *seen)
    layout = resolve_layout(config, launch.world)
    cluster = known_cluster(config, *seen)
    if config.monitor.plan_every_steps:
        cluster = cluster_of(config, "monitor.plan_every_steps", *seen)
        make_plan(config, cluster, launch.world)  # tells at once what can't be planned
    guard = ShortageGuard(config, layout, launch, device, cluster)
    if not launch.rank:
        guard.warn()
    with process_group(launch, device, config.parallel.timeout_minutes), ExitStack() as stack:
        mesh = make_mesh(layout, launch.rank, device, config.parallel.timeout_minutes)
        check_alike("settings", render(config), mesh)
        _first_rank_enters(Path(config.out), mesh, stack)
        _check_shared(Path(config.out), mesh)
        with guard:
            run = guard.run = set_up(config, resume, mesh, launch.restarted, facts)
            return _train(run, continue_texts, cluster)


def _train(run: Run, continue_texts: Continue | None, cluster: Cluster | None) -> Run:
    config = run.config
    _check_samples(run)
    if run.mesh.is_first:
        write_atomically(run.folder / "config.toml", render(config).encode())
    if run.progress.step >= config.train.steps:
        run.stopped = f"it is complete: {run.progress.step} of {config.train.steps} steps"
        logger.info("%s: %s", run.folder, run.stopped)
        run.loader.close()
        return run
    if out_of_patience(run):
        run.stopped = why_out_of_patience(run)
        logger.info("%s: %s", run.folder, run.stopped)
        run.loader.close()
        return run
    budget = config.train.max_minutes * 60 if config.train.max_minutes else None
    sinks: Sequence[Sink] = ()
    if run.mesh.is_first:
        sinks = open_sinks(config.monitor, run.folder, config.train.steps, run.progress.step, budget)
    with ExitStack() as stack:
        stack.enter_context(closing(run.loader))
        reporter = stack.enter_context(closing(Reporter(run, sinks, _peak_tflops(run))))
        extras = _extras(run, reporter, continue_texts)
        if cluster and config.monitor.plan_every_steps:
            watch = stack.enter_context(closing(PlanWatch(run, cluster)))
            extras.insert(0, watch.every(lambda step: step % config.monitor.plan_every_steps == 0))
        if config.validation.at_start and not run.progress.step:
            reporter.report(None, 0.0, validate(run), last=False)
        train_loop(run, run.loader, reporter, extras)
    return run


def _first_rank_enters(folder: Path, mesh: Mesh, stack: ExitStack) -> None:
    """Let rank 0 lock the run's folder and clear it; the others wait, and end where it may not."""
    trouble: Exception | None = None
    if mesh.is_first:
        try:
            stack.enter_context(run_lock(folder))
            remove_incomplete(folder)  # left by a killed run, perhaps on a disk that is full
        except Exception as failure:
            trouble = failure
    if any(mesh.agree([trouble is not None])):
        raise trouble or ConfigError(f"rank 0 can't train in {folder}; its message says why")


def _check_shared(folder: Path, mesh: Mesh) -> None:
    """Refuse to start where a rank doesn't see what rank 0 writes: checkpoints need the parts of all. Collective."""
    if mesh.layout.world == 1:
        return
    number = random.SystemRandom().randrange(2**48)
    (number,) = (int(value) for value in mesh.agree([number if mesh.is_first else -1]))
    sign = folder / f".rank-0-was-here-{number}"
    if mesh.is_first:
        sign.touch()
    mesh.agree([0.0])
    began = time.monotonic()
    while not (seen := sign.exists()) and time.monotonic() < began + SHOWN_SECONDS:
        time.sleep(0.2)
    blind = mesh.agree([-1 if seen else mesh.place.rank])[0]
    if mesh.is_first:
        sign.unlink()
    if blind >= 0:
        raise ConfigError(
            f"rank {blind:.0f} doesn't see what rank 0 writes in out = {str(folder)!r}; set out to a folder on a file "
            "system that all nodes share"
        )


def _check_samples(run: Run) -> None:
    """Refuse prompts that could not be continued, before hours have gone into training."""
    sample, model = run.config.sample, run.config.model
    if not sample.every_steps:
        return
    if run.tokenizer is None:
        raise ConfigError("sample.every_steps needs a tokenizer, which the data don't tell; set data.tokenizer")
    for prompt in sample.prompts:
        length = len(run.tokenizer.encode(prompt)) + (run.tokenizer.bos_id is not None)
        if not length:
            raise ConfigError(f"sample.prompts: {prompt!r} has no token and the tokenizer no bos; give it some text")
        longest = model.max_position_embeddings
        if length + sample.max_new_tokens > longest and model.rope_scaling.kind == "default":
            raise ConfigError(
                f"sample.prompts: {prompt!r} has {length} tokens, which with sample.max_new_tokens = "
                f"{sample.max_new_tokens} exceed model.max_position_embeddings = {longest}; shorten one of them"
            )


def _peak_tflops(run: Run) -> float:
    if run.config.compute.peak_tflops:
        return run.config.compute.peak_tflops
    peak = device_peak(run.device, run.dtype)
    logger.info("MFU is against %.3g TFLOPS (%s)", peak.tflops, peak.source)
    return peak.tflops


def _extras(run: Run, reporter: Reporter, continue_texts: Continue | None) -> list[Every]:
    validation, sample = run.config.validation, run.config.sample
    extras = []
    if validation.every_steps:

        def hold_out() -> dict[str, float]:
            metrics = validate(run)
            judge(run, metrics)
            return metrics

        extras.append(Every(_each(validation.every_steps, run.config.train.steps), hold_out))
    if sample.every_steps and continue_texts is not None:

        def act() -> dict[str, float]:
            try:
                texts = sample_texts(run, continue_texts)
            except UserError as trouble:  # such as logits that aren't finite, which training itself deals with
                logger.warning("no samples after step %d: %s", run.progress.step, trouble)
                return {}
            for prompt, text in zip(sample.prompts, texts, strict=True):
                reporter.text(f"sample/{prompt}", text)
            return {}

        extras.append(Every(_each(sample.every_steps, run.config.train.steps), act))
    return extras


def sample_texts(run: Run, continue_texts: Continue) -> list[str]:
    """Continue the prompts of `sample` with the model as it is now."""
    if run.tokenizer is None:
        raise ConfigError("sample needs a tokenizer; set data.tokenizer")
    sample = run.config.sample
    with run.autocast():
        return continue_texts(run.model, run.tokenizer, sample.prompts, sample.max_new_tokens, sample.temperature)


def _each(steps: int, last: int) -> Callable[[int], bool]:
    return lambda step: step % steps == 0 or step == last
