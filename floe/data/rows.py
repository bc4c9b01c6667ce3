"""Rows of text as rows of tokens, under a template; and which of them are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from floe.data.batches import TokenRow
from floe.errors import DataError, require, require_whole

Item = TypeVar("Item")
Rows = Sequence[Mapping[str, Any]] | Mapping[int, Mapping[str, Any]]

# Why a row is dropped.
NO_COMPLETION = "without a completion"
NO_PROMPT = "without a prompt"
NO_CHOICE = "with a choice of no tokens"
TOO_LONG = "too long for max_length"


@dataclass(frozen=True)
class Encoded:
    """What encoding made of a data set, and what it left out.

    ``rows``: what is used. ``given``: how many rows came. ``dropped``: reason -> numbers of the
    rows left out for it, each row under one reason. ``cut``: numbers of the used rows whose prompt
    lost its left. A row's number is its 0-based place in its data.
    """

    rows: list[TokenRow]
    given: int
    dropped: dict[str, list[int]]
    cut: list[int]

    @property
    def lost(self) -> int:
        """How many rows were left out."""
        return sum(len(numbers) for numbers in self.dropped.values())


def encode(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int = 1024,
    source: str = "rows",
) -> Encoded:
    """Tokenise prompt and completion rows for training and loss evaluation.

    A row becomes ``[bos] prompt completion eos``; the loss is on ``completion eos``. Under a chat
    template a row is all that the template writes for question and answer, and eos where that does
    not hold it; the loss is on the answer and all that follows. Too long a row loses the left of
    its prompt (bos stays), never a part of its response; a row whose response and one token before
    it do not fit is dropped, as is one with an empty completion. All are listed.

    Args:
        rows: as :func:`floe.data.sources.load_rows` gives them, or some of those by their numbers.
        tokenizer: a ``transformers`` tokenizer with an eos token.
        template: None or ``"none"``, ``"chat"`` (the tokenizer's chat template, one user turn), or
            any text with ``{prompt}`` in it. Where a chat template writes today's date, it is given
            a fixed one.
        max_length: tokens per row, prompt and response with eos.
        source: what to call the data in errors.

    Raises:
        ValueError: for a template without ``{prompt}``, a tokenizer without eos or chat template.
        DataError: for a row with a lone surrogate, or one that the chat template refuses or does
            not write as it is; if no row is left: the text names the setting to change.
    """
    writer = _Writer(tokenizer, template)
    if template != "chat" and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos token, got None")

    def write(row: Mapping[str, Any]) -> _Written | str:
        if not row["completion"].strip():
            return NO_COMPLETION
        prompt, bos, response = writer.row(row["prompt"], row["completion"], end=True)
        return (prompt, bos, [response]) if response else NO_COMPLETION

    return _some_left(_encode(rows, write, max_length, 0, source), max_length, source)


def encode_choices(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int = 1024,
    source: str = "rows",
) -> Encoded:
    """Tokenise every choice of every row after its prompt, without an end.

    The result has one entry a choice, in order, its row's number as ``index``; a row whose choices
    do not all fit, or whose prompt or a choice has no tokens, is dropped.

    Raises: as :func:`encode`, and DataError for a row without choices; not if no row is left.
    """
    writer = _Writer(tokenizer, template)

    def write(row: Mapping[str, Any]) -> _Written | str:
        if "choices" not in row:
            raise ValueError("must have choices and answer")
        written = [writer.row(row["prompt"], text, end=False) for text in row["choices"]]
        prompt, bos, _ = written[0]
        choices = [choice for *_, choice in written]
        if not prompt:
            return NO_PROMPT
        return (prompt, bos, choices) if all(choices) else NO_CHOICE

    return _encode(rows, write, max_length, 0, source)


def encode_questions(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int = 1024,
    max_new_tokens: int = 32,
    source: str = "rows",
) -> Encoded:
    """Tokenise the prompts alone, cut to leave ``max_new_tokens`` of ``max_length`` to an answer.

    A row whose prompt has no tokens is dropped.

    Raises: as :func:`encode`; not if no row is left.
    """
    if not 1 <= max_new_tokens < max_length:
        raise ValueError(f"max_new_tokens must be in [1, {max_length - 1}], got {max_new_tokens}")
    writer = _Writer(tokenizer, template)

    def write(row: Mapping[str, Any]) -> _Written | str:
        prompt, bos = writer.prompt(row["prompt"])
        return (prompt, bos, [()]) if prompt else NO_PROMPT

    return _encode(rows, write, max_length, max_new_tokens, source)


def rows_of_both(first: Encoded, second: Encoded, max_length: int, source: str) -> Encoded:
    """The first's rows without those the second dropped; both are encodings of the same data.

    Raises:
        DataError: if no row is left.
    """
    gone = {number for numbers in first.dropped.values() for number in numbers}
    dropped = {reason: [*numbers] for reason, numbers in first.dropped.items()}
    for reason, numbers in second.dropped.items():
        new = {*numbers} - gone
        if new:
            dropped[reason] = sorted(new | {*dropped.get(reason, [])})
    out = {number for numbers in dropped.values() for number in numbers}
    rows = [row for row in first.rows if row.index not in out]
    both = Encoded(rows, first.given, dropped, sorted({*first.cut, *second.cut} - out))
    return _some_left(both, max_length, source)


def stop_tokens(tokenizer: Any, template: str | None = None) -> list[int]:
    """The tokens that end an answer: eos, and the chat template's end of turn, if it is a token."""
    writer = _Writer(tokenizer, template)
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if writer.chat is not None:
        ending = writer.tokens(writer.chat.turn(_QUESTION).ending)
        stops += [token for token in ending if token in writer.marks][:1]
    return sorted(set(stops))


_Tokens = tuple[int, ...]
_Written = tuple[_Tokens, bool, list[_Tokens]]  # prompt, whether it begins with bos, responses


def _encode(
    rows: Rows,
    write: Callable[[Mapping[str, Any]], _Written | str],
    max_length: int,
    reserved: int,
    source: str,
) -> Encoded:
    """Every row as ``write`` gives it, ``reserved`` tokens left free, or dropped for its reason."""
    require_whole("max_length", max_length, 2)
    encoded = Encoded([], len(rows), {}, [])
    for number, row in rows.items() if isinstance(rows, Mapping) else enumerate(rows):
        try:
            written = write(row)
        except ValueError as error:
            raise DataError(source, str(error), number) from error
        if not isinstance(written, str):
            prompt, bos, responses = written
            room = max_length - reserved - max(map(len, responses))
            if room >= 1:
                short = _shortened(prompt, room, bos)
                encoded.rows.extend(TokenRow(short, r, number, row.get("task")) for r in responses)
                encoded.cut.extend([number] if len(prompt) > room else [])
                continue
            written = TOO_LONG
        encoded.dropped.setdefault(written, []).append(number)
    return encoded


def _shortened(prompt: _Tokens, room: int, bos: bool) -> _Tokens:
    """The last ``room`` tokens; with ``bos`` the first token stays and the last ``room - 1``."""
    if len(prompt) <= room:
        return prompt
    start = prompt[:1] if bos else ()
    return start + prompt[len(prompt) - room + len(start) :]


def _some_left(encoded: Encoded, max_length: int, source: str) -> Encoded:
    if not encoded.rows:
        reasons = ", ".join(f"{len(rows)} {reason}" for reason, rows in encoded.dropped.items())
        message = f"no row with a target is left of {encoded.given}: {reasons}"
        raise DataError(source, f"{message} (max_length={max_length})")
    return encoded


class _Writer:
    """Prompts and answers as tokens, under one template."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.chat = _ChatTemplate(tokenizer) if template == "chat" else None
        self.marks = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
        self._frame = "{prompt}" if template in (None, "none", "chat") else str(template)
        if "{prompt}" not in self._frame:
            raise ValueError(f"template must be none, chat or hold {{prompt}}, got {template!r}")

    def tokens(self, text: str) -> _Tokens:
        """Tokens of a text, none added."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"{text[error.start]!r} at character {error.start}"
            raise ValueError(f"text must be Unicode, got the lone surrogate {what}") from error
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, prompt: str) -> tuple[_Tokens, bool]:
        """Tokens up to where the answer begins, and whether the first is a bos."""
        if self.chat is not None:
            return self._opening(self.chat.turn(prompt))
        bos = self.tokenizer.bos_token_id
        text = self._frame.replace("{prompt}", prompt)
        tokens = self.tokens(text)
        with_special = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        if bos is None or with_special[:1] != [bos]:
            return tokens, False
        return (tokens if tokens[:1] == (bos,) else (bos, *tokens)), True

    def _opening(self, turn: _Turn) -> tuple[_Tokens, bool]:
        """Tokens before an answer; a chat template writes bos itself, where the model wants it."""
        tokens, bos = self.tokens(turn.opening), self.tokenizer.bos_token_id
        return tokens, bos is not None and tokens[:1] == (bos,)

    def row(self, prompt: str, answer: str, *, end: bool) -> tuple[_Tokens, bool, _Tokens]:
        """:meth:`prompt`, and the answer's tokens with their ``end``; none for an empty answer."""
        eos = self.tokenizer.eos_token_id
        if self.chat is None:
            tokens = self.tokens(answer)
            return *self.prompt(prompt), (*tokens, eos) if end and tokens else tokens
        turn = self.chat.turn(prompt, answer)
        opening, bos = self._opening(turn)
        if not self.tokens(turn.answer):
            return opening, bos, ()
        written = turn.answer + (turn.ending if end else "")
        tokens = self.tokens(turn.opening + written)
        # What follows the prompt in one piece; if a token would lie across, the answer on its own.
        whole = tokens[: len(opening)] == opening
        tokens = tokens[len(opening) :] if whole else self.tokens(written)
        ending = {*self.tokens(turn.ending)} if end else set()
        if end and eos is None and not ending & self.marks:
            raise ValueError("tokenizer must have an eos token, got None")
        # Also a runtime that knows no end but eos is to stop.
        return opening, bos, (*tokens, eos) if end and eos not in {None, *ending} else tokens


_QUESTION, _ANSWER = "floe question", "floe answer"
# Some templates write today's date; rows, and with them a run's results, must not change overnight.
_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


class _Turn(NamedTuple):
    """``opening + answer + ending`` is what the template writes for the whole conversation.

    ``opening`` ends where the model is to go on: it holds the generation prompt, and an empty
    block of thoughts where the template puts one before answers.
    """

    opening: str
    answer: str
    ending: str


class _ChatTemplate:
    """A tokenizer's chat template for one user turn and one answer.

    A template is a program of the model's author: what it does to each row is checked, and every
    method raises ValueError where it refuses the row, loses its text or opens answers otherwise
    than it asks for them.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("template must not be 'chat' for a tokenizer without a chat template")
        text = tokenizer.get_chat_template()
        self._text = _DATE + text if "strftime_now" in text else text
        self._tokenizer = tokenizer
        # Templates of multimodal models read the content as a list of parts, and text as nothing.
        self._parts = not self._shows() and self._shows(parts=True)

    def turn(self, prompt: str, answer: str | None = None) -> _Turn:
        """How the template writes this prompt and answer; any answer with None."""
        whole = self._render(prompt, _ANSWER)
        opening, marker, ending = whole.rpartition(_ANSWER)
        if not marker:
            raise ValueError("the chat template must write the answer, it leaves it out")
        if _letters(prompt) not in _letters(opening):
            raise ValueError("the chat template must write the prompt as it is, it does not")
        asked = self._render(prompt, None)
        if not opening.startswith(asked):
            raise ValueError(
                "the chat template must open an answer as its generation prompt ends, got "
                f"{asked[-40:]!r} to ask and {opening[-40:]!r} before an answer; write the prompt "
                "with data.template instead"
            )
        if opening[len(asked) :].isspace():  # a blank before the answer is the model's to write
            opening = asked
        if answer is not None:
            whole = self._render(prompt, answer)
        written = whole[len(opening) : len(whole) - len(ending)]
        if opening + written + ending != whole:
            raise ValueError(
                "the chat template must open and end every answer alike, it does not this one "
                "(thoughts in it, say); write the prompt with data.template instead"
            )
        if _letters(written) != _letters(_ANSWER if answer is None else answer):
            raise ValueError("the chat template must write the answer as it is, it changes it")
        return _Turn(opening, written, ending)

    def _shows(self, parts: bool = False) -> bool:
        self._parts = parts
        try:
            text = self._render(_QUESTION, _ANSWER)
        except ValueError:
            return False
        listed = parts and repr(self._content(_QUESTION)) in text  # Python's own words for a list
        return _QUESTION in text and _ANSWER in text and not listed

    def _render(self, prompt: str, answer: str | None) -> str:
        turns = [{"role": "user", "content": self._content(prompt)}]
        if answer is not None:
            turns.append({"role": "assistant", "content": self._content(answer)})
        options = {"add_generation_prompt": answer is None, "tokenize": False}
        options["chat_template"] = self._text
        try:
            return str(self._tokenizer.apply_chat_template(turns, **options))
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(f"the chat template refuses the row: {error}") from error

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._parts else text


def _letters(text: str) -> str:
    return "".join(text.split())


def split(rows: Sequence[Item], fraction: float, seed: int = 41) -> tuple[list[Item], list[Item]]:
    """Hold out ``fraction`` of the rows (rounded, at least one): ``(kept, held out)``, in order.

    Raises:
        ValueError: if the fraction is not inside (0, 1) or one side would be empty.
    """
    require(0 < fraction < 1, "fraction must be inside (0, 1)", fraction)
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise ValueError(f"rows must be at least 2 to hold {fraction} of them out, got {len(rows)}")
    held = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    out = [row for i, row in enumerate(rows) if i in held]
    return [row for i, row in enumerate(rows) if i not in held], out


def sample(rows: Sequence[Item], n: int, seed: int = 41) -> list[Item]:
    """``n`` rows drawn without replacement, in row order; all of them if there are no more.

    For one seed a smaller sample is a part of every larger one.
    """
    require(n >= 1, "n must be at least 1", n)
    drawn = np.random.default_rng(seed).permutation(len(rows))[:n]
    return [rows[i] for i in sorted(drawn.tolist())]
