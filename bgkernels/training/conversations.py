"""Conversations, and which of their tokens are an assistant's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bgkernels.training.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
MARK = "generation %}"
"""Part of a template that marks what the assistant says."""
STAND_IN = "\ue000\ue001\ue002"
"""Content in private characters, found again in what a template makes of it."""


@dataclass(frozen=True)
class Conversation:
    r"""Turns of a conversation; those of the assistant are learnt.

    Args:
        turns: role and content of each.
        first: turns before this one are a prompt, whoever's they are.
        messages: what a template is given, where that is more than role and content.
        tools: descriptions of tools, for a template.
        number: of the record in its file, for messages.

    Example:
        >>> chat = Conversation((("user", "2 + 2?"), ("assistant", "4")))
        >>> chat.text
        'user: 2 + 2?\nassistant: 4\n'
    """

    turns: tuple[tuple[str, str], ...]
    first: int = 0
    messages: tuple[Message, ...] | None = field(default=None, compare=False)
    tools: Any = field(default=None, compare=False)
    number: int | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """All turns, without the template of any tokenizer."""
        return "".join(text for text, _ in self.parts())

    def parts(self) -> Iterator[tuple[str, bool]]:
        """Pieces of that text, and whether each is learnt."""
        calls = [m.get("tool_calls") for m in self.messages or ()] or [None] * len(self.turns)
        for i, (role, content) in enumerate(self.turns):
            said = content + (json.dumps(calls[i]) if calls[i] else "")
            yield f"{role}: ", False
            yield f"{said}\n", self.learnt(i)

    def learnt(self, i: int) -> bool:
        """Whether a turn is an answer that is learnt."""
        return self.turns[i][0] == "assistant" and i >= self.first

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them are learnt: by the tokenizer's chat template, if it has one.

        Answers are what the template marks as such (``{% generation %}``), or else what it makes of
        the contents of the assistant's turns, with the end of the turn.

        Raises:
            CorpusError: the template cannot render the conversation, or leaves out an answer.
        """
        try:
            if getattr(tokenizer, "chat_template", None) is None:
                return self._plain(tokenizer)
            rendering = Rendering(tokenizer, self)
            return rendering.marked() if MARK in rendering.template else rendering.found()
        except CorpusError as error:
            raise CorpusError(f"{self.name} cannot be used: {error}") from error.__cause__

    @property
    def name(self) -> str:
        """The record, for messages."""
        return "a conversation" if self.number is None else f"record {self.number}"

    def _plain(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
        pieces = [
            (tokenizer(text, add_special_tokens=False)["input_ids"], learnt)
            for text, learnt in self.parts()
        ]
        return [i for ids, _ in pieces for i in ids], [x for ids, x in pieces for _ in ids]


class Rendering:
    """A conversation in the words of a tokenizer's template.

    Args:
        tokenizer: has a template.
        chat: the conversation.
    """

    def __init__(self, tokenizer: Any, chat: Conversation) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        plain = [{"role": role, "content": content} for role, content in chat.turns]
        self.messages: list[Message] = list(chat.messages or plain)
        tools = {} if chat.tools is None else {"tools": chat.tools}
        self.template: str = self._tried(tokenizer.get_chat_template, **tools)
        self.options = tools

    def marked(self) -> tuple[list[int], list[bool]]:
        """Tokens, and those that the template marks.

        Raises:
            CorpusError: it marks none.
        """
        made = self._tried(
            self.tokenizer.apply_chat_template, self.messages, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True, **self.options,
        )  # fmt: skip
        learnt = [bool(x) for x in made["assistant_masks"]]
        answers = [i for i, turn in enumerate(self.chat.turns) if turn[0] == "assistant"]
        wanted = [i for i in answers if i >= self.chat.first]
        if wanted and not any(learnt):
            raise CorpusError("the chat template marks none of its answers with {% generation %}")
        start = _last_runs(learnt, len(wanted)) if len(wanted) < len(answers) else 0
        return list(made["input_ids"]), [x and i >= start for i, x in enumerate(learnt)]

    def found(self) -> tuple[list[int], list[bool]]:
        """Tokens, and those that overlap an answer.

        Raises:
            CorpusError: an answer cannot be told from the rest.
        """
        whole = self._text(self.messages)
        spans = list(self._answers(whole))
        if not getattr(self.tokenizer, "is_fast", False):
            return self._pieces(whole, spans)
        made = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        learnt = [
            start < end and any(start < b and end > a for a, b in spans)
            for start, end in made["offset_mapping"]
        ]
        return list(made["input_ids"]), learnt

    def _pieces(self, whole: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Tokens of answers and of the rest apart, of a tokenizer that knows no offsets."""
        bounds = [0, *(x for span in spans for x in span), len(whole)]
        tokens: list[int] = []
        learnt: list[bool] = []
        for i, (a, b) in enumerate(pairwise(bounds)):
            ids = self.tokenizer(whole[a:b], add_special_tokens=False)["input_ids"] if a < b else []
            tokens += ids
            learnt += [i % 2 == 1] * len(ids)
        return tokens, learnt

    def _answers(self, whole: str) -> Iterator[tuple[int, int]]:
        """Where the answers begin and end in the text: after their header, with their closing."""
        header, closing = self._header(whole), None
        before = 0
        for i in range(len(self.messages)):
            start, end = self._content(whole, i)
            if self.chat.learnt(i):
                if closing is None:
                    closing = self._closing(whole)
                start = _start(whole, header, before, start)
                yield start, end + _common(whole[end:], closing)
            before = max(end, before)

    def _content(self, whole: str, i: int) -> tuple[int, int]:
        """Where the content of a turn is, by putting another in its place."""
        other = self._text(
            [
                {"role": m["role"], "content": STAND_IN} if i == j else m
                for j, m in enumerate(self.messages)
            ]
        )
        at = other.find(STAND_IN)
        if at < 0:
            if self.chat.learnt(i):
                raise CorpusError(f"the chat template leaves out its answer in turn {i}")
            return 0, 0
        start = _common(other[:at], whole)
        rest = other[at + len(STAND_IN) :]
        return start, len(whole) - _common(rest[::-1], whole[start:][::-1])

    def _header(self, whole: str) -> str:
        """What stands before an answer: the generation prompt."""
        asked = self._text(self.messages, add_generation_prompt=True)
        return asked[_common(asked, whole) :] if asked.startswith(whole) else ""

    def _closing(self, whole: str) -> str:
        """What follows an answer at the end."""
        messages = list(self.messages)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        last = self._text([*messages, {"role": "assistant", "content": STAND_IN}])
        at = last.rfind(STAND_IN)
        return "" if at < 0 else last[at + len(STAND_IN) :]

    def _text(self, messages: Sequence[Message], **options: Any) -> str:
        text: str = self._tried(
            self.tokenizer.apply_chat_template, list(messages), tokenize=False,
            **options, **self.options,
        )  # fmt: skip
        return text

    def _tried(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever a template raises
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CorpusError(f"the chat template cannot render it ({reason})") from error


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    unequal = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unequal, min(len(one), len(other)))


def _start(whole: str, header: str, before: int, content: int) -> int:
    """Where an answer begins: after its header, which may reach into its content or end before it.

    Args:
        whole: the text.
        header: the generation prompt.
        before: the end of the content before it.
        content: where its own content begins.
    """
    at = whole.find(header, before, content + len(header)) if header else -1
    return at + len(header) if 0 <= at <= content else content


def _last_runs(learnt: list[bool], count: int) -> int:
    """Where the last so many runs of True begin."""
    starts = [i for i, x in enumerate(learnt) if x and not (i and learnt[i - 1])]
    return starts[-count] if 0 < count <= len(starts) else len(learnt)
