"""push against a local stand-in of the Hub's HTTP interface. The real Hub is not asked."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from cases import CASES
from command import Run, assert_refused, same_weights

import secateur

# huggingface_hub's upload by LFS calls its HTTP client in a way that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_a-secret-of-the-test"
LARGE = (".safetensors", ".png")  # The stand-in wants these by LFS, as the Hub does.


class Store:
    """What the stand-in holds and how it answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.private: bool | None = None  # None: there is no repository.
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.message = ""
        self.denied: dict[str, int] = {}


class StandIn(BaseHTTPRequestHandler):
    store: Store
    address: str

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store, path = self.store, self.path.partition("?")[0]
        store.asked.append(f"{self.command} {path}")
        status = next((status for part, status in store.denied.items() if part in path), 200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/put/"):
            status = 401
        if path == "/api/models/owner/smaller" and store.private is None:
            status = 404
        content = {"error": f"no, {TOKEN}"} if status != 200 else self.done(path, body)
        sent = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_POST = do_PUT = answer

    def done(self, path: str, body: bytes) -> Any:
        store = self.store
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "owner", "orgs": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            assert (asked["organization"], asked["name"]) == ("owner", "smaller")
            if store.private is None:
                store.private = asked.get("visibility") == "private" or bool(asked.get("private"))  # By release.
            return {"url": f"{self.address}/owner/smaller", "id": "owner/smaller"}
        if path in ("/api/models/owner/smaller", "/api/models/owner/smaller/revision/main"):
            return {"id": "owner/smaller", "private": store.private, "sha": "0" * 40, "siblings": []}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return {"errors": [], "warnings": []}
        if path == "/api/models/owner/smaller/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            return {"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]}
        if path == "/owner/smaller.git/info/lfs/objects/batch":
            return {"transfer": "basic", "objects": [self.place(entry) for entry in json.loads(body)["objects"]]}
        if path.startswith("/put/"):
            store.objects[path.removeprefix("/put/")] = body
            return {}
        if path == "/api/models/owner/smaller/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            return {"commitOid": "1" * 40, "commitUrl": f"{self.address}/owner/smaller/commit/1", "pullRequestUrl": None}
        raise AssertionError(path)

    def place(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "actions": {"upload": {"href": f"{self.address}/put/{entry['oid']}"}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.store.message = value["summary"]
            elif line["key"] == "file":
                self.store.files[value["path"]] = base64.b64decode(value["content"])
            else:
                content = self.store.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.store.files[value["path"]] = content

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The stand-in, with a stored token. Files go there by LFS, because Xet has a protocol of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    StandIn.store, StandIn.address = Store(), f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", StandIn.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield StandIn.store
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = CASES["bert-sequence"]
    path = tmp_path_factory.mktemp("push") / "smaller"
    secateur.save(case.model(), path, task=case.task, extra={"README.md": "---\ntags:\n- secateur\n---\n# smaller\n"})
    return path


def refused(hub: Store, message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(secateur.InputError) as caught:
        secateur.push(*arguments, **options)
    assert str(caught.value).startswith(message)
    assert TOKEN not in str(caught.value)
    assert hub.files == {}


def test_all_files_go_to_the_repository(hub: Store, folder: Path) -> None:
    address = secateur.push(folder, "owner/smaller", message="first")
    assert address == f"{StandIn.address}/owner/smaller"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "secateur.json"} <= hub.files.keys()
    assert hub.private is False
    assert hub.message == "first"
    assert any(line.startswith("PUT /put/") for line in hub.asked)


def test_the_command_pushes_and_tells_where(hub: Store, folder: Path, run: Run) -> None:
    result = run(f"push {folder} owner/smaller --private --json")
    assert result.code == 0
    assert result.document == {
        "folder": str(folder), "repository": "owner/smaller", "url": f"{StandIn.address}/owner/smaller",
    }  # fmt: skip
    assert hub.private is True
    assert hub.message == "Upload smaller"
    assert TOKEN not in result.out + "".join(result.errors)


def test_prune_pushes_the_finished_folder(hub: Store, run: Run) -> None:
    options = "--labels bad,good --examples 8 --keep 0.5 --allocation uniform --recover none --batch-sizes 1 --lengths 8"
    result = run(f"prune builtin --data train.jsonl {options} --out out --push owner/smaller")
    assert result.code == 0
    assert f"pushed to {StandIn.address}/owner/smaller" in "".join(result.errors)
    assert hub.files == {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert {"run.yaml", "README.md", "report.json", "widths.png"} <= hub.files.keys()
    assert hub.private is False
    assert TOKEN.encode() not in b"".join(hub.files.values())


def test_prune_pushes_to_a_private_repository_and_the_run_file_does_not_push_again(hub: Store, run: Run) -> None:
    options = "--labels bad,good --examples 8 --keep 0.5 --allocation uniform --recover none --batch-sizes 1 --lengths 8"
    result = run(f"prune builtin --data train.jsonl {options} --out out --push owner/smaller --private")
    assert result.code == 0
    assert hub.private is True
    for file in ("run.yaml", "README.md"):
        assert not {"push", "private", "owner/smaller"} & set(re.split(r"[\s:-]+", hub.files[file].decode()))
    hub.asked.clear()
    assert run("prune --config out/run.yaml --out again").code == 0
    assert hub.asked == []
    assert same_weights(Path("out"), Path("again"))
    assert run("prune --config out/run.yaml --out third --push owner/smaller --private").code == 0
    assert hub.files == {path.name: path.read_bytes() for path in Path("third").iterdir()}


def test_prune_refuses_a_public_repository_before_any_work(hub: Store, run: Run) -> None:
    hub.private = False
    line = "prune builtin --data train.jsonl --keep 0.5 --out out --private"
    for options, message in (
        ("--push owner/smaller", "private: expected a private repository, got 'owner/smaller', which is there already"),
        ("", "private: expected --push OWNER/NAME with it, got none"),
    ):
        assert_refused(run(f"{line} {options}"), message, "out")


def test_prune_refuses_before_any_work(hub: Store, run: Run) -> None:
    hub.denied = {"whoami": 401}
    for repository, message in (("smaller", "repo_id: expected OWNER/NAME"), ("owner/smaller", "token: the Hub refuses")):
        result = run(f"prune builtin --data train.jsonl --keep 0.5 --out out --push {repository}")
        assert result.code == 2
        assert result.errors[-1].startswith(f"secateur: {message}")
        assert not Path("out").exists()


@pytest.mark.parametrize("name", ["smaller", "a/b/c", "owner/na me", "owner/name--x", "-owner/name", "", None, Path("a/b")])
def test_a_name_that_cannot_be_is_refused_without_asking(hub: Store, folder: Path, name: Any) -> None:
    refused(hub, "repo_id: expected OWNER/NAME, got ", folder, name)
    assert hub.asked == []


def test_folders_that_secateur_did_not_write_are_refused_without_asking(hub: Store, tmp_path: Path, folder: Path) -> None:
    refused(hub, "folder: no such folder: ", tmp_path / "none", "owner/smaller")
    refused(hub, "folder: expected a model's folder with a config.json, got ", tmp_path, "owner/smaller")
    CASES["bert-sequence"].model().save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    refused(hub, "folder: expected one that secateur wrote, with secateur.json or ", tmp_path / "theirs", "owner/smaller")
    (tmp_path / "config.json").write_text("[]")
    refused(hub, "folder: ", tmp_path, "owner/smaller")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "secateur.json").write_text("{}")
    refused(hub, "folder: expected a model's weights (*.safetensors), got none in ", tmp_path, "owner/smaller")
    assert hub.asked == []


def test_without_a_token_one_line_says_how_to_log_in(hub: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/none")
    refused(hub, "token: expected one of the Hugging Face Hub, got none: run `hf auth login`", folder, "owner/smaller")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("whoami", 401, "token: the Hub refuses to tell whose the token is with it (401): "),
        ("whoami", 429, "repo_id: the Hub refuses to tell whose the token is (429): "),
        ("repos/create", 403, "token: the Hub refuses to create 'owner/smaller' with it (403): "),
        ("/put/", 403, "token: the Hub refuses to upload to 'owner/smaller' with it (403): "),
        ("preupload", 403, "token: the Hub refuses to upload to 'owner/smaller' with it (403): "),
        ("commit", 400, "repo_id: the Hub refuses to upload to 'owner/smaller' (400): "),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(hub: Store, folder: Path, path: str, status: int, message: str) -> None:
    hub.denied = {path: status}
    refused(hub, message, folder, "owner/smaller")


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Store, folder: Path) -> None:
    hub.private = False
    refused(hub, "private: expected a private repository, got 'owner/smaller'", folder, "owner/smaller", private=True)


def test_a_hub_out_of_reach_is_one_line(hub: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(
        hub,
        "repo_id: the Hub cannot be reached, or the connection broke: cannot tell whose the token is (",
        folder,
        "owner/smaller",
    )
