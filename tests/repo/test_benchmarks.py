"""The pieces of the benchmark runner, on problems that take no time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import bgkernels as bg
from benchmarks import (
    accuracy,
    compare,
    end_to_end,
    gpu,
    gpu_measure,
    gpu_record,
    parallel,
    primitives,
    publish,
    run,
    sweeps,
)
from benchmarks.cases import FORMS, Case, Problem
from benchmarks.entries import ENTRIES, Outcome, training
from benchmarks.limits import Products, Tiling, WideProducts, best_tiling
from benchmarks.measure import PRIMITIVES, measure, spread
from benchmarks.suites import PAIRS, SUITES
from bgkernels.training.cli import app

BACKENDS_HERE = primitives.usable("float32")
TINY = Case("tiny", 12, 8, 12, 200)
FAST = ("limit", "natural", "fused-32", "recompute-32", "dense", "paper")


@pytest.mark.parametrize("name", [*FAST, *(f"fused-32-{b}" for b in BACKENDS_HERE)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_entry_computes_its_loss(name: str, dtype: str) -> None:
    case = Case("", 0, 0, 0, 0, dtype=dtype)
    assert accuracy.check(name, case).passed


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"vocab_t": 210}, {"temperature": 2.0}])
def test_features_of_a_case_reach_the_entries(extra: dict[str, Any]) -> None:
    case = Case("", 0, 0, 0, 0, **extra)
    for name in ("fused-32", "recompute-32", "dense"):
        assert accuracy.check(name, case).passed
    assert ENTRIES["paper"].refuses(case, 1.0, 1e12)


@pytest.mark.parametrize("name", ["fused-32", "recompute-32", "dense"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "step"])
def test_forms_of_a_step(name: str, form: str) -> None:
    assert accuracy.check(name, Case("", 0, 0, 0, 0, form=form)).passed


@pytest.mark.parametrize(
    ("name", "module"),
    [("orda", "orda_kernel"), ("trl", "trl.kernels.chunked_divergence"), ("torch-lce", "torch")],
)
def test_peers_compute_their_losses(name: str, module: str) -> None:
    pytest.importorskip(module, exc_type=ImportError)
    form = "hard" if name == "torch-lce" else "step"
    assert accuracy.check(name, Case("", 0, 0, 0, 0, form=form)).passed


def test_limits_of_forms() -> None:
    case = Case("tiny", 12, 8, 12, 200)
    assert [replace(case, form=f).products for f in ("hard", "logits", "evaluation")] == [
        ("student", "input", "weight"), (), ("student", "teacher"),
    ]  # fmt: skip
    evaluation = Problem.of(replace(case, form="evaluation"))
    assert Products(evaluation, Tiling(torch.float32, 64)).run() == []
    logits = replace(case, form="logits")
    assert logits.moved == 3 * 12 * 200 * 4
    assert ENTRIES["copy"].start(Problem.of(logits))().loss is None


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ENTRIES["fused-32"]

    def start(problem: Problem) -> Any:
        outcome = right.start(problem)()
        grads = [outcome.gradients[0], 1.01 * outcome.gradients[1]]
        return lambda: Outcome(outcome.loss, grads)

    monkeypatch.setitem(ENTRIES, "fused-32", right.__class__("", start, "ours"))
    assert not accuracy.check("fused-32", TINY).passed


def test_liger_computes_its_loss() -> None:
    pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    problem = Problem.of(TINY)
    found = accuracy.errors(accuracy._eager(ENTRIES["liger"]), problem)
    assert max(found.values()) < 1e-3, found


@pytest.mark.parametrize("width", [64, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_limit_multiplies_everything(width: int, dtype: str) -> None:
    problem = Problem.of(Case("tiny", 12, 8, 12, 200, dtype=dtype))
    dx, dw = Products(problem, Tiling(torch.float32, width)).run()
    x, w = problem.input.detach().float(), problem.weight.detach().float()
    z = x @ w.T
    torch.testing.assert_close(dx.float(), z @ w, rtol=1e-2, atol=1e-2 * dx.abs().max().item())
    torch.testing.assert_close(dw.float(), z.T @ x, rtol=1e-2, atol=1e-2 * dw.abs().max().item())
    assert best_tiling(problem).width == 200


def test_our_own_products_multiply_everything() -> None:
    problem = Problem.of(Case("tiny", 12, 8, 12, 200, dtype="bfloat16"))
    bare = WideProducts(problem, 64)
    bare.d.fill_(1)
    dx, dw = bare.run()
    x, w, t_w = (t.detach().float() for t in (problem.input, problem.weight, problem.t_weight))
    torch.testing.assert_close(dx.float(), w.sum(0).expand(12, 8), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dw.float(), x.sum(0).expand(200, 8), rtol=1e-2, atol=1e-2)
    last = slice(192, 200)
    for tile, product in (
        (bare.z, x @ w[last].T), (bare.t, problem.t_input.float() @ t_w[last].T)
    ):  # fmt: skip
        torch.testing.assert_close(tile.view(-1)[: 12 * 64].view(12, 64)[:, :8], product)


def test_a_sample_says_what_happened_inside() -> None:
    step = ENTRIES["fused-32-eager"].start(Problem.of(TINY))
    sample = measure(step)
    assert sample["backend"] == "eager" and set(sample["passes"]) == set(PRIMITIVES)
    assert 0 < sum(sample["passes"].values()) < sample["seconds"]
    plan = {"chunks": 1, "width": 200, "tiles": 1, "kept": 1, "inline": False}
    assert sample["plans"] == [plan]
    assert sample["gradients"] == 4 * 8 * (12 + 200)


def test_a_shared_step_is_timed_beside_what_it_needs() -> None:
    found = parallel.study(parallel.Work(TINY, rounds=2, budget=1 << 20))
    assert set(found["seconds"]) == {"products", "collectives", "step"} and found["ratio"] > 0


def test_the_peak_is_seen() -> None:
    def loss(problem: Problem) -> torch.Tensor:
        return (torch.zeros(16 << 20) + problem.input.sum() + problem.weight.sum()).sum()

    problem = Problem.of(TINY)
    assert measure(training(loss)(problem))["peak"] > 100 << 20


def test_chunks_can_be_forced() -> None:
    with accuracy.forced_chunks(3):
        sample = measure(ENTRIES["fused-32"].start(Problem.of(TINY)))
    assert sample["plans"][0]["chunks"] == 3


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_recorded_passes_run_again(backend: str) -> None:
    first, second = primitives.passes(backend, "float32", "entropy", rows=6, vocab=100)
    assert (first.bytes, second.bytes) == (2 * 6 * 100 * 4, 3 * 6 * 100 * 4)
    assert first.calls and second.calls
    first.run()
    second.run()


def test_suites_name_entries_that_exist() -> None:
    assert len(PAIRS) == 7
    for suite in SUITES.values():
        assert all(name in ENTRIES for field in suite for name in field.entries)


def test_a_run_from_the_command_line_to_the_page(tmp_path: Path) -> None:
    output, page = tmp_path / "results.json", tmp_path / "README.md"
    (tmp_path / "docs").mkdir()
    names = ("limit", "fused-128")
    run.main(["--suite", "smoke", "--entries", *names, "--also", "--output", str(output)])
    results = json.loads(output.read_text())
    rows = {e["entry"]: e for e in results["fields"][0]["entries"]}
    assert set(rows) == set(names) and all(e["seconds"]["runs"] == 2 for e in rows.values())
    choosing = tmp_path / "docs" / "choosing.md"
    for path in (page, choosing):
        path.write_text(f"before\n{publish.BEGIN}\nformer\n{publish.END}\nafter\n")
    publish.main([str(output), "--root", str(tmp_path)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "former" not in text
    assert "MiB** besides inputs" in text
    assert "| fused, 128 MiB |" in choosing.read_text()
    assert "**bgkernels, fused, 128 MiB**" in (tmp_path / "docs" / "benchmarks.md").read_text()
    with pytest.raises(ValueError, match="once each"):
        publish.filled("no marks", "")


def result(seconds: float, peak: int) -> dict[str, Any]:
    ours = {"entry": "fused-32", "kind": "ours", "seconds": {"median": seconds}, "peak": peak}
    bare = {"entry": "limit", "kind": "limit", "seconds": {"median": 1.0}}
    return {"fields": [{"title": "tiny", "entries": [bare, ours]}]}


def test_results_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, made in zip(paths, (result(1.1, 100), result(1.2, 90), result(1.5, 90)), strict=True):
        path.write_text(json.dumps(made))
    compare.main([str(paths[0]), str(paths[1])])
    assert "+9%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1 figures grew by more than 15%"):
        compare.main([str(paths[0]), str(paths[2])])
    paths[1].write_text('{"fields": []}')
    with pytest.raises(SystemExit, match="no entry of ours in common"):
        compare.main([str(paths[0]), str(paths[1])])


def test_slopes_and_pictures(tmp_path: Path) -> None:
    points = [
        {"axis": axis, "size": n, "entry": e, "seconds": n**1.5, "temporaries": n}
        for axis in ("tokens", "vocabulary")
        for n in (1, 2, 4)
        for e in ("limit", "fused-128")
    ]
    assert sweeps.slopes(points)["tokens", "limit"] == pytest.approx(1.5)
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    paths = plots.draw({"sweeps": points}, tmp_path)
    assert [p.name for p in paths] == ["time-tokens.png", "memory-vocabulary.png"]
    assert all(p.stat().st_size > 1000 for p in paths)


def test_whole_models_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setattr(end_to_end, "TINY", {"student": sizes, "teacher": sizes})
    monkeypatch.setattr(end_to_end, "VOCAB", {"cpu": 512, "cuda": 512})
    monkeypatch.setattr(end_to_end, "LENGTH", 16)
    found = [end_to_end.figures(loss, room=1 << 40) for loss in end_to_end.LOSSES.values()]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert all(f["largest"] == 64 for f in found)


def test_nothing_is_written_where_a_check_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(field: Any) -> dict[str, Any]:
        raise run.CheckFailed("fused-128 is wrong")

    monkeypatch.setattr(run, "measure_field", wrong)
    with pytest.raises(SystemExit, match="nothing written: fused-128 is wrong"):
        run.main(["--suite", "smoke", "--also", "--output", str(tmp_path / "results.json")])
    assert not list(tmp_path.iterdir())


def test_entries_of_one_loss_must_agree_and_ours_must_run() -> None:
    field = SUITES["smoke"][0]
    run._sound(field, {"dense": {"loss": 1.0}, "paper": {"loss": 1.00001}, "liger": {"loss": 2.0}})
    with pytest.raises(run.CheckFailed, match="losses differ"):
        run._sound(field, {"dense": {"loss": 1.0}, "paper": {"loss": 1.1}})
    run._sound(field, {"dense": {"error": "no compiler"}})
    with pytest.raises(run.CheckFailed, match="SIGSEGV"):
        run._sound(field, {"fused-32": {"error": "SIGSEGV"}})


def test_a_run_on_a_gpu_goes_on_from_its_file(tmp_path: Path) -> None:
    """Section by section; an error is a row, and another commit begins anew."""
    path, ran = tmp_path / "gpu.json", []

    def broken() -> Any:
        yield {"a": 1}
        ran.append("broken")
        raise ValueError("no memory")

    stamp = {"commit": "1", "backend": "triton"}
    first = gpu_record.Record(path, stamp)
    assert first.run("x", broken) == [{"a": 1}, {"error": "ValueError: no memory"}]
    assert gpu_record.Record(path, stamp).run("x", broken) == first.sections["x"]
    assert len(ran) == 1
    gpu_record.Record(path, stamp | {"commit": "2"}).run("x", broken)
    assert len(ran) == 2


HANGING = """
import sys, time
from benchmarks import gpu

def hang(bench):
    yield {"case": "half"}
    print("in the middle", flush=True)
    time.sleep(600)

gpu.SECTIONS["pairs"] = hang
gpu.main(sys.argv[1:])
"""


def test_a_run_on_a_gpu_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the second section: the first is in a whole file, and is not run again."""
    path, sections = tmp_path / "gpu.json", ["from logits", "pairs", "tiles"]
    command = ["--dry-run", "--backend", "eager", "--output", str(path), "--sections", *sections]
    killed = subprocess.Popen(
        [sys.executable, "-c", HANGING, *command], stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    assert any("in the middle" in line for line in killed.stdout)
    killed.kill()
    killed.communicate()
    before = json.loads(path.read_text())
    assert list(before) == ["machine", "device", "from logits"]
    path.with_suffix(".part").write_text('{"machine": {')  # as if killed while it wrote

    def twice(bench: gpu_measure.Bench) -> Any:
        raise AssertionError("a section that was finished runs again")

    monkeypatch.setitem(gpu.SECTIONS, "from logits", twice)
    gpu.main(command)
    after = json.loads(path.read_text())
    assert list(after) == [*before, "pairs", "tiles"] and list(tmp_path.iterdir()) == [path]
    assert {name: after[name] for name in before} == before
    assert after["from logits"][0]["ms"] > 0
    assert all("ms" in row for row in after["pairs"] if "skipped" not in row)


def test_the_table_of_a_gpu_is_empty_until_one_has_run() -> None:
    assert gpu_record.readme_table([{"step": "fused", "error": "no GPU"}]).count("\n") == 1
    row = {"step": "fused, 1 GiB", "ms": 60.25, "ratio": 1.38, "peak MiB": 1010.2}
    assert gpu_record.readme_table([row]).endswith("| fused, 1 GiB | 60.2 | 1.38 | 1010 |")


def test_several_chunks_are_several() -> None:
    """Whatever the budget would hold; and plans are the planner's again afterwards."""
    x, w = torch.randn(9, 4, requires_grad=True), torch.randn(50, 4)
    args = x, w, bg.LinearTeacher(torch.randn(9, 4), torch.randn(50, 4)), torch.arange(9)
    for wanted, found in ((3, [3]), (None, [1])):
        with gpu.chunked(wanted) as counts:
            bg.linear_hybrid_distillation(*args, backend="eager").backward()
        assert counts == found


def test_what_cannot_run_says_why() -> None:
    case = Case("big", 1024, 8, 8, 1 << 20, dtype="bfloat16")
    assert "GiB" in str(ENTRIES["dense"].refuses(case, 1e9, 1e9))
    assert "would take about" in str(ENTRIES["dense"].refuses(case, 0.0, 1e12))
    assert ENTRIES["fused-32"].refuses(case, 0.0, 0.0) is None


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 3}


def test_the_command_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(run, "main", given.extend)
    assert CliRunner().invoke(app, ["bench", "--suite", "pairs", "--also"]).exit_code == 0
    assert given == ["--suite", "pairs", "--also"]


def test_the_command_says_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.run", None)
    failed = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench"])
    assert failed.exit_code == 1
    assert "run this in a checkout of the repository" in failed.output
