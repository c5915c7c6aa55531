"""Supervised fine-tuning: conversations in, a model out that was trained on what the assistant says.

The settings of `tern sft` become those of a training run: conversations are made shards of tokens and loss masks in the
run's folder, the model's shape is that of what it starts from. Then pretraining's own job trains it.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ternlm.config import Config, SftConfig, config_from_dict, config_to_dict, diff, load_sft_config, render
from ternlm.config.layout import resolve_layout
from ternlm.config.section import ConfigError
from ternlm.config.sft import ConversationSource
from ternlm.convert.weights import OpenModel
from ternlm.data.atomic import write_atomically
from ternlm.data.prepare import prepare
from ternlm.data.protocols import ChatProtocol
from ternlm.data.samples import options_for
from ternlm.data.shards import MANIFEST
from ternlm.data.source import Source, open_source
from ternlm.data.tokenizer import Tokenizer, load_tokenizer
from ternlm.infer.chat import answer_texts, protocol_of
from ternlm.infer.params import SamplingParams
from ternlm.infer.text import continue_texts, stop_ids
from ternlm.model.decoder import CausalLM
from ternlm.parallel.launch import find_launch, log_from
from ternlm.train.adapters import read_start
from ternlm.train.models import open_model
from ternlm.train.pretrain import pretrain
from ternlm.train.run import Run

logger = logging.getLogger(__name__)

_WAIT_SECONDS, _TELL_SECONDS = 0.5, 120.0


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning run, ready to be trained."""

    config: Config
    tokenizer: Tokenizer
    protocol: ChatProtocol
    facts: dict[str, Any]
    """What its checkpoints tell of the model beside its shape: the chat template, and what ends an answer."""
    sources: tuple[Source, ...]


def fine_tune(settings: SftConfig, resume: str = "auto") -> Run:
    """Train to the end of the settings, or until something stops the run; return it with its trained model.

    resume: as for `set_up`. Under torchrun every rank calls it; rank 0 prepares the data.
    """
    launch = find_launch()
    log_from(launch)
    ready = open_sft(settings, first=launch.rank == 0, console=Console(stderr=True) if not launch.rank else None)
    if not launch.rank:
        _keep_settings(settings)
        _tell(ready)
    return pretrain(ready.config, resume, _answerer(ready, settings.data.system), ready.facts)


def open_sft(settings: SftConfig, first: bool = True, console: Console | None = None) -> FineTuning:
    """Open the model, prepare the conversations and return the run that they make.

    first: prepare; else wait until another process has. console: where to show progress. Raises ConfigError, DataError
    or ConvertError for what can't be trained, before anything is trained.
    """
    base = open_model(settings.load.checkpoint or "")
    tokenizer = load_tokenizer(settings.data.tokenizer) if settings.data.tokenizer else base.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{base.path}: has no tokenizer; name the model's own by data.tokenizer")
    chats = any(map(_holds_chats, (*settings.data.all_sources(), *settings.data.validation)))
    protocol = protocol_of(base, tokenizer, settings.data.chat) if chats else ChatProtocol("", ())
    tokenizer = protocol.fit(tokenizer)
    if tokenizer.vocab_size > base.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and {base.path} has rows for {base.config.vocab_size}; "
            "set data.tokenizer to the model's own"
        )

    def prepared(sources: Sequence[ConversationSource]) -> list[dict[str, Any]]:
        found = []
        for source in sources:
            folder = _prepare(source, settings, tokenizer, protocol, first, console)
            found.append(_as_prepared(source, folder))
        return found

    _check_before_preparing(settings, base)
    training, held_out = prepared(settings.data.all_sources()), prepared(settings.data.validation)
    config = _resolve(settings, base, training, held_out)
    fraction = config.data.validation_fraction
    sources = tuple(open_source(s, config.data, validation=False, fraction=fraction) for s in config.data.sources)
    if settings.train.steps is None:
        steps = settings.train.epochs * sum(source.num_sequences for source in sources) / config.batch.global_sequences
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"steps": max(math.ceil(round(steps, 6)), 1)})}
        )
    return FineTuning(config, tokenizer, protocol, _facts(base, tokenizer, protocol), sources)


def _holds_chats(source: ConversationSource) -> bool:
    """Whether a source may hold what a chat protocol is for."""
    return source.format not in ("text", "internlm") and not source.path.endswith(".bin")


def _check_before_preparing(settings: SftConfig, base: OpenModel) -> None:
    """Refuse in the first second what would be refused once all data are prepared."""
    longest, seq_len = base.config.max_position_embeddings, settings.data.seq_len
    if seq_len > longest and base.config.rope_scaling.kind == "default":
        raise ConfigError(
            f"data.seq_len = {seq_len} must be at most {longest}, the length that {base.path} was trained for; lower it"
        )
    sources = (settings.data.all_sources(), settings.data.validation)
    config = _resolve(settings, base, *([_as_prepared(source, source.path) for source in group] for group in sources))
    if not config.parallel.auto:
        resolve_layout(config, find_launch().world)
    read_start(config)


def _as_prepared(source: ConversationSource, path: Path | str) -> dict[str, Any]:
    """Return the settings of a training run's source whose shards lie at `path`."""
    weight = {} if source.weight is None else {"weight": source.weight}
    return {"name": source.name, "path": str(path), **weight}


def _resolve(
    settings: SftConfig, base: OpenModel, training: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> Config:
    """Return the settings of the training run; its steps, if they aren't given, are still to be counted."""
    given = config_to_dict(settings)
    data, train = given.pop("data"), given.pop("train")
    kept = ("seq_len", "packing", "too_long", "validation_fraction", "workers", "prefetch")
    train.pop("epochs")
    return config_from_dict(
        given
        | {
            "model": config_to_dict(base.config),
            "data": {name: data[name] for name in kept if name in data} | {"sources": training, "validation": held_out},
            "train": {"steps": 1} | train,
            "optimizer": given["optimizer"] | {"lr": settings.learning_rate()},
        }
    )


def _prepare(
    source: ConversationSource,
    settings: SftConfig,
    tokenizer: Tokenizer,
    protocol: ChatProtocol,
    first: bool,
    console: Console | None,
) -> Path:
    """Make a source's conversations shards in the run's folder; return where they are, complete."""
    options = options_for(protocol, source.format, settings.data.system)
    path = Path(source.path)
    if not path.exists():
        raise ConfigError(f"data: no file or folder {source.path}; is the path right, seen from the current folder?")
    parts = [str(path.resolve()), settings.data.on_error, tokenizer.fingerprint, options.settings(), _state_of(path)]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    folder = Path(settings.out) / "data" / f"{source.name}-{name}"
    if not first:
        _wait_for(folder / MANIFEST)
    elif not (folder / MANIFEST).is_file():
        prepare([path], tokenizer, folder, on_error=settings.data.on_error, conversations=options, console=console)
    return folder


def _wait_for(file: Path) -> None:
    """Wait until rank 0 has prepared the data; say for what, where it takes long."""
    began, told = time.monotonic(), False
    while not file.is_file():
        time.sleep(_WAIT_SECONDS)
        if not told and time.monotonic() > began + _TELL_SECONDS:
            logger.warning(
                "waiting for %s, which rank 0 writes; out must be on a file system that all nodes share", file
            )
            told = True


def _state_of(path: Path) -> list[list[Any]]:
    """Tell files apart from changed ones."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _facts(base: OpenModel, tokenizer: Tokenizer, protocol: ChatProtocol) -> dict[str, Any]:
    names = ("source", "chat_template", "generation", "eos_token")
    known = {name: base.facts[name] for name in names if name in base.facts}
    if not protocol.template:  # texts were trained: how the model chats is as it was
        return known
    ends = sorted({tokenizer.id_of(token) for token in protocol.stop})
    generation = {**known.get("generation", {}), "eos_token_id": ends}
    return {**known, "chat_template": protocol.template, "generation": generation, "eos_token": protocol.stop[0]}


def _answerer(ready: FineTuning, system: str | None) -> Any:
    """Return what answers prompts as questions in the run's protocol; where it has none, what continues them."""
    if not ready.protocol.template:
        return continue_texts
    ends = frozenset(ready.tokenizer.id_of(token) for token in ready.protocol.stop) | stop_ids(ready.tokenizer)

    def answer(
        model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, temperature: float
    ) -> list[str]:
        first = [] if system is None else [{"role": "system", "content": system}]
        conversations = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=0, stop_ids=ends)
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would be compiled again for every length
            return answer_texts(model, ready.tokenizer, ready.protocol.template, conversations, params)

    return answer


def _keep_settings(settings: SftConfig) -> None:
    """Write the settings into the run's folder, where its own say nothing of conversations; tell what has changed."""
    file = Path(settings.out) / "sft.toml"
    if file.is_file():
        with suppress(ConfigError, OSError):  # one that can't be read any more tells nothing
            for line in diff(load_sft_config(file), settings):
                if line.startswith(("data.", "load.")):
                    logger.warning("changed since this run began or went on: %s", line)
    write_atomically(file, render(settings).encode())


def _tell(ready: FineTuning) -> None:
    """Log what is trained on what."""
    config = ready.config
    for source in ready.sources:
        rows, tokens = source.num_sequences, source.num_tokens
        lost = [
            f"{count:,} {what}" for count, what in ((source.num_cut, "cut"), (source.num_dropped, "left out")) if count
        ]
        logger.info(
            "%s: %s samples, %s tokens in %s sequences of %s (%.1f%% full)%s",
            source.name,
            f"{source.num_documents:,}",
            f"{tokens:,}",
            f"{rows:,}",
            f"{config.data.seq_len:,}",
            100 * tokens / (rows * config.data.seq_len),
            f"; too long: {', '.join(lost)}" if lost else "",
        )
    whole = config.model.num_params
    trained = config.adapter.num_params(config.model) if config.adapter else whole
    logger.info(
        "%s steps of %s sequences; %.4g M of %.4g M parameters are trained",
        f"{config.train.steps:,}",
        config.batch.global_sequences,
        trained / 1e6,
        (whole + trained if config.adapter else whole) / 1e6,
    )
