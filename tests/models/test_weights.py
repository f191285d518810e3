"""Files of weights as people have them: every tensor ends where it belongs, or the file is refused."""

import argparse
import datetime
import json
import pathlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kd.config.model_args import parse_model_args
from kd.errors import UserError
from kd.models import MODELS, build_model
from kd.models.pretrained import build_pretrained, check_pretrained, is_pretrained, load_pretrained
from kd.models.weights import SUFFIXES, Weights, find_fit, misfit, read_file, read_folder
from tests import checkpoints
from tests.networks import plain

SIZE = (32, 32)
EXPECTS = {"image_size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def weights_of(name: str, classes: int = 7, size: tuple[int, int] = SIZE) -> dict:
    """Random values everywhere, so that no two tensors can be exchanged without a difference."""
    torch.manual_seed(3)
    state = (
        MODELS[name](classes, size).state_dict() if name in MODELS else build_model(name, classes, size).state_dict()
    )
    return {key: torch.rand(value.shape) if value.is_floating_point() else value + 3 for key, value in state.items()}


def shapes_of(name: str, classes: int = 7) -> dict:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in MODELS[name](classes, SIZE).state_dict().items()}


def fitted(given: Weights, name: str) -> dict | None:
    fit = find_fit(given, shapes_of(name))
    return fit and {ours: given.tensors[theirs] for ours, theirs in fit.names.items()}


def expect(path: str, classes: int = 7) -> str:
    names = [f"class {number}" for number in range(classes)]
    Path(path).with_suffix(".json").write_text(json.dumps({**EXPECTS, "classes": names}))
    return path


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("counters", [True, False])
def test_every_network_of_the_zoo_is_matched_in_order(name, counters):
    right = weights_of(name)
    if not counters:
        right = checkpoints.without_counters(right)
    given = Weights(checkpoints.in_other_words(right))
    assert not right.keys() & given.tensors.keys()
    found = fitted(given, name)
    assert found.keys() == right.keys()
    assert all(torch.equal(found[key], right[key]) for key in right)
    count = len(checkpoints.without_counters(right))
    (note,) = find_fit(given, shapes_of(name)).notes
    assert note.startswith(f"matched {count} tensors by order and shape, their names differ (block0.layer.0.")


def test_a_shortcut_by_the_literatures_name():
    right = weights_of("resnet8x4")
    given = Weights(checkpoints.renamed(right, checkpoints.as_downsample))
    found = fitted(given, "resnet8x4")
    assert all(torch.equal(found[key], right[key]) for key in right)
    assert "by order and shape" in find_fit(given, shapes_of("resnet8x4")).notes[0]


def swap(weights: dict, one: str, other: str) -> dict:
    """The same dict with two entries in each other's place."""
    names = [{one: other, other: one}.get(name, name) for name in weights]
    return {name: weights[name] for name in names}


ORDERS = {
    "a bias where a weight should be": lambda right: swap(right, "bn1.weight", "bn1.bias"),
    "a mean where a variance should be": lambda right: swap(right, "bn1.running_mean", "bn1.running_var"),
    "sorted by name": lambda right: dict(sorted(right.items())),
    "backwards": lambda right: dict(reversed(right.items())),
    "two blocks exchanged": lambda right: swap(right, "layer1.0.conv1.weight", "layer1.0.conv2.weight"),
    "one tensor less": lambda right: dict(list(right.items())[:-1]),
    "one tensor more": lambda right: right | {"more.weight": torch.zeros(3)},
}


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_that_is_not_the_networks_is_refused(order):
    right = checkpoints.renamed(ORDERS[order](weights_of("resnet14")), lambda name: f"net0.{name}_".removesuffix("_"))
    assert find_fit(Weights(right), shapes_of("resnet14")) is None


def test_a_name_that_both_have_stands_in_the_same_place():
    right = weights_of("resnet8")
    names = list(right)
    moved = {"layer1.0.bn1.bias": "bn1.bias", "bn1.bias": "first.bias"}  # the file's bn1 is another layer
    given = {moved.get(name, name): right[name] for name in names}
    assert find_fit(Weights(given), shapes_of("resnet8")) is None


def test_a_safetensors_file_has_no_order():
    save_file(checkpoints.in_other_words(weights_of("vgg8")), "big.safetensors")
    found = read_file(Path("big.safetensors"))
    assert find_fit(found, shapes_of("vgg8")) is None
    assert "keeps no order to match them by" in misfit(found, shapes_of("vgg8"))
    save_file({"second.weight": torch.zeros(4, 4), "first.weight": torch.ones(4, 4)}, "small.safetensors")
    assert find_fit(read_file(Path("small.safetensors")), {"in.weight": (4, 4), "out.weight": (4, 4)}) is None


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "_orig_mod.",
        "backbone.",
        "student.",
        "module._orig_mod.",
        "module.model.backbone.",
        "model.student.",
    ],
)
@pytest.mark.parametrize("words", [dict, checkpoints.in_other_words], ids=["our names", "other names"])
def test_wrappers_before_the_names(prefix, words):
    right = weights_of("resnet8")
    found = fitted(Weights(checkpoints.wrapped(words(right), prefix)), "resnet8")
    assert all(torch.equal(found[key], right[key]) for key in right)


def test_a_networks_own_part_of_such_a_name_is_none_of_them():
    right = {"model.weight": torch.rand(3, 2), "model.bias": torch.rand(3)}
    fit = find_fit(Weights(right), {"model.weight": (3, 2), "model.bias": (3,)})
    assert fit.names == {"model.weight": "model.weight", "model.bias": "model.bias"}


def test_a_distillers_student_is_taken_and_said():
    student, teacher = weights_of("resnet8"), weights_of("vgg8")
    both = checkpoints.wrapped(student, "module.student.") | checkpoints.wrapped(teacher, "module.teacher.")
    fit = find_fit(Weights(both), shapes_of("resnet8"))
    assert fit.names["conv1.weight"] == "module.student.conv1.weight"
    assert fit.notes == (
        f"took the weights under 'module.student.', left out {len(teacher)} (module.teacher.stem.0.weight,"
        " module.teacher.stem.0.bias, ...)",
    )
    fit = find_fit(Weights(both), shapes_of("vgg8"))
    assert fit.names["fc.bias"] == "module.teacher.fc.bias"
    twice = checkpoints.wrapped(student, "student.") | checkpoints.wrapped(student, "teacher.")
    with pytest.raises(UserError, match=r"the weights under 'student.', 'teacher.' all fit"):
        find_fit(Weights(twice), shapes_of("resnet8"))


def test_an_averaged_model_of_torch():
    average = torch.optim.swa_utils.AveragedModel(plain(3))
    torch.save({"model_ema": average.state_dict()}, "big.pth")
    found = read_file(Path("big.pth"))
    wanted = {key: tuple(value.shape) for key, value in plain(3).state_dict().items()}
    assert find_fit(found, wanted).names["0.weight"] == "module.0.weight"


def of(value: float) -> dict:
    return {"a.weight": torch.full((2,), value)}


@pytest.mark.parametrize(
    ("content", "value", "words"),
    [
        ({"state_dict": of(1), "epoch": 3}, 1, ""),
        ({"model": of(1), "best_acc": torch.tensor(72.5)}, 1, ""),
        ({"net": of(1), "acc": 72.5}, 1, ""),
        ({"model_state_dict": of(1)}, 1, ""),
        ({"model": {"state_dict": of(1)}}, 1, ""),
        ({"model_ema": of(1), "epoch": 1}, 1, ""),
        ({"model_ema": of(2), "model": of(1)}, 1, "took the weights under 'model', left out 'model_ema'"),
        ({"state_dict": of(1), "state_dict_ema": of(2)}, 1, "under 'state_dict', left out 'state_dict_ema'"),
        ({"student": of(1), "epoch": 2}, 1, "took the weights under 'student'"),
        ({"online": of(1), "ema": of(2)}, 1, "took the weights under 'online', left out 'ema'"),
        (of(1.0) | {"ema": of(2.0)}, 1, "left out the weights under 'ema'"),
        ({"model_ema": of(1), "best_acc": torch.tensor(72.5), "rng": torch.zeros(9, dtype=torch.uint8)}, 1, ""),
        ({"student": of(1), "teacher": of(2), "ema": of(3)}, None, "has weights under 'student', 'teacher'"),
        (of(1) | {"epoch": 3}, 1, "left out 2 (epoch, optimizer) beside the weights: no tensors"),
        (
            {"state_dict": of(1), "model": of(2)},
            None,
            "has weights under 'state_dict', 'model', and no name",
        ),
        ({"student": of(1), "teacher": of(2)}, None, "has weights under 'student', 'teacher'"),
        ({"model": {}, "epoch": 3}, None, "contains no state dict"),
    ],
)
def test_one_clear_choice_among_several_weights(content, value, words):
    torch.save({**content, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}}, "big.pth")
    if value is None:
        with pytest.raises(UserError, match=words):
            read_file(Path("big.pth"))
        return
    found = read_file(Path("big.pth"))
    assert found.tensors["a.weight"].tolist() == [value] * 2
    assert words in " ".join(found.notes)
    assert bool(words) or not [note for note in found.notes if "took" in note]


def beside() -> dict:
    return {
        "args": argparse.Namespace(lr=0.1, data=pathlib.PosixPath("/data"), names=["a"]),
        "best_acc": np.float64(72.5),
        "best_epoch": np.int64(3),
        "history": np.arange(3.0),
        "path": pathlib.PosixPath("/runs/1"),
        "time": datetime.datetime(2026, 1, 2),
    }


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_objects_beside_the_weights_are_not_run(suffix, zipped):
    torch.save({"state_dict": of(1), **beside()}, f"big{suffix}", _use_new_zipfile_serialization=zipped)
    assert read_file(Path(f"big{suffix}")).tensors["a.weight"].tolist() == [1, 1]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_any_other_object_is_named_and_refused(zipped):
    torch.save({"state_dict": of(1), "extra": Bomb()}, "big.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"more than tensors, which is never executed \(.*getattr.*\); save its"
    ) as caught:
        read_file(Path("big.pth"))
    assert not Path("executed").exists()
    assert "\x1b" not in str(caught.value)


def test_a_whole_network_is_named_and_refused():
    torch.save({"model": plain(3)}, "big.pth")
    with pytest.raises(UserError, match=r"never executed \(torch.nn.modules.activation.ReLU, .*\); save its"):
        read_file(Path("big.pth"))


def archive(path: Path) -> None:
    Path("inside.txt").write_text("text")
    with tarfile.open(path, "w") as file:
        file.add("inside.txt")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b""), "has 0 bytes and is damaged, incomplete or of another format"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"), "git lfs pull"),
        (archive, "is an archive of other files"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "damaged, incomplete or of another format"),
    ],
)
def test_what_is_no_file_of_weights(write, words):
    write(Path("big.tar"))
    with pytest.raises(UserError, match=words):
        read_file(Path("big.tar"))


def test_a_file_cut_short():
    torch.save(of(1), "big.pth")
    Path("big.pth").write_bytes(Path("big.pth").read_bytes()[:300])
    with pytest.raises(UserError, match="has 300 bytes and is damaged"):
        read_file(Path("big.pth"))


@pytest.mark.parametrize("name", [*(f"big{suffix}" for suffix in SUFFIXES), "student_best"])
def test_a_file_is_no_run_folder(name):
    Path(name).touch()
    assert is_pretrained(name)
    Path(name).unlink()
    assert is_pretrained(name) == (name != "student_best")
    Path(name).mkdir()
    assert not is_pretrained(name)


def check(path: str, model: str, **how) -> str:
    with pytest.raises(UserError) as caught:
        check_pretrained(path, model, **how)
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    return text


def test_what_does_not_fit_is_counted_and_the_network_that_would_is_named():
    torch.save({"model": checkpoints.in_other_words(weights_of("resnet32x4"))}, expect("big.pth"))
    text = check("big.pth", "resnet20")
    assert "do not fit the network resnet20: of its 107 tensors, 107 missing (conv1.weight, bn1.weight, ...)" in text
    assert "unexpected (block0.layer.0.weight, block0.layer.1.weight, ...)" in text
    assert text.endswith("; they fit resnet32x4: give --teacher-model resnet32x4")
    torch.save(of(1) | {"\x1b[1mred\x1b[0m" * 40: torch.zeros(2)}, "big.pth")
    text = check("big.pth", "resnet20")
    assert "2 unexpected (a.weight, red" in text
    assert text.endswith("name the right one with --teacher-model")


def test_a_last_layer_of_other_classes_is_named():
    torch.save(weights_of("resnet8", 5), expect("big.pth"))
    text = check("big.pth", "resnet8")
    assert "2 of another shape (fc.weight is (5, 64) and not (7, 64), fc.bias is (5,) and not (7,))" in text
    assert text.endswith("its last layer has 5 outputs, and 7 classes are named for it; name all of them")
    check_pretrained("big.pth", "resnet8", new_head=True)


@pytest.mark.parametrize("words", [dict, checkpoints.in_other_words], ids=["our names", "other names"])
def test_a_new_last_layer_needs_no_classes(words, capsys):
    torch.save(words(weights_of("vgg8", 5)), "big.pth")
    Path("big.json").write_text(json.dumps(EXPECTS))
    assert 'list those of its 5 outputs, in order, as "classes" in big.json' in check("big.pth", "vgg8")
    check_pretrained("big.pth", "vgg8", new_head=True)
    assert ("--teacher big.pth: matched " in capsys.readouterr().out) == (words is not dict)


def test_the_outputs_of_a_file_without_order_are_not_guessed():
    weights = {"fc.weight": torch.zeros(7, 64), "layers.0.weight": torch.zeros(256, 64)}  # sorted, as safetensors are
    save_file(weights, "big.safetensors")
    Path("big.json").write_text(json.dumps(EXPECTS))
    assert 'list those, in order, as "classes" in big.json' in check("big.safetensors", "vgg8")


def test_a_missing_json_says_what_weights_do_not_say():
    torch.save(weights_of("vgg8"), "big.pth.tar")
    assert "normalisation they expect, nor the names of their classes in order; write big.pth.json" in check(
        "big.pth.tar", "vgg8"
    )


def test_a_sharded_folder_of_transformers():
    folder, weights = Path("vit"), weights_of("tests.networks:plain")
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["ViTForImageClassification"], "id2label": {str(n): f"c{n}" for n in range(7)}})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    names = list(weights)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, some in parts.items():
        save_file({name: weights[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert is_pretrained("vit")
    assert read_folder(folder).tensors.keys() == weights.keys()
    check_pretrained("vit", "tests.networks:plain")
    text = check("vit", "resnet8")
    assert "is a ViTForImageClassification of Transformers, which does not fit the network resnet8" in text
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "vit: lacks model-00002-of-00002.safetensors of model.safetensors.index.json" in check("vit", "resnet8")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_normalize", False),
        ("do_rescale", False),
        ("rescale_factor", 1 / 127.5),
        ("rescale_factor", "1/255"),
        ("rescale_offset", True),
        ("do_flip_channel_order", True),
        ("include_top", True),
    ],
)
def test_a_folder_whose_images_are_prepared_otherwise_is_refused(key, value):
    Path("vit").mkdir()
    Path("vit/config.json").write_text(json.dumps({"architectures": ["Net"], "id2label": {"0": "a", "1": "b"}}))
    save_file(weights_of("tests.networks:plain", 2), "vit/model.safetensors")
    settings = {"size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    usual = {"do_normalize": True, "do_rescale": True, "rescale_factor": 0.00392156862745098, "rescale_offset": None}
    Path("vit/preprocessor_config.json").write_text(json.dumps(settings | usual))
    check_pretrained("vit", "tests.networks:plain")
    Path("vit/preprocessor_config.json").write_text(json.dumps(settings | usual | {key: value}))
    text = check("vit", "tests.networks:plain")
    assert text.startswith(
        f"vit/preprocessor_config.json: {key} is {json.dumps(value)}, and kd gives every network RGB"
    )
    assert "give --teacher-model module:function" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", "abcdefg"),
        ("classes", dict.fromkeys("abcdefg", 1)),
        ("classes", list(range(7))),
        ("classes", None),
        ("image_size", "32"),
        ("image_size", ["32", "32"]),
        ("image_size", [32.5, 32]),
        ("image_size", 32),
        ("mean", "000"),
        ("std", ["0.5"] * 3),
    ],
)
def test_a_malformed_entry_beside_the_weights_is_named(key, value):
    torch.save(weights_of("resnet8"), "big.pth")
    expects = EXPECTS | {"classes": list("abcdefg")}
    Path("big.json").write_text(json.dumps(expects | {key: value}))
    assert f'big.json: {key} incomplete or malformed; write {{"image_size": [224, 224]' in check("big.pth", "resnet8")
    Path("big.json").write_text(json.dumps(expects))
    check_pretrained("big.pth", "resnet8")


@pytest.mark.timm
@pytest.mark.parametrize("prefix", ["", "timm_model."])
def test_a_folder_of_timm(prefix):
    pytest.importorskip("timm")
    folder, name = Path("net"), "timm/resnet10t"
    folder.mkdir()
    settings = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "resnet10t", "num_classes": 7, "pretrained_cfg": settings, "label_names": list("abcdefg")}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(checkpoints.wrapped(weights_of(name), prefix), folder / "model.safetensors")
    check_pretrained("net", "resnet34")
    plain = load_pretrained("net", "").sha256
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"num_classes": 7, "global_pool": "avg"}}))
    assert load_pretrained("net", "").sha256 == plain, "what timm writes of every network changes none"
    for network, pool in (("regnety_002", "avg"), ("vit_tiny_patch16_224", "token")):
        other = {"architecture": network, "model_args": {"global_pool": pool}}
        (folder / "config.json").write_text(json.dumps(config | other))
        assert load_pretrained("net", "").model_args is None, network
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"img_size": [64, 96]}}))
    assert load_pretrained("net", "").image_size == (64, 96)
    arguments = {"num_classes": 7, "in_chans": 3, "img_size": None, "global_pool": "max", "stem_chs": [8, 16]}
    (folder / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
    found = load_pretrained("net", "resnet34")
    assert parse_model_args(found.model_args) == {"global_pool": "max", "stem_chs": (8, 16)}
    (folder / "config.json").write_text(json.dumps(config | {"model_args": {"global_pool": "max"}}))
    images = torch.randn(2, 3, 32, 32)
    wanted = build_model(name, 7, (32, 32), arguments={"global_pool": "max"}).eval()
    wanted.load_state_dict(weights_of(name))
    torch.testing.assert_close(build_pretrained(load_pretrained("net", ""), "net").eval()(images), wanted(images))
    (folder / "config.json").write_text(json.dumps(config | {"label_names": None}))
    assert 'list those, in order, as "label_names" in net/config.json' in check("net", "resnet34")
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {}}))
    assert "its pretrained_cfg has no input_size, mean and std" in check("net", "resnet34")
