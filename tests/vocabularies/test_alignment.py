"""Which positions are the same: compared with a walk over the bytes, one position at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from bgkernels.vocabularies import (
    Translator,
    Vocabulary,
    VocabularyError,
    VocabularyMatch,
    align,
    match,
)
from bgkernels.vocabularies.readers import reader_of
from tests.vocabularies import toys

BYTES, SMALL, SPACED = toys.byte_level(400), toys.byte_level(290), toys.spaced(500)
PAIRS = {"bytes": (BYTES, SMALL), "spaces": (BYTES, SPACED), "from spaces": (SPACED, SMALL)}


def walked(found: VocabularyMatch, one: list[int], two: list[int], stripped: bool) -> list[int]:
    """The teacher's position for each of the student's, or -1, from the bytes read so far."""

    def read(vocabulary: Vocabulary, ids: list[int]) -> list[bytes]:
        texts = [b"".join(vocabulary[i] for i in ids[: n + 1]) for n in range(len(ids))]
        return [x.removeprefix(b" ") if stripped else x for x in texts]

    theirs = read(found.teacher, two)
    return [theirs.index(x) if x in theirs else -1 for x in read(found.student, one)]


def encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return reader_of(tokenizer).encode(texts)


@pytest.mark.parametrize("pair", PAIRS)
def test_positions_are_those_that_have_read_the_same_bytes(pair: str) -> None:
    student, teacher = PAIRS[pair]
    found = match(student, teacher)
    texts = toys.TEXTS[:3]
    ids = encoded(student, texts), encoded(teacher, texts)
    width = max(map(len, ids[1]))
    made = align(found, *ids)
    assert not made.differing.any()
    assert made.tokens == sum(map(len, ids[0]))
    for row, (one, two) in enumerate(zip(*ids, strict=True)):
        wanted = walked(found, one, two, stripped="spaces" in pair)
        shown = [row * width + i if i >= 0 else -1 for i in wanted]
        assert made.positions[row, : len(one)].tolist() == shown
        assert (made.positions[row, len(one) :] == -1).all()


@given(st.text(max_size=60), st.sampled_from(list(PAIRS)))
@settings(deadline=None, max_examples=60)
def test_the_end_of_a_text_is_common_to_both(text: str, pair: str) -> None:
    student, teacher = PAIRS[pair]
    ids = encoded(student, [text]), encoded(teacher, [text])
    if not ids[0][0] or "▁" in text or "<" in text:
        return
    made = align(match(student, teacher), *ids)
    assert not made.differing.any()
    assert made.positions[0, len(ids[0][0]) - 1] == len(ids[1][0]) - 1


def test_one_tokenizer_on_both_sides_aligns_everywhere() -> None:
    ids = encoded(BYTES, toys.TEXTS)
    made = align(match(BYTES, BYTES), ids, ids)
    real = made.positions >= 0
    assert made.share == 1
    assert torch.equal(made.positions[real], torch.arange(real.numel()).view_as(real)[real])


@pytest.mark.parametrize("pair", PAIRS)
def test_shuffled_ids_of_the_teacher_are_seen(pair: str) -> None:
    student, teacher = PAIRS[pair]
    found, texts = match(student, teacher), toys.TEXTS * 4
    ids = encoded(student, texts), encoded(teacher, texts)
    order = list(range(found.teacher.size))
    random.Random(0).shuffle(order)
    wrong = [[order[i] for i in row] for row in ids[1]]
    right, made = align(found, *ids), align(found, ids[0], wrong)
    assert made.differing.any() and made.share < 0.1 * right.share
    for row, positions in enumerate(made.positions):  # what is left has read the same bytes
        for i, at in enumerate(positions.tolist()):
            if at >= 0:
                theirs = wrong[row][: at % max(map(len, wrong)) + 1]
                both = [
                    b"".join(v[t] for t in x).removeprefix(b" ")
                    for v, x in ((found.student, ids[0][row][: i + 1]), (found.teacher, theirs))
                ]
                assert both[0] == both[1]
    with pytest.raises(VocabularyError, match="of different texts in"):
        made.check(least=0.5)
    right.check(least=0.1)


def test_text_that_one_side_normalises_is_counted() -> None:
    composing = toys.byte_level(400)
    composing.normalizer = normalizers.NFC()
    found = match(BYTES, composing)
    texts = ["e\u0301t\u00e9 and more text to follow", "no accents here"]
    made = align(found, encoded(BYTES, texts), encoded(composing, texts))
    assert (made.differing > 0).tolist() == [True, False]
    assert (made.positions[0] >= 0).sum() <= 1 < (made.positions[1] >= 0).sum()


def test_padding_takes_no_part() -> None:
    one, two = encoded(BYTES, toys.TEXTS[:1])[0], encoded(SMALL, toys.TEXTS[:1])[0]
    found = match(BYTES, SMALL)
    bare = align(found, [one], [two]).positions[0]
    left = align(found, [[-1, -1, *one]], [[-1, *two, -1]]).positions[0]
    assert (left[:2] == -1).all()
    assert torch.equal(left[2:], torch.where(bare >= 0, bare + 1, -1))


def test_special_tokens_are_events_if_both_have_them() -> None:
    end, other = BYTES.token_to_id("<|endoftext|>"), SPACED.token_to_id("</s>")
    begin = SPACED.token_to_id("<s>")
    one = [*encoded(BYTES, ["The cat"])[0], end]
    two = [begin, *encoded(SPACED, ["The cat"])[0], other]
    found = match(BYTES, SPACED)
    made = align(found, [one], [two]).positions[0]
    assert made[-1] == len(two) - 1
    assert made[-2] == len(two) - 2
    missing = align(found, [one], [two[:-1]]).positions[0]
    assert missing[-1] == -1 and missing[-2] == len(two) - 2  # where the shorter text ends


def test_only_what_is_said_is_compared_in_conversations() -> None:
    """Templates differ, and contents are the same: positions are those before and in them."""
    found = match(BYTES, SMALL)
    contents = ["The cat sat", "on the dog"]

    def rendered(tokenizer: Any, headers: list[str]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        segments: list[int] = []
        for number, (header, content) in enumerate(zip(headers, contents, strict=True)):
            for text, of in ((header, -1), (content, number)):
                made = encoded(tokenizer, [text])[0]
                ids, segments = ids + made, segments + [of] * len(made)
        return ids, segments

    one, own = rendered(BYTES, ["user: ", "\nassistant: "])
    two, other = rendered(SMALL, ["# You\n\n", "\n\n# Me\n\n"])
    made = align(found, [one], [two], student_segments=[own], teacher_segments=[other])
    positions = made.positions[0].tolist()
    for number in range(2):
        mine, theirs = own.index(number) - 1, other.index(number) - 1
        assert positions[mine] == theirs  # both predict the first word of the content
    last = max(i for i, x in enumerate(own) if x == 0)
    assert positions[last] == -1  # what follows is the template's
    assert positions[-1] == len(two) - 1
    assert not made.differing.any()
    whole = align(found, [one], [two])
    assert whole.share < made.share


def test_a_batch_is_aligned_as_its_rows_are() -> None:
    found = match(BYTES, SPACED)
    ids = encoded(BYTES, toys.TEXTS), encoded(SPACED, toys.TEXTS)
    width = max(map(len, ids[1]))
    whole = align(found, *ids)
    for row, (one, two) in enumerate(zip(*ids, strict=True)):
        alone = align(found, [one], [two]).positions[0]
        wanted = torch.where(alone >= 0, alone + row * width, -1)
        assert torch.equal(whole.positions[row, : len(one)], wanted)


def test_what_does_not_fit_is_refused() -> None:
    found = match(BYTES, SMALL)
    row = [[1, 2, 3]]
    with pytest.raises(ValueError, match="`student` and `teacher` must have as many rows"):
        align(found, row, row * 2)
    with pytest.raises(ValueError, match="`teacher` has the id 290"):
        align(found, row, [[290]])
    with pytest.raises(ValueError, match="segments of both sides"):
        align(found, row, row, student_segments=row)
    with pytest.raises(ValueError, match="`student_segments` must ascend"):
        align(found, row, row, student_segments=[[1, -1, 0]], teacher_segments=row)
    with pytest.raises(ValueError, match="`teacher_segments` must have the shape"):
        align(found, row, row, student_segments=row, teacher_segments=[[0]])
    with pytest.raises(ValueError, match=r"`student` must be \(batch, length\) integers"):
        align(found, torch.zeros(1, 3), row)
    empty = align(found, torch.empty(0, 4, dtype=torch.long), torch.empty(0, 4, dtype=torch.long))
    assert empty.positions.shape == (0, 4) and empty.share == 0


@pytest.mark.parametrize("pair", PAIRS)
def test_a_batch_is_written_in_the_tokens_of_the_teacher(pair: str) -> None:
    student, teacher = PAIRS[pair]
    found = match(student, teacher)
    texts = toys.TEXTS[:3]
    ids = encoded(student, texts)
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in ids], True, -1)
    made = Translator(found, teacher)(rows)
    texts = [" " * ("from" in pair) + text for text in texts]  # the student has read it
    direct = encoded(teacher, texts)
    assert [[i for i in row if i >= 0] for row in made.ids.tolist()] == direct
    wanted = align(found, rows, made.ids)
    assert torch.equal(made.alignment.positions, wanted.positions)


def test_windows_cut_within_characters_lose_these_alone() -> None:
    found = match(SMALL, BYTES)
    text = "猫坐在垫子上。The cat sat on the dog, and the cat sat on a mat.猫"
    ids = encoded(SMALL, [text])[0]
    begin = next(i for i in range(len(ids)) if found.student[ids[i]][0] in range(0x80, 0xC0))
    window = torch.tensor([ids[begin:-1]])
    made = Translator(found, BYTES)(window)
    assert not made.alignment.differing.any()
    assert made.alignment.share > 0.4
    back = b"".join(found.teacher[i] for i in made.ids[0].tolist()).decode()
    assert back and back in text


def test_special_tokens_are_translated_by_role_and_texts_begin_as_the_teacher_has_them() -> None:
    from tokenizers import processors

    teacher = toys.spaced(500)
    teacher.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    teacher = toys.fast(teacher, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    student = toys.byte_level(300)
    student.add_special_tokens(["<|im_start|>"])
    end, start = student.token_to_id("<|endoftext|>"), student.token_to_id("<|im_start|>")
    words = encoded(student, ["The cat", "sat on"])
    row = torch.tensor([[start, *words[0], end, *words[1]]])
    made = Translator(match(student, teacher), teacher)(row)
    ids = made.ids[0].tolist()
    assert ids[0] == 1 and ids.count(2) == 1  # <s> comes first; the start of a turn has no match
    positions = made.alignment.positions[0]
    assert positions[0] == 0  # before the first word
    after = positions[len(words[0]) + 1]
    assert ids[after] == 2 or (teacher.decode(ids[after]) == "" and ids[after - 1] == 2)
    assert positions[-1] == len(ids) - 1
