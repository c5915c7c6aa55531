"""Settings of runs that are planned and simulated, and of which no data exist."""

from ternlm.config import config_from_dict


def settings(changes=None, sequences=32, model=None):
    """Return the settings of a small model, or of another, with changes to each section."""
    table = {
        "model": model
        or {
            "vocab_size": 2048,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 640,
            "attention_bias": True,
        },
        "data": {"seq_len": 512, "sources": [{"name": "a", "path": "a"}]},
        "batch": {"global_sequences": sequences},
        "train": {"steps": 10},
        "compute": {"dtype": "bfloat16", "compile": "off"},
        "parallel": {"allow_untested": True},
    }
    for section, fields in (changes or {}).items():
        table[section] = {**table.get(section, {}), **fields}
    return config_from_dict(table)


def adapters(changes=None, **adapter):
    """Return changes that make of a run one of adapters beside frozen weights."""
    return {**(changes or {}), "adapter": {"rank": 8, **adapter}, "load": {"from": "somewhere"}}
