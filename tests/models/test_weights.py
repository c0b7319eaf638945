"""Weights from files: all or nothing, every difference listed, and no code run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from torchrelay.errors import RelayError
from torchrelay.models import ModelSettings, build, load_weights


class Net(nn.Module):
    """Two layers and a norm, small enough to list its differences."""

    def __init__(self, classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, classes)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "blank and ü.pth"])
def test_weights_from_every_file_format_are_bit_equal(tmp_path: Path, name: str) -> None:
    source, target, lines = Net(), Net(), []
    load_weights(target, save(copy_of(source), tmp_path / name), log=lines.append)
    assert equal(target.state_dict(), source.state_dict())
    assert lines == [f"loaded 9 tensors from {tmp_path / name}"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {key.replace("body.", "body._orig_mod."): value for key, value in state.items()},
    ],
)
def test_prefixes_of_other_frameworks_are_stripped(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], dict[str, object]]
) -> None:
    source, target = Net(), Net()
    torch.save(wrap(copy_of(source)), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert equal(target.state_dict(), source.state_dict())


def test_a_submodule_named_module_keeps_its_name(tmp_path: Path) -> None:
    source, target = nn.ModuleDict({"module": nn.Linear(2, 2)}), nn.ModuleDict({"module": nn.Linear(2, 2)})
    load_weights(target, save(copy_of(source), tmp_path / "w.pt"))
    assert equal(target.state_dict(), source.state_dict())


def test_half_precision_weights_are_converted_to_the_models_type(tmp_path: Path) -> None:
    source, target = Net(), Net()
    load_weights(target, save(copy_of(source.half()), tmp_path / "w.safetensors"))
    assert target.body.weight.dtype == torch.float32
    assert torch.equal(target.body.weight, source.body.weight.float())


def test_old_files_without_batch_norms_counter_load(tmp_path: Path) -> None:
    source, target = Net(), Net()
    state = {key: value for key, value in copy_of(source).items() if not key.endswith("num_batches_tracked")}
    load_weights(target, save(state, tmp_path / "w.pt"))
    assert torch.equal(target.fc.weight, source.fc.weight)


# ------------------------------------------------------------------------------------------------ mismatches


def test_a_mismatch_lists_keys_and_shapes_and_leaves_the_model_untouched(tmp_path: Path) -> None:
    state = copy_of(Net(width=5))
    state["extra.weight"] = torch.zeros(7, 2)
    del state["fc.bias"]
    target = Net()
    before = copy_of(target)
    with pytest.raises(RelayError) as caught:
        load_weights(target, save(state, tmp_path / "w.safetensors"))
    text = str(caught.value)
    assert "w.safetensors doesn't fit, nothing was loaded" in text
    assert "1 missing (fc.bias 3)" in text
    assert "1 unexpected (extra.weight 7×2)" in text
    assert "body.weight 5×2 for the model's 4×2" in text
    assert "fc.weight 3×5 for the model's 3×4" in text
    assert "\n" not in text
    assert equal(target.state_dict(), before)


def test_a_long_list_of_differences_is_shortened(tmp_path: Path) -> None:
    target = nn.ModuleList(nn.Linear(1, 1) for _ in range(10))
    with pytest.raises(RelayError, match=r"20 missing \(0\.weight 1×1, .* and 12 more\); 1 unexpected \(x 2\)"):
        load_weights(target, save({"x": torch.zeros(2)}, tmp_path / "w.pt"))


def test_a_head_with_other_classes_requires_new_head(tmp_path: Path) -> None:
    source, target = Net(classes=1000), Net(classes=3)
    path, before, lines = save(copy_of(source), tmp_path / "w.pt"), copy_of(target), []
    with pytest.raises(RelayError, match=r"trained for 1000 classes, and the model has 3: set model\.new_head=true"):
        load_weights(target, path)
    assert equal(target.state_dict(), before)
    load_weights(target, path, new_head=True, log=lines.append)
    assert torch.equal(target.body.weight, source.body.weight)
    assert torch.equal(target.fc.weight, before["fc.weight"])
    assert lines == [f"loaded 7 tensors from {path}; the head 'fc' is new"]


def test_new_head_allows_no_other_difference(tmp_path: Path) -> None:
    with pytest.raises(RelayError, match=r"body\.weight 5×2 for the model's 4×2.*another model's"):
        load_weights(Net(), save(copy_of(Net(width=5, classes=9)), tmp_path / "w.pt"), new_head=True)


def test_a_recipe_loads_weights_with_and_without_a_new_head(tmp_path: Path) -> None:
    source = build(ModelSettings(name="small-cnn"), classes=10, channels=1, image_size=8, log=print)
    path = save(copy_of(source), tmp_path / "w.safetensors")
    settings = ModelSettings(name="small-cnn", pretrained=str(path))
    same = build(settings, classes=10, channels=1, image_size=8, log=print)
    assert equal(same.state_dict(), source.state_dict())
    with pytest.raises(RelayError, match="new_head"):
        build(settings, classes=4, channels=1, image_size=8, log=print)
    settings = settings.model_copy(update={"new_head": True})
    fewer = build(settings, classes=4, channels=1, image_size=8, log=print).state_dict()
    assert torch.equal(fewer["block1.0.weight"], source.state_dict()["block1.0.weight"])
    assert fewer["head.weight"].shape == (4, 64)


def test_a_weights_file_for_a_library_model_follows_the_same_rules(tmp_path: Path) -> None:
    source = build(ModelSettings(name="squeezenet1_1"), classes=1000, log=print)
    path = save(copy_of(source), tmp_path / "w.pth")
    settings = ModelSettings(name="squeezenet1_1", pretrained=str(path))
    with pytest.raises(RelayError, match=r"trained for 1000 classes, and the model has 10: .*new_head"):
        build(settings, classes=10, log=print)
    model = build(settings.model_copy(update={"new_head": True}), classes=10, log=print)
    assert torch.equal(model.state_dict()["features.0.weight"], source.state_dict()["features.0.weight"])


# ------------------------------------------------------------------------------------------------ bad files


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_its_payload_does_not_run(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "w.pt"
    content = {**copy_of(Net()), "payload": Payload(marker)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    target = Net()
    before = copy_of(target)
    with pytest.raises(RelayError, match=r"w\.pt .*refused") as caught:
        load_weights(target, path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert equal(target.state_dict(), before)
    if kind != "plain pickle":
        torch.load(path, weights_only=False)  # the payload is a real one: read without care, it runs
        assert marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_file_is_reported_in_one_line(tmp_path: Path, suffix: str, damage: str) -> None:
    path = save(copy_of(Net()), tmp_path / f"w{suffix}")
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": bytes(range(1, 200))}[damage])
    with pytest.raises(RelayError, match=str(path)) as caught:
        load_weights(Net(), path)
    assert "\n" not in str(caught.value)


def test_a_file_without_weights_is_refused_with_the_accepted_formats(tmp_path: Path) -> None:
    with pytest.raises(RelayError, match="no file of weights at"):
        load_weights(Net(), tmp_path / "absent.pt")
    (tmp_path / "w.onnx").write_bytes(b"")
    with pytest.raises(RelayError, match=r"unknown ending: .*\.safetensors, \.pt, \.pth"):
        load_weights(Net(), tmp_path / "w.onnx")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(RelayError, match="no state dict but Tensor"):
        load_weights(Net(), tmp_path / "tensor.pt")
    torch.save({"epoch": 3, "fc.weight": torch.zeros(2)}, tmp_path / "mixed.pt")
    with pytest.raises(RelayError, match="its 'epoch' is int"):
        load_weights(Net(), tmp_path / "mixed.pt")


def test_a_checkpoint_folder_suggests_the_file_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000010"
    folder.mkdir()
    save(copy_of(Net()), folder / "model.safetensors")
    with pytest.raises(RelayError, match=r"is a folder.*: name .*step-00000010/model\.safetensors"):
        load_weights(Net(), folder)
    load_weights(Net(), folder / "model.safetensors")
