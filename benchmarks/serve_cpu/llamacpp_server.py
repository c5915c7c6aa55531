"""llama.cpp's own HTTP server, until SIGTERM. unified: one memory for all texts, or a share for each.

python llamacpp_server.py '{"model": FILE, "port": PORT, "texts": N, "tokens": N, "unified": true}'
"""

import json
import os
import signal
import sys

import xllamacpp


def main(settings: dict) -> None:
    """Serve a GGUF file at a port of this machine."""
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.hostnames, params.port, params.ui = ["127.0.0.1"], settings["port"], False
    params.n_parallel, params.n_ctx, params.kv_unified = settings["texts"], settings["tokens"], settings["unified"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(json.loads(sys.argv[1]))
