"""What a network expects of an image, in words and numbers that go with every exported file."""

RULE = "upright by its EXIF tag, RGB, the largest part around the centre with the shape of the network's images"
RULE += ", brought to that size (bicubic)"


def describe(info: dict) -> dict:
    """What a file made from a run expects and gives, from the run's model.json; as JSON it goes with every file."""
    (height, width), stored = info["image_size"], info.get("stored_size")
    return {
        "input": "images",
        "dtype": "uint8",
        "shape": ["batch", 3, height, width],
        "colours": "RGB",
        "range": [0, 255],
        "image": RULE if stored is None else f"{RULE}: first to {stored} x {stored}, whose centre is cut out",
        "image_size": [height, width],
        "stored_size": stored,
        "mean": list(info["mean"]),
        "std": list(info["std"]),
        "normalisation": "(pixel / 255 - mean) / std, which the .onnx and .pt2 files do themselves; the network that"
        " kd.load builds from model.safetensors takes images already normalised",
        "output": "logits",
        "classes": list(info["classes"]),
    }
