"""Cached labels: what is stored is what the teacher said, or an error, however it was killed."""

from __future__ import annotations

import errno
import os
import pickle
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bgkernels as bg
from bgkernels.labels import (
    CaptureConfig,
    CorruptLabels,
    LabelDataset,
    LabelError,
    collate,
    fingerprint,
    generate,
)
from tests.labels.documents import CONFIG, DOCUMENTS, LENGTHS, VOCAB, Tokenizer, make_teacher


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """A folder of labels that was made without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert generate(teacher, DOCUMENTS, folder, CONFIG, tokenizer=Tokenizer())
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_what_is_stored_is_what_the_teacher_said(teacher, whole):
    dataset = LabelDataset(whole, tokenizer=Tokenizer(), vocab=VOCAB)
    assert len(dataset) == len(LENGTHS) and len(dataset.shards) == 3
    for i, tokens in enumerate(DOCUMENTS):
        document = dataset[i]
        assert document.tokens.tolist() == tokens
        if not tokens:
            continue
        z = teacher.network(torch.tensor([tokens])).logits[0].double()
        lp, one = (z / 2).log_softmax(-1), z.log_softmax(-1)
        labels, expected = document.labels, lp.topk(7)
        assert torch.equal(labels.indices, expected.indices)
        error = (labels.logprobs - expected.values).abs()
        assert (error <= 2**-10 * expected.values.abs() + 1e-6).all()
        kept = expected.values.logsumexp(-1)
        assert (labels.logprobs.double().logsumexp(-1) - kept).abs().max() < 1e-6
        close = {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(labels.entropy.double(), -(lp.exp() * lp).sum(-1), **close)
        torch.testing.assert_close(labels.power_sum.double(), (0.3 * lp).logsumexp(-1), **close)
        assert one.gather(1, labels.sample[:, None]).min() > -16.0


def test_samples_follow_the_teacher(teacher, tmp_path):
    generate(teacher, [[5]] * 600, tmp_path, CaptureConfig(k=1, documents_per_shard=150))
    samples = torch.cat([document.labels.sample for document in LabelDataset(tmp_path)])
    p = teacher.network(torch.tensor([[5]])).logits[0, 0].softmax(-1)
    share = torch.bincount(samples, minlength=VOCAB) / 600
    assert (share - p).abs().max() < 4 * (p * (1 - p) / 600).sqrt().max()
    assert len({tuple(part.tolist()) for part in samples.view(4, 150)}) == 4


def test_batches_are_a_teacher_s_tensors(teacher, tmp_path, monkeypatch):
    given = {}
    fake = lambda *args, **kwargs: given.update(kwargs, args=args) or "teacher"  # noqa: E731
    monkeypatch.setattr(bg, "TopKTeacher", fake, raising=False)
    generate(teacher, DOCUMENTS, tmp_path, replace(CONFIG, temperature=1.0))
    dataset = LabelDataset(tmp_path)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=dataset.collate)
    batch = next(iter(loader)).to("cpu")
    assert batch.tokens.shape == batch.target.shape == batch.entropy.shape == (4, 8)
    assert batch.indices.shape == batch.logprobs.shape == (4, 8, 7)
    assert batch.target[0].tolist() == [*DOCUMENTS[0][1:], *[-100] * 4]
    assert batch.sample[0, 5:].eq(-100).all() and batch.sample[0, :5].ge(0).all()
    assert batch.teacher(tail="drop") == "teacher"
    assert given.pop("args") == (batch.indices, batch.logprobs)
    assert given.pop("entropy") is batch.entropy and given.pop("power_sum") is batch.power_sum
    assert given == {"tail": "drop", "gamma": 0.3, "vocab": VOCAB}
    assert collate([dataset[0]]).teacher() == "teacher"
    assert len(pickle.loads(pickle.dumps(dataset))[2].tokens) == LENGTHS[2]
    with pytest.raises(IndexError, match="10 documents"):
        dataset[10]


def test_tempered_labels_are_not_taken_for_others(whole):
    dataset = LabelDataset(whole)
    with pytest.raises(LabelError, match=r"captured at temperature 2\.0.*capture at 1"):
        dataset.collate([dataset[0]]).teacher()


# ---- killed and resumed


class Killed(BaseException):
    """Not an error that anything may handle."""


@pytest.fixture
def deadly(monkeypatch):
    """``deadly(n)`` raises at the n-th of the moments that matter: captures, syncs and renames."""
    everything = ((bg, "capture"), (os, "fsync"), (os, "replace"))

    def arm(moment, error=Killed, moments=everything):
        left = [moment]

        def wrap(owner, name):
            original = getattr(owner, name)

            def wrapper(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise error
                return original(*args, **kwargs)

            monkeypatch.setattr(owner, name, wrapper)

        for owner, name in moments:
            wrap(owner, name)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_the_files_are_the_same(
    teacher, whole, tmp_path, deadly, seed, monkeypatch
):
    chance, deaths = random.Random(seed), 0
    for _ in range(20):
        deadly(chance.randint(1, 15))
        try:
            generate(teacher, DOCUMENTS, tmp_path, CONFIG, tokenizer=Tokenizer())
        except Killed:
            deaths += 1
            with pytest.raises(CorruptLabels, match=r"is not complete|holds no labels"):
                LabelDataset(tmp_path)
        else:
            break
        finally:
            monkeypatch.undo()
    assert deaths >= 1
    assert content(tmp_path) == content(whole)


SCRIPT = """
import os, signal
from bgkernels.labels import generate
from tests.labels.documents import CONFIG, DOCUMENTS, Tokenizer, make_teacher
replace, left = os.replace, [4]  # shard, receipt, shard, and the temporary file stays
def deadly(*args):
    left[0] -= 1
    os.kill(os.getpid(), signal.SIGKILL) if not left[0] else replace(*args)
os.replace = deadly
generate(make_teacher(), DOCUMENTS, {folder!r}, CONFIG, tokenizer=Tokenizer())
"""


def test_killed_by_the_system(teacher, whole, tmp_path):
    code = SCRIPT.format(folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert run.returncode == -signal.SIGKILL
    assert len(content(tmp_path)) == 4  # among them a half-made receipt
    assert generate(teacher, DOCUMENTS, tmp_path, CONFIG, tokenizer=Tokenizer())
    assert content(tmp_path) == content(whole)


def test_ranks_share_the_shards(teacher, whole, tmp_path, monkeypatch):
    for rank, world in ((1, 2), (0, 2)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        made = []
        options = {"tokenizer": Tokenizer(), "report": made.append}
        done = generate(teacher, DOCUMENTS, tmp_path, CONFIG, **options)
        assert done == (rank == 0) and len(made) == 2 - rank
    assert content(tmp_path) == content(whole)


def test_disk_full_loses_nothing(teacher, whole, tmp_path, deadly, monkeypatch):
    deadly(5, OSError(errno.ENOSPC, "No space left on device"), [(os, "fsync")])
    with pytest.raises(LabelError, match=r"No space left.*intact.*same command"):
        generate(teacher, DOCUMENTS, tmp_path, CONFIG, tokenizer=Tokenizer())
    monkeypatch.undo()
    done = content(tmp_path)
    assert done.items() <= content(whole).items() and "shard-00000.safetensors" in done
    assert generate(teacher, DOCUMENTS, tmp_path, CONFIG, tokenizer=Tokenizer())
    assert content(tmp_path) == content(whole)


# ---- damaged, or of something else


@pytest.fixture
def copy(whole, tmp_path):
    for name, data in content(whole).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_detected(teacher, copy, whole):
    path = copy / "shard-00001.safetensors"
    good, chance = path.read_bytes(), random.Random(0)
    for position in (0, 8, len(good) - 1, *(chance.randrange(len(good)) for _ in range(20))):
        path.write_bytes(good)
        flip(path, position)
        dataset = LabelDataset(copy)
        assert dataset[0].tokens.tolist() == DOCUMENTS[0]
        with pytest.raises(CorruptLabels, match=r"shard-00001.* is corrupt.*delete it, and run"):
            dataset[4]
        with pytest.raises(CorruptLabels, match="shard-00001"):
            dataset.verify()
    path.unlink()
    assert generate(teacher, DOCUMENTS, copy, CONFIG, tokenizer=Tokenizer())
    assert content(copy) == content(whole)
    LabelDataset(copy).verify()


def test_a_changed_manifest_is_detected(copy):
    path = copy / "manifest.json"
    good = path.read_bytes()
    for position in random.Random(0).sample(range(len(good)), 60):
        path.write_bytes(good)
        flip(path, position)
        with pytest.raises(LabelError, match=r"manifest\.json"):
            LabelDataset(copy)


def test_missing_and_cut_files(copy):
    path = copy / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptLabels, match=r"shard-00002.* bytes instead of .*delete it"):
        LabelDataset(copy)
    path.unlink()
    with pytest.raises(CorruptLabels, match=r"shard-00002.* is missing; run the command"):
        LabelDataset(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(CorruptLabels, match=r"not complete \(3 shards are done\)"):
        LabelDataset(copy)
    with pytest.raises(CorruptLabels, match="holds no labels"):
        LabelDataset(copy / "nothing")


def test_another_tokenizer_or_vocabulary(whole):
    with pytest.raises(LabelError, match=f"{fingerprint(Tokenizer(1))}.*shares the teacher's"):
        LabelDataset(whole, tokenizer=Tokenizer(1))
    with pytest.raises(LabelError, match=r"`vocab` is 59.*60 columns.*vocab_size=59"):
        LabelDataset(whole, vocab=59)
    assert LabelDataset(whole, vocab=VOCAB + 4).info.k == 7


def test_other_labels_are_not_mixed_in(teacher, copy):
    (copy / "shard-00000.safetensors").unlink()
    with pytest.raises(LabelError, match=r"something else: k is 7 there and 6 here"):
        generate(teacher, DOCUMENTS, copy, replace(CONFIG, k=6), tokenizer=Tokenizer())
    with pytest.raises(LabelError, match="something else: data is"):
        generate(teacher, [[1], *DOCUMENTS[1:]], copy, CONFIG, tokenizer=Tokenizer())
    other = make_teacher()
    other.network.lm_head.weight.data.mul_(2)
    with pytest.raises(LabelError, match="weights is"):
        generate(other, DOCUMENTS, copy, CONFIG, tokenizer=Tokenizer())
    assert not (copy / "shard-00000.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "documents", "message"),
    [
        ({"k": 61}, [[1]], r"k must lie in \[1, 60\], the teacher's columns; got 61"),
        ({"k": 9, "vocab_size": 8}, [[1]], r"k must lie in \[1, 8\]"),
        ({"vocab_size": 61}, [[1]], r"vocab_size must lie in \[1, 60\]"),
        ({}, [[1], [2, 60]], "document 1 has the token 60, and the vocabulary has 60 tokens"),
        ({}, [[-1]], "document 0 has the token -1"),
        ({}, [], "there are no documents"),
        ({"batch_size": 0}, [[1]], "batch_size must be at least 1; got 0"),
        ({}, [[[1, 2]]], "document 0 must be a list of tokens"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, tmp_path, changes, documents, message):
    with pytest.raises(LabelError, match=message):
        generate(teacher, documents, tmp_path, replace(CONFIG, **changes))
    assert not content(tmp_path)


def test_a_teacher_that_is_not_finite_is_refused(tmp_path):
    teacher = make_teacher()
    teacher.network.lm_head.weight.data[3] = float("nan")
    with pytest.raises(LabelError, match="nan, which cannot be"):
        generate(teacher, DOCUMENTS, tmp_path, CONFIG)
    assert not content(tmp_path)
