"""Models by names on a hub, against a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from diffmae_video import Classifier, DiffMAE, load_model
from diffmae_video.cli.app import run
from diffmae_video.config import ModelSettings
from diffmae_video.errors import DataError, StorageError, UsageError
from diffmae_video.models.encoder import Encoder
from diffmae_video.models.exporters import export_model
from diffmae_video.models.hub import download, model_folder
from diffmae_video.models.weights import save_model
from diffmae_video.pipelines.find import find_first_weights, find_init, find_run
from tests.models.hub_server import Hub, serve

SETTINGS = ModelSettings.model_validate(
    {"width": 32, "depth": 1, "heads": 2, "patch": 8, "frames": 4, "size": (16, 16), "decoder_width": 16}
    | {"decoder_depth": 1, "decoder_heads": 2}
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub()) as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_nothing")
        monkeypatch.chdir(tmp_path)
        yield hub


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_goes_to_the_hub_and_comes_back(hub: Hub) -> None:
    model = DiffMAE(SETTINGS, seed=3)
    url = model.push_to_hub("me/small", licence="mit")
    assert url.startswith(f"{hub.url}/me/small/commit/")
    assert sorted(hub.repos["me/small"]["main"]) == ["README.md", "model.json", "weights.safetensors"]
    assert b"license: mit" in hub.repos["me/small"]["main"]["README.md"]
    assert equal(DiffMAE.from_pretrained("me/small"), model)
    with pytest.raises(UsageError, match="me/small is a DiffMAE, not a Classifier"):
        Classifier.from_pretrained("me/small")
    other = DiffMAE(SETTINGS, seed=4)
    other.push_to_hub("me/small", branch="later")
    assert equal(DiffMAE.from_pretrained("hf:me/small", revision="later"), other)
    assert equal(DiffMAE.from_pretrained("me/small"), model)


def test_save_pretrained_and_from_pretrained_by_path(tmp_path: Path) -> None:
    model = Classifier(Encoder(SETTINGS), 3)
    assert model.save_pretrained(tmp_path / "there") == tmp_path / "there"
    assert equal(Classifier.from_pretrained(tmp_path / "there"), model)


def test_a_name_stands_wherever_a_checkpoint_does(hub: Hub, tmp_path: Path) -> None:
    model = DiffMAE(SETTINGS, seed=3)
    save_model(model, tmp_path / "mine")
    hub.put_folder("me/mine", tmp_path / "mine", "v1")
    for path, line in (find_run("pretrain", "hf:me/mine@v1"), find_init("hf:me/mine@v1")):
        assert "hf:me/mine@v1" in line
        assert equal(load_model(path), model)
    assert equal(load_model(find_first_weights("hf:me/mine@v1")), model)
    assert run(["export", "--checkpoint", "hf:me/mine@v1", "--out", "out"]) == 0
    assert equal(load_model("out"), model)


def test_another_projects_model_is_imported_once_and_no_pickle_is_fetched(hub: Hub, tmp_path: Path) -> None:
    kind = {
        "objective": "mae",
        "timestep": "none",
        "decoder": "joint",
        "positions": "flat",
        "target": "norm_pixel_channel",
    }
    video = ModelSettings.model_validate(SETTINGS.model_dump() | kind | {"pixel_norm": "imagenet"})
    model = DiffMAE(video)
    with torch.no_grad():
        model.decoder.latent_embed.bias.zero_()
    export_model(model, tmp_path / "hf", "hf")
    hub.put_folder("them/video", tmp_path / "hf")
    hub.repos["them/video"]["main"] |= {"pytorch_model.bin": b"a pickle", "code.py": b"code", "other/more.json": b"{}"}
    folder = model_folder("hf:them/video")
    imported = load_model(folder)
    assert torch.equal(imported.encoder.patch_embed.proj.weight, model.encoder.patch_embed.proj.weight)
    assert json.loads((folder / "model.json").read_text())["info"]["file"] == "hf:them/video"
    assert set(hub.asked) == {"model.safetensors", "config.json", "preprocessor_config.json"}
    written = (folder / "weights.safetensors").stat().st_mtime_ns
    assert model_folder("hf:them/video") == folder
    assert (folder / "weights.safetensors").stat().st_mtime_ns == written
    assert run(["import", "hf-videomae", "hf:them/video", "--out", "imported"]) == 0
    assert equal(load_model("imported"), imported)


def test_timms_names_are_those_of_its_table(hub: Hub, tmp_path: Path) -> None:
    import timm

    network = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    timm.models.save_for_hf(network, tmp_path / "tiny", safe_serialization=True)
    hub.put_folder("timm/vit_tiny_patch16_224.augreg_in21k", tmp_path / "tiny")
    model = load_model(model_folder("timm:vit_tiny_patch16_224.augreg_in21k"))
    assert model.settings.pixel_norm == "symmetric"  # these were trained on [-1, 1], unlike most
    kernel = network.patch_embed.proj.weight
    assert torch.equal(model.encoder.patch_embed.proj.weight, kernel[:, :, None])
    with pytest.raises(UsageError, match="timm:vit_nano is no name of timm with weights on the hub"):
        download("timm:vit_nano")


def test_what_goes_wrong_is_one_sentence(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.put("me/pickles", {"pytorch_model.bin": b"a pickle"})
    hub.put("me/parts", {"a-1.safetensors": b"", "a-2.safetensors": b""})
    expected = {
        "hf:me/nothing": (UsageError, f"hf:me/nothing: there is no such model on {hub.url}, or it is private"),
        "hf:me/pickles@v9": (UsageError, "hf:me/pickles@v9: the model has no such revision"),
        "hf:me/pickles": (DataError, "hf:me/pickles holds no safetensors, and nothing else is fetched"),
        "hf:me/parts": (DataError, r"hf:me/parts holds several files of weights \(a-1.safetensors, a-2.safetensors\)"),
        "hf:a/b/c": (UsageError, "hf:a/b/c is no name on a hub; write hf:user/model"),
    }
    for name, (kind, message) in expected.items():
        with pytest.raises(kind, match=message) as caught:
            model_folder(name)
        assert "\n" not in str(caught.value)
    assert hub.asked == ["a-1.safetensors", "a-2.safetensors"] or set(hub.asked) == {
        "a-1.safetensors",
        "a-2.safetensors",
    }
    assert run(["export", "--checkpoint", "hf:me/pickles"]) == 3
    assert "hf:me/pickles holds no safetensors" in capsys.readouterr().err


def test_without_a_network_what_was_fetched_serves(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DiffMAE(SETTINGS, seed=3)
    save_model(model, tmp_path / "mine")
    hub.put_folder("me/mine", tmp_path / "mine")
    model_folder("hf:me/mine")
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert equal(load_model(model_folder("hf:me/mine")), model)
    with pytest.raises(StorageError, match=f"hf:me/new is not in the cache, and {nobody} cannot be reached"):
        model_folder("hf:me/new")
    with pytest.raises(StorageError, match="cannot be reached"):
        model.push_to_hub("me/new")


def test_a_path_that_a_file_names_asks_no_host(hub: Hub) -> None:
    with pytest.raises(UsageError, match=r"hf:me/mine holds no model\.json"):
        load_model("hf:me/mine")
    assert hub.asked == []
