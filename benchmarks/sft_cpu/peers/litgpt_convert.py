"""Convert a Hugging Face folder by litgpt's own convert_hf_checkpoint: `litgpt_convert.py FOLDER NAME`, in place."""

import sys
from pathlib import Path

from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

if __name__ == "__main__":
    convert_hf_checkpoint(Path(sys.argv[1]), model_name=sys.argv[2], dtype="float32")
