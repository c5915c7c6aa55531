"""The model card (README.md) of an exported folder: what the model is, what it was trained on, how to load it."""

from typing import Any

from ternlm.config.model import ModelConfig
from ternlm.convert.weights import OpenModel


def model_card(model: OpenModel, config: ModelConfig, name: str, written: dict[str, Any]) -> str:
    """Return the text. written: `bytes`, `dtype` of the weights."""
    rope = config.rope_scaling
    rows = {
        "parameters": f"{config.num_params:,}",
        "layers x hidden": f"{config.num_hidden_layers} x {config.hidden_size}",
        "heads (key/value heads)": f"{config.num_attention_heads} ({config.kv_heads})",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "rotary positions": f"base {config.rope_theta:g}" + ("" if rope.kind == "default" else f", {rope.kind}"),
        "weights": f"{written['dtype']}, {written['bytes'] / 2**30:.2f} GiB",
    }
    rows |= {key: str(value) for key, value in model.facts.get("training", {}).items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    chat = ""
    if model.facts.get("chat_template"):
        chat = (
            '\nmessages = [{"role": "user", "content": "hello"}]\n'
            'ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")'
        )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [ternlm]
---

# {name}

A causal language model in the {"Qwen3" if config.qk_norm else "Llama"} architecture, written by TernLM.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}"){chat}
```
"""
