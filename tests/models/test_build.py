"""Building models by name: where a name is found, its arguments, and errors."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchrelay.errors import RelayError, UsageError
from torchrelay.models import InitFromData, ModelSettings, build, freeze, names
from torchrelay.models.weights import find_head

LINES: list[str] = []  # what no test looks at


def module_from(text: str) -> ModuleType:
    """Return a module as `--code` imports it."""
    code = ModuleType("users_file")
    exec(text, vars(code))  # noqa: S102 - the test's own text
    return code


def count(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


# ------------------------------------------------------------------------------------------------ the libraries' models


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("resnet18", 3, 32),
        ("resnet18", 1, 32),
        ("squeezenet1_1", 1, 64),
        ("mobilenet_v3_small", 4, 32),
        ("shufflenet_v2_x0_5", 3, 32),
        ("vit_b_32", 1, 32),
        ("timm/resnet18", 1, 32),
        ("timm/vit_tiny_patch16_224", 3, 64),
        ("convnext_atto", 2, 64),  # torchvision has no such model, timm has
    ],
)
def test_a_library_model_gets_the_classes_channels_and_size_of_the_data(name: str, channels: int, size: int) -> None:
    model = build(ModelSettings(name=name), classes=7, channels=channels, image_size=size, log=LINES.append)
    assert model.eval()(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_a_built_torchvision_model_is_bit_equal_to_the_librarys() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(3)
    theirs = resnet18(num_classes=10).state_dict()
    torch.manual_seed(3)
    ours = build(ModelSettings(name="resnet18"), classes=10, log=LINES.append).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_a_model_with_side_heads_gives_plain_logits_in_training(name: str, size: int) -> None:
    model = build(ModelSettings(name=name), classes=5, log=LINES.append)
    assert model.train()(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_options_reach_the_librarys_class() -> None:
    model = build(ModelSettings(name="mobilenet_v2", options={"width_mult": 0.25}), classes=10, log=LINES.append)
    plain = build(ModelSettings(name="mobilenet_v2"), classes=10, log=LINES.append)
    assert count(model) < count(plain) / 4


@pytest.mark.parametrize("options", [{"no_such": 1}, {"weights": "DEFAULT"}, {"num_classes": 3}])
@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_an_unknown_library_option_is_a_usage_error(name: str, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        build(ModelSettings(name=name, options=options), classes=10, log=LINES.append)


def test_an_image_size_that_the_patch_size_does_not_divide_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"vit_b_16.*patch"):
        build(ModelSettings(name="vit_b_16"), classes=10, image_size=30, log=LINES.append)


def test_the_head_is_found_in_models_of_every_style() -> None:
    expected = {
        "resnet18": "fc",
        "vgg11": "classifier.6",
        "squeezenet1_0": "classifier.1",
        "vit_b_32": "heads.head",
        "swin_t": "head",
        "googlenet": "fc",
        "densenet121": "classifier",
    }
    with torch.device("meta"):
        for name, head in expected.items():
            model = build(ModelSettings(name=name), classes=10, image_size=224, log=LINES.append)
            assert find_head(model) == head, name


# ------------------------------------------------------------------------------------------------ names


def test_names_lists_every_family() -> None:
    families = names()
    assert "fast-cnn" in families["torchrelay"]
    assert "resnet50" in families["torchvision"]
    assert "fasterrcnn_resnet50_fpn" not in families["torchvision"]  # it is no classifier
    assert "resnet18" in families["timm"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("resnet81", "resnet18"),
        ("smallcnn", "small-cnn"),
        ("timm/resnet19", "resnet18"),
        ("timm/hf-hub:x/y", "no model"),
    ],
)
def test_a_wrong_model_name_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=right) as caught:
        build(ModelSettings(name=wrong), classes=10, log=LINES.append)
    assert wrong.removeprefix("timm/") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as Python itself marks what can't be imported
    with pytest.raises(UsageError, match=r"pip install 'torchrelay\[timm\]'"):
        build(ModelSettings(name="timm/resnet18"), classes=10, log=LINES.append)
    with pytest.raises(UsageError, match=r"pip install 'torchrelay\[timm\]'"):
        build(ModelSettings(name="convnext_atto"), classes=10, log=LINES.append)
    assert names()["timm"] == []


def test_importing_the_package_imports_no_library(cli: Callable[..., Any]) -> None:
    done = cli(
        program="""
        import sys
        from forked import forget
        forget("torchrelay", "torchvision", "timm")
        import torchrelay.models
        print([name for name in ("torchrelay.models", "torchvision", "timm") if name in sys.modules])
        """
    )
    assert done.stdout == "['torchrelay.models']\n", done.stderr


# ------------------------------------------------------------------------------------------------ the user's file

CODE = """
import torch
from os import system
from torch import nn
from torch.nn import Bilinear

class Net(nn.Module):
    def __init__(self, classes, channels, width=4):
        super().__init__()
        self.given = (classes, channels, width)
        self.layer = nn.Linear(channels, classes)

class Bare(nn.Module):
    pass

class Any(nn.Module):
    def __init__(self, **keywords):
        super().__init__()
        self.given = keywords

def usual(num_classes, in_features=3):
    return nn.Linear(in_features, num_classes)

def demanding(classes, depth):
    return nn.Identity()

def wrong(classes):
    return "a model"

class resnet18(nn.Module):
    pass
"""


def test_a_user_class_gets_the_keywords_it_accepts() -> None:
    code = module_from(CODE)
    plain = build(ModelSettings(name="Net"), classes=5, channels=2, code=code, log=LINES.append)
    assert plain.given == (5, 2, 4)
    wide = build(ModelSettings(name="Net", options={"width": 9}), classes=5, channels=2, code=code, log=LINES.append)
    assert wide.given == (5, 2, 9)
    assert isinstance(build(ModelSettings(name="Bare"), classes=5, code=code, log=LINES.append), nn.Module)
    some = build(ModelSettings(name="Any", options={"depth": 2}), classes=5, code=code, log=LINES.append)
    assert some.given == {"depth": 2}


def test_a_user_function_may_take_num_classes() -> None:
    model = build(ModelSettings(name="usual"), classes=6, code=module_from(CODE), log=LINES.append)
    assert isinstance(model, nn.Linear)
    assert model.out_features == 6


def test_the_user_file_takes_precedence_over_the_libraries() -> None:
    model = build(ModelSettings(name="resnet18"), classes=6, code=module_from(CODE), log=LINES.append)
    assert count(model) == 0


def test_a_recipe_cannot_reach_a_function_that_the_users_file_merely_imports() -> None:
    with pytest.raises(UsageError, match="no model 'system'"):
        build(ModelSettings(name="system"), classes=6, code=module_from(CODE), log=LINES.append)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "Net", "options": {"widht": 3}}, "no option 'widht'; did you mean 'width'"),
        ({"name": "demanding"}, "'depth'.*model.options"),
        ({"name": "wrong"}, "returned str, not a torch.nn.Module"),
        ({"name": "Net", "pretrained": True}, "no weights of its own"),
    ],
)
def test_an_unsuitable_user_model_reports_why(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RelayError, match=words):
        build(ModelSettings.model_validate(settings), classes=6, code=module_from(CODE), log=LINES.append)


def test_an_error_inside_a_user_class_is_not_wrapped() -> None:
    code = module_from("from torch import nn\nclass Net(nn.Module):\n    def __init__(self): raise TypeError('mine')")
    with pytest.raises(TypeError, match="mine"):
        build(ModelSettings(name="Net"), classes=6, code=code, log=LINES.append)


def test_a_model_initialized_from_data_is_recognized_by_its_method() -> None:
    fast = build(ModelSettings(name="fast-cnn"), classes=6, log=LINES.append)
    assert isinstance(fast, InitFromData)
    assert not isinstance(nn.Identity(), InitFromData)


# ------------------------------------------------------------------------------------------------ freezing


def trainable(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def test_freeze_freezes_matching_parameters_except_negated_ones() -> None:
    lines: list[str] = []
    settings = ModelSettings(name="mlp", freeze=["*", "!head.*"])
    model = build(settings, classes=3, channels=4, log=lines.append)
    assert trainable(model) == {"head.weight", "head.bias"}
    assert lines == [f"4 of 6 parameters are frozen ({4 * 256 + 256 + 256 * 256 + 256:,} numbers)"]


def test_freeze_applies_patterns_in_order() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze(model, ["!0.*", "*.bias"])
    assert trainable(model) == {"0.weight", "1.weight"}


def test_a_pattern_that_matches_nothing_or_freezes_all_is_a_usage_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="'weigth' matches no parameter; did you mean 'weight'"):
        freeze(model, ["weigth"])
    with pytest.raises(UsageError, match="nothing to train"):
        freeze(model, ["*"])


# ------------------------------------------------------------------------------------------------ pretrained weights


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PyTorch cache without a network: the proxy's port is closed."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the first one it made, and its proxies
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "")
    return tmp_path


def put_in_cache(torch_home: Path, name: str) -> dict[str, Tensor]:
    """Save a random torchvision model where its published weights would be, and return its weights."""
    from torchvision import models

    torch.manual_seed(11)
    state = models.get_model(name).state_dict()
    path = torch_home / "hub" / "checkpoints" / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return dict(state)


@pytest.mark.parametrize(("name", "head"), [("squeezenet1_1", "classifier.1"), ("shufflenet_v2_x0_5", "fc")])
def test_library_weights_are_loaded_with_a_new_head(torch_home: Path, name: str, head: str) -> None:
    saved = put_in_cache(torch_home, name)
    lines: list[str] = []
    model = build(ModelSettings(name=name, pretrained=True), classes=10, log=lines.append)
    loaded = model.state_dict()
    assert loaded.keys() == saved.keys()
    for key, value in saved.items():
        assert key.startswith(head) or torch.equal(loaded[key], value), key
    assert loaded[f"{head}.weight"].shape[0] == 10
    assert lines == [
        f"loaded {name}'s weights IMAGENET1K_V1",
        f"the head '{head}' is new: 10 classes, 1000 in the weights",
    ]
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_the_librarys_head_is_kept_for_equal_classes_and_replaced_on_request(torch_home: Path) -> None:
    saved = put_in_cache(torch_home, "squeezenet1_1")
    kept = build(ModelSettings(name="squeezenet1_1", pretrained="IMAGENET1K_V1"), classes=1000, log=LINES.append)
    assert torch.equal(kept.state_dict()["classifier.1.weight"], saved["classifier.1.weight"])
    renewed = build(ModelSettings(name="squeezenet1_1", pretrained=True, new_head=True), classes=1000, log=LINES.append)
    assert not torch.equal(renewed.state_dict()["classifier.1.weight"], saved["classifier.1.weight"])


def test_gray_images_give_the_same_output_with_library_weights(torch_home: Path) -> None:
    put_in_cache(torch_home, "squeezenet1_1")
    settings = ModelSettings(name="squeezenet1_1", pretrained=True)
    color = build(settings, classes=1000, log=LINES.append).eval()
    gray = build(settings, classes=1000, channels=1, log=LINES.append).eval()
    images = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(gray(images), color(images.expand(-1, 3, -1, -1)))


def test_a_file_of_code_in_the_librarys_cache_is_refused_and_does_not_run(torch_home: Path) -> None:
    marker = torch_home / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(marker),))

    path = torch_home / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    torch.save({"x": Payload()}, path)
    with pytest.raises(RelayError, match=r"squeezenet1_1-b8a52dc0.pth asks to run .*mkdir"):
        build(ModelSettings(name="squeezenet1_1", pretrained=True), classes=10, log=LINES.append)
    assert not marker.exists()


def test_without_network_the_error_says_where_to_put_the_file(torch_home: Path) -> None:
    with pytest.raises(RelayError, match="squeezenet1_1") as caught:
        build(ModelSettings(name="squeezenet1_1", pretrained=True), classes=10, log=LINES.append)
    text = str(caught.value)
    assert "\n" not in text
    assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth" in text
    assert str(torch_home / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth") in text
    assert not list(torch_home.rglob("*.p*"))  # no half-fetched file is left


def test_a_wrong_weights_name_lists_the_available_ones() -> None:
    with pytest.raises(UsageError, match=r"IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT; did you mean 'IMAGENET1K_V2'"):
        build(ModelSettings(name="resnet50", pretrained="IMAGENET_V2"), classes=10, log=LINES.append)


def test_timm_weights_are_selected_by_the_model_name() -> None:
    with pytest.raises(UsageError, match=r"timm/resnet18\.a1_in1k"):
        build(ModelSettings(name="timm/resnet18", pretrained="a1_in1k"), classes=10, log=LINES.append)


def test_timm_weights_are_loaded_with_a_new_head(tmp_path: Path) -> None:
    saved = build(ModelSettings(name="timm/resnet10t"), classes=1000, log=LINES.append).state_dict()
    torch.save(saved, tmp_path / "w.pth")
    lines: list[str] = []
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}}  # timm's own way to read a local copy
    settings = ModelSettings(name="timm/resnet10t", pretrained=True, options=options)
    loaded = build(settings, classes=10, log=lines.append).state_dict()
    assert loaded.keys() == saved.keys()
    assert all(key.startswith("fc.") or torch.equal(loaded[key], value) for key, value in saved.items())
    assert loaded["fc.weight"].shape == (10, 512)
    assert lines == ["loaded timm's weights of resnet10t", "the head 'fc' is new: 10 classes"]


@pytest.mark.slow  # a process of its own, which imports timm and the hub's client
def test_timm_without_a_network_gives_one_line_with_the_remedy(tmp_path: Path) -> None:
    program = (
        "from torchrelay.models import ModelSettings, build\n"
        "build(ModelSettings(name='timm/resnet18', pretrained=True), classes=10, log=print)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("torchrelay.errors.RelayError: the pretrained weights of 'timm/resnet18' can't be had")
    assert "set model.pretrained to its path" in last
