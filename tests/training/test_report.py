"""The page of a run: what models would have said, what the folder has, what a browser shows."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bgkernels.training import marks, models, presets, tasks
from bgkernels.training.cli import app
from bgkernels.training.config import ModelShape, TrainConfig
from bgkernels.training.demo import run_demo
from bgkernels.training.errors import OptionError
from bgkernels.training.files import write_json
from bgkernels.training.maps import TokenMap, Voice, hear
from bgkernels.training.page import Cell, Chart, Line, Page, Table, of_run, render
from bgkernels.training.report import table
from bgkernels.training.tasks import fitted
from tests.training.browser import play
from tests.tree import ROOT

LENGTH = 24
NAMES = {"teacher": "teacher", "soft": "soft-only"}


def spoken(favourite):
    """Somebody who is sure of the same token everywhere."""
    best = ((favourite, 0.9), ("</script>", 0.06), ("\n", 0.02), ("x", 0.01), ("y", 0.01))
    return Voice((best,) * 4, ("<b> & more", "", "\n", None))


@pytest.fixture(scope="module")
def page():
    passage = TokenMap(
        ("<b>", "&", "\n", "z"), (0.0, 0.1, 0.9, 1.0), kl=(0.0, 0.5, 1.0, 2.0),
        voices={"teacher": spoken("&"), "soft": spoken("z")},
    )  # fmt: skip
    line = Line("soft", tuple((step, 10 / step) for step in range(10, 101, 10)))
    cells = (Cell("61.0 %", share=0.61, best=True), Cell("0.100", "±0.010"))
    return Page(
        "a < b", ("A sentence.",), NAMES, (Table("Right", ("right", "KL"), {"soft": cells}),),
        (Chart("Loss", "nats", (line,), {"teacher": 0.05}),), (passage, passage),
        configuration={"seed": 3},
    )  # fmt: skip


# ---- what a model would have said


@pytest.fixture(scope="module")
def speaker():
    words = tasks.find("arithmetic").tokenizer
    model = models.small_llama(ModelShape(16, 2, 2), len(words), LENGTH, seed=5)
    model.network.lm_head.weight.data.mul_(2)
    model.freeze()
    return model, words


def test_favourites_and_continuations_are_those_of_dense_torch(speaker):
    model, words = speaker
    text = torch.randint(2, len(words), (LENGTH,), generator=torch.Generator().manual_seed(1))
    places = range(3, LENGTH)
    voice = hear(model, words, text, places)
    for place, best, ahead in zip(places, voice.best, voice.ahead, strict=True):
        said = text[:place].tolist()
        with torch.no_grad():
            shares = model.network(torch.tensor([said])).logits[0, -1].double().softmax(-1)
        dense, tokens = shares.topk(5)
        assert [token for token, _ in best] == [words.decode([t]) for t in tokens.tolist()]
        assert [p for _, p in best] == pytest.approx(dense.tolist(), abs=1e-4)
        if place + 10 > LENGTH:
            assert ahead is None
            continue
        for _ in range(10):
            with torch.no_grad():
                said.append(int(model.network(torch.tensor([said])).logits[0, -1].argmax()))
        assert ahead == words.decode(said[place:])


def test_a_continuation_ends_where_the_text_does(speaker):
    model, words = speaker
    text = torch.arange(2, 2 + LENGTH) % len(words)
    endless = hear(model, words, text, range(1, 4))
    stop = words.convert_tokens_to_ids(endless.best[0][0][0])
    assert hear(model, words, text, range(1, 4), stop).ahead[0] == ""


# ---- the page


def test_a_page_asks_for_nothing_and_escapes_everything(page):
    html = render(page)
    assert not re.search(r"(?:src|href|url|action)\s*[=(]\s*[\"']?(?!data:,)\w*:?//", html)
    assert not re.search(r"https?:|@import|<link(?! rel=\"icon\" href=\"data:,\">)", html)
    assert "default-src 'none'" in html and "connect-src" not in html
    assert "a &lt; b" in html and "&lt;b&gt;" in html and "<b>" not in html
    assert html.count("</script>") == 2, "no token ends a script"
    assert html.count("--share: 0.61") == 1 and "±0.010" in html and "seed" in html


def test_a_page_of_tables_alone_has_no_script():
    html = render(Page("Numbers", tables=(Table("One", ("a",), {"row": (Cell("1"),)}),)))
    assert "<script" not in html and "Token by token" not in html and re.search(r">\s*1</td>", html)


PLAYED = """
  const seen = {ready: "ready" in document.documentElement.dataset};
  const maps = [...document.querySelectorAll(".passage")];
  const tokens = [...maps[0].children], card = document.getElementById("card");
  const press = key => document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", {key, bubbles: true}));
  const state = () => card.hidden ? null : card.dataset.token;
  const stops = () => tokens.map(token => token.tabIndex);
  seen.before = [state(), stops()];
  tokens[1].dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  seen.hovered = [state(), card.textContent];
  document.querySelector("#maps").dispatchEvent(new PointerEvent("pointerleave"));
  seen.left = state();
  tokens[0].focus();
  seen.focused = [state(), tokens[0].getAttribute("aria-describedby"), card.textContent];
  press("ArrowRight"); seen.right = [state(), stops()];
  press("End"); seen.end = state();
  press("ArrowUp"); seen.up = state();
  press("Home"); seen.home = state();
  press("Escape"); seen.escaped = [state(), document.activeElement === tokens[0]];
  const select = document.querySelector("select"), apart = () => tokens.filter(
    token => token.classList.contains("apart")).length;
  seen.framed = [select.value, apart()];
  select.value = "soft"; select.dispatchEvent(new Event("change", {bubbles: true}));
  seen.framed.push(apart());
  seen.kinds = tokens.map(token => token.className.split(" ")[1]);
  const radio = document.querySelector("[value=kl]");
  radio.checked = true; radio.dispatchEvent(new Event("change", {bubbles: true}));
  seen.shares = tokens.map(token => token.style.getPropertyValue("--share"));
  seen.keys = [...document.querySelectorAll(".key")].map(key => [key.dataset.for, key.hidden]);
  seen.fetched = performance.getEntriesByType("resource").length;
  const page = document.documentElement;
  seen.width = [page.clientWidth, page.scrollWidth];
  return seen;
"""


@pytest.fixture(scope="module")
def seen(page, tmp_path_factory):
    return play(render(page), PLAYED, tmp_path_factory.mktemp("browser"), "--window-size=1280,900")


def test_a_browser_shows_a_card_on_hover_and_on_focus(seen):
    assert seen["ready"] and seen["before"] == [None, [0, -1, -1, -1]]
    where, card = seen["hovered"]
    assert where == "0.1" and seen["left"] is None
    assert "bridge, entropy 0.100, divergence 0.500" in card
    assert "soft-onlyz0.900</script>0.060↵0.020x0.010y0.010goes on: (it ends)" in card
    where, described, card = seen["focused"]
    assert (where, described) == ("0.0", "card") and "goes on: <b> & more" in card


def test_a_browser_is_walked_by_keys(seen):
    assert seen["right"] == ["0.1", [-1, 0, -1, -1]], "one stop of the tabulator a passage"
    assert seen["end"] == "0.3" and seen["up"] != "0.3" and seen["home"] == "0.0"
    assert seen["escaped"] == [None, True], "the card goes, the place stays"


def test_a_browser_colours_and_frames(seen):
    assert seen["framed"] == ["", 0, 4]
    assert seen["kinds"] == ["low", "low", "high", "high"]
    assert seen["shares"] == ["0", "0.25", "0.5", "1"]
    assert seen["keys"] == [["ambiguity", True], ["kl", False]]


def test_a_browser_fetches_nothing(seen):
    assert seen["fetched"] == 0


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_sticks_out(page, tmp_path, width):
    """In a frame, since a window has a least width."""
    script = f"""
      const frame = document.createElement("iframe");
      frame.style.cssText = "border: 0; height: 900px; width: {width}px";
      document.body.replaceChildren(frame);
      const inner = frame.contentDocument;
      inner.open(); inner.write(PAGE); inner.close();
      inner.querySelector(".passage .token").dispatchEvent(
        new frame.contentWindow.PointerEvent("pointerover", {{bubbles: true}}));
      const root = inner.documentElement;
      return [root.clientWidth, root.scrollWidth, inner.getElementById("card").hidden];
    """
    inner = json.dumps(render(page)).replace("</", "<\\/")
    script = f"const PAGE = {inner}; {script}"
    shown, needed, hidden = play(render(page), script, tmp_path)
    assert width - 20 <= needed <= shown <= width and not hidden, "but for a scroll bar"


# ---- the demo on a task


def test_demo_of_a_task_begins_with_right_answers(tmp_path, monkeypatch):
    """All students start from one that has read the task, which is found again."""
    monkeypatch.setattr(marks, "PROBLEMS", 4)
    config = presets.on_task("arithmetic:terms=3,digits=2")
    few = TrainConfig(3, 1e-2, validate_every=2, checkpoint_every=3)
    config = replace(
        config, output=tmp_path, teacher_training=few, student_training=few, schooling=few,
        data=replace(config.data, texts=40, batch_size=4), device="cpu",
        teacher_shape=ModelShape(16, 1, 1), student_shape=ModelShape(16, 1, 1),
        evaluation=replace(config.evaluation, windows=4), methods=("hard", "soft-t2"),
    )  # fmt: skip
    result = run_demo(fitted(config))
    write_json(tmp_path / "results.json", result.plain())
    rows = [str(cell) for cell in table(result).columns[0].cells]
    assert rows.index("  right, sampled") < rows.index("  cross-entropy")
    found = of_run(tmp_path)
    assert found.tables[0].title == "Right answers"
    assert list(found.tables[0].rows) == ["teacher", "hard", "soft-t2"]
    for passage in found.passages:
        assert passage.given.endswith("=") and passage.tokens[-1] == "<|endoftext|>"
    assert list((tmp_path / "schooling").glob("student-hard/step-*.pt"))
    again = run_demo(fitted(config))
    assert again.students["hard"].measures["kl"]["all"].mean == pytest.approx(
        result.students["hard"].measures["kl"]["all"].mean
    )


# ---- folders


def command(*arguments):
    return CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(
        app, ["report", *map(str, arguments)]
    )


def test_a_run_that_was_stopped_has_curves(tmp_path):
    folder = tmp_path / "run" / "student-soft"
    folder.mkdir(parents=True)
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "cross_entropy": 3.25, "kl": 0.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    done = command(tmp_path / "run")
    assert done.exit_code == 0 and "report.html" in done.output, done.output
    html = (tmp_path / "run" / "report.html").read_text()
    assert "run, not finished" in html and "soft-only ends at 3.250" in html


def test_what_is_no_run_is_named(tmp_path):
    done = command(tmp_path)
    assert done.exit_code == 1 and "RUN must be the folder of a run" in " ".join(
        done.output.split()
    )
    (tmp_path / "results.json").write_text('{"students": 3}')
    with pytest.raises(OptionError, match=r"results\.json is not as this version writes it"):
        of_run(tmp_path)


@pytest.mark.parametrize("name", ["arithmetic", "programs"])
def test_committed_results_become_a_page(name, tmp_path):
    (path,) = ROOT.glob(f"benchmarks/results/*/*-accuracy-{name}.json")
    (tmp_path / "accuracy.json").write_text(path.read_text())
    page = of_run(tmp_path)
    rows = page.tables[0].rows
    assert float(rows["soft-t2"][0].text[:-2]) > float(rows["soft"][0].text[:-2])
    assert "T = 2" in render(page)
