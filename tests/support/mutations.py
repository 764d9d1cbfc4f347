"""Random damage to files and values, from a seeded generator: the same generator state gives the same damage."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Place = tuple[Any, Any]  # A container of a JSON document and a key or an index of it.

NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, -1, 0, -0.5, 1.5, 10**14, 10**30, -(10**19), 2**31, 2**63, 1e308, 5e-324]
WRONG: list[Any] = [
    *(None, True, False, "", "x", "auto", "0.5", "\0", "é", "a\nb", [], {}, [None], [[1]], {"": 0}, {"x": [1, {"y": None}]}),
    *("../../x", "A" * 5000, "\ud800", [0] * 50, 3, 7, -3, 0.1),
    *NUMBERS,
]
GARBAGE = [b"", b"\0", b"{", b"[]", b"{}", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"[" * 100_000, b"\n\n"]


def pieces(document: Any) -> list[Place]:
    """Return all places of a JSON document: each container with each of its keys or indices."""
    places: list[Place] = []
    stack = [document]
    while stack:
        container = stack.pop()
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], (dict, list)):
                stack.append(container[key])
    return places


def damaged_value(generator: Random, document: Any) -> Any:
    """Return a copy of a JSON document with one to three places damaged: removed, replaced, renamed, repeated or swapped."""
    document = copy.deepcopy(document)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        places = pieces(document)
        if not places:
            break
        container, key = generator.choice(places)
        value = container[key]
        action = generator.choice(("remove", "replace", "replace", "replace", "number", "rename", "repeat", "swap"))
        if action == "remove":
            del container[key]
        elif action == "number" and isinstance(value, (int, float)):
            container[key] = generator.choice([-value, value + 1, value - 1, value * 2, str(value), float(value), *NUMBERS])
        elif action == "rename" and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        elif action == "repeat" and isinstance(container, list):
            container.append(copy.deepcopy(value))
        elif action == "swap":
            container[key] = [value] if isinstance(value, dict) else {"0": value}
        else:
            container[key] = copy.deepcopy(generator.choice(WRONG))
    return document


def damaged_json(generator: Random, text: bytes) -> bytes:
    """Return a JSON file with its values or its bytes damaged."""
    if generator.random() < 0.2:
        return damaged_bytes(generator, text)
    if generator.random() < 0.04:
        return json.dumps(generator.choice(WRONG)).encode()
    return json.dumps(damaged_value(generator, json.loads(text))).encode()


def damaged_bytes(generator: Random, content: bytes) -> bytes:
    """Return content that is cut off, replaced, or changed in a few bytes."""
    action = generator.choice(("cut", "cut", "garbage", "flip", "flip", "insert", "repeat"))
    place = generator.randrange(len(content) + 1)
    if action == "cut":
        return content[:place]
    if action == "garbage":
        return generator.choice(GARBAGE)
    if action == "flip":
        changed = bytearray(content)
        for _ in range(generator.randint(1, 8)):
            if changed:
                changed[generator.randrange(len(changed))] = generator.randrange(256)
        return bytes(changed)
    if action == "insert":
        return (
            content[:place] + generator.choice([b"\0", b"\xff", b'"', b"\r", b",", b"\n", "\u2028".encode()]) + content[place:]
        )
    return content + content[place:]


def damaged_tensors(generator: Random, content: bytes) -> bytes:
    """Return a safetensors file with damaged bytes, a damaged header, or tensors that are gone, added, reshaped or NaN."""
    if generator.random() < 0.2:
        return damaged_bytes(generator, content)
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    name = generator.choice(names)
    entry = header[name]
    action = generator.choice(("remove", "rename", "reshape", "dtype", "nan", "metadata", "header", "size", "add"))
    begin, end = entry["data_offsets"]
    if action == "remove":
        return rebuilt(header, data, lambda tensors: tensors.pop(name))
    if action == "rename":
        return rebuilt(header, data, lambda tensors: tensors.update({f"{name}.x": tensors.pop(name)}))
    if action == "add":
        return rebuilt(header, data, lambda tensors: tensors.update(extra=("F32", [2], bytes(8))))
    if action == "reshape":  # One row fewer.
        rows = entry["shape"][0] if entry["shape"] else 1
        part = bytes(data[begin:end])[: (end - begin) // max(rows, 1) * (rows - 1)]
        return rebuilt(
            header, data, lambda tensors: tensors.update({name: (entry["dtype"], [rows - 1, *entry["shape"][1:]], part)})
        )
    if action == "dtype":
        entry["dtype"] = generator.choice({"F32": ("I32", "U32"), "F64": ("I64", "U64")}.get(entry["dtype"], ("F32", "I8")))
    elif action == "nan":
        width = {"F32": "<f", "F64": "<d"}.get(entry["dtype"])
        if width and end > begin:
            step = struct.calcsize(width)
            place = begin + step * generator.randrange((end - begin) // step)
            data[place : place + step] = struct.pack(width, generator.choice((math.nan, math.inf, -math.inf, 1e38)))
    elif action == "metadata":
        about = header.get("__metadata__", {})
        for field in about:
            damage = damaged_json if about[field].startswith("{") else damaged_bytes
            about[field] = damage(generator, about[field].encode()).decode("utf-8", "replace")
    elif action == "header":
        header = damaged_value(generator, header)
    text = json.dumps(header).encode()
    size = len(text) if action != "size" else generator.choice((0, 1, 2**40, 2**63, len(text) + 1))
    return struct.pack("<Q", size) + text + bytes(data)


def rebuilt(header: dict[str, Any], data: bytes | bytearray, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return a safetensors file after a change to its tensors (dtype, shape, bytes) by name."""
    tensors = {
        n: (e["dtype"], e["shape"], bytes(data[slice(*e["data_offsets"])])) for n, e in header.items() if n != "__metadata__"
    }
    change(tensors)
    entries: dict[str, Any] = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    content = b""
    for name, (dtype, shape, part) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(part)]}
        content += part
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + content
