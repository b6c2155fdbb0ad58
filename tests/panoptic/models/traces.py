"""Numbers that each architecture computes today, which a refactor must not change.

Two kinds of numbers of each case in `CASES`, both in float64: every loss term of every one of twenty training steps,
and digests of what the model makes of a batch. They stand in traces.json, under names of this file's own, so that
renaming a class does not touch them; `record_traces` writes them anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panoptic.distributed import alone
from panoptic.models import (
    DETRConfig,
    EfficientPSConfig,
    EoMTConfig,
    JSISNetConfig,
    Mask2FormerConfig,
    MaskFormerConfig,
    PanopticDeepLabConfig,
    PanopticFCNConfig,
    PanopticFPNConfig,
)
from panoptic.models.base import Outputs, PanopticModel, Prediction
from panoptic.segmentation import Categories, Frame, Sample, collate
from panoptic.training.device import Engine, prepare
from panoptic.training.optim import Optim, build_optimiser
from panoptic.training.step import SkipCounter, train_step
from panoptic.transforms import Augment, generator, training_view
from tests.conftest import draw_segmentation
from tests.support.double import all_in_double
from tests.support.small import SMALL

FILE = Path(__file__).with_name("traces.json")

STEPS = 20

CATEGORIES = Categories(
    names=("person", "sky", "car", "road", "dog"),
    is_thing=(True, False, True, False, True),
    ids=(24, 7, 3, 100, 18),
    colours=((220, 20, 60), (70, 130, 180), (0, 0, 142), (128, 64, 128), (119, 11, 32)),
)

SIZES = ((64, 96), (50, 71))
"""Of the two images that are evaluated; the second is padded."""

OUTPUT_SIZES = ((91, 133), (41, 57))
"""At which their maps are wanted: one is upsampled, the other reduced."""


def _group(config: Any) -> Any:
    """With group norm: batch norm over a dozen values would blow rounding up to per cents within twenty steps."""
    return replace(config, norm="group", backbone=replace(config.backbone, norm="group"))


def _wide_groups(config: Mask2FormerConfig) -> Mask2FormerConfig:
    """Group norm over three channels: over one, whose few cells may be equal, it is all rounding."""
    return replace(config, channels=48)


def _few_regions(config: JSISNetConfig) -> JSISNetConfig:
    """So that a backbone's last stage, run over each of them, takes seconds."""
    return replace(config, detection=replace(config.detection, samples=2, most=6))


_DEEPLAB, _FPN, _FCN = SMALL[PanopticDeepLabConfig], SMALL[PanopticFPNConfig], SMALL[PanopticFCNConfig]
_JSIS, _DETR = SMALL[JSISNetConfig], SMALL[DETRConfig]
_EOMT = SMALL[EoMTConfig]
_MASKFORMER, _MASK2FORMER = SMALL[MaskFormerConfig], SMALL[Mask2FormerConfig]
_ROI = _FPN["batch_norm"].detector

CASES: dict[str, Any] = {
    "deeplab_standalone": _group(_DEEPLAB["standalone"]),
    "deeplab_detectron2": _group(_DEEPLAB["detectron2"]),
    "deeplab_foreground": _DEEPLAB["group_norm_foreground"],
    "fpn_group_norm": _FPN["group_norm"],
    "fpn_other_rules": replace(
        _group(_FPN["batch_norm"]),
        semantic_norm="group",
        detector=replace(_ROI, heads=replace(_ROI.heads, precision="float32")),
    ),
    "fcn_plain": _FCN["plain"],
    "fcn_starred": replace(_FCN["starred"], backbone=_FCN["plain"].backbone),
    "fcn_summed_all_classes": _group(_FCN["summed_all_classes"]),
    "fcn_p2_stuff": _FCN["p2_stuff"],
    "jsis_own_stage": replace(_JSIS["own_stage"], head=replace(_JSIS["own_stage"].head, width=24, mask_channels=24)),
    "jsis_last_stage": _few_regions(_group(_JSIS["last_stage"])),
    "jsis_crop": _JSIS["crop"],
    "detr_panoptic": _DETR["panoptic"],
    "detr_boxes": _DETR["boxes"],
    "detr_dc5_pre_norm": _DETR["dc5_pre_norm"],
    "efficientps": SMALL[EfficientPSConfig]["group_norm"],
    "maskformer_pyramid": _MASKFORMER["pyramid"],
    "maskformer_encoder": _MASKFORMER["encoder"],
    "mask2former_deformable": _wide_groups(_MASK2FORMER["deformable"]),
    "mask2former_pyramid": replace(
        _wide_groups(_MASK2FORMER["pyramid"]), backbone=replace(_MASK2FORMER["pyramid"].backbone, norm="group")
    ),
}

CASES |= {f"eomt_{name}": config for name, config in _EOMT.items()}

CROPS = {"jsis_last_stage": (33, 47)}
"""Size of the training images where the usual one takes too long."""

GAIN = {"fcn_plain": 1.0, "fcn_starred": 1.0}
"""Noise on the weights where the usual one drives positions to 1 - 1e-16, among which rounding picks the peaks."""

STEADY = {"mask2former_deformable": 6, "mask2former_pyramid": 6, "eomt_dinov2": 6, "eomt_dinov3": 6, "eomt_unmasked": 6}
"""How many steps are the same on every processor where rounding is amplified from about the eighth on: Mask2Former
and EoMT attend to cells by the sign of a logit and take their losses at points by their rank."""


def predict(model: PanopticModel, outputs: Outputs, frame: Frame) -> Prediction:
    """The one place of these traces that knows how a model is asked for everything that it makes of its outputs."""
    return model.postprocess(outputs, frame, ("maps", "instances", "semantics", "proposals"))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with so many threads: sums of float64, too, depend on how they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def losses(name: str, steps: int = STEPS) -> dict[str, list[float]]:
    """Every term of every step, and the gradient's norm, by name; on one thread."""
    samples, augment = (
        [drawn(k) for k in range(6)],
        Augment(scale="factor", factors=(0.8, 1.2, 0.2), crop=CROPS.get(name, (49, 63))),
    )
    engine, optim = Engine(), Optim(optimiser="sgd", lr=1e-3, warmup_steps=4, clip_norm=5.0)
    found: dict[str, list[float]] = {}
    with threads(1), all_in_double():
        # a little noise: fresh offsets of deformable layers lie where the gradient jumps
        model = prepare(lively(build(name), 0.04), "cpu", engine).train()
        optimiser, health = build_optimiser(model, optim), SkipCounter()
        for step in range(steps):
            views = [training_view(samples[(2 * step + k) % 6], augment, generator(0, step, k)) for k in range(2)]
            batch = collate(views, model.divisor)
            result = train_step(
                model, optimiser, [batch], step=step, total=steps, optim=optim, engine=engine, health=health
            )
            for term, value in {**result.losses, "grad_norm": result.grad_norm}.items():
                assert value.dtype == torch.float64, f"{name}: {term} is {value.dtype}"
                found.setdefault(term, []).append(float(value))
    assert all(len(values) == steps for values in found.values())
    return found


def digests(name: str, count: int = 1) -> dict[str, dict[str, Any]]:
    """Of what is made of one batch's outputs, and of the truth in their place; on `count` threads.

    The outputs of a model that has learnt nothing hold few segments: the truth brings things, stuff and overlaps.
    """
    samples = [drawn(10 + k, size) for k, size in enumerate(SIZES)]
    with threads(count), torch.inference_mode(), alone(), all_in_double():
        model = lively(build(name), GAIN.get(name, 4.0)).eval()
        images, targets = collate(samples, model.divisor)
        frame = replace(targets.frame, output_sizes=torch.tensor(OUTPUT_SIZES))
        assert frame.sizes.tolist() == [list(size) for size in SIZES]
        outputs = model.network(images, frame)
        swapped = {**outputs, **uneven(model.truth(targets, outputs))}
        return {
            "outputs": digests_of(predict(model, outputs, frame)),
            "truth": digests_of(predict(model, swapped, frame)),
        }


def digests_of(found: Prediction) -> dict[str, Any]:
    """Of maps, instances, class maps and proposals, and how many of each there are in each image."""
    assert [m.segments.shape for m in found.maps] == [m.shape for m in found.semantics] == list(OUTPUT_SIZES)
    scores = [np.zeros(0) if m.scores is None else m.scores for m in found.maps]
    proposals = None if found.proposals is None else [p.cpu().numpy() for p in found.proposals]
    return {
        "maps": digest((m.segments, m.labels, s) for m, s in zip(found.maps, scores, strict=True)),
        "instances": digest(
            (tuple((*mask["size"], _text(mask["counts"])) for mask in i.masks), i.labels, i.scores, i.boxes)
            for i in found.instances
        ),
        "semantics": digest((m,) for m in found.semantics),
        "proposals": None if proposals is None else digest((p,) for p in proposals),
        "counts": {
            "segments": [len(m.labels) for m in found.maps],
            "classes": [len(np.unique(m)) for m in found.semantics],
            "instances": [len(i.labels) for i in found.instances],
            "proposals": None if proposals is None else [len(p) for p in proposals],
        },
    }


def build(name: str) -> PanopticModel:
    """The case's model of seeded weights."""
    torch.manual_seed(0)
    return CASES[name].build(CATEGORIES)


def lively(model: PanopticModel, gain: float) -> PanopticModel:
    """The same model with noise on the weights of its heads, which fresh ones keep too small to find much."""
    noise = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if not name.startswith("backbone."):
            spread = 0.0 if parameter.numel() < 2 else float(parameter.detach().std())
            scale = gain * spread if spread > 1e-6 else gain / 40  # rounding may leave one to equal values
            parameter.data.add_(torch.randn(parameter.shape, generator=noise) * scale)
    return model


def uneven(truth: Outputs) -> Outputs:
    """The truth with a per cent of noise on what is not zero, so that no tie is left for rounding to decide."""
    noise = torch.Generator().manual_seed(2)
    return {
        key: value * (1 + 0.01 * torch.rand(value.shape, generator=noise)) if value.is_floating_point() else value
        for key, value in sorted(truth.items())
    }


def drawn(seed: int, size: tuple[int, int] = (64, 96)) -> Sample:
    """An image whose classes have a colour each, with things, now and then a crowd, and a void corner."""
    rng = np.random.default_rng(seed)
    truth = draw_segmentation(rng, *size, CATEGORIES, things=4, crowd=seed % 3 == 0)
    palette = np.array(CATEGORIES.colours)[np.concatenate([[0], truth.labels])]
    palette[0] = 0
    image = palette[truth.segments] + rng.integers(-20, 20, (*size, 3))
    return Sample(image.clip(0, 255).astype(np.uint8), truth, f"drawn-{seed}")


def digest(images: Any) -> str:
    """SHA-256 of nested arrays, texts and numbers: integers as int64, scores to 6 decimals, boxes to 3."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, str):
            found.update(f"text {len(value)} {value}".encode())
        elif isinstance(value, tuple):
            found.update(f"tuple {len(value)} ".encode())
            for part in value:
                add(part)
        else:
            array = np.asarray(value)
            if array.dtype.kind == "f":
                array = np.rint(array.astype(np.float64) * 1e6 if array.ndim < 2 else array.astype(np.float64) * 1e3)
            found.update(f"array {array.shape} ".encode() + array.astype("<i8").tobytes())

    for image in images:
        add(image)
    return found.hexdigest()


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def measured(name: str) -> dict[str, Any]:
    """Everything that is recorded of a case."""
    return {"losses": losses(name), **digests(name)}


def differences(before: Mapping[str, Any], after: Mapping[str, Any], rtol: float, steps: int = STEPS) -> list[str]:
    """What of a case is not what it was, one a line.

    Args:
        rtol: of the losses, of which those below a hundredth of their term's largest value count as that; 0 = exactly.
        steps: so many of the first are compared.
    """
    lines = []
    old, new = before.get("losses", {}), after["losses"]
    lines += [f"loss {term} is {'new' if term in new else 'gone'}" for term in sorted(old.keys() ^ new.keys())]
    for term in [term for term in old if term in new]:
        pairs = list(zip(old[term], new[term], strict=True))[:steps]
        scale = max(abs(v) for v in old[term])
        moved = [k for k, (a, b) in enumerate(pairs) if a != b and not abs(a - b) <= rtol * max(abs(a), 0.01 * scale)]
        if moved:
            worst = max(moved, key=lambda k: abs(pairs[k][0] - pairs[k][1]))
            first, most = (f"{k} ({pairs[k][0]!r}, now {pairs[k][1]!r})" for k in (moved[0], worst))
            lines.append(f"loss {term} at {len(moved)} of {len(pairs)} steps, first at {first}, most at {most}")
    for kind in ("outputs", "truth"):
        was = before.get(kind, {})
        lines += [
            f"{key} of {kind}" + (f" ({was.get(key)}, now {value})" if key == "counts" else "")
            for key, value in after[kind].items()
            if was.get(key) != value
        ]
    return lines


def recorded() -> dict[str, dict[str, Any]]:
    """The content of traces.json, with the losses as numbers."""
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    for case in content.values():
        case["losses"] = {term: [float.fromhex(v) for v in values] for term, values in case["losses"].items()}
    return content


def write(content: Mapping[str, Mapping[str, Any]]) -> None:
    """Write traces.json; hexadecimal floats keep every bit."""
    plain = {
        name: {**case, "losses": {term: [v.hex() for v in values] for term, values in case["losses"].items()}}
        for name, case in content.items()
    }
    FILE.write_text(json.dumps(plain, indent=1) + "\n")
