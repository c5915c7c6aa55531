"""C functions compute what PyTorch's operators do, and what isn't there is done without."""

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ternlm.model.rope import rotate
from ternlm.ops import native

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SIZES = pytest.mark.parametrize("shape", [(1, 16), (3, 48), (2, 5, 64), (1, 300, 576), (0, 32)], ids=str)
pytestmark = pytest.mark.skipif(not native.is_available(CPU, torch.float32), reason="no C compiler")


@pytest.fixture(autouse=True)
def threads():
    """More threads than one, whatever a test before has left."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """A cache folder that nothing was built in, and no memory of what was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path / "cache" / "ternlm" / "native"
    native.library.cache_clear()


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within 1e-6 in float32; in bfloat16 the exact number rounded once, or the one beside it."""
    tolerance = 1e-6 if ours.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=tolerance / 10)


@DTYPES
@SIZES
def test_norms(shape, dtype):
    x, more, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1])
    close(native.rms_norm(x, weight, 1e-6), F.rms_norm(x.double(), (shape[-1],), weight.double(), 1e-6))
    added = more + x
    normed = native.rms_norm(x, weight, 1e-6, more)
    assert torch.equal(more, added)
    close(normed, F.rms_norm(added.double(), (shape[-1],), weight.double(), 1e-6))


@DTYPES
@SIZES
def test_gates(shape, dtype):
    both = torch.randn(*shape[:-1], 2 * shape[-1]).mul(20).to(dtype)
    gate, up = both.chunk(2, -1)
    exact = F.silu(gate.double()) * up.double()
    close(native.silu_mul(gate, up), exact)
    close(native.silu_mul(gate.contiguous(), up.contiguous()), exact)


def test_gates_of_extremes():
    gate = torch.tensor([-torch.inf, -1e4, -90, -80, -0.0, 0, 1e-30, 80, 90, 1e4, 3e38, torch.inf, torch.nan, 1, 2, 3])
    found = native.silu_mul(gate[None], torch.ones(1, 16))[0]
    torch.testing.assert_close(found, F.silu(gate), rtol=1e-6, atol=1e-30, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [12, 64, 80])
@pytest.mark.parametrize(("batch", "num"), [(1, 1), (1, 90), (3, 7)])
def test_rotations(batch, num, heads, size, dtype):
    angles = torch.rand(batch, num, 1, size) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    heads_x = torch.randn(batch, num, heads + 2, size).to(dtype)
    kept = heads_x[:, :, heads:].clone()
    exact = rotate(heads_x[:, :, :heads].double(), cos.double(), sin.double())
    native.rotate_(heads_x[:, :, :heads], cos, sin)
    close(heads_x[:, :, :heads], exact)
    assert torch.equal(heads_x[:, :, heads:], kept)  # of the same tokens, but not of what was given


def test_they_are_built_once(fresh_cache, monkeypatch):
    assert native.library(torch.float32) is not None
    (built,) = fresh_cache.iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(native.subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert native.library(torch.float32) is not None
    assert list(fresh_cache.iterdir()) == [built]


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("no-such-compiler", "no-such-compiler"),
        ("sh -c 'echo all is broken >&2; exit 1'", "sh | all is broken"),
        ("sh -c 'unbalanced", "quotation"),
    ],
)
def test_without_a_compiler_it_is_said_once_and_done_without(compiler, told, fresh_cache, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert not native.is_available(CPU, torch.float32)
        assert not native.is_available(CPU, torch.float32)
    (record,) = caplog.records
    assert "texts are continued by slower ones" in record.message
    assert told in record.message
    assert not fresh_cache.exists() or not list(fresh_cache.iterdir())  # nothing half-built stays


def test_what_is_not_whole_in_the_cache_is_built_anew(fresh_cache):
    fresh_cache.mkdir(parents=True)
    built = native._build(native._command(torch.bfloat16), fresh_cache, native._key(native._command(torch.bfloat16)))
    whole = built.read_bytes()
    with built.open("r+b") as file:
        file.truncate(8192)  # which would end the process where it is loaded
    assert native.library(torch.bfloat16) is not None
    assert list(fresh_cache.iterdir()) == [built]
    assert built.read_bytes() == whole


def test_a_folder_that_nothing_may_be_run_from_is_left_alone(fresh_cache, monkeypatch):
    assert native.library(torch.float32) is not None
    (built,) = fresh_cache.iterdir()
    load, commands, run = native.ctypes.CDLL, [], subprocess.run

    def refuse(name):
        if name.startswith(str(fresh_cache)):
            raise OSError("failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    monkeypatch.setattr(native.subprocess, "run", lambda words, **more: commands.append(words) or run(words, **more))
    native.library.cache_clear()
    assert native.library(torch.float32) is not None
    assert len(commands) == 1
    assert list(fresh_cache.iterdir()) == [built]


def test_a_home_that_is_full_is_no_hindrance(fresh_cache, tmp_path, monkeypatch, caplog):
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{fresh_cache}*) echo "No space left" >&2; exit 1;; esac\nexec gcc "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with caplog.at_level(logging.INFO):
        assert native.library(torch.float32) is not None
    assert not list(fresh_cache.iterdir())
    (record,) = caplog.records
    assert (record.levelname, "No space left" in record.message) == ("INFO", True)


def test_processes_that_build_at_once_do_not_meet(fresh_cache):
    code = "import torch; from ternlm.ops import native; assert native.library(torch.float32) is not None"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list(fresh_cache.iterdir())) == 1


def test_a_folder_that_others_may_write_to_is_not_trusted(fresh_cache, caplog):
    fresh_cache.mkdir(parents=True)
    fresh_cache.chmod(0o777)
    with caplog.at_level(logging.INFO):
        assert native.library(torch.float32) is not None
    assert not list(fresh_cache.iterdir())
    assert "others may write to" in caplog.text


def test_a_folder_of_an_earlier_version_does_not_matter(fresh_cache):
    fresh_cache.parent.mkdir(parents=True)
    fresh_cache.parent.chmod(0o775)
    assert native.library(torch.float32) is not None
    assert len(list(fresh_cache.iterdir())) == 1
    assert fresh_cache.stat().st_mode & 0o777 == 0o700


def test_a_home_that_nothing_can_be_kept_in_is_no_hindrance(fresh_cache, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder would be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = native.library(torch.float32)
    assert found is not None
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # nothing stays
    x = torch.randn(2, 16)
    close(native.rms_norm(x, torch.ones(16), 1e-6), F.rms_norm(x.double(), (16,), eps=1e-6))


def test_without_a_home_it_is_built_for_the_while(fresh_cache, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(native.Path, "home", homeless)
    assert native.library(torch.float32) is not None


def test_it_can_be_switched_off(fresh_cache, monkeypatch):
    monkeypatch.setenv("TERNLM_NATIVE", "0")
    assert not native.is_available(CPU, torch.float32)
    assert not fresh_cache.exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.rms_norm(torch.ones(2, 24), torch.ones(24), 1e-6),
        lambda: native.rms_norm(torch.ones(2, 16), torch.ones(16, dtype=torch.bfloat16), 1e-6),
        lambda: native.rms_norm(torch.ones(2, 16), torch.ones(16), 1e-6, torch.ones(1, 16)),
        lambda: native.rms_norm(torch.ones(2, 16, device="meta"), torch.ones(16, device="meta"), 1e-6),
        lambda: native.rms_norm(torch.ones(2, 16), torch.ones(16), 1e-6, torch.ones(2, 16, device="meta")),
        lambda: native.silu_mul(torch.ones(2, 16), torch.ones(2, 32)[:, :16]),
        lambda: native.silu_mul(*torch.ones(2, 3, 4, 16).transpose(1, 2).unbind()),
        lambda: native.silu_mul(torch.ones(2, 16), torch.ones(2, 16, device="meta")),
        lambda: native.silu_mul(torch.ones(4, 0), torch.ones(4, 0)),
        lambda: native.rotate_(torch.ones(1, 4, 2, 16), torch.ones(1, 3, 1, 16), torch.ones(1, 3, 1, 16)),
        lambda: native.rotate_(
            torch.ones(1, 4, 2, 16), torch.ones(1, 4, 1, 16), torch.ones(1, 4, 1, 16, device="meta")
        ),
        lambda: native.rotate_(torch.ones(1, 4, 2, 16).bfloat16(), *torch.ones(2, 1, 4, 1, 16).unbind()),
    ],
)
def test_what_would_be_read_wrongly_is_refused(call):
    with pytest.raises(ValueError, match=r"can't read tensors like these: \("):
        call()
