"""Names of models and data sets on the Hub, against a local stand-in of its HTTP interface and without any."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from cases import CASES, uneven_plan, uniform_plan

import secateur
from secateur.flow.loaded import described, load_model, meta_model
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


class Mirror(StandIn):
    """Has the files of one folder as the model "owner/cut"."""

    folder: Path
    COMMIT = "1" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        ASKED.append(self.path)
        name = self.path.rpartition("/")[2]
        if "/resolve/" in self.path and not (self.folder / name).is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            body = b""
        elif "/resolve/" in self.path:
            body = (self.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", self.COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        else:
            files = sorted(self.folder.iterdir())
            tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "2" * 40} for path in files]
            about = {"id": "owner/cut", "sha": self.COMMIT, "siblings": [{"rfilename": path.name} for path in files]}
            body = json.dumps(tree if "/tree/" in self.path else about).encode()
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder whose files the Hub has as "owner/cut"."""
    ASKED.clear()
    monkeypatch.setattr(Mirror, "folder", tmp_path / "cut", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield tmp_path / "cut"
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


@pytest.mark.parametrize("plan", [uniform_plan, uneven_plan])  # A stock model, and one that is none.
def test_a_pruned_model_is_loaded_by_its_name_as_by_its_folder(plan: Any, mirror: Path) -> None:
    case = CASES["llama"]
    pruned = secateur.prune(case.model(), plan(case, "head"))
    secateur.save(pruned, mirror, task=case.task)
    by_folder, by_name = (load_model(name, task=None, device="cpu", dtype="auto") for name in (str(mirror), "owner/cut"))
    assert (by_name.task, by_name.labels) == (by_folder.task, by_folder.labels) == ("causal-lm", case.task.labels)
    assert torch.equal(case.logits(by_name.model), case.logits(by_folder.model))
    assert meta_model("owner/cut", task=None).num_parameters() == pruned.num_parameters()  # type: ignore[operator]
    again = secateur.prune(by_name.model, secateur.plan(secateur.attribute(by_name.model, case.task, case.examples), keep=0.5))
    assert again.num_parameters() < pruned.num_parameters()  # type: ignore[operator]


def test_a_pruned_model_without_a_task_is_loaded_by_its_name(mirror: Path) -> None:
    case = CASES["llama"]
    pruned = secateur.prune(case.model(), uneven_plan(case, "head"))
    secateur.save(pruned, mirror, tokenizer=case.task.reader)
    assert torch.equal(case.logits(load_model("owner/cut", task=None, device="cpu", dtype="auto").model), case.logits(pruned))


def test_a_dense_model_on_the_hub_is_not_downloaded_to_be_described(mirror: Path) -> None:
    secateur.save(CASES["llama"].model(), mirror, tokenizer=CASES["llama"].task.reader)
    assert described("owner/cut")[0] == "owner/cut"
    assert not any("safetensors" in path for path in ASKED)


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
