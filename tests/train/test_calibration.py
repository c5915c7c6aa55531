"""`tern calibrate`: its fits against figures that are known, its file against the planner, all of it on a few ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ternlm.config import config_from_dict
from ternlm.config.layout import Layout
from ternlm.config.section import ConfigError
from ternlm.parallel.launch import Launch
from ternlm.planner.cluster import Cluster, Links, Rates
from ternlm.planner.kernels import Kernels, Matmul
from ternlm.planner.known import find_cluster
from ternlm.planner.step_time import describe_step, step_time
from ternlm.planner.times import Network, kernel_seconds, matmul_seconds
from ternlm.planner.traffic import Traffic
from ternlm.planner.work import LARGEST_IN_HEAP, cpu_chunk_tokens, step_work
from ternlm.train.calibration.calibrate import calibrate
from ternlm.train.calibration.clock import Clock, Samples
from ternlm.train.calibration.cluster_file import render_cluster
from ternlm.train.calibration.fit import fit_attention, fit_matmuls, solve_stream
from ternlm.train.calibration.kernels import Sizes, attention_works, loss_works, update_work
from ternlm.train.calibration.links import OPERATIONS, PAYLOADS, Timed, figures, node_size
from ternlm.train.calibration.rates import DeviceFigures, slowest
from ternlm.train.objective import chunk_tokens

CPU = torch.device("cpu")
TINY = Sizes((16, 64), (32, 64), (16, 64), 64, ((2, 16),), (64, 64), 512, 2**14, 2**20)
KNOWN = Rates(
    matmul_tflops=0.2,
    half_inner=8.0,
    operands_g_s=4.0,
    attention_tflops=0.15,
    attention_backward_tflops=0.12,
    half_attention=64.0,
    attention_block=512.0,
    memory_gb_s=40.0,
)


def config(vocab=4000, tied=False, **compute):
    return config_from_dict(
        {
            "model": {
                "vocab_size": vocab,
                "hidden_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 704,
                "tie_word_embeddings": tied,
            },
            "data": {"seq_len": 512, "sources": [{"name": "a", "path": "-"}]},
            "batch": {"global_sequences": 1},
            "train": {"steps": 1},
            "compute": {"dtype": "float32", **compute},
        }
    )


def test_fitted_products_take_as_long_as_those_they_were_fitted_to():
    sizes = [(m, n, k) for m in (128, 512, 2048) for n in (256, 1024) for k in (64, 256, 1024)]
    timed = [(Matmul(*size), matmul_seconds(Matmul(*size), KNOWN)) for size in sizes]
    curve = fit_matmuls(timed)
    assert curve.tflops[0] == pytest.approx(0.2, rel=0.03)
    assert curve.error < 0.01
    found = KNOWN.model_copy(
        update={
            "matmul_tflops": curve.tflops[0],
            "half_inner": curve.halves[0],
            "half_outer": curve.halves[1],
            "operands_g_s": curve.tflops[0] * 1e3 / curve.halves[2],
        }
    )
    other = Matmul(300, 700, 500)
    assert matmul_seconds(other, found) == pytest.approx(matmul_seconds(other, KNOWN), rel=0.02)


def test_fitted_attention_takes_as_long_as_what_it_was_fitted_to():
    def seconds(document, backward):
        flops = 1e9 * document
        kernels = Kernels((), *((0.0, 2.5 * flops) if backward else (flops, 0.0)))
        return kernel_seconds(kernels, KNOWN, document)["attention"]

    documents = (64, 128, 256, 512, 1024, 2048, 4096)
    curve = fit_attention([(1e9 * n, n, seconds(n, False), seconds(n, True)) for n in documents])
    assert curve.tflops == pytest.approx((0.15, 0.12), rel=0.05)
    assert curve.halves[1] == pytest.approx(512, rel=0.1)
    assert curve.error < 0.02


def test_two_blocks_tell_bytes_from_launches():
    gb_s, each_us = solve_stream((1e8 / 20e9 + 40 * 5e-6, 1e8, 40), (1e5 / 20e9 + 40 * 5e-6, 1e5, 40))
    assert gb_s == pytest.approx(20)
    assert each_us == pytest.approx(5)
    gb_s, each_us = solve_stream((1e-3, 1e7, 40), (2e-3, 1e5, 40))  # noise: the small one took longer
    assert (gb_s, each_us) == (pytest.approx(10), 0.0)


def test_disturbed_samples_count_only_while_calm_ones_are_few():
    assert Samples(calm=[1.0, 2.0, 3.0], disturbed=[9.0, 9.0, 9.0, 9.0]).seconds == 2.0
    assert Samples(calm=[1.0], disturbed=[9.0, 9.0]).seconds == 9.0


def test_the_clock_tells_long_work_from_short():
    x = torch.ones(2**12)
    times = Clock(CPU).measure({"one": lambda: x.exp(), "twenty": lambda: [x.exp() for _ in range(20)]}, 0.1)
    assert times["twenty"] > 5 * times["one"] > 0


def timed(name, ranks, rate_gb_s, latency_us):
    found = []
    for operation in OPERATIONS:
        for payload in PAYLOADS:
            traffic = Traffic(operation, name, ranks, name == "across", payload)
            found.append(Timed(traffic, traffic.sent_bytes / (rate_gb_s * 1e9) + latency_us * 1e-6))
    return found


def test_links_give_back_the_times_of_large_collectives():
    links = figures(4, 2, {"node": timed("node", 4, 10.0, 0.0), "across": timed("across", 2, 0.5, 0.0)})
    assert links.node_gb_s == pytest.approx(10.0)
    assert links.network_gb_s == pytest.approx(2.0)  # four groups at once
    cluster = Cluster(
        name="a",
        device="a",
        devices_per_node=4,
        memory_gib=1.0,
        peak_tflops=1.0,
        rates=KNOWN,
        links=Links(node_gb_s=links.node_gb_s, network_gb_s=links.network_gb_s),
    )
    network = Network(cluster, {"replicas": range(0, 8, 4)})
    across = Traffic("all_reduce", "replicas", 2, True, 10**9)
    assert network.seconds(across) == pytest.approx(across.sent_bytes / 0.5e9)


def test_a_hop_is_what_the_planner_counts_as_one():
    links = figures(1, 4, {"across": timed("across", 4, 1e6, 40.0)})
    # 2 log2(4) hops of an all-reduce, 3 of the others
    assert links.hop_us == pytest.approx(40 / 3, rel=0.01)


def test_one_rank_has_no_links():
    assert figures(1, 1, {}).node_gb_s == 0.0


def test_uneven_nodes_are_refused():
    with pytest.raises(ConfigError, match=r"3 ranks on a node, 4 in all: every node must have the same"):
        node_size(Launch(world=4, node_ranks=3))
    assert node_size(Launch(world=4, node_ranks=2)) == 2
    assert node_size(Launch(world=4)) == 4


def test_the_file_reads_back_as_the_cluster_and_says_how(tmp_path):
    cluster = Cluster(
        name='a "quoted" one',
        device="cpu",
        devices_per_node=2,
        memory_gib=23.5,
        peak_tflops=0.25,
        source="tern calibrate",
        rates=KNOWN,
        links=Links(node_gb_s=3.0),
    )
    text = render_cluster(cluster, {"rates.memory_gb_s": "copy of 256 MiB", "links.node_gb_s": "gloo"})
    (tmp_path / "c.toml").write_text(text)
    assert find_cluster(str(tmp_path / "c.toml")) == cluster
    assert "memory_gb_s = 40.0  # GB/s, copy of 256 MiB" in text
    assert "half_outer" not in text  # nothing was measured for it


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    with pytest.raises(ConfigError, match=r"--out = .* can't be written .*; choose another file"):
        calibrate(tmp_path, "cpu")
    with pytest.raises(ConfigError, match="--out"):
        calibrate(tmp_path / "none" / "c.toml", "cpu")
    with pytest.raises(ConfigError, match="--seconds = 0 must be at least 1"):
        calibrate(tmp_path / "c.toml", "cpu", seconds=0)


def test_attention_is_counted_as_the_planner_counts_it():
    for work in attention_works(TINY, CPU, torch.float32).values():
        out = work.forward()
        assert work.flops == pytest.approx(2.0 * 2 * 16 * out.shape[1] * work.document)
        assert [grad.shape for grad in work.backward()] == [out.shape] * 3


def test_neighbouring_documents_differ_so_that_none_are_batched():
    (short, _) = attention_works(TINY, CPU, torch.float32).values()
    assert short.document > 16  # the mean over tokens of unequal lengths


def test_loss_and_update_are_the_projects_own():
    grads = loss_works(TINY, 32, CPU, torch.float32)["whole"]()
    assert [tuple(grad.shape) for grad in grads] == [(32, 128), (512, 128)]
    update_work(TINY, CPU)()


def test_the_defaults_of_a_gpus_rates_change_nothing():
    plain = Rates(matmul_tflops=100.0, attention_tflops=50.0, attention_backward_tflops=40.0, memory_gb_s=1000.0)
    same = plain.model_copy(update={"norms_gb_s": 1000.0, "loss_gb_s": 1000.0})
    kernels = Kernels((Matmul(64, 64, 64),), 1e9, 1e9, 1e9, 1e8, 3)
    assert kernel_seconds(kernels, plain, 100) == kernel_seconds(kernels, same, 100)
    assert kernel_seconds(kernels, plain, 100)["other"] == pytest.approx(1.1e-3)
    slower = plain.model_copy(update={"serial_us": 10.0})
    assert kernel_seconds(kernels, slower, 100)["launch"] == pytest.approx(30e-6)


def test_masked_keys_of_a_block_cost_at_most_as_much_as_the_others():
    kernels = Kernels((), 1e9, 0.0)
    rates = KNOWN.model_copy(update={"half_attention": 0.0})
    seconds = {n: kernel_seconds(kernels, rates, n)["attention"] for n in (64, 512, 1024)}
    assert seconds[64] == seconds[512] == pytest.approx(2e9 / 0.15e12)
    assert seconds[1024] == pytest.approx(1.5e9 / 0.15e12)


def test_a_chunk_of_logits_is_the_trainers():
    for vocab in (1000, 32000, 10**6):
        assert cpu_chunk_tokens(vocab) == chunk_tokens(vocab, CPU)


def test_only_tensors_beyond_the_heaps_limit_are_taken_anew():
    assert step_work(config(), Layout(1)).fresh_bytes == (0.0,)
    vocab = 40_000  # 41 MB of table, 82 MB of logits
    table, logits = 4.0 * vocab * 256, 4.0 * vocab * 512
    assert table > LARGEST_IN_HEAP
    assert step_work(config(vocab), Layout(1)).fresh_bytes == (2 * table + logits,)
    assert step_work(config(vocab, tied=True), Layout(1)).fresh_bytes == (3 * table + logits,)


def test_float32_moves_more_bytes_in_the_loss_and_casts_nothing():
    wide, half = (step_work(config(dtype=dtype, compile="off"), Layout(1)) for dtype in ("float32", "bfloat16"))
    logits, table = 512 * 4000, 4000 * 256
    (stage,) = wide.stages
    assert stage.ends_forward.loss_bytes + stage.ends_backward.loss_bytes == 32.0 * logits + 12.0 * table
    assert half.update_bytes[0] / wide.update_bytes[0] == pytest.approx(46 / 40)


def test_new_memory_and_the_optimizer_have_their_own_rates():
    slow = KNOWN.model_copy(update={"fresh_gb_s": 4.0, "update_gb_s": 20.0})
    cluster = Cluster(name="a", device="a", memory_gib=1.0, peak_tflops=1.0, rates=slow)
    step = describe_step(config(40_000), Layout(1), 1)
    parts = step_time(step, cluster).parts
    without = step_time(step, cluster.model_copy(update={"rates": KNOWN})).parts
    assert parts["other"] - without["other"] == pytest.approx(step.work.fresh_bytes[0] / 4e9)
    assert parts["optimizer"] == pytest.approx(step.work.update_bytes[0] / 20e9)


def check_file(path: Path, ranks_per_node: int, nodes: int) -> None:
    """A file that the planner takes, with every figure above 0."""
    cluster = find_cluster(str(path))
    rates = cluster.rates
    assert min(rates.matmul_tflops, rates.attention_tflops, rates.memory_gb_s, rates.norms_gb_s, rates.loss_gb_s) > 0
    assert min(rates.update_gb_s, rates.fresh_gb_s, cluster.peak_tflops) > 0
    assert cluster.dtype in cluster.source
    assert cluster.devices_per_node == ranks_per_node
    assert (cluster.links.node_gb_s > 0) == (ranks_per_node > 1)
    assert (cluster.links.network_gb_s > 0) == (cluster.links.hop_us > 0) == (nodes > 1)
    layout = Layout(ranks_per_node * nodes)
    settings = config()
    settings = settings.model_copy(update={"batch": replace_batch(settings, layout.world)})
    assert step_time(describe_step(settings, layout, ranks_per_node), cluster).seconds > 0
    assert f"torch {torch.__version__}" in path.read_text()


def replace_batch(settings, sequences):
    return settings.batch.model_copy(update={"global_sequences": sequences})


@pytest.mark.slow
def test_calibrating_one_rank_writes_what_the_planner_takes(tmp_path):
    calibrate(tmp_path / "c.toml", "cpu", "float32", 2.0, TINY)
    check_file(tmp_path / "c.toml", 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks_per_node", "nodes"), [(2, 1), (4, 1), (2, 2)])
def test_calibrating_several_ranks_measures_their_links(tmp_path, ranks_per_node, nodes):
    world = ranks_per_node * nodes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "from pathlib import Path; from ternlm.train.calibration.calibrate import calibrate; "
        f"from ternlm.train.calibration.kernels import Sizes; calibrate(Path('c.toml'), 'cpu', 'float32', 4.0, {TINY})"
    )
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(ranks_per_node), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank % ranks_per_node)},
        )
        for rank in range(world)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    check_file(tmp_path / "c.toml", ranks_per_node, nodes)


def test_several_devices_write_the_median_and_name_the_slow():
    def device(tflops, disturbance):
        return DeviceFigures(KNOWN.model_copy(update={"matmul_tflops": tflops}), tflops, {}, disturbance)

    devices = [device(0.5, 0.1), device(0.21, 0.7), device(0.2, 0.1)]
    assert devices[0].typical(devices[1:]).rates.matmul_tflops == 0.21
    assert devices[0].typical(devices[1:]).disturbance == 0.7
    assert slowest(devices) == []
    assert slowest([*devices, device(0.1, 0.0), device(0.22, 0.0)]) == [3]


def test_the_command_says_what_it_cannot_use(tmp_path):
    command = [sys.executable, "-m", "ternlm", "calibrate", "--out", str(tmp_path / "c.toml"), "--seconds", "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--seconds = 0 must be at least 1" in done.stderr
