"""What an export consists of, and how well its files must keep the network's predictions. No torch here."""

FILES = {"safetensors": "model.safetensors", "onnx": "model.onnx", "int8": "model.int8.onnx", "pt2": "model.pt2"}
MIN_AGREEMENT = 90.0  # percent of images; a file that differs on more than one in ten is another classifier
