"""Names of models and data sets on the Hub, against a local stand-in of its HTTP interface and without any."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from cases import CASES

import secateur
from secateur.flow.loaded import described
from secateur.support.hub import Base, base_of, model_place, on_hub

ASKED: list[str] = []


class StandIn(BaseHTTPRequestHandler):
    """Knows one model and one data set. Of other repositories it says that they do not exist, or that it fails."""

    def do_GET(self) -> None:
        if "/owner/" in self.path:  # The client also asks for things of its own.
            ASKED.append(self.path)
        known = "owner/there" in self.path
        self.send_response(500 if "owner/broken" in self.path else 200 if known else 404)
        if not known and "owner/broken" not in self.path:
            self.send_header("X-Error-Code", "RepoNotFound")
        body = json.dumps({"id": "owner/there", "sha": "0" * 40, "siblings": [], "cardData": {"license": "mit"}}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that the stand-in was asked for."""
    ASKED.clear()
    monkeypatch.setattr("secateur.support.hub._cards", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield ASKED
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub answers, and the caches are empty."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def refused(message: str, call: Any, *arguments: Any) -> None:
    with pytest.raises(secateur.InputError) as caught:
        call(*arguments)
    assert str(caught.value).startswith(message)


def test_a_name_that_the_hub_does_not_have_is_asked_for_once(hub: list[str]) -> None:
    refused("model: no such model folder or Hub model: 'owner/mistyped' (if it is private: run", described, "owner/mistyped")
    refused("data: no such file or Hub data set: 'owner/mistyped' (if it is private: run", data_rows, "owner/mistyped:test")
    assert hub == ["/api/models/owner/mistyped", "/api/datasets/owner/mistyped"]


def test_a_model_and_its_card_are_asked_for_once(hub: list[str]) -> None:
    assert model_place("owner/there") == "owner/there"
    for _ in range(2):
        assert base_of("owner/there") == Base("owner/there", {"license": "mit"})
    assert hub == ["/api/models/owner/there"]


def test_the_card_of_a_model_that_was_not_looked_up_is_asked_for(hub: list[str]) -> None:
    assert base_of("owner/broken") == Base(None, {})
    for _ in range(2):
        assert base_of("owner/there") == Base("owner/there", {"license": "mit"})
    assert hub == ["/api/models/owner/broken", "/api/models/owner/there"]


def test_a_hub_that_fails_counts_as_out_of_reach(hub: list[str]) -> None:
    assert on_hub("owner/there", "model", "model")
    assert not on_hub("owner/broken", "model", "model")
    assert len(hub) == 2


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_the_cache_is_used_or_the_name_is_refused(tmp_path: Path) -> None:
    refused("model: no such model folder: 'owner/name'; the Hub cannot be reached, and its cache", described, "owner/name")
    refused("data: no such file: 'owner/name'; the Hub cannot be reached, and the cache", data_rows, "owner/name")
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    secateur.save(CASES["bert-sequence"].model(), snapshot)
    reference = tmp_path / "hub" / "models--owner--name" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("a" * 40)
    place, config = described("owner/name")
    assert Path(place) == snapshot
    assert config.model_type == "bert"


@pytest.mark.parametrize("name", ["models/mistyped", "owner/na me", "a/b/c", "owner/name--x..y", "-name"])
def test_a_path_and_a_name_that_cannot_be_are_refused_without_asking(
    name: str, hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    refused(f"model: no such model folder: {name!r}", described, name)
    refused(f"data: no such file: {name!r}", data_rows, name)
    assert hub == []


def test_a_file_is_no_model(hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_text("")
    refused("model: expected a model folder or a name on the Hub, got the file 'model'", described, "model")
    assert hub == []


def data_rows(name: str) -> list[Any]:
    from secateur.data.examples import read_examples

    return list(read_examples(name, ("input",)))
