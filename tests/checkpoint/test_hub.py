"""Models on the hub, from a hub on this machine: what is fetched, how it goes on, what fails."""

import socket

import huggingface_hub.constants as constants
import ml_dtypes
import pytest

import dskjax
from dskjax.checkpoint import CheckpointError, Conversion, convert, hub, load, load_hf, save_params
from dskjax.config import ModelConfig
from tests.checkpoint.build import draw, random_params, same_bits, tiny_config, write_folder
from tests.checkpoint.fake_hub import commit, running

BF16 = ml_dtypes.bfloat16
CONFIG = tiny_config(num_hidden_layers=2, num_nextn_predict_layers=1)
SMALL = ["LICENSE", "README.md", "chat_template.jinja", "config.json", "tiktoken.model"]
SMALL = [*SMALL, "tokenizer.json", "tokenizer_config.json"]
SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


def repository(folder, seed=0, files=3):
    """A folder as on the hub, with things that no model needs."""
    write_folder(folder, CONFIG, draw(CONFIG, BF16, seed), files)
    for name in {*SMALL, "modeling_deepseek.py", ".gitattributes", "pytorch_model.bin"}:
        if not (folder / name).exists():
            (folder / name).write_text(f'{{"{name}": 1}}')  # equal files are fetched once
    (folder / "inference" / "configs").mkdir(parents=True)
    (folder / "inference" / "configs" / "16B.json").write_text("{}")
    (folder / "inference" / "model.safetensors").write_text("another copy")
    (folder / "consolidated.safetensors").write_text("another copy")
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    with running(monkeypatch, tmp_path / "cache") as server:
        server.repos["org/tiny"] = {"main": repository(tmp_path / "main")}
        yield server


def test_what_a_model_needs_is_fetched_once(server, tmp_path):
    params, cfg = dskjax.load("org/tiny")
    assert server.downloads() == sorted([*SMALL, INDEX, *SHARDS])
    expected, expected_cfg = load_hf(tmp_path / "main")
    assert cfg == expected_cfg
    same_bits(params, expected)
    server.requests.clear()
    folder = hub.find("org/tiny")
    assert server.downloads() == []
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SMALL, INDEX, *SHARDS])


def test_a_single_file_needs_no_index(server, tmp_path):
    server.repos["org/one"] = {"main": repository(tmp_path / "one", files=1)}
    same_bits(load("org/one")[0], load_hf(tmp_path / "one")[0])
    assert server.downloads() == sorted([*SMALL, "model.safetensors"])


def test_config_and_tokenizer_come_without_weights(server):
    folder = hub.find("org/tiny", weights=False)
    assert (folder / "config.json").is_file()
    assert server.downloads() == sorted([*SMALL, INDEX])


def test_a_revision_is_a_branch_a_tag_or_a_commit(server, tmp_path):
    server.repos["org/tiny"]["v2"] = repository(tmp_path / "v2", seed=1)
    for revision in ("v2", commit("v2")):
        same_bits(load("org/tiny", revision=revision)[0], load_hf(tmp_path / "v2")[0])
    same_bits(load("org/tiny")[0], load_hf(tmp_path / "main")[0])
    with pytest.raises(CheckpointError, match="org/tiny: no revision 'v3'; .*/org/tiny/tree/main"):
        load("org/tiny", revision="v3")


def test_a_connection_that_breaks_goes_on_where_it_broke(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.break_at = {SHARDS[1]: 5500}
    params, _ = load("org/tiny")
    assert f"{SHARDS[1]} bytes=5000-" in server.downloads()
    same_bits(params, load_hf(tmp_path / "main")[0])


def test_an_interrupted_download_fetches_only_what_is_missing(server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    size = (tmp_path / "main" / SHARDS[1]).stat().st_size
    broken = {SHARDS[1]: size // 2}

    class Always(dict):
        def pop(self, name):
            return self[name]

    server.break_at = Always(broken)
    with pytest.raises(CheckpointError, match="org/tiny: the download .* command goes on"):
        load("org/tiny")
    server.break_at = {}
    done = {name.split()[0] for name in server.downloads()} - {SHARDS[1]}
    server.requests.clear()
    same_bits(load("org/tiny")[0], load_hf(tmp_path / "main")[0])
    assert SHARDS[1] in server.downloads() and not done & set(server.downloads())


def test_an_orbax_folder_on_the_hub(server, tmp_path):
    cfg = ModelConfig.from_hf(CONFIG)
    params = random_params(cfg, BF16)
    save_params(tmp_path / "o", params, cfg)
    server.repos["org/orbax"] = {"main": tmp_path / "o"}
    same_bits(load("org/orbax")[0], params)


def test_converting_from_the_hub(server, tmp_path):
    convert("org/tiny", tmp_path / "b", Conversion(dtype="float32"), revision="main")
    same_bits(load(tmp_path / "b")[0], load_hf(tmp_path / "main", dtype="float32")[0])
    assert (tmp_path / "b" / "LICENSE").exists() and (tmp_path / "b" / "tiktoken.model").exists()


# ------------------------------------------------------------------ what fails


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/none", "org/none: no such folder here, and no such model at .*; for a private one"),
        ("org/gated", "org/gated: gated: accept its terms at .*/org/gated, then log in"),
    ],
)
def test_missing_and_gated_models(name, says, server):
    server.repos["org/gated"] = server.repos["org/tiny"]
    server.gated.add("org/gated")
    with pytest.raises(CheckpointError, match=says) as refused:
        load(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "/a/b", "./a", "org/", "a b/c", "a/..", "x--y/z"]
)
def test_what_is_no_id_is_never_looked_up(name, server):
    with pytest.raises(CheckpointError, match="no such folder, and not the id of a model"):
        load(name)
    assert server.requests == []


def test_a_folder_comes_first(server, tmp_path, monkeypatch):
    write_folder(tmp_path / "org" / "tiny", CONFIG, draw(CONFIG, BF16, seed=5))
    monkeypatch.chdir(tmp_path)
    same_bits(load("org/tiny")[0], load_hf(tmp_path / "org" / "tiny")[0])
    with pytest.raises(ValueError, match="revision='v2' is for models on the hub, but org/tiny is"):
        load("org/tiny", revision="v2")
    assert server.requests == []


def test_a_hub_that_fails(server):
    server.status = 503
    with pytest.raises(CheckpointError, match="org/tiny: no such folder here, .*reached .*503"):
        load("org/tiny")


def test_without_a_connection(server, monkeypatch, tmp_path):
    load("org/tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    same_bits(load("org/tiny")[0], load_hf(tmp_path / "main")[0])
    with pytest.raises(CheckpointError, match="org/new: .* it is not in .* cannot be reached"):
        load("org/new")


def test_offline(server, monkeypatch, tmp_path):
    hub.find("org/tiny", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    with pytest.raises(CheckpointError, match="only a part of it is in .* HF_HUB_OFFLINE is set"):
        load("org/tiny")
    with pytest.raises(CheckpointError, match="org/new: .* it is not in .* HF_HUB_OFFLINE is set"):
        load("org/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    same_bits(load("org/tiny")[0], load_hf(tmp_path / "main")[0])
    assert server.requests == []
