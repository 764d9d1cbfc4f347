"""Passwords and tokens of URLs are hidden; all other text stays."""

from __future__ import annotations

import pytest

from secateur.support.errors import InputError
from secateur.support.urls import redacted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://me:word@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("https://token@host/a", "https://***@host/a"),
        ("https://me:p@ss@host:8080/a@b", "https://***@host:8080/a@b"),
        ("s3://key:se/cr+et@bucket/a", "s3://***@bucket/a"),
        ("simplecache::s3://me:word@bucket/a", "simplecache::s3://***@bucket/a"),
        ("no 'https://h/a?X-Amz-Signature=f0&part=1', 'ftp://u:p@h'", "no 'https://h/a?X-Amz-Signature=***&part=1', 'ftp://***@h'"),
        ('{"a": "https://h/?access_token=x"}', '{"a": "https://h/?access_token=***"}'),
        ("https://h/a?sv=1&sig=abc%3D#code=2", "https://h/a?sv=1&sig=***#code=***"),
    ],
)  # fmt: skip
def test_secrets_are_hidden(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected
    assert str(InputError(f"data: {text}")) == f"data: {expected}"


@pytest.mark.parametrize(
    "text",
    ["https://host:8080/a@b", "s3://bucket/part-?.jsonl", "s3://bucket/a@b", "https://h/a?part=1", "me:word@host", "file:///x@y"],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert redacted(text) == text
