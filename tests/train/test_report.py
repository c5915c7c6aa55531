import json

import pytest

from ternlm.train.pretrain import pretrain


@pytest.mark.parametrize(("stop_at", "reported"), [(3, [3]), (5, [4, 5]), (9, [4, 6])])
def test_the_last_step_is_reported_though_it_is_not_due(make_config, tmp_path, stop_at, reported):
    (tmp_path / "stop").write_text(str(stop_at))
    run = pretrain(make_config(train={"stop_file": str(tmp_path / "stop")}, monitor={"every_steps": 4}))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == reported
    assert all("loss/total" in line for line in lines)
