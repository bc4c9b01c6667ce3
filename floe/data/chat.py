"""One question and its answer as a tokenizer's chat template writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_QUESTION, _ANSWER = "floe question", "floe answer"
# Some templates write today's date; rows, and with them a run's results, must not change overnight.
_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class Turn:
    """``opening + answer + ending`` is what the template writes for the whole conversation.

    ``opening`` ends where the model is to go on: it holds the generation prompt, and an empty
    block of thoughts where the template puts one before answers.
    """

    opening: str
    answer: str
    ending: str


class ChatTemplate:
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

    def turn(self, prompt: str, answer: str | None = None) -> Turn:
        """How the template writes this prompt and answer; any answer with None."""
        whole = self._render(prompt, _ANSWER)
        opening, found, ending = whole.rpartition(_ANSWER)
        if not found:
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
        return Turn(opening, written, ending)

    def ending(self) -> str:
        """What the template writes after an answer."""
        return self.turn(_QUESTION).ending

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
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, chat_template=self._text, add_generation_prompt=answer is None,
                tokenize=False,
            )  # fmt: skip
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(f"the chat template refuses the row: {error}") from error
        return text

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._parts else text


def _letters(text: str) -> str:
    return "".join(text.split())
