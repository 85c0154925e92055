"""Checkpoints on the Hugging Face Hub, from a local server that answers as the Hub does, and without a network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from conftest import Convsim
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from convsim_cli import init_checkpoint, measure_checkpoint, open_checkpoint
from convsim_cli.errors import ConvsimError, DownloadError, InputError
from convsim_cli.networks.architectures import build_network

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore:.*unauthenticated requests:UserWarning")
COMMIT, OLDER = "a" * 40, "b" * 40


@dataclass
class Hub:
    """A server: `files[OWNER/REPO][REVISION][FILE]` is what it holds; a number is the status that it answers with."""

    url: str = ""
    files: dict[str, dict[str, dict[str, bytes]] | int] = field(default_factory=dict)
    cut: bool = False  # whether a file ends before its length
    asked: list[str] = field(default_factory=list)
    server: ThreadingHTTPServer | None = None

    def put(self, file: str, content: bytes, revision: str = "main", repo: str = "lab/net") -> None:
        revisions = self.files.setdefault(repo, {"main": {}})
        assert isinstance(revisions, dict)
        revisions.setdefault(revision, {})[file] = content


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(self.path)
            tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+).*", self.path)
            named = tree or re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            assert named, self.path
            revisions = hub.files.get(named[1], 404)
            if isinstance(revisions, int):
                return self.answer(revisions, {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}.get(revisions))
            revision = {COMMIT: "main"}.get(unquote(named[2]), unquote(named[2]))
            if revision not in revisions:
                return self.answer(404, "RevisionNotFound")
            files = revisions[revision]
            if tree:
                listed = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0"} for file in files]
                return self.answer(200, content=json.dumps(listed).encode())
            if unquote(named[3]) not in files:
                return self.answer(404, "EntryNotFound")
            self.answer(200, content=files[unquote(named[3])])

        do_HEAD = do_GET  # noqa: N815

        def answer(self, status: int, code: str | None = None, content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {
                **({"X-Error-Code": code} if code else {}),
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Content-Length": str(len(content)),
                "Content-Type": "application/json",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if hub.cut else content)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that huggingface_hub asks, with an empty cache."""
    found = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(found)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        found.url, found.server = f"http://127.0.0.1:{server.server_port}", server
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.url)
        template = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", found.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield found
        server.shutdown()


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"conv.weight": torch.randn(6, 3, 3, 3), "head.weight": torch.randn(2, 6)}


def test_a_file_of_the_hub_is_measured_as_a_file_of_this_machine(
    hub: Hub, state: dict[str, Tensor], tmp_path: Path, convsim: Convsim
) -> None:
    hub.put("weights/net.safetensors", save(state))
    save_file(state, tmp_path / "net.safetensors")
    here = convsim("measure", tmp_path / "net.safetensors", "--json").document
    name = "hf://lab/net@main/weights/net.safetensors"
    there = convsim("measure", name, "--json").document
    assert there["source"] == name
    assert there["layers"] == here["layers"]
    assert measure_checkpoint(name).document()["layers"] == here["layers"]
    assert open_checkpoint(name).name == name


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_without_a_file_the_usual_names_are_looked_for_in_order(
    file: str, hub: Hub, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "state.bin")
    put = {
        "pytorch_model.bin": (tmp_path / "state.bin").read_bytes(),
        "model.safetensors.index.json": json.dumps({"weight_map": {"conv.weight": "a.safetensors"}}).encode(),
        "a.safetensors": save({"conv.weight": state["conv.weight"] + 1}),
        "model.safetensors": save({"conv.weight": state["conv.weight"] + 2}),
    }
    for name, content in put.items():
        hub.put(name, content)
        if name == file:
            break
    if file.endswith("json"):
        hub.put("a.safetensors", put["a.safetensors"])
    more = {"pytorch_model.bin": 0, "model.safetensors.index.json": 1, "model.safetensors": 2}[file]
    torch.testing.assert_close(open_checkpoint("hf://lab/net").load("conv.weight"), state["conv.weight"] + more)


def test_shards_are_all_of_the_commit_of_their_index(hub: Hub, state: dict[str, Tensor]) -> None:
    index = {"weight_map": {"conv.weight": "1.safetensors", "head.weight": "2.safetensors"}}
    hub.put("sub/net.index.json", b"{}")
    hub.put("sub/model.safetensors.index.json", json.dumps(index).encode())
    hub.put("sub/1.safetensors", save({"conv.weight": state["conv.weight"]}))
    hub.put("sub/2.safetensors", save({"head.weight": state["head.weight"]}))
    checkpoint = open_checkpoint("hf://lab/net/sub/model.safetensors.index.json")
    assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in state.items())
    assert {path for path in hub.asked if "sub/1" in path} == {f"/lab/net/resolve/{COMMIT}/sub/1.safetensors"}


@pytest.mark.parametrize("revision", ["v1.0", OLDER, "refs/pr/3", "refs%2Fpr%2F3"])
def test_a_branch_tag_commit_or_pull_request_can_be_named(revision: str, hub: Hub, state: dict[str, Tensor]) -> None:
    hub.put("model.safetensors", save(state), unquote(revision))
    assert torch.equal(open_checkpoint(f"hf://lab/net@{revision}").load("conv.weight"), state["conv.weight"])
    assert torch.equal(
        open_checkpoint(f"hf://lab/net@{revision}/model.safetensors").load("conv.weight"), state["conv.weight"]
    )


def test_init_saves_to_a_file_of_this_machine_and_leaves_the_cache(
    hub: Hub, state: dict[str, Tensor], tmp_path: Path, convsim: Convsim
) -> None:
    hub.put("model.safetensors", save(state))
    refused = convsim("init", "hf://lab/net")
    assert (refused.code, "hf://lab/net is on the Hub; --output is required" in refused.error) == (2, True)
    assert hub.asked == []
    dry = convsim("init", "hf://lab/net", "--dry-run", "--json").document
    assert (dry["checkpoint"], dry["output"]) == ("hf://lab/net", None)
    out = tmp_path / "new.safetensors"
    report = init_checkpoint("hf://lab/net", out, method="dct")
    assert (report.document()["checkpoint"], report.backup) == ("hf://lab/net", None)
    changed = load_file(out)
    assert torch.equal(changed["head.weight"], state["head.weight"])
    assert not torch.equal(changed["conv.weight"], state["conv.weight"])
    assert torch.equal(open_checkpoint("hf://lab/net").load("conv.weight"), state["conv.weight"])
    (cached,) = (tmp_path / "cache").glob("*/snapshots/*/model.safetensors")
    with pytest.raises(InputError, match="is named by a digest of its content, so others rely on its content"):
        init_checkpoint(cached)
    assert "got hf://lab/net" in convsim("init", "hf://lab/net", "--recover").error


@pytest.mark.slow
def test_weights_of_the_hub_start_a_training_and_a_file_cannot_choose_them(
    hub: Hub, tmp_path: Path, convsim: Convsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = build_network("cnn:4", seed=3)
    hub.put("model.safetensors", save(network.state_dict()))
    small = ("--arch", "cnn:4", "--dataset", "digits", "--limit-train", 60, "--limit-test", 30, "--lr", 1e-12, "-q")
    weights = ("--weights", "hf://lab/net")
    assert convsim("train", *small, *weights, "--epochs", 1, "--name", "a").code == 0
    trained = load_file("runs/a/last.safetensors")
    torch.testing.assert_close(trained["0.weight"], network.state_dict()["0.weight"])
    (tmp_path / "args.json").write_bytes(Path("runs/a/args.json").read_bytes())
    hub.asked.clear()
    for option, given in (("--resume", "runs/a"), ("--config", "args.json")):
        refused = convsim("train", option, given)
        assert "names the weights hf://lab/net, which would be downloaded; if you trust it, repeat" in refused.error
        assert refused.error.endswith(f"convsim train {option} {given} --weights hf://lab/net")
    assert hub.asked == []
    assert convsim("train", "--resume", "runs/a", *weights, "-q").code == 0
    assert convsim("train", "--config", "args.json", *weights, "--name", "b", "-q").code == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://lab", r"^hf://lab: expected hf://OWNER/REPO\[@REVISION\]\[/FILE\]$"),
        ("hf://lab/net@", "expected hf://OWNER/REPO"),
        ("hf://lab/no--net", "no--net"),
        ("hf://lab/other", "no repository lab/other, or a private one; check the name, or log in with hf auth login"),
        ("hf://lab/gated", "access to lab/gated is restricted; ask for it on the repository's page, and log in"),
        ("hf://lab/locked", "access to lab/locked is restricted"),
        ("hf://lab/net@v9", "lab/net has no revision v9; use one of its branches, tags or commits"),
        (
            "hf://lab/net/x.pth",
            r"lab/net has no x.pth; it has a.pth, b/c.safetensors; choose one of them: hf://lab/net/",
        ),
        ("hf://lab/net", "has no model.safetensors, model.safetensors.index.json or pytorch_model.bin; it has a.pth,"),
        ("hf://lab/empty", "or pytorch_model.bin; it has no checkpoint$"),
        ("hf://lab/torn/net.index.json", "lab/torn has no a.safetensors; it has net.index.json"),
        ("hf://lab/net/b/c.safetensors", r"c\.safetensors: .*(damaged|cut short|header)"),
    ],
)
def test_what_is_wrong_with_a_name_is_said_in_one_line(name: str, said: str, hub: Hub) -> None:
    for file in ("readme.md", "a.pth", "b/c.safetensors"):
        hub.put(file, b"\0" * 8 + b"{ no checkpoint")
    hub.put("readme.md", b"", repo="lab/empty")
    hub.put("net.index.json", b'{"weight_map": {"w": "a.safetensors"}}', repo="lab/torn")
    hub.files |= {"lab/gated": 403, "lab/locked": 401}
    with pytest.raises(InputError, match=said) as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)


def test_a_download_that_ends_early_is_named_and_fetched_again(
    hub: Hub, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.put("model.safetensors", save(state))
    hub.cut = True
    with pytest.raises(ConvsimError, match=r"hf://lab/net: cannot be downloaded .*; try again") as caught:
        open_checkpoint("hf://lab/net")
    assert isinstance(caught.value, DownloadError)
    hub.cut = False
    assert torch.equal(open_checkpoint("hf://lab/net").load("conv.weight"), state["conv.weight"])


def test_without_a_network_the_cache_serves_and_its_lack_is_said(
    hub: Hub, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the tries of huggingface_hub
    index = {"weight_map": dict.fromkeys(state, "a.safetensors")}
    hub.put("model.safetensors.index.json", json.dumps(index).encode())
    hub.put("a.safetensors", save(state))
    open_checkpoint("hf://lab/net")
    assert hub.server is not None
    hub.server.shutdown()
    hub.server.server_close()
    assert torch.equal(open_checkpoint("hf://lab/net").load("conv.weight"), state["conv.weight"])
    with pytest.raises(DownloadError, match=r"hf://lab/other: not in the cache, and .* \(.*\); check the network"):
        open_checkpoint("hf://lab/other")


@pytest.mark.slow
def test_the_hubs_environment_is_used_and_its_missing_package_is_named(
    hub: Hub, state: dict[str, Tensor], tmp_path: Path
) -> None:
    hub.put("model.safetensors", save(state))
    here = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "convsim_cli", "measure", "hf://lab/net", "--json", "-q"]
    found = subprocess.run(command, env=here, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["source"] == "hf://lab/net"
    (tmp_path / "huggingface_hub.py").write_text("raise ModuleNotFoundError")
    here["PYTHONPATH"] = os.pathsep.join([str(tmp_path), here.get("PYTHONPATH", "")])
    missing = subprocess.run(command, env=here, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "hf://lab/net: needs huggingface_hub, which is not installed: pip install 'convsim[hub]'" in missing.stderr


def test_timm_finds_networks_on_the_hub_by_itself(hub: Hub, convsim: Convsim) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=3)
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
    hub.put("config.json", json.dumps(config).encode())
    hub.put("model.safetensors", save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))
    fresh = build_network("timm:hf-hub:lab/net", seed=7)
    assert not torch.equal(fresh.conv1[0].weight, network.conv1[0].weight)  # type: ignore[union-attr, index]
    trained = build_network("timm:hf-hub:lab/net", pretrained=True)
    assert torch.equal(trained.conv1[0].weight, network.conv1[0].weight)  # type: ignore[union-attr, index]
    failed = convsim("measure", "--arch", "timm:hf-hub:lab/none", "--pretrained")
    assert (failed.code, "timm:hf-hub:lab/none cannot be fetched" in failed.error) == (1, True)
