"""Continue texts: prompts encoded, generated from and decoded, under the compiled model of training too."""

from collections.abc import Sequence

import torch

from ternlm.data.tokenizer import Tokenizer
from ternlm.infer.generate import generate
from ternlm.infer.sampling import SamplingParams
from ternlm.model.decoder import CausalLM


def continue_texts(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, temperature: float
) -> list[str]:
    """Return the continuation of each prompt, up to the tokenizer's end token."""
    stop_ids = frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=0, stop_ids=stop_ids)
    # Blocks compiled for training would be compiled again for every length.
    with torch.compiler.set_stance("force_eager"):
        tokens = generate(model, [encode_prompt(tokenizer, prompt) for prompt in prompts], params)
    return [tokenizer.decode(row) for row in tokens]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt as the beginning of a document."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(prompt)
