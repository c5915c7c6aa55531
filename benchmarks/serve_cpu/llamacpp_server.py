"""llama.cpp's own HTTP server, as TernLM starts it, without TernLM before it; with as many threads as all servers have.

python llamacpp_server.py '{"model": FILE, "name": NAME, "port": PORT, "texts": N, "tokens": N}'
"""

import json
import os
import sys

from ternlm.serve.llamacpp import main

if __name__ == "__main__":
    main({**json.loads(sys.argv[1]), "threads": int(os.environ["OMP_NUM_THREADS"])})
