"""Which tokens are the same, for every kind of tokenizer, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bgkernels.vocabularies import VocabularyError, VocabularyMatch, coverage, match, read
from bgkernels.vocabularies.readers import reader_of
from tests.vocabularies import toys

BYTES = toys.byte_level(400)
SPACED = toys.spaced(500)
KINDS: dict[str, Any] = {
    "byte-level": BYTES,
    "fast": toys.fast(toys.byte_level(330, toys.TEXTS[:2]), eos_token="<|endoftext|>"),
    "tiktoken": toys.Tiktoken(BYTES, read(BYTES).tokens),
    "spaced": SPACED,
    "spaced, fast": toys.fast(SPACED, bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    "sentencepiece": toys.SentencePiece(SPACED),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", toys.TEXTS)
def test_the_bytes_of_text_come_back(kind: str, text: str) -> None:
    vocabulary = read(KINDS[kind])
    ids = reader_of(KINDS[kind]).encode([text])[0]
    back = b"".join(vocabulary[i] for i in ids)
    assert back == b" " * ("spaced" in kind or kind == "sentencepiece") + text.encode()
    assert vocabulary.roles["eos"] == {400: 0}.get(vocabulary.size, vocabulary.roles["eos"])


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_pairs_have_the_same_bytes(student: str, teacher: str) -> None:
    found = match(KINDS[student], KINDS[teacher])
    ids = found.pairs.tolist()
    roles = [{i: r for r, i in v.roles.items()} for v in (found.student, found.teacher)]
    for one, other in zip(*ids, strict=True):
        assert found.student[one] == found.teacher[other]
        assert roles[0].get(one) == roles[1].get(other)
        assert found.student[one] or one in roles[0]
    assert len(set(ids[0])) == len(set(ids[1])) == len(ids[0])
    assert ids[0] == sorted(ids[0])
    shared = {*found.student.tokens} & {*found.teacher.tokens} - {b""}
    events = found.student.roles.keys() & found.teacher.roles.keys()
    assert len(ids[0]) == len(shared) + len(events)
    assert {*ids[0]}.isdisjoint(found.unmatched[0].tolist())
    assert len(found.unmatched[1]) + len(ids[1]) == found.teacher.size


def test_a_piece_is_preferred_to_a_byte_token() -> None:
    found = match(BYTES, SPACED)
    letters = {found.student[i]: j for i, j in found.pairs.T.tolist()}
    assert SPACED.id_to_token(letters[b"e"]) == "e"
    assert SPACED.id_to_token(letters[b"\xe7"]) == "<0xE7>"


def test_special_tokens_are_paired_by_their_role() -> None:
    one = toys.fast(toys.byte_level(300), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    two = toys.fast(toys.byte_level(300, special="</s>"), eos_token="</s>")
    two.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|fim▁begin|>"]})
    one.add_special_tokens({"additional_special_tokens": ["<|start_header_id|>"]})
    found = match(one, two)
    pairs = dict(found.pairs.T.tolist())
    assert pairs[one.eos_token_id] == two.eos_token_id
    assert pairs[one.convert_tokens_to_ids("<|start_header_id|>")] == (
        two.convert_tokens_to_ids("<|im_start|>")
    )
    assert one.pad_token_id not in pairs  # the other has none


def test_added_tokens_are_what_they_spell() -> None:
    one, two = toys.byte_level(300), toys.byte_level(280)
    for tokenizer in (one, two):
        tokenizer.add_tokens(["<tool_call>", "   "])
    found = match(one, two)
    pairs = dict(found.pairs.T.tolist())
    assert pairs[one.token_to_id("<tool_call>")] == two.token_to_id("<tool_call>")
    assert found.student[one.token_to_id("   ")] == b"   "


def test_mass_is_what_the_pairs_have_of_a_distribution() -> None:
    found = match(BYTES, SPACED)
    probabilities = torch.rand(3, 2, found.teacher.size + 5).softmax(-1)
    kept = {*found.pairs[1].tolist()}
    wanted = sum(probabilities[..., i] for i in kept)
    torch.testing.assert_close(found.mass(probabilities), wanted)
    with pytest.raises(VocabularyError, match="columns"):
        found.mass(probabilities[..., :100])
    with pytest.raises(ValueError, match="`side`"):
        found.mass(probabilities, side="both")


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = match(BYTES, SPACED)
    found.save(tmp_path / "match.npz")
    again = VocabularyMatch.load(tmp_path / "match.npz", BYTES, SPACED)
    assert torch.equal(again.pairs, found.pairs)
    assert again.student.tokens == found.student.tokens
    assert again.teacher.fingerprint == found.teacher.fingerprint
    assert [x.name for x in tmp_path.iterdir()] == ["match.npz"]


def test_a_match_of_other_tokenizers_is_refused(tmp_path: Path) -> None:
    found = match(BYTES, SPACED)
    found.save(tmp_path / "match.npz")
    with pytest.raises(VocabularyError, match=r"student's tokenizer: it has \d+ ids"):
        VocabularyMatch.load(tmp_path / "match.npz", student=SPACED)
    with pytest.raises(VocabularyError, match=r"id \d+ is b'.*' in it and"):
        found.check_tokenizers(student=shuffled(BYTES))
    with pytest.raises(VocabularyError, match="special tokens"):
        found.check_tokenizers(student=renamed(BYTES))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "match.npz"
    match(BYTES, SPACED).save(path)
    with np.load(path) as arrays:
        content = dict(arrays)
    content["student.content"] = content["student.content"].copy()
    content["student.content"][500] ^= 1
    with path.open("wb") as file:
        np.savez(file, **content)
    with pytest.raises(VocabularyError, match="the student's vocabulary has another hash"):
        VocabularyMatch.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(VocabularyError, match="is no match of two vocabularies"):
        VocabularyMatch.load(path)
    with pytest.raises(VocabularyError, match="is no match of two vocabularies"):
        VocabularyMatch.load(tmp_path / "absent.npz")
    with pytest.raises(VocabularyError, match="could not write"):
        match(BYTES, SPACED).save(tmp_path / "no" / "match.npz")


def test_heads_have_the_columns_of_the_pairs() -> None:
    found = match(BYTES, SPACED)
    found.check_heads(found.student.size + 64, found.teacher.size)
    with pytest.raises(VocabularyError, match="the head of the teacher has 300 columns"):
        found.check_heads(teacher=300)


def test_tokenizers_that_share_nothing_are_refused() -> None:
    sentence = "The cat sat on a mat."
    whole = Tokenizer(models.WordLevel({sentence: 0}, unk_token=sentence))
    with pytest.raises(VocabularyError, match="share no token"):
        match(whole, BYTES)


def test_a_tokenizer_that_changes_text_is_refused() -> None:
    lower = toys.byte_level(300)
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(VocabularyError, match=r"do not come back .* became 'the cat"):
        match(lower, BYTES)
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(VocabularyError, match="do not come back"):
        match(BYTES, words)


def test_another_thing_is_no_tokenizer() -> None:
    with pytest.raises(VocabularyError, match=r"must be a fast one of transformers.*got dict"):
        match({}, BYTES)


def test_coverage_counts_tokens_positions_and_spans() -> None:
    found = coverage(match(BYTES, SPACED), BYTES, SPACED, toys.TEXTS)
    assert found.tokens == tuple(
        sum(len(x) for x in reader_of(t).encode(toys.TEXTS)) for t in (BYTES, SPACED)
    )
    assert 0 < found.student < 1 and 0 < found.teacher < 1 and found.differing == 0
    assert sum(found.spans.values()) == pytest.approx(1)
    same = coverage(match(BYTES, BYTES), BYTES, BYTES, toys.TEXTS)
    assert (same.student, same.aligned, same.same, same.spans["1-1"]) == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="`texts`"):
        coverage(match(BYTES, BYTES), BYTES, BYTES, [""])


def shuffled(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens under other numbers, special ones apart."""
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    names = [x for x in vocab if vocab[x]]
    mixed = random.Random(0).sample(names, len(names))
    content["model"]["vocab"] = {"<|endoftext|>": 0} | {x: i + 1 for i, x in enumerate(mixed)}
    return Tokenizer.from_str(json.dumps(content))


def renamed(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens, of which the first one begins a text."""
    return Tokenizer.from_str(tokenizer.to_str().replace("<|endoftext|>", "<|startoftext|>"))
