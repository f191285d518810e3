"""Quantise a float32 ONNX file to 8-bit arithmetic without losing the network's predictions.

The file is compared with its float32 source on the calibration images. If it agrees with it on too few of them, ranges
without the outermost values are tried; then the layers with the largest error stay in float32, as few as it takes.
"""

import copy
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8

from kd.errors import require
from kd.export.onnx_files import errors_as_messages, normalisation_nodes, save_onnx
from kd.metrics import agreement

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # one of them begins a layer; what follows belongs to it
RANGES = {"all values": None, "the central 99.9% of values": 99.9}  # a wide range leaves small values few levels
BATCH = 64  # does not change the result
HISTOGRAM_BATCH = 8  # all of its intermediate values are in memory at once
NAMED = 5  # layers in a note; export.json has all
RANKING_IMAGES = 128  # enough to rank layers by error


class Layer(NamedTuple):
    name: str
    nodes: tuple[str, ...]


class Quantized(NamedTuple):
    """How an int8 file was made, and how well it keeps its source's predictions."""

    ranges: str  # a key of RANGES
    layers: int
    float_layers: tuple[str, ...]
    agreement: float  # percent of the calibration images
    images: int

    def note(self, file: str) -> str:
        """One sentence for the table and the model card."""
        layers = f"all {self.layers} layers in 8 bits"
        if self.float_layers:
            names = ", ".join(self.float_layers[:NAMED])
            names += f" and {len(self.float_layers) - NAMED} more" * (len(self.float_layers) > NAMED)
            layers = f"{len(self.float_layers)} of {self.layers} layers stay in float32 ({names}), the others in 8 bits"
        return (
            f"{file}: {layers}, its ranges from {self.ranges}; it agrees with its float32 source"
            f" on {self.agreement:.2f}% of {self.images} training images."
        )


class Plan(NamedTuple):
    ranges: str
    float_layers: tuple[int, ...]
    agreement: float  # percent of the calibration images


def write_int8(
    source: Path, path: Path, images: UInt8[np.ndarray, "n 3 h w"], preprocessing: dict, target: float
) -> Quantized:
    """Quantise the float32 file `source`; the training images `images` set its ranges.

    It agrees with `source` on `target` percent of them, if need be with some layers in float32.
    Weights are signed with one scale per channel and 7 bits, activations unsigned with 8 bits, logits in float32.
    x86 processors without VNNI add pairs of 8-bit products in 16 bits, where full 8-bit weights overflow silently; with
    7 bits the file gives the same result on every processor (onnxruntime's quantisation guide: "reduce_range"). On such
    a processor a resnet8 agrees with its float32 file on 96.5% of 2,000 CIFAR-100 images with 7 bits, and on 83.2% with
    8. Raises: UserError if the file cannot be made, or no layer can be quantised.
    """
    with errors_as_messages(path.name):
        network = Quantizer(source, images)
        plan = network.best_ranges(target)
    if plan.agreement < target:
        print(
            f"  agrees with {source.name} on {plan.agreement:.2f}% of {len(images)} training images, not {target:g}%:"
            " the layers with the largest error stay in float32",
            flush=True,
        )
        with errors_as_messages(path.name):
            plan = network.fewest_float_layers(plan, target)
    names = tuple(network.layers[number].name for number in plan.float_layers)
    require(
        not names or len(names) < len(network.layers),
        f"{path.name}: no layer of this network keeps its predictions in 8 bits; leave int8 out of --formats, or give a"
        " lower --min-agreement",
    )
    with errors_as_messages(path.name):
        save_onnx(network.build(plan.ranges, plan.float_layers), path, preprocessing)
    return Quantized(plan.ranges, len(network.layers), names, plan.agreement, len(images))


class Quantizer:
    """A float32 network and its calibration images; builds its int8 models, and compares them with it."""

    def __init__(self, source: Path, images: UInt8[np.ndarray, "n 3 h w"]):
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.images = images
        self.kinds = sorted({*QDQRegistry, *QLinearOpsRegistry})  # operations that can be quantised
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            self.model = load_model_with_shape_infer(prepared)
        self.normalisation = normalisation_nodes(self.model.graph)
        self.layers = self._layers()
        self.expected = onnx_logits(self.model, images)
        self._ranges = {}

    def _layers(self) -> list[Layer]:
        """The network's layers in order: a convolution or linear layer and the operations up to the next one."""
        names, nodes = [], [[]]
        for node in self.model.graph.node:
            if node.op_type not in self.kinds or node.name in self.normalisation:
                continue
            if node.op_type in WEIGHTED:
                nodes += [[]] * bool(names)  # what comes before the first layer belongs to it
                weights = {tensor.name for tensor in self.model.graph.initializer}.intersection(node.input[1:2])
                names.append(next(iter(weights), node.name).removeprefix("network.").removesuffix(".weight"))
            nodes[-1] = [*nodes[-1], node.name]
        return [Layer(name, tuple(group)) for name, group in zip(names, nodes)]

    def best_ranges(self, target: float) -> Plan:
        """Every layer in 8 bits, over the first of RANGES that reach `target`, or the best."""
        plans = []
        for ranges in RANGES:
            plans.append(Plan(ranges, (), self.agreement(ranges, ())))
            if plans[-1].agreement >= target:
                return plans[-1]
        return max(plans, key=lambda plan: plan.agreement)

    def fewest_float_layers(self, plan: Plan, target: float) -> Plan:
        """As few layers in float32 as reach `target`: the worst by error, less those that turn out to be unneeded."""
        errors = [self.error(plan.ranges, number) for number in range(len(self.layers))]
        worst = sorted(range(len(errors)), key=lambda number: -errors[number])
        low, high = 1, len(worst)  # with all of them in float32 nothing differs
        while low < high:
            middle = (low + high) // 2
            if self.agreement(plan.ranges, worst[:middle]) >= target:
                high = middle
            else:
                low = middle + 1
        kept = worst[:high]
        for number in reversed(worst[:high]):
            fewer = [other for other in kept if other != number]
            if fewer and self.agreement(plan.ranges, fewer) >= target:
                kept = fewer
        return Plan(plan.ranges, tuple(sorted(kept)), self.agreement(plan.ranges, kept))

    def agreement(self, ranges: str, float_layers: tuple[int, ...] | list[int]) -> float:
        """Percent of the calibration images on which the int8 model predicts what the float32 network does."""
        logits = onnx_logits(self.build(ranges, float_layers), self.images)
        return agreement(torch.from_numpy(logits), torch.from_numpy(self.expected))

    def error(self, ranges: str, number: int) -> float:
        """Error of the logits with one layer in 8 bits, relative to each image's logits, averaged over images."""
        others = [other for other in range(len(self.layers)) if other != number]
        expected = self.expected[:RANKING_IMAGES]
        gap = onnx_logits(self.build(ranges, others), self.images[:RANKING_IMAGES]) - expected
        sizes = np.maximum(np.linalg.norm(expected, axis=1), np.finfo(np.float32).tiny)
        return float((np.linalg.norm(gap, axis=1) / sizes).mean())

    def build(self, ranges: str, float_layers: tuple[int, ...] | list[int]):
        """The int8 model with these layers in float32."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        if ranges not in self._ranges:
            self._ranges[ranges] = self._calibrate(RANGES[ranges])
        excluded = [name for number in float_layers for name in self.layers[number].nodes]
        quantizer = QDQQuantizer(
            copy.deepcopy(self.model),
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges[ranges],
            nodes_to_quantize=[],
            nodes_to_exclude=[*self.normalisation, *excluded],
            op_types_to_quantize=self.kinds,
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        model = quantizer.model.model
        _keep_logits_in_float(model.graph)
        return model

    def _calibrate(self, percentile: float | None):
        """Each tensor's range on the calibration images: all of it, or the central `percentile` percent of values."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        method, options, size = CalibrationMethod.MinMax, {}, BATCH
        if percentile is not None:
            method, options = CalibrationMethod.Percentile, {"percentile": percentile, "symmetric": False}
            size = HISTOGRAM_BATCH
        with tempfile.TemporaryDirectory() as folder:
            path, augmented = Path(folder) / "prepared.onnx", str(Path(folder) / "augmented.onnx")
            onnx.save(self.model, path)
            calibrator = create_calibrator(path, self.kinds, augmented, method, extra_options=options)
            for start in range(0, len(self.images), size):  # one at a time: a histogram takes equal shapes only
                calibrator.collect_data(_one_batch(self.images[start : start + size]))
            return calibrator.compute_data()


def onnx_logits(model, images: UInt8[np.ndarray, "n 3 h w"]) -> Float[np.ndarray, "n k"]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    starts = range(0, len(images), BATCH)
    return np.concatenate([session.run(["logits"], {"images": images[start : start + BATCH]})[0] for start in starts])


def _keep_logits_in_float(graph) -> None:
    """Undo the rounding of the output. It gains nothing, and where images differ much in the size of their logits, the
    smaller ones would all become zero."""
    made_by = {output: node for node in graph.node for output in node.output}
    dequantize = made_by["logits"]
    quantize = made_by.get(dequantize.input[0])
    exact = made_by.get(quantize.input[0]) if quantize is not None else None
    if dequantize.op_type != "DequantizeLinear" or exact is None:
        return
    for node in (dequantize, quantize):
        graph.node.remove(node)
    name = quantize.input[0]
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = ["logits" if other == name else other for other in names]


def _one_batch(images: UInt8[np.ndarray, "b 3 h w"]):
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self._batches = iter([{"images": images}])

        def get_next(self) -> dict | None:
            return next(self._batches, None)

    return Reader()
