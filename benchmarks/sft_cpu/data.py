"""The questions and answers as each library's users keep them, and the model as each of them loads it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interleaved.processes import REPO

from ternlm.data.chat import render

PEERS = Path(__file__).resolve().parent / "peers"
# litgpt knows by the folder's name that a prompt of this model begins with a special token, and drops it otherwise.
MODEL_NAME = "SmolLM2-135M-Instruct"


def export_model(folder: Path) -> Path:
    """Write the model to a Hugging Face folder in float32; return it."""
    out = folder / MODEL_NAME
    export = [sys.executable, "-m", "ternlm", "export", "smollm2", "--to", "hf", "--dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    subprocess.run([*export, "--out", str(out)], check=True, env=environment, stdout=subprocess.DEVNULL)
    return out


def convert_model(model: Path, folder: Path, python: Path) -> Path:
    """Convert a copy of the model by litgpt's own means, with its python; return the copy."""
    out = folder / "litgpt" / MODEL_NAME
    shutil.copytree(model, out)
    command = [str(python), str(PEERS / "litgpt_convert.py"), str(out), MODEL_NAME]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return out


def read_pairs(path: Path, limit: int | None) -> list[tuple[str, str]]:
    """Return the first `limit` questions and answers of a JSON Lines file such as GSM8K's."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [(record["question"], record["answer"]) for record in records[:limit]]


def write_data(pairs: list[tuple[str, str]], template: str, folder: Path) -> None:
    """Write the pairs as messages (TernLM), prompt and completion (TRL), and instruction and output (litgpt)."""
    (folder / "litgpt").mkdir(parents=True)
    asked = [[{"role": "user", "content": question}] for question, _ in pairs]
    told = [[{"role": "assistant", "content": answer}] for _, answer in pairs]
    _write_lines(folder / "messages.jsonl", [{"messages": [*q, *a]} for q, a in zip(asked, told, strict=True)])
    both = [{"prompt": q, "completion": a} for q, a in zip(asked, told, strict=True)]
    _write_lines(folder / "prompt_completion.jsonl", both)
    alpaca = [{"instruction": question, "output": answer} for question, answer in pairs]
    (folder / "litgpt" / "train.json").write_text(json.dumps(alpaca))
    # litgpt wants something to validate on.
    (folder / "litgpt" / "val.json").write_text(json.dumps(alpaca[:1]))
    (folder / "litgpt" / "style.txt").write_text(render(template, [{"role": "user", "content": "{question}"}]))


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
