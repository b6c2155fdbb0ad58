"""Exported graphs beside the models that they were made of: numbers, maps, metadata."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from timm.layers import StdConv2dSame
from timm.layers.conv2d_same import Conv2dSame

from jobs import export
from panoptic import models
from panoptic.export import check_tools, differences, quantise, write
from panoptic.export.graphs import EXAMPLE, Graph, Network, constant_padding
from panoptic.export.writer import trace
from panoptic.metrics.panoptic_quality import QualityCounts, count, quality
from panoptic.models.base import PanopticModel
from panoptic.models.detr.model import DETRConfig
from panoptic.models.jsis_net.model import JSISNetConfig
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.png import decode_image, encode_image
from panoptic.predictor import Predictor
from panoptic.runtime import Runner
from panoptic.runtime import __main__ as runtime
from panoptic.runtime.runner import METADATA, NETWORK
from panoptic.segmentation import Categories
from panoptic.training.checkpoint import save
from panoptic.transforms import Resize
from tests.support.small import SMALL

onnxruntime = pytest.importorskip("onnxruntime")

VIEW = Resize(short=96, longest=160)

TWO_GRAPHS = (DETRConfig, JSISNetConfig)
"""Architectures with a second stage that is a graph of its own, which every change is tried on beside
Panoptic-DeepLab."""

CASES = [
    pytest.param(
        next(iter(SMALL[kind].values())),
        id=kind.__name__,
        marks=pytest.mark.slow if kind in TWO_GRAPHS else pytest.mark.nightly,
    )
    for kind in typing.get_args(models.Architecture)
    if kind is not PanopticDeepLabConfig
]


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Two of different shapes, of soft blobs."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (6, 8, 3), np.uint8), rng.integers(0, 256, (9, 6, 3), np.uint8)]
    return [cv2.resize(image, size) for image, size in zip(small, ((200, 130), (110, 170)), strict=True)]


def build(config: Any, categories: Categories) -> PanopticModel:
    torch.manual_seed(0)
    return config.build(categories).eval()


def compare(model: PanopticModel, folder: Path, photographs: list[np.ndarray]) -> None:
    """Numbers, maps and batches of what was exported beside the model's."""
    worst = differences(model, folder, [(96, 160), (160, 128)])
    assert max(worst.values()) < 1e-4, worst
    runner, predictor = Runner(folder), Predictor(model, VIEW)
    assert runner.categories == model.categories and runner.resize == VIEW
    for photograph in photographs:
        ours, theirs = predictor(photograph), runner(photograph)
        assert theirs.labels.tolist() == ours.labels.tolist()
        assert (theirs.segments == ours.segments).mean() > 0.999  # rounding decides where two are equal
    # of several images at once, the same as of each
    images, place = runner.prepared(photographs[0])
    sizes = np.array([place.size])
    one = runner.graph("network", {"images": images, "sizes": sizes})
    several = runner.graph("network", {"images": images.repeat(3, 0), "sizes": sizes.repeat(3, 0)})
    for name, value in one.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(several[name][2] / scale, value[0] / scale, atol=1e-4)


@pytest.fixture(scope="module")
def deeplab(small_categories: Categories) -> PanopticModel:
    model = build(next(iter(SMALL[PanopticDeepLabConfig].values())), small_categories)
    for module in model.modules():  # its own heads start so near to zero that nothing depends on the image
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return model


@pytest.fixture(scope="module")
def exported(deeplab: PanopticModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Panoptic-DeepLab as ONNX."""
    folder = tmp_path_factory.mktemp("deeplab")
    write(deeplab, VIEW, folder)
    return folder


def test_onnx_runtime_gives_the_models_numbers_and_maps(
    deeplab: PanopticModel, exported: Path, photographs: list[np.ndarray]
) -> None:
    compare(deeplab, exported, photographs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("config", CASES)
def test_every_architecture(
    config: Any,
    small_categories: Categories,
    photographs: list[np.ndarray],
    shared: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model = build(config, small_categories)
    write(model, VIEW, tmp_path)
    compare(model, tmp_path, photographs)
    # PQ of the one map with the other as the truth, over 16 photographs of pedestrians where they are at hand
    files = sorted(shared("data/pedestrians/images/val").glob("*.jpg"))[:16]
    runner, predictor, counts = Runner(tmp_path), Predictor(model, VIEW), QualityCounts.zeros(len(small_categories))
    for file in files:
        counts += count(predictor(file), runner(file), small_categories)
    assert len(files) == 16 and quality(counts, small_categories).all.pq > 99.9


def test_a_photograph_by_the_command(
    exported: Path, photographs: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "out.jpg"
    photo.write_bytes(encode_image(photographs[0]))
    runtime.main([str(exported), str(photo), "--out", str(out)])
    assert decode_image(out.read_bytes(), "out").shape == photographs[0].shape
    *segments, last = capsys.readouterr().out.splitlines()
    assert len(segments) == len(Runner(exported)(photo).labels) and last.startswith(f"{len(segments)} segments in ")
    with pytest.raises(SystemExit) as end:
        runtime.main([str(tmp_path), str(photo)])
    assert end.value.code == 2 and "network.onnx: there is no such file" in capsys.readouterr().err


def test_the_file_says_all_that_a_program_needs(exported: Path, small_categories: Categories) -> None:
    session = onnxruntime.InferenceSession(str(exported / "network.onnx"))
    description = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert description["architecture"] == "PanopticDeepLab" and description["graphs"] == ["network"]
    assert [entry["name"] for entry in description["categories"]] == list(small_categories.names)
    assert description["resize"]["short"] == 96 and description["divisor"] == 1 and description["batch"] == "any"
    assert description["pixels"]["mean"] == [123.675, 116.28, 103.53] and description["merge"]["rule"] == "centres"
    inputs = {entry.name: entry.shape for entry in session.get_inputs()}
    assert list(inputs) == ["images", "sizes"] and inputs["images"][1] == 3 and inputs["sizes"][1] == 2
    assert all(isinstance(inputs["images"][axis], str) for axis in (0, 2, 3)), "batch, height and width are free"
    assert {entry.name for entry in session.get_outputs()} == {"semantic", "centre", "offset"}


def test_int8_weights_keep_the_description(exported: Path, photographs: list[np.ndarray], tmp_path: Path) -> None:
    file = tmp_path / "network.onnx"
    file.write_bytes((exported / "network.onnx").read_bytes())
    quantise(file)
    assert file.stat().st_size < 0.3 * (exported / "network.onnx").stat().st_size
    whole, small = Runner(exported), Runner(tmp_path)
    assert small.description == whole.description
    images, place = whole.prepared(photographs[0])
    inputs = {"images": images, "sizes": np.array([place.size])}
    ours, theirs = whole.graph("network", inputs)["semantic"], small.graph("network", inputs)["semantic"]
    assert 0 < np.abs(ours - theirs).max() < 0.3 * np.abs(ours).max()


def test_a_program_of_torch_by_the_job(
    deeplab: PanopticModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = tmp_path / "checkpoint.pt", tmp_path / "out"
    options = {"resize.short": 96, "resize.longest": 160}
    save(str(checkpoint), config=deeplab.config, model=deeplab, experiment=options)
    files = export.main([str(checkpoint), "--to", "torch", "--out", str(out)])
    assert capsys.readouterr().out.startswith(f"{out}/network.pt2  ")
    extra = {f"{METADATA}.json": ""}
    program = torch.export.load(files["network"], extra_files=extra)
    description = json.loads(extra[f"{METADATA}.json"])
    assert description["architecture"] == "PanopticDeepLab" and description["resize"]["longest"] == 160
    for images_at_once, height, width in ((2, *EXAMPLE), (3, 100, 130)):
        images = torch.randint(0, 256, (images_at_once, 3, height, width), dtype=torch.uint8)
        sizes = torch.tensor([[height - 3, width - 5]] * images_at_once)
        with torch.no_grad():
            ours, theirs = Network(deeplab)(images, sizes), program.module()(images, sizes)
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_package_of_aotinductor(deeplab: PanopticModel, tmp_path: Path) -> None:
    try:
        check_tools("aot")
    except ValueError as error:
        pytest.skip(str(error))
    files = write(deeplab, VIEW, tmp_path, "aot")
    package = torch._inductor.aoti_load_package(str(files["network"]))
    assert json.loads(package.get_metadata()[METADATA])["architecture"] == "PanopticDeepLab"
    images, sizes = torch.randint(0, 256, (2, 3, 128, 160), dtype=torch.uint8), torch.tensor([[120, 150]] * 2)
    with torch.no_grad():
        ours, theirs = Network(deeplab)(images, sizes), package(images, sizes)
    # as a share of the largest value, which is 200 pixels in the offsets: 5e-6 was seen
    apart = {name: float((ours[name] - theirs[name]).abs().max() / ours[name].abs().max()) for name in ours}
    assert max(apart.values()) < 2e-5, apart


def test_missing_tools_are_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def no_compiler() -> typing.NoReturn:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    with pytest.raises(ValueError, match=r"^--to aot: there is no C\+\+ compiler; install g\+\+"):
        check_tools("aot")
    monkeypatch.setattr("panoptic.export.writer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx, onnxscript, onnxruntime not installed; pip install 'panoptic-ray\[ex"):
        check_tools("onnx")


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^--int8: only with --to onnx, not --to torch"):
        export.main(["any.pt", "--to", "torch", "--int8"])
    with pytest.raises(ValueError, match=r"^--out s3://bucket/x: give a folder of this machine"):
        export.main(["any.pt", "--out", "s3://bucket/x"])


class Padded(torch.nn.Module):
    """Convolutions with "SAME" padding, as a model with a canvas of whole cells has them."""

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self.divisor = divisor
        kernels = [(3, 2, 1), (5, 2, 1), (4, 2, 1), (3, 2, 2), (5, 2, 1), (3, 1, 1)]
        self.layers = torch.nn.Sequential(
            *(Conv2dSame(2, 2, size, step, 0, dilation) for size, step, dilation in kernels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_padding_that_follows_from_the_size_is_constant_on_whole_cells() -> None:
    """Of EfficientNets with TensorFlow's padding; tracing their own has no end."""
    torch.manual_seed(0)
    model: Any = Padded(32)
    graph = Graph(NETWORK, model, {"x": torch.randn(1, 2, 64, 96)}, {"x": (2, 3)})
    with constant_padding(model):
        program = trace(graph)
    for height, width in ((64, 96), (128, 160)):
        x = torch.randn(1, 2, height, width)
        assert torch.equal(program.module()(x), model(x))
    with pytest.raises(ValueError, match=r"multiples of 32; model\.divisor is 16"), constant_padding(Padded(16)):  # type: ignore[arg-type]
        pass
    pools: Any = torch.nn.Sequential(StdConv2dSame(2, 2, 3, 2))
    with pytest.raises(ValueError, match="StdConv2dSame of timm cannot be exported"), constant_padding(pools):
        pass


def test_what_cannot_be_traced_is_named() -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"^network: torch\.export refuses it: "):
        trace(Graph("network", Branches(), {"x": torch.ones(3)}))
