"""`tern quickstart`: raw text in, a small trained model and its samples out, on any machine, without a download.

The text is the source of Python's standard library: tens of megabytes of code and English that every Python brings.
Everything goes through the same functions as a real run: tokenizer, shards, `pretrain`, checkpoints.
"""

import hashlib
import json
import lzma
import math
import shlex
import sysconfig
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ternlm.config import Config, ConfigError, config_from_dict, load_config, render
from ternlm.data.atomic import write_atomically
from ternlm.data.prepare import prepare
from ternlm.data.train_tokenizer import train_tokenizer
from ternlm.train.loop import train_step
from ternlm.train.pretrain import Continue, pretrain
from ternlm.train.run import Run, set_up
from ternlm.train.validate import validate

VOCAB_SIZE = 2048
PROMPTS = ("def read_file(path", "class Queue:\n", "import os\nimport sys\n", '"""Return the ')
_HELD_OUT_ONE_IN = 25
_BUDGET = 1.5
"""Of the minutes asked for, what training may take at most: the speed measured before it is an estimate."""


@dataclass(frozen=True)
class Corpus:
    """Files to train on, and files that neither the model nor the tokenizer ever sees."""

    training: list[Path]
    held_out: list[Path]


def quickstart(out: Path, minutes: float, threads: int, continue_texts: Continue) -> Run:
    """Train a small model for about `minutes` and show what it learnt; run again, it goes on where it was."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    corpus = find_corpus(Path(sysconfig.get_paths()["stdlib"]))
    console.rule("[bold]1. Text to tokens")
    _prepare_data(corpus, out, console)
    console.rule("[bold]2. Pretraining")
    config, before = _plan(out, minutes, threads, console)
    run = pretrain(config, "auto", continue_texts)
    if run.stopped and run.stopped.startswith("received"):
        _show_how_to_go_on(console, run, config)
        return run
    console.rule("[bold]3. What it learnt")
    after = validate(run)["validation_bpb/stdlib"]
    _show_result(console, run, before, after, corpus)
    _show_samples(console, run, continue_texts)
    _show_next(console, out)
    return run


def find_corpus(library: Path) -> Corpus:
    """List the library's Python files, split by a hash of their names."""
    packages = {"site-packages", "dist-packages"}  # what users installed is not the library
    files = sorted(
        p for p in library.rglob("*.py") if packages.isdisjoint(p.relative_to(library).parts) and _is_text(p)
    )
    if len(files) < 100:
        raise ConfigError(
            f"{library} holds {len(files)} Python files; quickstart needs a Python with its library's source: "
            "install the full package of it, or give `tern data prepare` a text of your own"
        )

    def held_out(path: Path) -> bool:
        name = path.relative_to(library).as_posix()
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT_ONE_IN == 0

    return Corpus([p for p in files if not held_out(p)], [p for p in files if held_out(p)])


def quickstart_config(out: Path, steps: int, minutes: float, threads: int) -> Config:
    """Return the settings; sizes and rates were chosen by trying (docs/log.md)."""
    return config_from_dict(
        {
            "out": str(out),
            "model": {
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 192,
                "num_hidden_layers": 4,
                "num_attention_heads": 3,
                "intermediate_size": 512,
                "attention_bias": True,
                "max_position_embeddings": 512,
                "init": {"kind": "plain"},
            },
            "data": {
                "seq_len": 256,
                "sources": [{"name": "stdlib", "path": str(out / "data" / "training")}],
                "validation": [{"name": "stdlib", "path": str(out / "data" / "held_out")}],
            },
            "batch": {"global_sequences": 8, "microbatch_sequences": 8},
            "train": {"steps": steps, "max_minutes": _BUDGET * minutes},
            "optimizer": {"kind": "muon", "lr": 6e-3, "muon_lr": 0.03},
            "schedule": {"kind": "wsd", "warmup_fraction": 0.02, "decay_fraction": 0.6},
            "compute": {"threads": threads},
            "checkpoint": {"every_steps": 0, "every_minutes": 1.0},
            "validation": {"max_sequences": 0},
        }
    )


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:  # the library has some, to test encodings
        return False
    except OSError:  # not everyone's to read, or a link to nowhere
        return False


def _prepare_data(corpus: Corpus, out: Path, console: Console) -> None:
    tokenizer, data = out / "tokenizer", out / "data"
    if not (tokenizer / "tokenizer.json").exists():
        train_tokenizer(corpus.training, VOCAB_SIZE, tokenizer, format="text")
    prepare(corpus.training, tokenizer, data / "training", format="text", console=console)
    prepare(corpus.held_out, tokenizer, data / "held_out", format="text", console=console)


def _plan(out: Path, minutes: float, threads: int, console: Console) -> tuple[Config, float]:
    """Return the run's settings and the held-out bits per byte before training.

    A run that was stopped keeps the settings it began with; a new one gets as many steps as fit into `minutes` by
    the time that a few steps take.
    """
    notes = out / "quickstart.json"
    if notes.exists():
        config = load_config(out / "config.toml")
        _tell_what_is_kept(config, minutes, threads, console)
        return config, json.loads(notes.read_text())["bpb_before"]
    started = time.monotonic()
    probe = set_up(quickstart_config(out, 1000, minutes, threads), "never")
    console.print(f"a model of {probe.config.model.num_params / 1e6:.1f} M parameters, on {probe.device}")
    with probe.loader:
        batches = iter(probe.loader)
        train_step(probe, next(batches))  # compiles
        begun = time.monotonic()
        for microbatches in islice(batches, 5):
            train_step(probe, microbatches)
        step_seconds = (time.monotonic() - begun) / 5
    left = minutes * 60 - (time.monotonic() - started)
    config = quickstart_config(out, max(int(0.97 * left / step_seconds), 5), minutes, threads)
    before = validate(set_up(config, "never"))["validation_bpb/stdlib"]
    write_atomically(out / "config.toml", render(config).encode())
    write_atomically(notes, json.dumps({"bpb_before": before}).encode())
    return config, before


def _tell_what_is_kept(config: Config, minutes: float, threads: int, console: Console) -> None:
    asked = {"minutes": minutes, "threads": threads}
    for option, kept in _options_of(config).items():
        if not math.isclose(kept, asked[option]):
            console.print(
                f"{config.out} goes on as it began, with --{option} {kept:g}, not {asked[option]:g}; "
                "for other settings choose another --out",
                highlight=False,
                markup=False,
            )


def _options_of(config: Config) -> dict[str, float]:
    """Return the command line's numbers that led to these settings."""
    return {"minutes": (config.train.max_minutes or 0.0) / _BUDGET, "threads": config.compute.threads}


def _show_how_to_go_on(console: Console, run: Run, config: Config) -> None:
    options = " ".join(f"--{option} {value:g}" for option, value in _options_of(config).items())
    console.print(
        f"saved at step {run.progress.step} of {config.train.steps}; to go on:\n"
        f"  tern quickstart {options} --out {shlex.quote(config.out)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _show_result(console: Console, run: Run, before: float, after: float, corpus: Corpus) -> None:
    text = b"".join(path.read_bytes() for path in corpus.held_out)
    together = _lzma_bits([text]) / len(text)
    apart = _lzma_bits([path.read_bytes() for path in corpus.held_out]) / len(text)
    progress = run.progress
    console.print(
        f"{progress.tokens / 1e6:.2f} M tokens in {progress.step} steps and {progress.seconds:.0f} s, "
        f"{progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s\n"
        f"bits per byte on {len(corpus.held_out)} files it never saw ({len(text) / 1e6:.2f} MB): "
        f"[bold]{before:.2f}[/] before, [bold green]{after:.3f}[/] after\n"
        f"lzma needs {apart:.3f} for the same bytes, each file for itself, and {together:.3f} for all in one piece"
    )


def _lzma_bits(texts: list[bytes]) -> int:
    return sum(8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in texts)


def _show_samples(console: Console, run: Run, continue_texts: Continue) -> None:
    if run.tokenizer is None:
        raise ConfigError(f"the data of {run.folder} has lost its tokenizer; remove the folder and start again")
    texts = continue_texts(run.model, run.tokenizer, PROMPTS, 64, 0.7)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        console.print(Text(prompt, style="bold cyan") + Text(text))
        console.rule(style="dim")


def _show_next(console: Console, out: Path) -> None:
    console.print(
        "What to type next:\n"
        f"  tern generate {out} --prompt 'def '        more of its writing\n"
        f"  tern data inspect {out}/data/training      what it was trained on\n"
        f"  tern config show {out}/config.toml         every setting, explained\n"
        f"  tern quickstart --minutes 30 --out runs/longer   the same, for longer",
        highlight=False,
        markup=False,
    )
