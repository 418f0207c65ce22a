"""The command line in process: what it writes, and that bad input ends with one clear line.

One test starts the server as a process, as a user does.
"""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

import dskjax as library

GOLDENS = Path(__file__).parent / "goldens"
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-deepseek"


def close(found, golden):
    return np.linalg.norm(found - golden) <= 2e-5 * np.linalg.norm(golden)


def test_info_counts_parameters(dskjax):
    code, out, _ = dskjax("info", "deepseek-v3")
    assert code == 0
    for number in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "71,424"):
        assert number in out
    assert "15,706,484,224" in dskjax("info", "deepseek-v2-lite")[1]
    assert "5,163,936" in dskjax("info", EXAMPLE)[1]


def test_info_bounds_decode_steps(dskjax, tmp_path):
    plot = tmp_path / "roofline.png"
    arguments = ("info", "deepseek-v3", "--gpu", "h100", "--mesh", "ep=16", "--plot", plot)
    code, out, err = dskjax(*arguments, "--context", 4100)
    assert code == 0, err
    assert "2,505" in out  # of 32 sequences
    assert "too big" not in out
    assert plot.stat().st_size > 1000
    code, out, err = dskjax("info", "deepseek-v3", "--gpu", "h100", "--mesh", "ep=8")
    assert "too big" in out  # 128 sequences beside an eighth of the experts


def test_logits_and_hidden_states(dskjax, tmp_path):
    golden = np.load(GOLDENS / "v3_mtp" / "golden.npz")
    np.save(tmp_path / "ids.npy", golden["ids"].astype(np.int64))
    files = ("--ids", tmp_path / "ids.npy", "--out", tmp_path / "out.npy")
    code, _, err = dskjax(
        "logits", GOLDENS / "v3_mtp", *files, "--dtype", "float32", "--hidden", tmp_path / "h.npz"
    )
    assert code == 0, err
    assert close(np.load(tmp_path / "out.npy"), golden["logits"])
    hidden = np.load(tmp_path / "h.npz")
    for name in ("embed", "layer_0", "layer_1", "final"):
        assert close(hidden[name], golden[name]), name
    assert np.array_equal(hidden["experts_1"], golden["experts_1"])
    assert "experts_0" not in hidden  # a dense layer
    dskjax("logits", GOLDENS / "v3_mtp", *files, "--dtype", "float32", "--mtp-depth", 2)
    assert close(np.load(tmp_path / "out.npy"), golden["mtp_logits_2"])
    dskjax("logits", GOLDENS / "v3_mtp", *files, "--dtype", "bfloat16")
    rounded = np.load(tmp_path / "out.npy")
    assert rounded.dtype == np.float32
    assert 1e-4 < np.linalg.norm(rounded - golden["logits"]) / np.linalg.norm(rounded) < 0.1


def test_generate_ids(dskjax, tmp_path):
    golden = np.load(GOLDENS / "v3_mtp" / "golden.npz")
    np.save(tmp_path / "ids.npy", golden["ids"][:, : int(golden["prompt_len"])])
    count = golden["greedy"].shape[1]
    code, _, err = dskjax(
        *("generate", GOLDENS / "v3_mtp", "--ids", tmp_path / "ids.npy", "--max-tokens", count),
        *("--temperature", 0, "--dtype", "float32", "--speculate", 3, "--ignore-eos"),
        *("--out-ids", tmp_path / "new.npy"),
    )
    assert code == 0, err
    assert np.array_equal(np.load(tmp_path / "new.npy"), golden["greedy"])
    assert "accepted/drafted" in err


def test_rows_are_padded_with_eos_after_they_stop(dskjax, tmp_path):
    golden = np.load(GOLDENS / "v3_yarn" / "golden.npz")
    source, folder = GOLDENS / "v3_yarn", tmp_path / "model"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    eos = int(golden["greedy"][0, 5])
    text = (folder / "config.json").read_text()
    config = json.loads(text) | {"eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(config))
    np.save(tmp_path / "ids.npy", golden["ids"][:, : int(golden["prompt_len"])])
    count = golden["greedy"].shape[1]
    code, _, err = dskjax(
        *("generate", folder, "--ids", tmp_path / "ids.npy", "--max-tokens", count),
        *("--dtype", "float32", "--out-ids", tmp_path / "new.npy"),
    )
    assert code == 0, err
    expected = golden["greedy"].copy()
    for row in expected:
        stops = np.flatnonzero(row == eos)
        if stops.size:
            row[stops[0] :] = eos
    assert np.array_equal(np.load(tmp_path / "new.npy"), expected)


def test_generate_streams_text(dskjax):
    code, out, err = dskjax(
        *("generate", EXAMPLE, "--prompt", "def main():\n    ", "--max-tokens", 12),
        *("--speculate", 1),
    )
    assert code == 0, err
    assert len(out.strip()) > 10
    assert "12 tokens" in err
    code, out, err = dskjax("generate", EXAMPLE, "--chat", "Hello", "--thinking", "--max-tokens", 4)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "deepseek-v9"], ["'deepseek-v9'", "presets", "deepseek-v3"]),
        (["info", "tiny-v3", "--gpu", "a100"], ["'a100'", "h200"]),
        (["info", "tiny-v3", "--gpu", "h20", "--experts", "int3"], ["'int3'"]),
        (["info", "tiny-v3", "--gpu", "h20", "--mesh", "xp=2"], ["'xp=2'", "ep"]),
        (["info", "tiny-v3", "--gpu", "h20", "--context", "0"], ["context=0"]),
        (["generate", EXAMPLE], ["exactly one of --prompt"]),
        (["generate", EXAMPLE, "--prompt", "a", "--out-ids", "x.npy"], ["--out-ids needs --ids"]),
        (["generate", EXAMPLE, "--prompt", "a", "--top-p", "2"], ["top_p=2"]),
        (["generate", EXAMPLE, "--prompt", "a", "--max-tokens", "4000"], ["max_position"]),
        (["generate", EXAMPLE / "none", "--prompt", "a"], ["none"]),
        (["generate", GOLDENS / "v3_yarn", "--prompt", "a"], ["tokenizer.json"]),
        (["logits", EXAMPLE, "--ids", "missing.npy", "--out", "o.npy"], ["missing.npy"]),
        (["--cpu-devices", "-1", "info", "tiny-v3"], ["--cpu-devices -1"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(dskjax, arguments, words):
    code, out, err = dskjax(*arguments)
    assert code == 2
    assert "Traceback" not in err
    for word in words:
        assert word in err.replace("\n", " "), err


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), np.float32), "float32 (2, 3)"),
        (np.zeros(3, np.int32), "int32 (3,)"),
        (np.full((1, 3), 160), "id 160, outside 0..159"),
        (np.full((1, 3), -1), "id -1"),
        (np.zeros((1, 5000), np.int32), "rows of 5000 tokens"),
    ],
)
def test_bad_ids_are_refused(dskjax, tmp_path, array, words):
    np.save(tmp_path / "ids.npy", array)
    code, _, err = dskjax(
        *("logits", GOLDENS / "v3_yarn", "--ids", tmp_path / "ids.npy"),
        *("--out", tmp_path / "out.npy"),
    )
    assert code == 2
    assert words in err
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("content", [b"", b"ids", b"\x80\x04\x95\x0b\x00\x00\x00"])
def test_ids_that_are_no_array_are_refused(dskjax, tmp_path, content):
    """Empty, text, and the first bytes of a pickle, which must not be loaded."""
    (tmp_path / "ids.npy").write_bytes(content)
    code, _, err = dskjax(
        *("logits", GOLDENS / "v3_yarn", "--ids", tmp_path / "ids.npy"),
        *("--out", tmp_path / "out.npy"),
    )
    assert code == 2
    assert "is not a .npy array" in err


# ------------------------------------------------------------------ convert, models by name


def test_convert_there_and_back(dskjax, tmp_path):
    source, orbax, back = GOLDENS / "v3_mtp", tmp_path / "o", tmp_path / "b"
    for arguments in ((source, orbax, "--to", "orbax"), (orbax, back, "--max-shard-gb", 0.00005)):
        code, _, err = dskjax("convert", *arguments)
        assert code == 0 and err.split() == ["wrote", str(arguments[1])], err
    assert len(list(back.glob("*.safetensors"))) > 3
    params, cfg = library.load(back)
    expected, expected_cfg = library.load(source)
    assert cfg == expected_cfg
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), params, expected)
    assert all(jax.tree.leaves(same))
    assert "wrote" in dskjax("convert", source, back, "--overwrite", "--dtype", "bfloat16")[2]
    assert library.load(back)[0]["norm"]["weight"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", EXAMPLE, EXAMPLE), ["holds the source", "choose another place"]),
        (("convert", GOLDENS / "none", "OUT"), ["none", "no such folder"]),
        (("convert", EXAMPLE, "TAKEN"), ["exists already", "--overwrite"]),
        (("convert", EXAMPLE, "OUT", "--quantise", "w4afp8"), ["int4 with 48 inputs", "fp8"]),
        (("convert", EXAMPLE, "OUT", "--quantise", "fp8", "--dequantise"), ["choose one"]),
        (("convert", EXAMPLE, "OUT", "--max-shard-gb", "0"), ["max_shard_bytes=0"]),
        (("logits", "org/none", "--ids", "a", "--out", "b"), ["org/none", "HF_HUB_OFFLINE is set"]),
        (("generate", "org/none", "--prompt", "a"), ["org/none", "no such folder here"]),
        (("info", "org/none"), ["org/none", "HF_HUB_OFFLINE"]),
        (("info", "none"), ["'none'", "neither a folder nor a preset"]),
        (("serve", "org/none"), ["org/none", "HF_HUB_OFFLINE"]),
        (("generate", EXAMPLE, "--prompt", "a", "--revision", "v2"), ["revision='v2'", "is here"]),
    ],
)
def test_one_line_says_what_is_wrong(dskjax, monkeypatch, tmp_path, arguments, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "a").write_text("a")
    places = {name: tmp_path / name for name in ("OUT", "TAKEN")}
    code, _, err = dskjax(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    [line] = err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "OUT").exists()


# ------------------------------------------------------------------ serve


@pytest.fixture
def serve(dskjax, tmp_path):
    """Runs `dskjax serve ARGS...`, which is to fail."""
    return lambda *args: dskjax("serve", *args, "--cache-dir", tmp_path / "xla")


@pytest.fixture
def no_start(monkeypatch):
    """Nothing heavy may begin."""

    def load(*args, **options):
        raise AssertionError("the weights were loaded before the options were checked")

    monkeypatch.setattr("serve.start.load", load)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([EXAMPLE, "--roles", "2P"], ["'2P'", "1P1D"]),
        ([EXAMPLE, "--roles", "0P1D"], ["'0P1D'", "at least one engine"]),
        ([EXAMPLE, "--roles", "1P1D", "--mesh", "dp=2"], ["mesh={'dp': 2", "decode_mesh"]),
        ([EXAMPLE, "--decode-mesh", "dp=2"], ["decode_mesh={'dp': 2", "use mesh"]),
        ([EXAMPLE, "--prefill-tp", "0"], ["prefill_tp=0"]),
        ([EXAMPLE, "--router", "best"], ["'best'", "remaining-slots"]),
        ([EXAMPLE, "--accept", "hope"], ["'hope'", "rejection"]),
        ([EXAMPLE, "--accept", "relaxed:top_n=no"], ["top_n"]),
        ([EXAMPLE, "--rules", "strict,hope"], ["'hope'", "rejection"]),
        ([GOLDENS / "v3_mtp", "--speculate", "9"], ["drafts=9", "at most"]),
        ([GOLDENS / "v3_yarn", "--speculate", "1"], ["drafts=1", "no MTP modules"]),
        ([EXAMPLE, "--speculate", "-1"], ["drafts=-1"]),
        ([EXAMPLE, "--synthetic", "9"], ["mean=9.0", "[1, 2]"]),
        ([EXAMPLE, "--max-model-len", "4096"], ["max_model_len=4096", "2048"]),
        ([EXAMPLE, "--max-model-len", "0"], ["max_model_len=0"]),
        ([EXAMPLE, "--slots", "0"], ["slots=0"]),
        ([EXAMPLE, "--layer-group", "0"], ["layer_group=0"]),
        ([EXAMPLE, "--kv-dtype", "int4"], ["'int4'", "fp8"]),
        ([EXAMPLE, "--memory-fraction", "2"], ["memory_fraction=2.0"]),
        ([EXAMPLE, "--drain-timeout", "-1"], ["drain_timeout=-1"]),
        ([EXAMPLE, "--api-key", ""], ["API key"]),
        ([EXAMPLE, "--port", "70000"], ["127.0.0.1:70000", "65535"]),
        ([EXAMPLE, "--roles", "1P1D", "--inject-faults", "melt=1"], ["'melt=1'", "corrupt"]),
        ([EXAMPLE, "--roles", "1P1D", "--inject-faults", "drop=2"], ["'drop=2'", "0 to 1"]),
        ([EXAMPLE, "--roles", "1P1D", "--inject-faults", "drop=a"], ["'drop=a'", "number"]),
        ([EXAMPLE, "--inject-faults", "drop=0.1"], ["'drop=0.1'", "1P1D"]),
        ([EXAMPLE / "none"], ["none"]),
        ([GOLDENS / "v3_yarn", "--port", "0"], ["v3_yarn", "tokenizer.json"]),
    ],
)
def test_serve_refuses_bad_options_before_it_loads_anything(serve, no_start, arguments, words):
    code, _, err = serve(*arguments)
    assert code == 2, err
    [line] = err.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("option", ["--prefill-policy", "--dtype"])
def test_serve_names_the_values_of_a_choice(serve, no_start, option):
    code, _, err = serve(EXAMPLE, option, "lifo")
    assert code == 2 and "Traceback" not in err
    assert f"'{option}'" in err and "'lifo' is not one of" in err


def test_serve_refuses_a_port_in_use_before_it_loads_anything(serve, no_start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = serve(EXAMPLE, "--port", port)
    assert code == 2
    [line] = err.strip().splitlines()
    assert f"127.0.0.1:{port}: Address already in use" in line and "choose another" in line


@contextlib.contextmanager
def running(*arguments, log):
    """`dskjax serve ARGS...` as a process; yields it and its URL when it is ready to answer."""
    command = [sys.executable, "-m", "dskjax", "serve", *map(str, arguments)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 400
        while (url := re.search(r"at (http://[\d.:]+)/v1", log.read_text())) is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield process, url[1]
    finally:
        process.kill()
        process.wait()


def fetch(url, body=None):
    headers = {"content-type": "application/json", "authorization": "Bearer secret"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return answer.read().decode()


@pytest.mark.full
def test_serve_answers_and_drains(tmp_path):
    """A prefill and a decode engine, from the command to the exit status."""
    options = ("--roles", "1P1D", "--port", 0, "--speculate", 2, "--few-buckets", "--slots", 2)
    options += ("--max-model-len", 256, "--chunk", 64, "--rules", "strict", "--accept", "strict")
    options += ("--pages", 64)
    options += ("--api-key", "secret", "--dtype", "float32", "--cache-dir", tmp_path / "xla")
    log = tmp_path / "log"
    with running(EXAMPLE, *options, log=log) as (process, url):
        assert json.loads(fetch(f"{url}/ready")) == {"status": "ready"}
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(f"{url}/v1/models", timeout=10)
        refused.value.close()
        prompt = "def main():\n    parser = argparse."
        body = {"model": "tiny-deepseek", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        answer = json.loads(fetch(f"{url}/v1/completions", body))
        text, usage = answer["choices"][0]["text"], answer["usage"]
        assert usage["completion_tokens"] == 24

        metrics = fetch(f"{url}/metrics")
        labels = 'engine="decode0",mode="whole",model_name="tiny-deepseek",role="decode"'
        assert f"dskjax:transfer_mode_total{{{labels}}} 1.0" in metrics
        labels = 'engine="decode0",model_name="tiny-deepseek",role="decode"'
        moved = re.search(rf"dskjax:kv_transfer_bytes_total{{{labels}}} ([\d.e+]+)", metrics)
        assert moved and float(moved[1]) > 0
        pattern = rf"dskjax:remaining_slots{{{labels}}} 2\.0"
        deadline = time.monotonic() + 20
        while not re.search(pattern, fetch(f"{url}/metrics")):
            assert time.monotonic() < deadline, "the coordinator's measurement never came"
            time.sleep(0.2)

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    assert "Traceback" not in log.read_text()

    params, cfg = library.load(EXAMPLE, dtype="float32")
    tokenizer = library.Tokenizer.load(EXAMPLE)
    ids = tokenizer.encode(prompt, bos=True)
    assert usage["prompt_tokens"] == len(ids)
    plain = library.generate(params, cfg, [ids], max_tokens=24)
    assert text == tokenizer.decode(plain.tokens[0])


@pytest.mark.parametrize(("package", "command"), [("fastapi", "serve"), ("httpx2", "chat")])
def test_a_missing_extra_is_named(dskjax, monkeypatch, package, command):
    for name in [name for name in sys.modules if name.split(".")[0] in ("serve", package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, error = dskjax(command, *([EXAMPLE] if command == "serve" else []))
    assert code == 2 and package in error and "dskjax[serve]" in error
