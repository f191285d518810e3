"""Odd files become upright RGB, whatever their mode; resized crops and jitter match torchvision's."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image

from kd.config import DataConfig, ViewConfig
from kd.data import augment, draws, load_data, rows
from kd.data.loader import TrainingImages
from kd.errors import UserError
from kd.models import build_model
from kd.utils.images import crop_and_resize, decode
from tests.data.test_workers import images
from tests.run_scripts import teach

v2 = importlib.import_module("torchvision.transforms.v2")  # kd.models has made it importable

WIDE, HIGH = 24, 16
ORIENTATION = 0x0112  # EXIF's


def scene() -> np.ndarray:
    """A picture whose left half is red and whose upper half is blue, so that its orientation shows."""
    pixels = np.zeros((HIGH, WIDE, 3), np.uint8)
    pixels[:, : WIDE // 2, 0] = 200
    pixels[: HIGH // 2, :, 2] = 220
    return pixels


def odd_files(folder) -> str:
    """An imagefolder of three classes that differ in colour, with files of every kind."""
    source = images(folder, counts=(("train", 12), ("test", 6)))
    picture, grey = Image.fromarray(scene()), Image.fromarray(scene()).convert("L")
    rotated = Image.Exif()
    rotated[ORIENTATION] = 6
    see_through = picture.quantize(8)
    see_through.info["transparency"] = bytes([0, 128, *[255] * 6])
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    odd = {
        "grey.png": (grey, {}),
        "one_bit.png": (grey.convert("1"), {}),
        "palette.gif": (picture.quantize(16), {}),
        "see_through_palette.png": (see_through, {"transparency": see_through.info["transparency"]}),
        "grey_and_alpha.png": (grey.convert("LA"), {}),
        "rgba.png": (picture.convert("RGBA"), {}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "deep.png": (deep, {}),
        "rotated.jpg": (picture, {"exif": rotated, "quality": 100, "subsampling": 0}),
        "large.webp": (picture.resize((240, 160)), {}),
        "thin.bmp": (picture.resize((40, 9)), {}),
    }
    for name, (image, how) in odd.items():
        image.save(folder / "train" / "class 0" / name, **how)
    return source


def stored(path) -> dict:
    return {"bytes": path.read_bytes(), "path": path.name}


def test_a_folder_of_odd_files_trains(tmp_path):
    source = odd_files(tmp_path / "pictures")
    flags = ["--data", source, "--image-size", "12", "--batch-size", "10", "--epochs", "1", "--resized-crop", "0.5"]
    teach(*flags, "--stored-size", "16", "--colour-jitter", "0.2", "--out", "run")
    data = load_data(DataConfig(source=source, image_size=12, stored_size=16, val_fraction=0.0))
    assert data.train.images.shape == (23, 3, 16, 16)
    assert data.size == (12, 12)


def test_the_one_broken_file_among_them_is_named(tmp_path):
    source = odd_files(tmp_path / "pictures")
    (tmp_path / "pictures" / "train" / "class 0" / "see_through_palette.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(
        UserError, match=r"^train row \d+ \(.*see_through_palette.png\): not a readable image \(.*\); repair"
    ):
        load_data(DataConfig(source=source, image_size=12))


def shown(name: str) -> np.ndarray:
    """What a viewer shows for an odd file of the scene, computed independently."""
    colour = scene()
    grey = np.asarray(Image.fromarray(colour).convert("L"))
    if name == "rotated.jpg":  # orientation 6: turn clockwise to view
        colour = np.rot90(colour, -1)
    elif name == "large.webp":
        colour = np.asarray(Image.fromarray(colour).resize((240, 160)))
    elif name == "one_bit.png":
        colour = np.stack([np.asarray(Image.fromarray(grey).convert("1")) * np.uint8(255)] * 3, axis=2)
    elif name in ("grey.png", "grey_and_alpha.png", "deep.png"):
        colour = np.stack([grey] * 3, axis=2)
    return colour.transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("name", "most"),  # levels by which a pixel may differ, in a lossy format or with a small palette
    [
        ("grey.png", 0),
        ("grey_and_alpha.png", 0),
        ("deep.png", 0),
        ("rgba.png", 0),
        ("one_bit.png", 0),
        ("rotated.jpg", 12),
        ("cmyk.jpg", 60),
        ("large.webp", 60),
        ("palette.gif", 3),
        ("see_through_palette.png", 3),
    ],
)
def test_odd_files_decode_to_what_a_viewer_shows(tmp_path, name, most):
    odd_files(tmp_path / "pictures")
    seen = decode(stored(tmp_path / "pictures" / "train" / "class 0" / name), None, "train", 0)
    difference = np.abs(seen.astype(int) - shown(name))
    assert difference.max() <= most
    assert difference.mean() <= most / 4


@pytest.mark.parametrize(
    ("greys", "words"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), "its greys are fractions, whose white is unknown"),
        (np.arange(64, dtype=np.int32) * 4, "its greys are 0 to 252, and white is 65535"),
        (np.arange(64, dtype=np.int32) * 65, "its greys are 0 to 4095"),
        (np.arange(64, dtype=np.int32) - 1000, "its greys are -1000 to -937"),
        (np.arange(64, dtype=np.int32) * 4000, "its greys are 0 to 252000"),
        (np.arange(64, dtype=np.uint16) * 65, "its greys are 0 to 4095"),
    ],
)
def test_greys_whose_white_is_unknown_are_refused_and_named(tmp_path, greys, words):
    Image.fromarray(greys.reshape(8, 8)).save(tmp_path / "odd.tiff")
    with pytest.raises(UserError, match=rf"^val row 7 \(odd.tiff\): not a readable image \({words}"):
        decode(stored(tmp_path / "odd.tiff"), None, "val", 7)


def test_a_black_picture_of_sixteen_bits_is_black(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "night.png")
    assert not decode(stored(tmp_path / "night.png"), None, "train", 0).any()


@pytest.mark.parametrize("size", [22, 224, 299])
def test_the_central_square_lies_within_every_image(size):
    """Rounding once made it larger than the image by a last bit, for one short side in thirty."""
    for short in range(100, 601):
        assert crop_and_resize(Image.new("L", (short, short + 3)), size, size).size == (size, size)


def test_a_picture_that_cannot_be_brought_to_size_is_named(tmp_path, monkeypatch):
    Image.fromarray(scene()).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **how: 1 / 0)
    with pytest.raises(UserError, match=r"^train row 3 \(x.png\): not a readable image.*division by zero"):
        decode(stored(tmp_path / "x.png"), 8, "train", 3)


@pytest.mark.parametrize("form", ["png", "jpg"])
def test_the_central_square_is_brought_to_size(tmp_path, form):
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    path = tmp_path / f"x.{form}"
    small.resize((600, 400), Image.Resampling.BICUBIC).save(path)
    square = Image.open(path).convert("RGB").crop((100, 0, 500, 400))
    wanted = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    seen = decode(stored(path), 32, "train", 0)
    # A JPEG is unpacked at a fraction of its pixels if twice the size is left: the result differs slightly.
    inner = np.s_[:, 2:-2, 2:-2]  # the border includes a little of the pixels beside the square
    assert np.abs(seen.astype(int) - wanted)[inner].mean() < (0.01 if form == "png" else 1.5)


def random_images(count: int, high: int, wide: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, high, wide), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "seen"), [((20, 20), (20, 20)), ((24, 24), (20, 20)), ((18, 26), (18, 26))])
def test_resized_crops_are_torchvisions(size, seen):
    pixels = random_images(50, *size)
    box = draws.draw_boxes(ViewConfig(resized_crop=0.08), size, torch.arange(50), 3, 7)
    crops = augment.resized_crop(pixels, box, seen)
    for image, top, left, high, wide, result in zip(pixels, *(part.tolist() for part in box), crops):
        wanted = v2.functional.resized_crop(image.float(), top, left, high, wide, list(seen), antialias=False)
        assert (result.float() - wanted).abs().max() <= 0.51  # rounded to whole levels


def test_boxes_are_spread_as_torchvisions():
    """Compares mean and deviation of 20,000 boxes' places and sizes with RandomResizedCrop's."""
    size, count = (40, 40), 20_000
    box = draws.draw_boxes(ViewConfig(resized_crop=0.08), size, torch.arange(count), 0, 0)
    assert (box.top >= 0).all()
    assert (box.left >= 0).all()
    assert (box.top + box.height <= 40).all()
    assert (box.left + box.width <= 40).all()
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(40, scale=(0.08, 1.0))
    image = torch.zeros(3, *size)
    drawn = [transform.make_params([image]) for _ in range(4000)]
    for name, actual in box._asdict().items():
        reference = torch.tensor([draw[name] for draw in drawn]).double()
        error = (reference.var() / 4000 + actual.double().var() / count).sqrt()
        assert (actual.double().mean() - reference.mean()).abs() < 5 * error, name
        assert actual.double().std() == pytest.approx(reference.std().item(), rel=0.06), name


def test_an_image_too_long_for_any_box_gives_its_middle():
    box = draws.draw_boxes(ViewConfig(resized_crop=1.0), (10, 100), torch.arange(4), 0, 0)
    assert [part.tolist() for part in box] == [[0] * 4, [43] * 4, [10] * 4, [13] * 4]


def test_jitter_is_torchvisions_brightness_contrast_and_saturation():
    pixels = random_images(20, 9, 7)
    factors = draws.draw_factors(0.6, torch.arange(20), 1, 2)
    assert all(((part >= 0.4) & (part <= 1.6)).all() for part in factors)
    for image, brightness, contrast, saturation, result in zip(pixels, *factors, augment.jitter(pixels, factors)):
        wanted = v2.functional.adjust_brightness(image / 255, brightness.item())
        wanted = v2.functional.adjust_contrast(wanted, contrast.item())
        wanted = v2.functional.adjust_saturation(wanted, saturation.item())
        assert (result - wanted * 255).abs().max() < 0.55


def test_jitter_depends_on_neither_batch_nor_threads():
    """A float sum would round differently with another batch or other threads."""
    pixels = random_images(24, 224, 224)
    factors = draws.draw_factors(0.4, torch.arange(24), 1, 2)
    threads = torch.get_num_threads()
    try:
        together = augment.jitter(pixels, factors)
        torch.set_num_threads(2)
        alone = [
            augment.jitter(pixels[row : row + 1], draws.Factors(*(p[row : row + 1] for p in factors)))
            for row in range(24)
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("config", [ViewConfig(resized_crop=0.08), ViewConfig(colour_jitter=0.4), ViewConfig()])
def test_a_view_depends_on_seed_number_and_index_alone(tmp_path, config):
    data = load_data(DataConfig(source=images(tmp_path / "x"), image_size=12, stored_size=16))
    training = TrainingImages(data, config, 0, torch.device("cpu"))
    (whole, *_), *_ = training.augmented([torch.arange(30)], 4)
    parts = [torch.tensor([7, 3]), torch.tensor([29, 3, 0])]
    torch.manual_seed(99)  # must not matter
    for index, (image, *_) in zip(parts, training.augmented(parts, 4)):
        assert torch.equal(image, whole[index])
    (other, *_), *_ = training.augmented([torch.arange(30)], 5)
    assert not torch.equal(other, whole)
    assert whole.shape == (30, 3, 12, 12)


def test_scoring_sees_the_centre():
    pixels = random_images(2, 16, 16)
    assert torch.equal(rows.centre_crop(pixels, (12, 12)), pixels[:, :, 2:14, 2:14])
    assert torch.equal(rows.centre_crop(pixels, (16, 16)), pixels)
    with pytest.raises(UserError, match="images of 16 x 16 pixels have no centre of 17 x 16; give --image-size N"):
        rows.centre_crop(pixels, (16, 17))


def test_large_images_get_imagenets_stem():
    small, large = (build_model("resnet18", 10, (size, size)) for size in (64, 65))
    assert (small.conv1.kernel_size, type(small.maxpool).__name__) == ((3, 3), "Identity")
    assert (large.conv1.kernel_size, large.conv1.stride, type(large.maxpool).__name__) == ((7, 7), (2, 2), "MaxPool2d")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"stored_size": 32}, "--stored-size 32: give --image-size too"),
        ({"stored_size": 32, "image_size": 40}, "--stored-size 32: give --image-size too, at most 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(**flags))


@pytest.mark.parametrize("flags", [{"resized_crop": 1.5}, {"colour_jitter": -0.1}])
def test_shares_beyond_one_are_refused(flags):
    with pytest.raises(UserError, match="give a share from 0 to 1"):
        ViewConfig(**flags).check()
