import difflib
from collections.abc import Collection, Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from kd.errors import UserError, require
from kd.types import INPUT, Outputs


class Tap:
    """A network that gives `layers` (dotted module names, or NAME.input) beside its logits.

    Works by hooks, which do nothing while the network is called by others; without layers there are none. A layer that
    runs several times gives its last output. Raises UserError for a name that is not there.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] = ()):
        self.network, self.layers = network, tuple(layers)
        self._seen: dict[str, Tensor] | None = None  # not None while this tap is being asked
        modules = {name: module for name, module in network.named_modules() if name}
        # Bound methods rather than closures: a deep copy of the network then fills its own copy of the tap.
        self._hooks = [self._hook(layer, modules) for layer in self.layers]

    def _hook(self, layer: str, modules: dict[str, nn.Module]):
        if layer in modules:
            return modules[layer].register_forward_hook(partial(self._keep_output, layer))
        module = layer.removesuffix(INPUT)
        if layer == module or module not in modules:
            raise UserError(f"no layer {layer!r}: {list_layers(modules, layer)}")
        return modules[module].register_forward_pre_hook(partial(self._keep_input, layer))

    def _keep_output(self, layer: str, module: nn.Module, inputs: tuple, output: object) -> None:
        self._keep(layer, output)

    def _keep_input(self, layer: str, module: nn.Module, inputs: tuple) -> None:
        self._keep(layer, inputs[0])

    def _keep(self, layer: str, value: object) -> None:
        if self._seen is not None:
            require(isinstance(value, Tensor), f"layer {layer!r} gives a {type(value).__name__}, not a tensor")
            self._seen[layer] = value.clone()  # a ReLU that works in place would overwrite it

    def __call__(self, image: Float[Tensor, "b 3 h w"]) -> Outputs:
        self._seen = {}
        try:
            logits = self.network(image)
            missing = [layer for layer in self.layers if layer not in self._seen]
            require(not missing, f"layer {missing and missing[0]!r} is there and does not run; tap another")
            return Outputs(logits, {layer: self._seen[layer] for layer in self.layers})
        finally:
            self._seen = None

    def remove(self) -> None:
        """Take the hooks off the network."""
        for hook in self._hooks:
            hook.remove()


def list_layers(modules: Collection[str], wrong: str = "") -> str:
    """Which layers a network has: those like a wrong name, else all that are not inside another one."""
    close = difflib.get_close_matches(wrong, modules, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    top = [name for name in modules if "." not in name]
    return f"there are {', '.join(top)}, what is inside them (as in {max(modules, key=len)}), and NAME{INPUT}"
