"""``bgkernels generate-labels``, and the files that it reads."""

from __future__ import annotations

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner

from bgkernels.labels import CaptureConfig, Documents, LabelDataset, LabelError, generate
from bgkernels.labels.documents import read_documents
from bgkernels.training import ModelShape, models
from bgkernels.training.cli import app
from bgkernels.training.errors import MissingExtra
from bgkernels.training.tokens import train_tokenizer

TEXTS = ["the teacher knows what may follow", "and the student learns it", "", "the end"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A teacher with its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    model = models.small_llama(ModelShape(16, 1, 2), len(tokenizer), length=16, seed=0)
    models.export(model, tokenizer, folder)
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["generate-labels", *map(str, arguments)])


def test_command(folder, tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    output = tmp_path / "labels"
    arguments = ("--teacher", folder, "--data", data, "--output", output, "--k", 5)
    arguments += ("--max-length", 4, "--documents-per-shard", 3)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    dataset = LabelDataset(output, tokenizer=tokenizer)
    tokens = [token for document in dataset for token in document.tokens.tolist()]
    assert tokens == [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    assert all(len(document.tokens) <= 4 for document in dataset) and dataset.info.k == 5
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    assert run(*arguments).exit_code == 0  # nothing is made twice
    assert before == {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}

    result = run(*arguments, "--temperature", 2.0)
    assert result.exit_code == 1 and "temperature is 1.0 there and 2.0 here" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--k", 100_000), "k must lie in"),
        (("--dtype", "float8"), "--dtype must be one of float32"),
        (("--device", "abacus"), "--device must be one that torch can use"),
        (("--temperature", 0), "temperature"),
        (("--max-length", 17), "takes at most 16 tokens"),
    ],
)
def test_command_refuses(folder, tmp_path, arguments, message):
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    output = tmp_path / "labels"
    defaults = ("--teacher", folder, "--data", data, "--output", output, "--max-length", 16)
    result = run(*defaults, *arguments)
    assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
    assert not list(tmp_path.glob("labels/*"))


def test_kinds_of_files(tmp_path):
    ids = [[1, 2, 3, 4, 5], [], [6, 7]]
    table = pyarrow.table({"input_ids": ids, "other": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    write_jsonl(tmp_path / "a.jsonl", [{"tokens": row} for row in ids])
    for name in ("a.parquet", "a.arrow", "a.jsonl"):
        assert [x.tolist() for x in read_documents(tmp_path / name)] == ids
    cut = read_documents(tmp_path / "a.parquet", max_length=2)
    assert [x.tolist() for x in cut] == [[1, 2], [3, 4], [5], [], [6, 7]]
    assert [x.tolist() for x in cut[1:3]] == [[3, 4], [5]]
    whole = read_documents(tmp_path / "a.parquet")
    assert cut.fingerprint != whole.fingerprint != read_documents(tmp_path / "a.arrow").fingerprint


def test_a_folder_of_files(tmp_path):
    for i in (1, 0):
        write_jsonl(tmp_path / f"part{i}.jsonl", [{"input_ids": [i, 5]}])
    assert [x.tolist() for x in read_documents(tmp_path)] == [[0, 5], [1, 5]]


def test_rows_of_a_data_set(tmp_path):
    """A ``datasets.Dataset`` is a sequence of such rows."""
    teacher = models.small_llama(ModelShape(16, 1, 2), 50, length=8, seed=0)
    rows = [{"input_ids": [3, 4], "length": 2}, {"input_ids": torch.tensor([5])}]
    assert generate(teacher, rows, tmp_path, CaptureConfig(k=2))
    assert [x.tokens.tolist() for x in LabelDataset(tmp_path)] == [[3, 4], [5]]


def test_null_rows_are_empty_documents():
    assert [len(x) for x in Documents(pyarrow.chunked_array([[[1], None, [2, 3]]]))] == [1, 0, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "x"}, "must have a column 'input_ids' or 'tokens'.*; it has 'words'"),
        ({"text": "x"}, "'text' and a tokenizer"),
        ({"input_ids": ["x"]}, "'input_ids' of .* must hold lists of integers, not list"),
    ],
    ids=str,
)
def test_data_without_tokens(tmp_path, row, message):
    with pytest.raises(LabelError, match=message):
        read_documents(write_jsonl(tmp_path / "a.jsonl", [row]))


def test_without_arrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'bgkernels\[labels\]'"):
        read_documents(tmp_path)


def test_data_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2}\n')
    with pytest.raises(LabelError, match="cannot be read"):
        read_documents(tmp_path / "a.jsonl")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(LabelError, match=r"of one kind .* has \.jsonl and \.parquet"):
        read_documents(tmp_path)
    with pytest.raises(LabelError, match="has none"):
        read_documents(tmp_path / "missing")
