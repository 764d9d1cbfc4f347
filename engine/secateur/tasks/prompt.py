"""Prompt: the text around an input that a language model is asked with."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.data.columns import Columns
from secateur.support.errors import FieldError, InputError, first_line
from secateur.support.fields import shown

_NAME = "input"


@dataclass(frozen=True)
class Prompt:
    """The text around each input.

    An input that has this text already is left as it is, so prompted data and raw data give the same.

    Args:
        text: The text with {input} in the place of the input, such as "topic: {input}"; or with the names of the columns that
            are the input, such as "{premise} Therefore, {hypothesis}". Two braces are one: "{{".
        chat: Whether the text is a user's message in the tokenizer's chat template, which then asks for the answer.
        system: The text of the system's message before it.

    Raises:
        InputError: The text has no place for an input, or one that is no plain name; or `system` comes without `chat`.
    """

    text: str = "{input}"
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.chat, bool) or not isinstance(self.system, (str, type(None))):
            raise FieldError(f"prompt: expected texts, and true or false for chat, got {shown(self)}")
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise FieldError(f"prompt: expected a text with places such as {{input}}, got {self.text!r}: {error}") from error
        for _, name, form, conversion in parts:
            if name is not None and (not name or form or conversion or set(name) & set(".[]!:")):
                raise FieldError(f"prompt: expected names of columns in braces, got {{{name}}} in {self.text!r}")
        if not self.fields:
            raise FieldError(f"prompt: expected the place of the input, such as {{input}}, got {self.text!r}")
        if len(self.fields) > 1 and _NAME in self.fields:
            raise FieldError(f"prompt: expected {{input}} alone, or names of columns, got {self.text!r}")
        if self.system is not None and not self.chat:
            raise FieldError("system: expected none without chat, got one")

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, without repetitions."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the rows that are the input; none if the text says only {input}."""
        return () if self.fields == (_NAME,) else self.fields

    def why_not(self, value: Any) -> str | None:
        """Return why a value cannot stand in the text; None if it can."""
        parts = [value] if len(self.fields) == 1 else value
        if isinstance(parts, (list, tuple)) and len(parts) == len(self.fields) and all(isinstance(p, str) for p in parts):
            return None
        expected = "text" if len(self.fields) == 1 else f"texts for {', '.join(self.fields)}"
        return f"expected {expected} for the prompt, got {shown(value)}"

    def around(self, value: str | Sequence[str], tokenizer: Any) -> str:
        """Return the prompt with an input in it.

        Args:
            value: The input: a text, or a text for each of `fields` if there are several.
            tokenizer: The tokenizer, whose chat template is used with `chat`.

        Raises:
            InputError: The tokenizer has no chat template, or one that does not take these messages.
        """
        texts = [value] if isinstance(value, str) else value
        message = self.text.format(**dict(zip(self.fields, texts, strict=True)))
        if len(texts) == 1 and self.text.count("{") == 1:
            head, tail = (part.format() for part in self.text.split(f"{{{self.fields[0]}}}"))
            if (head or tail) and len(texts[0]) >= len(head) + len(tail):
                message = texts[0] if texts[0].startswith(head) and texts[0].endswith(tail) else message
        if not self.chat:
            return message
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            templated: str = tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # Templates raise errors of their own, and of jinja2.
            what = "no chat template" if not getattr(tokenizer, "chat_template", None) else first_line(error)
            raise InputError(f"chat: expected a tokenizer with a chat template for these messages, got: {what}") from error
        return templated


def as_prompt(prompt: str | Prompt | None) -> Prompt | None:
    """Return a prompt that may be given as its text.

    Raises:
        InputError: It is something else, or as in `Prompt`.
    """
    if not isinstance(prompt, (str, Prompt, type(None))):
        raise InputError(f"prompt: expected a text or a secateur.Prompt, got {shown(prompt)}")
    return Prompt(prompt) if isinstance(prompt, str) else prompt


def columns_with(prompt: Prompt | None, columns: Columns | None) -> Columns | None:
    """Return the columns of the data by the task's columns, with those that a prompt names for the input.

    Raises:
        InputError: The input's columns are given twice.
    """
    if prompt is None or not prompt.columns:
        return columns
    if columns is not None and "input" in columns:
        raise InputError(f"columns: expected none for the input, as the prompt names {', '.join(prompt.columns)}")
    return {**(columns or {}), "input": prompt.columns}
