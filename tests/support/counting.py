"""A tokenizer for tests that ask how much text is tokenised."""

from __future__ import annotations

from typing import Any


class Counting:
    """A tokenizer that counts the characters of the texts it encodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        self.characters += sum(len(text) for part in texts for text in ([part] if isinstance(part, str) else part))
        return self.tokenizer(*texts, **options)
