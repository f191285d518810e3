"""Taps; and every method as a module: which parameters get gradients, dtypes under autocast, crd's banks."""

import copy

import pytest
import torch
from torch import nn

from kd.config import METHODS
from kd.config.methods import FeatureFlags
from kd.errors import UserError
from kd.losses import loss_class
from kd.losses.base import Distiller
from kd.losses.crd import Negatives
from kd.models import MODELS, build_model, probe, stages
from kd.models.features import Tap
from kd.types import Pair, Stages
from tests.pairs import LABELS, SAMPLES, SIZE, STAGES, batch_of, build, network, terms_of

FEATURES = [name for name, kind in METHODS.items() if issubclass(kind, FeatureFlags)]
LOGITS = [name for name, kind in METHODS.items() if "standardize" in kind.__dataclass_fields__]
INDEX = torch.arange(12)


def test_a_tap_returns_a_layers_output_from_before_anything_overwrote_it():
    net = network(4)
    image = torch.randn(2, 3, *SIZE)
    logits, features, _ = Tap(net, ("0", "2", "6.input"))(image)
    torch.testing.assert_close(features["0"], net[0](image))
    assert (features["0"] < 0).any(), "the ReLU behind it works in place"
    assert list(features) == ["0", "2", "6.input"]
    torch.testing.assert_close(net[6](features["6.input"]), logits)


def test_a_tap_sets_no_hooks_without_layers_stores_nothing_for_others_and_can_be_removed():
    net = network(4)
    Tap(net)
    assert not any(module._forward_hooks for module in net.modules())
    tap = Tap(net, ("2",))
    net(torch.randn(1, 3, *SIZE))
    assert tap._features is None
    tap.remove()
    assert not any(module._forward_hooks for module in net.modules())


def test_a_deep_copy_of_a_tapped_network_fills_its_own_tap():
    distiller, _ = build("simkd")
    other = copy.deepcopy(distiller)
    image = torch.randn(2, 3, *SIZE)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert other.deployed(image).abs().sum() == other.deployed.classifier.bias.abs().sum() == 0
    assert distiller.tap(image).features["projector"].abs().sum() > 0


@pytest.mark.parametrize(
    ("layer", "words"),
    [("layer5", "did you mean layer"), ("nothing", "there are conv1, bn1, layer1"), ("layer1.input.input", "did you")],
)
def test_a_wrong_layer_is_refused_with_the_existing_ones(layer, words):
    with pytest.raises(UserError, match=words):
        Tap(build_model("resnet8", 5, (8, 8)), (layer,))


def test_layers_that_output_no_tensor_or_never_run_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    net[1].unused = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"layer '1.unused': exists but does not run"):
        Tap(net, ("1.unused",))(torch.randn(1, 3, 8, 8))
    net[1].register_forward_hook(lambda module, inputs, output: (output,))
    with pytest.raises(UserError, match=r"layer '1': outputs a tuple, not a tensor; name another layer"):
        Tap(net, ("1",))(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet101", "resnet152")])
def test_every_model_names_its_maps_and_the_one_pooled_into_its_classifier(name):
    net = build_model(name, 7, (16, 16))
    for parameter in net.parameters():
        if parameter.ndim == 1:  # BatchNorm's too: grey images would leave nothing but zeros
            parameter.data.add_(0.01)
    found = stages(name, net, 7)
    assert len(found.maps) >= 3
    outputs = probe(net, (16, 16), name, (*found.maps, found.pooled, *found.embedding))
    features = outputs.features
    maps, embedding = [features[layer] for layer in found.maps], features[found.embedding[0]].flatten(1)
    assert all(feature.ndim == 4 for feature in maps)
    sides = [feature.shape[2] for feature in maps]
    assert sides == sorted(sides, reverse=True)
    torch.testing.assert_close(features[found.pooled].mean((2, 3)), embedding)
    torch.testing.assert_close(net.get_submodule(found.classifier)(embedding), outputs.logits)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "torchvision/resnet34", "resnet20", "vgg13", "shufflenetv1"])
def test_the_maps_before_their_last_relu_become_the_maps_by_it(name):
    net = build_model(name, 7, (16, 16))
    found = stages(name, net, 7)
    features = Tap(net, (*found.maps, *found.before_relu))(torch.randn(2, 3, 16, 16)).features
    for layer, before in zip(found.maps, found.before_relu, strict=True):
        assert (features[before] < 0).any()
        assert torch.equal(features[before].relu(), features[layer])


def test_a_wide_networks_maps_before_relu_are_after_the_batchnorm_that_they_enter():
    net = build_model("wrn-16-1", 7, (16, 16)).eval()
    found = stages("wrn-16-1", net, 7)
    features = Tap(net, (*found.maps, *found.before_relu, "head"))(torch.randn(2, 3, 16, 16)).features
    for layer, norm in zip(found.maps, (net.layer2[0].bn1, net.layer3[0].bn1, net.head[0]), strict=True):
        assert any(torch.equal(norm(features[layer]), features[before]) for before in found.before_relu)
    assert torch.equal(features["head.0"].relu(), features["head"])


def test_timms_networks_have_their_own_names_for_the_last_relu():
    timm = pytest.importorskip("timm")
    for name in ("resnet34", "resnet50"):
        found = stages(f"timm/{name}", timm.create_model(name, num_classes=7), 7)
        assert {layer.removesuffix(".input") for layer in found.before_relu} <= set(found.modules)


def test_reviewkd_takes_the_teacher_before_its_relu_and_simkd_the_map_that_it_pools():
    config, net = METHODS["reviewkd"](), build_model("resnet8", 5, (8, 8))
    found, wide = stages("resnet8", net, 5), stages("wrn-16-1", build_model("wrn-16-1", 5, (8, 8)), 5)
    maps, before = ("layer1", "layer2", "layer3"), tuple(f"layer{stage}.0.relu.input" for stage in (1, 2, 3))
    assert loss_class(METHODS["reviewkd"]).layers(config, found, found) == ((*maps, "fc.input"), (*before, "fc.input"))
    assert loss_class(METHODS["simkd"]).layers(METHODS["simkd"](), wide, wide) == (("layer3",), ("head",))
    four = found._replace(maps=("layer0", *maps), before_relu=("layer0", *before))
    assert loss_class(METHODS["reviewkd"]).layers(config, found, four) == loss_class(METHODS["reviewkd"]).layers(
        config, found, found
    )


@pytest.mark.parametrize(
    ("method", "student", "teacher", "flags", "layers"),
    [
        ("at", "resnet8", "resnet8", {}, None),
        ("at", "wrn-16-1", "wrn-16-1", {}, (("layer1", "layer2", "layer3"),) * 2),
        ("at", "wrn-16-1", "wrn-16-1", {"student_layers": ("layer1",), "teacher_layers": ("layer1",)}, None),
        ("fitnet", "wrn-16-1", "wrn-16-1", {}, None),
        ("sp", "mobilenetv2", "vgg8", {}, (("layer4",), ("layer4",))),
        ("pkt", "mobilenetv2", "shufflenetv2", {}, None),
        ("simkd", "resnet8", "wrn-16-1", {}, None),
        ("simkd", "shufflenetv2", "resnet8", {}, (("layer3",), ("layer3",))),
        ("kd", "mobilenetv2", "wrn-16-1", {}, None),
    ],
)
def test_a_run_whose_default_layers_changed_has_another_identity(method, student, teacher, flags, layers):
    """An unfinished run of before must not be continued on other layers; all others keep their folders."""
    networks = [build_model(name, 5, (8, 8)) for name in (student, teacher)]
    found = [stages(name, network, 5) for name, network in zip((student, teacher), networks)]
    config, kind = METHODS[method](**flags), loss_class(METHODS[method])
    named = kind.layers(config, *found)
    outputs = [probe(network, (8, 8), "", part) for network, part in zip(networks, named)]
    loss = kind(config, Pair(*outputs, LABELS, *found, networks[1].fc))
    assert loss.identity() == ({"layers": layers} if layers else {})


@pytest.mark.parametrize("name", ["wrn-16-1", "mobilenetv2", "shufflenetv2"])
def test_simkd_drops_what_comes_after_the_students_map(name):
    """Its gradients would be missing (two processes wait for them), and its weights shipped for nothing."""
    student, teacher = build_model(name, 5, (8, 8)), build_model("resnet8", 5, (8, 8))
    found, theirs = stages(name, student, 5), stages("resnet8", teacher, 5)
    config, kind = METHODS["simkd"](), loss_class(METHODS["simkd"])
    layers = kind.layers(config, found, theirs)
    outputs = [probe(network, (8, 8), "", part) for network, part in zip((student, teacher), layers)]
    loss = kind(config, Pair(*outputs, LABELS, found, theirs, teacher.fc))
    distiller = Distiller(student, loss)
    distiller.deployed(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in distiller.deployed.parameters() if p.requires_grad)
    again = kind.rebuild(build_model(name, 5, (8, 8)), loss.recipe)
    assert again.state_dict().keys() == distiller.deployed.state_dict().keys()


def test_different_numbers_of_stages_are_paired_from_the_last():
    config = METHODS["at"]()
    four, three = Stages(("a", "b", "c", "d")), Stages(("x", "y", "z"))
    assert loss_class(METHODS["at"]).layers(config, three, four) == (("x", "y", "z"), ("b", "c", "d"))
    assert loss_class(METHODS["fitnet"]).layers(METHODS["fitnet"](), four, three) == (("c",), ("y",))
    unknown = METHODS["at"](teacher_layers=("p", "q", "r"))
    assert loss_class(METHODS["at"]).layers(unknown, three, Stages()) == (("x", "y", "z"), ("p", "q", "r"))


@pytest.mark.parametrize(
    ("method", "flags", "words"),
    [
        ("at", {"student_layers": ("0",)}, r"student layers \(0\) and teacher layers \(0, 2\) do not pair up"),
        ("at", {"student_layers": ("6",), "teacher_layers": ("6",)}, "layer '6': outputs .*maps, b x c x h x w"),
        ("rkd", {"student_layers": ("0", "2"), "teacher_layers": ("0", "2")}, "compares one layer, and 2 were named"),
        ("fitnet", {"hint_stage": 3}, "--hint-stage 3: there are 2 stages; give 1 to 2"),
        ("sp", {"student_layers": ("9",)}, "no layer '9'"),
        ("simkd", {"teacher_layers": ("0",)}, "does not take the average of 0"),
    ],
)
def test_layers_that_do_not_fit_are_refused_with_the_reason(method, flags, words):
    with pytest.raises(UserError, match=words):
        build(method, **flags)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_all_that_trains(method):
    distiller, teacher = build(method, **({"kd_weight": 0.5} if method in FEATURES else {}))
    batch = batch_of(INDEX, method=method)
    outputs = teacher.of_batch(batch)
    features = {name: feature.requires_grad_() for name, feature in outputs.features.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, terms, measures = distiller(batch, outputs._replace(features=features))
    assert logits.dtype == torch.float32
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())
    assert bool(measures) == (teacher.network is not None)
    assert not any(measure.requires_grad for measure in measures.values())
    assert ("kd" in terms) == (method in (*FEATURES, "kd", "skd"))
    sum(terms.values()).backward()
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("method", LOGITS)
def test_standardised_logits_forget_the_teachers_scale(method):
    distiller, teacher = build(method, standardize=True)
    batch = batch_of(INDEX, method=method)
    outputs = teacher.of_batch(batch)
    scaled = outputs._replace(logits=3 * outputs.logits + 2)
    if outputs.strong is not None:
        scaled = scaled._replace(strong=3 * outputs.strong + 2)
    term = {"mlkd": "instance"}.get(method, method)
    one, other = (distiller(batch, part).terms[term] for part in (outputs, scaled))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["dkd", "rld", "reviewkd"])
def test_the_ramp_rises_with_the_epoch_and_is_then_over(method):
    distiller, teacher = build(method, **({"ramp_epochs": 2.0} if method == "reviewkd" else {}))
    first, second, third = (terms_of(distiller, teacher, batch_of(INDEX, epoch))[method].item() for epoch in (0, 1, 2))
    assert second == pytest.approx(2 * first, rel=1e-5)
    assert third == pytest.approx(second, rel=1e-5)


def test_crd_draws_other_classes_evenly_and_anew_each_epoch():
    negatives = Negatives(LABELS, 64, key=3)
    batches = [batch_of(torch.arange(SAMPLES), epoch) for epoch in range(50)]
    drawn = torch.stack([negatives(batch) for batch in batches])
    assert not (LABELS[drawn] == LABELS[:, None]).any()
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(negatives(batch_of(torch.tensor([5, 9]), 1)), drawn[1][[5, 9]])
    counts = torch.bincount(drawn[:, 0].flatten(), minlength=SAMPLES)[LABELS[0] != LABELS]
    assert (counts.double() / counts.double().mean() - 1).abs().max() < 0.35


def test_crd_updates_the_batchs_rows_of_its_banks_and_sets_its_normalisers_once():
    distiller, teacher = build("crd")
    loss, before = distiller.loss, distiller.loss.banks.clone()
    terms_of(distiller, teacher, batch_of(INDEX))
    z = loss.normalizers.clone()
    assert (z > 0).all()
    changed = (loss.banks != before).any(dim=2)
    assert torch.equal(changed[0], torch.arange(SAMPLES) < 12)
    torch.testing.assert_close(loss.banks[:, :12].norm(dim=2), torch.ones(2, 12))
    terms_of(distiller, teacher, batch_of(INDEX + 12))
    assert torch.equal(loss.normalizers, z)
    assert {"loss.banks", "loss.normalizers"} <= distiller.state_dict().keys()
    assert not any("negatives" in name for name in distiller.state_dict())


def test_the_stages_of_the_test_networks_are_right():
    assert stages("tests.pairs:network", network(4), 5) == Stages((), "6", STAGES.modules)
