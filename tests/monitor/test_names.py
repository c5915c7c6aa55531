from pathlib import Path

import pytest

from ternlm.monitor.names import METRICS, find_metric, render_table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_on_metrics_is_the_table():
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == render_table()


def test_names_are_distinct_and_have_a_group():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 1 for name in names)


@pytest.mark.parametrize(
    ("name", "entry"),
    [("loss/en", "loss/SOURCE"), ("loss/total", "loss/SOURCE"), ("lr/adamw", "lr/adamw")],
)
def test_a_source_is_found_under_its_group(name, entry):
    found = find_metric(name)
    assert found is not None
    assert found.name == entry


def test_an_unknown_name_has_no_entry():
    assert find_metric("reward/mean") is None
    assert find_metric("lr/other") is None
