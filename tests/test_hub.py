"""Push and pull by the real client through a Hub of our own: in one commit, or not at all and in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hub_client import Client, Failed, environment
from hub_server import READER, running_hub

pytestmark = pytest.mark.hub

NAMES = ["ant", "bee", "cat"]
MAKE = f"""
import json, logging, torch, timm, glattn, pathlib
from glattn.hub import create_model, push
from glattn.hub.card import Record
names = {NAMES}
image = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(7))

def make(seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model("test_glattn", num_classes=3, **options)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(4, model.in_chans, 64, 64))  # running statistics that are not the initial ones
    return model.eval()

def send(repo, seed=0, record=Record(metrics={{"top1": 91.5, "top5": 99.0}}, dataset="digits"), **options):
    return push(make(seed), repo, label_names=names, record=record, **options)

def differ(one, other):
    with torch.inference_mode():
        return float((one(image) - other.eval()(image)).abs().max())
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def shared_client(hub, tmp_path_factory):
    client = Client(environment(hub.endpoint, tmp_path_factory.mktemp("home")))
    yield client
    client.close()


@pytest.fixture
def client(shared_client, hub):
    hub.faults.clear()
    hub.log.clear()
    return lambda code: shared_client.run(MAKE + textwrap.dedent(code))


@pytest.fixture
def new_client(hub, tmp_path):
    """Return a function that starts a process with an empty cache, or another's."""
    clients = []

    def start(home="new", endpoint=None, token="hf_writer", **more):
        clients.append(Client(environment(endpoint or hub.endpoint, tmp_path / home, token, **more)))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def one_line(error: Failed) -> str:
    assert "\n" not in error.message
    return error.message


def fails(client, code: str, kind: str = "OSError") -> str:
    with pytest.raises(Failed) as error:
        client(code)
    assert kind in error.value.kinds, error.value
    return one_line(error.value)


def test_push_is_one_commit_of_safe_files_and_pulls_back_the_same_numbers(hub, client):
    where = client('result = send("org/first")')
    assert set(hub.files("org/first")) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert hub.history("org/first") == ["Upload model", "initial commit"]
    assert where == f"{hub.endpoint}/org/first/commit/{hub.repos['org/first'].branches['main'].sha}"
    assert hub.repos["org/first"].branches["main"].files["model.safetensors"].lfs
    assert not hub.repos["org/first"].private

    result = client("""
        pulled = timm.create_model("hf-hub:org/first", pretrained=True)
        cfg = pulled.pretrained_cfg
        result = differ(make(), pulled), cfg["label_names"], cfg["license"], pulled.num_classes
    """)
    assert result == [0.0, NAMES, "apache-2.0", 3]
    config = json.loads(hub.files("org/first")["config.json"])
    assert config["label_names"] == NAMES
    assert config["architecture"] == "test_glattn"


def test_options_of_the_model_travel(client):
    assert client("""
        model = make(head_dim=4, mlp_ratio=2.0, position="bias", layout="window", window_size=5, in_chans=1)
        push(model, "org/options")
        pulled = timm.create_model("hf-hub:org/options", pretrained=True)
        image = image[:, :1]
        result = differ(model, pulled), pulled.cfg == model.cfg, pulled.in_chans
    """) == [0.0, True, 1]


@pytest.mark.parametrize("create", ["timm.create_model", "create_model"])
def test_a_repository_that_is_named_comes_before_the_packages_own_weights(client, create):
    assert (
        client(f"""
        mine = timm.create_model("glattn_atto", num_classes=3).eval()
        push(mine, "org/atto")
        overlay = dict(hf_hub_id="org/atto", num_classes=3)
        pulled = {create}("glattn_atto", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
        result = differ(mine, pulled)
    """)
        == 0.0
    )


def test_adapted_to_other_classes_channels_and_features(hub, client):
    client('send("org/adapt")')
    result = client("""
        one = make()
        few = create_model("hf-hub:org/adapt", pretrained=True, num_classes=5)
        gray = create_model("hf-hub:org/adapt", pretrained=True, in_chans=1)
        bare = create_model("hf-hub:org/adapt", pretrained=True, num_classes=0)
        maps = create_model("hf-hub:org/adapt", pretrained=True, features_only=True).eval()
        with torch.inference_mode():
            features = one.forward_features(image)
            result = (
                few.num_classes, torch.equal(few.eval().forward_features(image), features),
                torch.allclose(gray.stem.conv1.conv.weight, one.stem.conv1.conv.weight.sum(1, keepdim=True)),
                torch.equal(bare.eval()(image), one.forward_head(features, pre_logits=True)),
                torch.equal(maps(image)[-1], features),
            )
    """)
    assert result == [5, True, True, True, True]


def test_a_tag_of_the_registry_pulls_from_its_repository(hub, client):
    client('send("org/test_glattn.digits")')
    assert client("""
        from timm.models import PretrainedCfg, _registry
        cfg = PretrainedCfg(hf_hub_id="org/test_glattn.digits", num_classes=3, first_conv="stem.conv1.conv",
                            classifier="head.fc", tag="digits", architecture="test_glattn")
        _registry._model_pretrained_cfgs["test_glattn.digits"] = cfg
        both = [create("test_glattn.digits", pretrained=True) for create in (timm.create_model, create_model)]
        result = [differ(make(), pulled) for pulled in both]
    """) == [0.0, 0.0]


def test_what_is_to_be_private_goes_to_no_public_repository(hub, client):
    client('send("org/open")')
    before = hub.files("org/open")
    client("""
        try:
            send("org/open", seed=2, private=True)
        except ValueError as error:
            assert "org/open is there and public" in str(error), error
        else:
            raise AssertionError
    """)
    assert hub.files("org/open") == before


def test_private_and_revision(hub, client, new_client):
    client('send("org/secret", private=True)')
    client('send("org/secret", private=True)')  # as it is
    client('send("org/secret", seed=1, revision="v2")')
    assert hub.repos["org/secret"].private
    assert hub.files("org/secret")["model.safetensors"] != hub.files("org/secret", "v2")["model.safetensors"]
    first = hub.repos["org/secret"].branches["main"].sha
    assert client(f"""
        seeds = {{"secret@v2": 1, "secret": 0, "secret@{first}": 0}}
        pulled = [timm.create_model("hf-hub:org/" + name, pretrained=True) for name in seeds]
        result = [differ(make(seed), model) for seed, model in zip(seeds.values(), pulled)]
    """) == [0.0, 0.0, 0.0]
    assert "hf-hub:org/secret@v2" in hub.files("org/secret", "v2")["README.md"].decode()

    stranger = new_client(token=None)
    message = fails(stranger.run, MAKE + 'create_model("hf-hub:org/secret", pretrained=True)')
    assert "hf-hub:org/secret: no such repository" in message
    assert "HF_TOKEN" in message


def test_push_again_updates_everything_but_a_card_that_a_person_edited(hub, client):
    client('send("org/again")')
    before = hub.files("org/again")
    client('send("org/again")')
    assert hub.history("org/again") == ["Upload model", "initial commit"]  # nothing new: no commit

    client('send("org/again", seed=1, record=Record(metrics={"top1": 93.25}, dataset="digits"))')
    after = hub.files("org/again")
    assert after["model.safetensors"] != before["model.safetensors"]
    assert "91.5" in before["README.md"].decode()
    assert "93.25" in after["README.md"].decode()
    assert "91.5" not in after["README.md"].decode()

    from hub_server import Blob

    edited = after["README.md"].replace(b"# org/again", b"# Insects and a cat")
    repo = hub.repos["org/again"]
    repo.commit("main", {**repo.branches["main"].files, "README.md": Blob(edited, False)}, "Say what it is")
    client('send("org/again", seed=2, record=Record(metrics={"top1": 94.75}, dataset="digits"))')
    assert hub.files("org/again")["README.md"] == edited
    assert hub.files("org/again")["model.safetensors"] != after["model.safetensors"]


def test_card_of_a_run_and_its_pasted_usage(hub, client, new_client, tmp_path):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "best" / "metrics.json").write_text('{"epoch": 3, "top1": 87.125, "top5": 100.0, "images": 360}')
    (run / "environment.json").write_text('{"torch": "2.15", "command": ["glattn", "train", "a b.yaml"]}')
    (run / "config.yaml").write_text("dataset: digits\nepochs: 4\n")
    (run / "metrics.csv").write_text("epoch,lr,top1\n0,0.1,50.0\n1,0.1,87.125\n")
    (run / "curve.png").write_bytes(b"\x89PNG\r\n\x1a\n picture")
    client(f"""
        from timm.models import save_for_hf
        save_for_hf(make(), "{run}/best", safe_serialization=True, model_config={{"label_names": names}})
        result = push("{run}", "org/run")
    """)
    files = hub.files("org/run")
    assert files["curve.png"] == (run / "curve.png").read_bytes()
    card = files["README.md"].decode()
    for said in (
        "87.125",
        "glattn train 'a b.yaml'",
        "| epochs | 2 |",
        "| torch | 2.15 |",
        "![",
        "ant, bee, cat",
    ):
        assert said in card

    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    stranger = new_client(token=None)
    printed = stranger.run("\n".join(blocks[:2]) + "\nresult = model.num_classes, len(backbone.feature_info)")
    assert printed == [5, 4]
    pytest.importorskip("transformers")
    stranger.run("\n".join([blocks[0], blocks[2]]) + "\nresult = [c['label'] for c in classify(image)]")


def test_a_push_that_is_killed_leaves_the_repository_as_it_was(hub, client, new_client):
    client('send("org/killed")')
    before = hub.files("org/killed")
    for method, path in (("PUT", "/storage/"), ("POST", "/org/killed.git"), ("POST", "/commit/main")):
        fault = hub.fault(method, path, hang=True)
        victim = new_client()
        victim.start(MAKE + 'send("org/killed", seed=5)')
        assert fault.reached.wait(60)
        victim.close()
        assert hub.files("org/killed") == before
    client('send("org/killed", seed=5)')
    assert hub.history("org/killed") == ["Upload model", "Upload model", "initial commit"]
    assert client('result = differ(make(5), timm.create_model("hf-hub:org/killed", pretrained=True))') == 0.0


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/api/repos/create", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("POST", "/preupload/", {"status": 500}),
        ("POST", "/objects/batch", {"status": 503}),
        ("PUT", "/storage/", {"status": 500}),
        ("PUT", "/storage/", {"cut": 1000}),
        ("POST", "/commit/", {"status": 500}),
        ("POST", "/commit/", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("HEAD", "README.md", {"status": 500}),
    ],
)
def test_a_push_outlasts_a_fault_of_the_moment(hub, client, method, path, fault):
    repo = f"org/moment-{len(hub.repos)}"
    started = time.monotonic()
    planted = hub.fault(method, path, **fault)
    client(f'send("{repo}", seed={len(hub.repos) + 10})')
    assert planted.times == 0
    assert hub.history(repo) == ["Upload model", "initial commit"]
    if "headers" in fault:
        assert time.monotonic() - started >= 1.0


def test_a_push_that_is_refused_says_so_in_one_line(hub, client, new_client):
    reader = new_client(token=READER).run
    assert "403" in fails(reader, MAKE + 'send("org/refused")')
    stranger = new_client(token=None).run
    message = fails(stranger, MAKE + 'send("org/refused")')
    assert "org/refused" in message
    assert "HF_TOKEN" in message
    assert "org/refused" not in hub.repos

    client('send("org/refused")')
    before = hub.files("org/refused")
    hub.fault("POST", "/commit/", status=403)
    assert "403" in fails(client, 'send("org/refused", seed=1)')
    hub.fault("POST", "/api/validate-yaml", status=400)
    fails(client, 'send("org/refused", seed=1)', "Exception")
    assert hub.files("org/refused") == before


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("HEAD", "model.safetensors", {"status": 500}),
        ("HEAD", "config.json", {"status": 503}),
        ("GET", "/storage/", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("GET", "/storage/", {"status": 500}),
        ("GET", "/storage/", {"cut": 100_000}),
        ("GET", "config.json", {"cut": 10}),
    ],
)
def test_a_pull_outlasts_a_fault_of_the_moment(hub, client, tmp_path, method, path, fault):
    if "org/pull" not in hub.repos:
        client('send("org/pull")')
    planted = hub.fault(method, path, **fault)
    pull = f'create_model("hf-hub:org/pull", pretrained=True, cache_dir="{tmp_path}")'
    assert client(f"result = differ(make(), {pull})") == 0.0
    assert planted.times == 0


def test_a_pull_that_fails_says_so_in_one_line_and_leaves_nothing_half_written(hub, client, tmp_path):
    if "org/pull" not in hub.repos:
        client('send("org/pull")')
    pull = f'create_model("hf-hub:org/pull", pretrained=True, cache_dir="{tmp_path}")'

    hub.fault("GET", "/storage/", short=1000)
    message = fails(client, pull)
    assert message.startswith("hf-hub:org/pull: ")
    assert "size" in message
    assert client(f"result = differ(make(), {pull})") == 0.0

    missing = 'create_model("hf-hub:org/{}", pretrained=True)'
    assert "no such repository" in fails(client, missing.format("nothing"))
    assert "no such revision" in fails(client, missing.format("pull@nothing"))
    hub.fault("HEAD", "config.json", status=403, times=9)
    assert "403" in fails(client, f'create_model("hf-hub:org/pull", pretrained=True, cache_dir="{tmp_path}/403")')
    hub.faults.clear()
    hub.fault("HEAD", "config.json", status=401, times=9)
    fails(client, f'create_model("hf-hub:org/pull", pretrained=True, cache_dir="{tmp_path}/401")')


def test_a_hub_that_stalls_on_safetensors_is_no_reason_to_read_a_pickle(hub, client, tmp_path):
    from hub_server import Blob

    client('send("org/both")')
    repo = hub.repos["org/both"]
    repo.commit("main", {**repo.branches["main"].files, "pytorch_model.bin": Blob(b"not to be read", False)}, "pickle")
    hub.fault("HEAD", "model.safetensors", status=403, times=9)
    assert "403" in fails(client, f'create_model("hf-hub:org/both", pretrained=True, cache_dir="{tmp_path}")')
    assert hub.count("GET .*pytorch_model.bin") == 0


def test_offline(hub, client, new_client):
    client('send("org/offline")')
    pull = MAKE + 'result = differ(make(), CREATE("hf-hub:org/offline", pretrained=True))'
    assert new_client("warm").run(pull.replace("CREATE", "timm.create_model")) == 0.0

    hub.log.clear()
    assert new_client("warm", HF_HUB_OFFLINE="1").run(pull.replace("CREATE", "create_model")) == 0.0
    assert hub.log == []
    nowhere = "http://127.0.0.1:9"
    assert new_client("warm", nowhere).run(pull.replace("CREATE", "create_model")) == 0.0

    message = fails(new_client("cold", HF_HUB_OFFLINE="1").run, pull.replace("CREATE", "create_model"))
    assert "hf-hub:org/offline: not in the cache, and HF_HUB_OFFLINE" in message
    message = fails(new_client("cold", nowhere).run, pull.replace("CREATE", "create_model"))
    assert f"{nowhere} cannot be reached" in message


def test_a_hub_without_xet_storage_is_pushed_to_by_lfs(hub, new_client):
    client = new_client(HF_HUB_DISABLE_XET="0")
    client.run(MAKE + 'send("org/mirror")')
    assert hub.history("org/mirror") == ["Upload model", "initial commit"]
    assert client.run(MAKE + 'result = differ(make(), timm.create_model("hf-hub:org/mirror", pretrained=True))') == 0.0


def test_the_command(hub, client, tmp_path):
    client(f'send("org/unused", dry_run="{tmp_path}/model")')
    assert "org/unused" not in hub.repos
    env = environment(hub.endpoint, tmp_path / "home")
    push = [
        sys.executable,
        "-m",
        "glattn",
        "push",
        str(tmp_path / "model"),
        "org/command",
        "--revision",
        "v1",
    ]
    done = subprocess.run(push, env=env, capture_output=True, text=True)
    assert (done.returncode, hub.history("org/command", "v1")[0]) == (0, "Upload model"), done.stderr
    assert 'timm.create_model("hf-hub:org/command@v1", pretrained=True)' in done.stdout
    refused = subprocess.run(
        push, env=environment(hub.endpoint, tmp_path / "home", None), capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("glattn push: org/command: ")


def test_transformers_reads_the_repository_with_the_same_numbers(hub, client):
    pytest.importorskip("transformers")
    client('send("org/wrapped")')
    result = client("""
        from PIL import Image
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
        model = make()
        wrapped = AutoModelForImageClassification.from_pretrained("org/wrapped").eval()
        picture = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 60).convert("RGB")
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        with torch.inference_mode():
            pixels = transform(picture)[None]
            ours = model(pixels)
            theirs = AutoImageProcessor.from_pretrained("org/wrapped")(picture, return_tensors="pt")["pixel_values"]
            same_logits = torch.equal(wrapped(pixels).logits, ours)
        scores = {entry["label"]: entry["score"] for entry in
                  pipeline("image-classification", model="org/wrapped", top_k=3)(picture)}
        expected = dict(zip(names, ours.softmax(-1)[0].tolist()))
        result = (type(wrapped).__name__, same_logits, torch.equal(theirs, pixels), sorted(scores) == sorted(names),
                  max(abs(scores[name] - expected[name]) for name in names) < 1e-6)
    """)
    assert result == ["TimmWrapperForImageClassification", True, True, True, True]


def glattn(env: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "glattn", *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=500)


def test_the_whole_loop_gives_the_same_accuracy_to_the_digit(hub, new_client, tmp_path):
    pytest.importorskip("sklearn")
    mine = environment(hub.endpoint, tmp_path / "trainer")
    options = ["dataset=digits", "data=digits", "image_size=32", "lr=0.004", "warmup_epochs=0", "workers=0"]
    options += ["model_args.stem_stride=2", "tracker=none", "device=cpu"]
    trained = glattn(mine, tmp_path, "train", "--model", "test_glattn", "--run", "run", "--epochs", "1", *options)
    assert trained.returncode == 0, trained.stderr
    measured = json.loads((tmp_path / "run" / "best" / "metrics.json").read_text())
    assert measured["top1"] > 30  # far above chance: something was learnt that could be lost

    pushed = glattn(mine, tmp_path, "push", "run", "org/digits")
    assert pushed.returncode == 0, pushed.stderr
    files = hub.files("org/digits")
    assert files["curve.png"] == (tmp_path / "run" / "curve.png").read_bytes()
    card = files["README.md"].decode()
    for said in (f"{measured['top1']:.4f}".rstrip("0").rstrip("."), "train --model test_glattn --run run", "digits"):
        assert said in card

    theirs = environment(hub.endpoint, tmp_path / "validator", None)
    arguments = ["--data", "digits", "--device", "cpu", "--workers", "0", "--output", "found.json"]
    validated = glattn(theirs, tmp_path, "validate", "hf-hub:org/digits", *arguments)
    assert validated.returncode == 0, validated.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["top1"], found["top5"]) == (measured["top1"], measured["top5"])
    assert found["loss"] == pytest.approx(measured["loss"], abs=1e-6)

    usage = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert len(new_client(token=None).run(usage + "\nresult = list(names)")) == 10

    # and on from there: a fine-tuning that starts at what was pulled
    options = ["pretrained=true", "lr=1e-6", *[o for o in options if not o.startswith(("lr=", "model_args"))]]
    tuned = glattn(
        theirs, tmp_path, "train", "--model", "hf-hub:org/digits", "--run", "tuned", "--epochs", "1", *options
    )
    assert tuned.returncode == 0, tuned.stderr
    again = json.loads((tmp_path / "tuned" / "best" / "metrics.json").read_text())
    assert abs(again["top1"] - measured["top1"]) < 10


def test_a_run_without_a_best_model_is_refused_in_one_line(hub, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: test_glattn\n")
    done = glattn(environment(hub.endpoint, tmp_path / "home"), tmp_path, "push", "run", "org/none")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run: no model here: neither best/config.json nor config.json" in done.stderr
    assert "org/none" not in hub.repos


def test_forgetting_the_import_names_the_model(hub, client, new_client):
    client('send("org/forgotten")')
    bare = new_client().run
    with pytest.raises(Failed, match=r"Unknown model.*test_glattn"):
        bare('import timm; timm.create_model("hf-hub:org/forgotten", pretrained=True)')
    one_import = 'import glattn; result = glattn.create_model("hf-hub:org/forgotten", pretrained=True).num_classes'
    assert bare(one_import) == 3


def test_a_size_and_windows_of_ones_own(client):
    result = client("""
        push(make(layout="window", window_size=7, position="bias", abs_pos="stem"), "org/windows")
        sized = create_model("hf-hub:org/windows", pretrained=True, img_size=288, window_size=9).eval()
        with torch.inference_mode():
            result = list(sized(image).shape), bool(sized(image).isfinite().all())
    """)
    assert result == [[2, 3], True]
    message = fails(client, 'create_model("hf-hub:org/windows", pretrained=True, mlp_ratio=2.0)', "ValueError")
    for said in ("mlp_ratio=2.0", "mlp_ratio=4.0", "in the checkpoint and", "fc1"):
        assert said in message


def test_the_guides_python_runs(hub, new_client):
    pytest.importorskip("transformers")
    guide = (Path(__file__).parents[1] / "docs" / "hub.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 4
    first = new_client("first").run
    assert first(blocks[0] + "\nresult = model.num_classes") == 3
    reader = new_client("second", token=None).run
    assert reader(blocks[1] + "\nresult = model.num_classes, backbone.feature_info.reduction()") == [5, [4, 8, 16, 32]]
    assert reader(blocks[2] + "\nresult = model.pretrained_cfg['label_names']") == NAMES
    assert reader(blocks[3] + "\nresult = classify.model.config.num_labels") == 3
