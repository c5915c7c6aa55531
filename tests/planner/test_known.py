"""Known clusters, fitted constants and cluster files: what holds together, and what is refused with a remedy."""

import pytest

from ternlm.config.section import ConfigError
from ternlm.planner.devices import peak_tflops
from ternlm.planner.fitted import Constants, Family, fitted_constants
from ternlm.planner.known import find_cluster, make_cluster, sheets

FILE = """
name = "mine"
device = "cpu"
devices_per_node = 2
memory_gib = 16
peak_tflops = 1.0
[rates]
matmul_tflops = 0.5
attention_tflops = 0.3
attention_backward_tflops = 0.2
memory_gb_s = 20
[links]
node_gb_s = 5
"""


@pytest.mark.parametrize("name", sheets())
def test_every_known_device_has_a_peak_and_becomes_a_cluster_no_faster_than_its_sheet(name):
    sheet = sheets()[name]
    peak = peak_tflops(sheet.name, "bfloat16")
    assert peak
    cluster = find_cluster(f"{name}x8@800")
    assert cluster.devices_per_node == 8
    assert cluster.peak_tflops == peak
    assert cluster.rates.matmul_tflops < peak
    assert cluster.rates.attention_backward_tflops < cluster.rates.attention_tflops < peak
    assert cluster.rates.memory_gb_s < sheet.memory_gb_s
    assert cluster.links.node_gb_s < sheet.node_gb_s
    assert cluster.links.network_gb_s < 100
    assert cluster.memory_gib == sheet.memory_gib


def test_a_lower_power_limit_slows_products_and_attention_alike():
    full, limited = find_cluster("h100x8").rates, find_cluster("h100-500wx8").rates
    ratio = limited.matmul_tflops / full.matmul_tflops
    assert 500 / 700 <= ratio < 1  # rates fall slower than power does
    assert limited.attention_tflops / full.attention_tflops == pytest.approx(ratio)


def test_attention_of_older_kernels_is_slower():
    c, sheet = fitted_constants(), sheets()["a100"]
    by_kernel = {
        kind: make_cluster(sheet, 8, 400, c, kind).rates.attention_tflops for kind in ("flash1", "flash2", "biased")
    }
    assert by_kernel["flash1"] < by_kernel["biased"] < by_kernel["flash2"]


def test_fitted_constants_are_within_what_hardware_can_do():
    c = fitted_constants()
    for family in (c.ampere, c.hopper):
        assert 0.5 < family.matmul < 0.95
        assert 0.1 < family.attention_backward < family.attention < family.matmul
    assert 0 < c.power <= 1  # no faster than power itself
    assert 1 < c.float8 <= 2  # float8 has twice the peak
    assert 0.3 < c.flash1 < 1
    assert 64 <= c.half_inner <= 512
    assert 0.02 < c.half_waves < 1
    assert 256 <= c.half_attention <= 4096
    assert 2 < c.launch_us < 15
    assert min(c.memory, c.node, c.network) > 0.5
    assert max(c.memory, c.node, c.network) < 0.95
    assert 50 < c.nodes_to_half < 2000
    assert 1 < c.hop_us < c.broadcast_hop_us < 30
    assert 0 < c.overhead < 0.06


def test_constants_are_few_and_each_says_what_it_means():
    names = {**Constants.model_fields, **Family.model_fields}
    assert len(Constants.model_fields) - 2 + 2 * len(Family.model_fields) <= 26
    assert all(field.description for field in names.values())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            ("node_gb_s = 5", "node_gb_s = 0"),
            ["node_gb_s = 0", "devices_per_node = 2", "exchanged; give"],
        ),
        (("memory_gb_s = 20", "memory_gb_s = 0"), ["rates.memory_gb_s = 0", "greater than 0"]),
        (("matmul_tflops = 0.5", "matmul_tflops = -1"), ["rates.matmul_tflops = -1", "greater than 0"]),
        (("memory_gib = 16", "memory_gib = nan"), ["memory_gib", "finite"]),
        (("memory_gib = 16", ""), ["memory_gib"]),
        (("[links]", "[link]"), ["link", "links"]),
        (("node_gb_s = 5", "node_gbs = 5"), ["node_gbs", "node_gb_s"]),
    ],
)
def test_a_cluster_file_that_cannot_be_right_is_refused_with_name_value_and_rule(tmp_path, change, told):
    path = tmp_path / "mine.toml"
    path.write_text(FILE.replace(*change))
    with pytest.raises(ConfigError) as error:
        find_cluster(str(path))
    for words in [*told, "mine.toml"]:
        assert words in str(error.value)


def test_a_good_cluster_file_is_taken(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    assert find_cluster(str(path)).links.node_gb_s == 5


def test_an_unknown_cluster_is_refused_with_the_nearest_and_all_known():
    with pytest.raises(ConfigError, match=r"'h10x8' is neither a file nor known; did you mean h100x8\?.*a100x8"):
        find_cluster("h10x8")


def test_a_recipe_for_a_cluster_is_named_as_one(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\npreset = 'tiny'\n")
    with pytest.raises(ConfigError, match=r"run\.toml' is a recipe, with \[model\].*; name the recipe first") as caught:
        find_cluster(str(path))
    assert "is not a setting" not in str(caught.value)
