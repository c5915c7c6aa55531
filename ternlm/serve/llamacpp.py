"""llama.cpp's server, from the package xllamacpp: run with settings as JSON, it serves until it is ended.

python llamacpp.py '{"model": FILE, "name": NAME, "port": PORT, "texts": N, "tokens": N or null, "threads": N or null}'
"""

import json
import signal
import sys
from typing import Any

_TOKENS = 32768


def main(settings: dict[str, Any]) -> None:
    """Serve a GGUF file at a port of this machine."""
    import xllamacpp

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = {settings["name"]}
    params.hostnames, params.port, params.ui = ["127.0.0.1"], settings["port"], False
    # All texts share one memory, so that one of them may be as long as all the others.
    params.n_parallel, params.n_ctx, params.kv_unified = settings["texts"], settings["tokens"] or _TOKENS, True
    params.endpoint_metrics, params.verbosity = True, 0
    if settings["threads"]:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
