"""TernLM: a lightweight framework for the whole life of a large language model."""

import os

__version__ = "0.1.0"

# A CPU's bfloat16 products keep code and buffers for each shape that they have met, 1,024 of them if nobody says
# otherwise, which with documents of any length grows to GiB. They are read at the first product, and aren't slower so.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "256")
