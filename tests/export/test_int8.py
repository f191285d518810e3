"""Int8 files on small graphs built by hand: which layers stay in float32, and that logits do."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kd.errors import UserError
from kd.export.int8 import Quantized, Quantizer, onnx_logits, write_int8
from kd.export.onnx_runtime import OnnxFile, describe

INFO = {"image_size": [1, 1], "mean": [0, 0, 0], "std": [1, 1, 1], "classes": ["a", "b"]}


def write_network(path, weights: list[np.ndarray], scale: float = 1 / 255):
    """Pixels of one point, normalised, through linear layers with a ReLU between each two."""
    values = {"scale": np.float32([scale]), "zero": np.zeros(1, np.float32)}
    values |= {f"network.{number}.weight": np.float32(weight) for number, weight in enumerate(weights)}
    make, last = helper.make_node, len(weights) - 1
    nodes = [
        make("Cast", ["images"], ["cast"], "cast", to=TensorProto.FLOAT),
        make("Mul", ["cast", "scale"], ["mul"], "mul"),
        make("Sub", ["mul", "zero"], ["sub"], "sub"),
        make("Flatten", ["sub"], ["in0"], "flatten"),
    ]
    for number in range(len(weights)):
        output = "logits" if number == last else f"out{number}"
        nodes.append(make("Gemm", [f"in{number}", f"network.{number}.weight"], [output], f"linear{number}", transB=1))
        nodes += [make("Relu", [output], [f"in{number + 1}"], f"relu{number}")] * (number < last)
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, 1, 1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "network", [images], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (200, 3, 1, 1), dtype=np.uint8)


def two_uneven_layers() -> list[np.ndarray]:
    """Layers 1 and 2 exchange values of 1000 and of 1 in one tensor, of which only the small ones count."""
    first = np.eye(3)
    hidden = np.diag([1000.0, 1, 1])
    small = np.float32([[0, 1, 0], [0, 0, 1]])
    return [first, hidden, small, np.eye(2)]


def test_small_logits_beside_large_ones_keep_their_order(tmp_path, images):
    """One image in twenty has logits a thousand times as large; 256 levels over all of them leave the others zero."""
    images[:, 2] = 0
    images[:190, :2] //= 64  # 0 to 3, the others up to 255
    source = write_network(tmp_path / "model.onnx", [np.eye(2, 3)], scale=1.0)
    quantizer = Quantizer(source, images)
    logits = onnx_logits(quantizer.build("all values", ()), images)
    assert quantizer.agreement("all values", ()) == 100
    assert len(np.unique(logits[:190, 0])) == 4
    nodes = quantizer.build("all values", ()).graph.node
    assert [node.op_type for node in nodes if "logits" in node.output] == ["Gemm"]
    assert [node for node in nodes if node.op_type == "QuantizeLinear"]


def test_only_the_layers_that_spoil_predictions_stay_in_float(tmp_path, images, capsys):
    source = write_network(tmp_path / "model.onnx", two_uneven_layers())
    quantizer = Quantizer(source, images)
    assert [layer.name for layer in quantizer.layers] == ["0", "1", "2", "3"]
    assert quantizer.layers[1].nodes == ("linear1", "relu1")
    assert quantizer.agreement("all values", ()) < 60
    done = write_int8(source, tmp_path / "model.int8.onnx", images, describe(INFO), target=95.0)
    assert (done.float_layers, done.layers, done.images) == (("1", "2"), 4, 200)
    assert "2 of 4 layers stay in float32 (1, 2), the others in 8 bits" in done.note("model.int8.onnx")
    assert f"{done.agreement:.2f}% of 200 training images" in done.note("model.int8.onnx")
    written = OnnxFile(tmp_path / "model.int8.onnx")
    agreement = 100 * float((written(images).argmax(axis=1) == quantizer.expected.argmax(axis=1)).mean())
    assert done.agreement == pytest.approx(agreement)
    assert agreement >= 95
    arrays = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "model.int8.onnx").graph.initializer}
    assert [arrays[f"network.{number}.weight"] for number in (1, 2)] == [TensorProto.FLOAT] * 2
    assert [arrays[f"network.{number}.weight_quantized"] for number in (0, 3)] == [TensorProto.INT8] * 2
    assert "not 95%: the layers with the largest error stay in float32" in capsys.readouterr().out


def test_a_note_counts_layers_and_names_a_few():
    note = Quantized("all values", 54, tuple("abcdefgh"), 95.4, 108).note("model.int8.onnx")
    assert "8 of 54 layers stay in float32 (a, b, c, d, e and 3 more), the others in 8 bits" in note


def test_a_layer_ranked_too_high_goes_back_to_8_bits(tmp_path, images, monkeypatch):
    quantizer = Quantizer(write_network(tmp_path / "model.onnx", two_uneven_layers()), images)
    monkeypatch.setattr(quantizer, "error", lambda ranges, number: [9, 5, 4, 0][number])
    plan = quantizer.fewest_float_layers(quantizer.best_ranges(95.0), 95.0)
    assert plan.float_layers == (1, 2)
    assert plan.agreement >= 95


def test_a_sound_network_is_quantised_in_full_without_a_search(tmp_path, images, monkeypatch):
    source = write_network(tmp_path / "model.onnx", [np.eye(3), np.eye(2, 3)])
    monkeypatch.setattr(Quantizer, "fewest_float_layers", lambda *_: pytest.fail("searched"))
    done = write_int8(source, tmp_path / "model.int8.onnx", images, describe(INFO), target=95.0)
    assert (done.ranges, done.float_layers) == ("all values", ())
    assert "all 2 layers in 8 bits" in done.note("model.int8.onnx")


def test_ranges_leave_out_rare_outliers_where_that_keeps_predictions(tmp_path):
    """One image in 4,000 makes a value of 255,000 where all others lie between 0 and 3."""
    images = np.random.default_rng(0).integers(0, 4, (4000, 3, 1, 1), dtype=np.uint8)
    images[:, 2] = 0
    images[0, 2] = 255
    source = write_network(tmp_path / "model.onnx", [np.eye(3), np.diag([1, 1, 1000]), np.eye(2, 3)], scale=1.0)
    quantizer = Quantizer(source, images)
    assert quantizer.agreement("all values", ()) < 70
    done = write_int8(source, tmp_path / "model.int8.onnx", images, describe(INFO), target=95.0)
    assert (done.ranges, done.float_layers) == ("the central 99.9% of values", ())
    assert done.agreement >= 99


def test_a_network_without_a_layer_for_8_bits_is_one_message(tmp_path, images):
    source = write_network(tmp_path / "model.onnx", two_uneven_layers()[1:3])
    with pytest.raises(UserError, match=r"no layer of this network keeps its predictions in 8 bits; leave int8 out"):
        write_int8(source, tmp_path / "model.int8.onnx", images, describe(INFO), target=99.9)
    assert not (tmp_path / "model.int8.onnx").exists()


def test_agreement_is_that_of_metrics(tmp_path, images):
    from kd import metrics

    quantizer = Quantizer(write_network(tmp_path / "model.onnx", two_uneven_layers()), images)
    logits = torch.from_numpy(onnx_logits(quantizer.build("all values", ()), images))
    expected = torch.from_numpy(quantizer.expected)
    assert quantizer.agreement("all values", ()) == metrics.agreement(logits, expected)
