"""Features of a network beside its logits: outputs of named layers, or what enters them."""

import difflib
import threading
from collections.abc import Collection, Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from kd.errors import UserError, require
from kd.models.layout import find_layouts
from kd.types import INPUT, Batch, Outputs


class _OfThread(threading.local):
    """The features of the call that a thread is in; None between its calls. A copy starts without any."""

    features: dict[str, Tensor] | None = None

    def __reduce__(self) -> tuple:
        return _OfThread, ()


class Tap:
    """Runs a network and returns the features of `layers` (dotted module names, or NAME.input) beside its logits.

    The stages of timm's networks come as maps b x c x h x w, whether they output maps or tokens (kd/models/layout.py).
    Its hooks do nothing while others call the network, and several threads may call it at once; without layers it sets
    none. If a layer runs several times, its last output counts. Raises UserError for an unknown layer.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] = ()):
        self.network, self.layers = network, tuple(layers)
        self._here = _OfThread()
        modules = {name: module for name, module in network.named_modules() if name}
        self._layouts = find_layouts(network) if layers else {}
        # Bound methods, not closures: in a deep copy, the copied network's hooks then fill the copied tap.
        self._hooks = [self._hook(layer, modules) for layer in self.layers]

    @property
    def _features(self) -> dict[str, Tensor] | None:
        """Filled by the hooks while this tap runs the network in this thread, else None."""
        return self._here.features

    def _hook(self, layer: str, modules: dict[str, nn.Module]):
        if layer in modules:
            return modules[layer].register_forward_hook(partial(self._store_output, layer))
        module = layer.removesuffix(INPUT)
        if layer == module or module not in modules:
            raise UserError(f"no layer {layer!r}: {list_layers(modules, layer)}")
        return modules[module].register_forward_pre_hook(partial(self._store_input, layer))

    def _store_output(self, layer: str, module: nn.Module, inputs: tuple, output: object) -> None:
        self._store(layer, output)

    def _store_input(self, layer: str, module: nn.Module, inputs: tuple) -> None:
        # len, not bool: torch 2.11 compiles no truth of a tuple.
        require(len(inputs) > 0, f"layer {layer!r}: its module is called with keywords alone; name another layer")
        self._store(layer, inputs[0])

    def _store(self, layer: str, value: object) -> None:
        if self._features is not None:
            require(
                isinstance(value, Tensor),
                f"layer {layer!r}: outputs a {type(value).__name__}, not a tensor; name another layer",
            )
            self._features[layer] = self._as_map(layer, value).clone()  # an in-place ReLU would overwrite it

    def _as_map(self, layer: str, value: Tensor) -> Tensor:
        if layer not in self._layouts:
            return value
        try:
            return self._layouts[layer].to_map(value)
        except ValueError as error:
            raise UserError(f"layer {layer!r}: {error}; name another layer") from error

    def __call__(self, image: Float[Tensor, "b 3 h w"]) -> Outputs:
        self._here.features = features = {}
        try:
            logits = self.network(image)
            missing = [layer for layer in self.layers if layer not in features]
            require(not missing, f"layer {missing and missing[0]!r}: exists but does not run; name another layer")
            return Outputs(logits, {layer: features[layer] for layer in self.layers})
        finally:
            self._here.features = None

    def of_batch(self, batch: Batch) -> Outputs:
        """Outputs for the batch's images, and the logits of its strong view if it has one.

        One forward pass each, so that BatchNorm normalises a view by its own statistics, as in the code of the methods
        with two views; its running statistics are of both. Features are the weak view's.
        """
        outputs = self(batch.image)
        return outputs if batch.strong is None else outputs._replace(strong=self.network(batch.strong))

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for hook in self._hooks:
            hook.remove()


def list_layers(modules: Collection[str], wrong: str = "") -> str:
    """Help for a wrong layer name: the names most like it, or else the network's outermost layers."""
    close = difflib.get_close_matches(wrong, modules, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    outermost = [name for name in modules if "." not in name]
    return f"there are {', '.join(outermost)}, layers inside them (as in {max(modules, key=len)}), and NAME{INPUT}"
