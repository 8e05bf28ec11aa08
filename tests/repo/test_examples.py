"""The scripts in ``examples``: each runs by its own command, on less, and does what it says."""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bgkernels as bg
from tests.tree import names

pytest.importorskip("transformers", reason="needs the extra `training`: transformers")

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = {p.stem: p for p in sorted(FOLDER.glob("*.py")) if p.stem != "tiny"}
PARALLEL = "vocab_parallel"
NEEDS = {"trainer": "accelerate", "trl_gkd": "trl", "dpo": "trl"}
"""Packages of the extra `integrations`."""
PUBLIC = {"integrations", "labels", "training.models.CausalLM"}

Namespace = dict[str, Any]


def command(path: Path) -> list[str]:
    """The first command in the docstring of a script."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found = re.search(rf"^(python|torchrun .*) examples/{path.name}.*$", doc, re.M)
    assert found, f"{path.name} does not say how to run it"
    return shlex.split(found.group())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """Runs a script in an empty folder, with more options; its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    for registry in (bg.divergences.registry, bg.routing.registry):
        monkeypatch.setattr(registry, "_factories", dict(registry._factories))

    def script(name: str, *options: str) -> Namespace:
        monkeypatch.setattr(sys, "argv", [*command(SCRIPTS[name])[1:], *options])
        return runpy.run_path(str(SCRIPTS[name]), run_name="__main__")

    return script


def falls(losses: list[float]) -> None:
    """The last losses are well below the first."""
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses


def raw_loop(run: Any, capsys: Any) -> None:
    losses = run("raw_loop", "--steps", "15")["losses"]
    falls(losses)
    assert f"loss {losses[9]:.3f}" in capsys.readouterr().out


def two_tokenizers(run: Any, capsys: Any) -> None:
    done = run("two_tokenizers", "--steps", "25")
    falls(done["losses"])
    seen = done["attachment"].teacher.aligned
    assert 0.5 < done["shared"].aligned < 1
    assert seen["soft"] > 0.5 * seen["tokens"] and seen["differing"] == 0
    assert "of the positions have soft labels" in capsys.readouterr().out


def trainer(run: Any, capsys: Any) -> None:
    done = run("trainer", "--steps", "6")
    assert done["after"] < 0.9 * done["before"]
    trained = done["trainer"].model.state_dict()
    saved = done["student"].state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def trl_gkd(run: Any, capsys: Any) -> None:
    done = run("trl_gkd", "--steps", "10")
    assert done["losses"][-1] < done["losses"][0]
    assert done["trainer"].attachment.target == "teacher_argmax"


def dpo(run: Any, capsys: Any) -> None:
    rows = torch.tensor(run("dpo", "--steps", "8")["rows"], dtype=torch.float64)
    ours, theirs = rows.split(2, dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)  # fp32 sums in another order
    assert rows[0, 0] == pytest.approx(math.log(2), rel=1e-6) and rows[-1, 0] < 0.6


def label_cache(run: Any, capsys: Any) -> None:
    falls(run("label_cache", "--epochs", "1")["losses"])
    _, *shards = sorted(Path("runs/labels").iterdir())
    written = [p.stat().st_mtime_ns for p in shards]
    run("label_cache", "--epochs", "0")  # finds that all is done
    assert [p.stat().st_mtime_ns for p in shards] == written


def two_teachers(run: Any, capsys: Any) -> None:
    done = run("two_teachers", "--steps", "15")
    assert all(done["after"][text] < 0.9 * done["before"][text] for text in ("prose", "code"))
    sure, unsure = (
        bg.linear_row_stats(x := torch.zeros(4, 1), w, bg.LinearTeacher(x + 1, w), "teacher_argmax")
        for w in (torch.tensor([[9.0], [0.0]]), torch.zeros(2, 1))
    )
    weights = done["surer"]([unsure, sure])
    assert (weights[:, 1] > weights[:, 0]).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


def vocab_parallel(run: Any, capsys: Any) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    given = command(SCRIPTS[PARALLEL])
    options = [*given[1:-1], str(SCRIPTS[PARALLEL]), "--steps", "10"]
    done = subprocess.run(
        [*launch, *options], capture_output=True, text=True, timeout=300, cwd=FOLDER.parent
    )
    assert done.returncode == 0, done.stderr
    losses = {float(x) for x in re.findall(r"columns, loss ([\d.]+)$", done.stdout, re.M)}
    assert len(losses) == 1 and "rank 1: 129 of 258 columns" in done.stdout
    whole = run("raw_loop", "--steps", "10", "--temperature", "1")["losses"][-1]
    assert losses.pop() == pytest.approx(whole, rel=1e-3)


def custom_divergence(run: Any, capsys: Any) -> None:
    done = run("custom_divergence", "--steps", "15")  # compares value and gradient itself
    falls(done["losses"])
    assert "hellinger" in bg.divergences.registry


def custom_policy(run: Any, capsys: Any) -> None:
    table = run("custom_policy", "--steps", "25")["table"]
    assert table["plausible"] < table["hard"]


def bridges(run: Any, capsys: Any) -> None:
    done = run("bridges", "--steps", "60", "--text", "Assert statements are a convenient way")
    entropy, hard = done["entropy"], done["hard"]
    assert np.corrcoef(entropy, hard)[0, 1] < -0.5  # where the teacher is sure, the label leads
    np.testing.assert_allclose(hard + done["soft"], 1, rtol=1e-6)
    assert Path("bridges.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith(("bridge: ", "garden: ")) for line in lines)


TESTS = (
    raw_loop, trainer, trl_gkd, dpo, label_cache, two_teachers, two_tokenizers, vocab_parallel,
    custom_divergence, custom_policy, bridges,
)  # fmt: skip


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
def test_script(test: Callable[..., None], run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if package := NEEDS.get(test.__name__):
        pytest.importorskip(package, reason=f"needs the extra `integrations`: {package}")
    test(run, capsys)


LAUNCHED = {"fsdp2": "FSDP", "zero3": "DEEPSPEED"}


@pytest.mark.slow
@pytest.mark.parametrize("config", LAUNCHED)
def test_accelerate_launch(config: str, tmp_path: Path) -> None:
    """The configurations, on two processes of a CPU."""
    pytest.importorskip("accelerate", reason="needs the extra `integrations`: accelerate")
    if config == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the extra `deepspeed`")
    root = FOLDER.parent
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", str(FOLDER / f"{config}.yaml"), "--module", "tests.launched"]
    settings = {"PYTHONPATH": f"{root}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(FOLDER / "trainer.py"), "--steps", "6"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"held-out loss ([\d.]+) -> ([\d.]+)", done.stdout)[0])
    assert after < 0.9 * before
    assert done.stdout.count(f"{LAUNCHED[config]}: 2 processes, parts=True") == 2
    assert (tmp_path / "distilled" / "model.safetensors").exists()


def test_every_script_has_a_test() -> None:
    assert {test.__name__ for test in TESTS} == set(SCRIPTS)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.stem)
def test_scripts_are_short_and_use_the_public_api(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    ours = [x.removeprefix("bgkernels.") for x in names(path) if x.startswith("bgkernels.")]
    assert not [x for x in ours if not any(x.startswith(known) for known in PUBLIC)]


def test_the_list_has_every_script_and_its_command() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| (.+) \| `(.+)` \|$", page, re.M)
    assert {name for name, _, _ in listed} == set(SCRIPTS)
    for name, _, line in listed:
        assert shlex.split(line) == command(SCRIPTS[name])
