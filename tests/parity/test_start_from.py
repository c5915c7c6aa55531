"""Training that starts from a Hugging Face folder is the same on any layout; each rank reads its own part."""

from pathlib import Path
from typing import Any

from cases import settings_of
from rank_steps import errors, merged, run_steps, start
from ranks import run_ranks

from ternlm.config.support import parse_case

LAYOUTS = ["2: tensor-sequence=2", "2: sharding=2/2/2", "2: pipeline-1f1b=2"]


def settings(folder: Path, case: str, out: str) -> dict[str, Any]:
    changes = {"load": {"from": str(folder / "hf")}, "out": str(folder / out)}
    return merged(settings_of(parse_case(case)), changes)


def train_each(folder: Path, truth: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the errors of each layout on this rank."""
    found = {}
    for number, case in enumerate(LAYOUTS):
        run = start(folder, settings(folder, case, f"start-{number}"), resume="never")
        found[case] = errors(run_steps(run, 1), truth)
    return found


def test_every_layout_starts_from_the_same_weights(shards: Path) -> None:
    from ternlm.convert.export_hf import export_hf
    from ternlm.train.models import open_model

    run = start(shards, merged(settings_of(parse_case("1:")), {"seed": 99, "out": str(shards / "saved")}))
    run.loader.close()
    run.save()
    run.saver.finish()
    export_hf(open_model(shards / "saved"), shards / "hf", shard_bytes=50_000)
    truth = run_steps(start(shards, settings(shards, "1:", "alone"), resume="never"), 1)
    for found in run_ranks(2, train_each, shards, truth):
        for case, each in found.items():
            assert each["loss"] < 2e-5, case
            assert each["weights"] < 1e-5, case


def save_each(folder: Path) -> None:
    """Train a step on each layout, and save."""
    for number, case in enumerate(LAYOUTS):
        changes = merged(settings_of(parse_case(case)), {"out": str(folder / f"export-{number}")})
        run = start(folder, changes, resume="never")
        run_steps(run, 1)
        run.save()
        run.saver.finish()


def test_any_layouts_checkpoint_is_exported_as_the_same_model(shards: Path) -> None:
    from ternlm.convert.export_hf import export_hf
    from ternlm.train.models import open_model

    changes = merged(settings_of(parse_case("1:")), {"out": str(shards / "export-alone")})
    truth = run_steps(start(shards, changes, resume="never"), 1)["weights"]
    run_ranks(2, save_each, shards)
    for number, case in enumerate(LAYOUTS):
        export_hf(open_model(shards / f"export-{number}"), shards / f"exported-{number}")
        weights = open_model(shards / f"exported-{number}").weights
        assert set(weights.names()) == truth.keys()
        for name, (_, wanted) in truth.items():
            assert float((weights.read(name) - wanted).abs().max() / wanted.abs().max()) < 1e-5, (case, name)
