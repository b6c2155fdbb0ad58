"""A model whose predictions are in the classes that a class map makes of its own.

The network, and with it every score, is the model's; the map changes what comes out of post-processing. So a model of
many classes is evaluated on a data set of fewer without being trained again.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from panoptic.models.base import Outputs, PanopticModel, Prediction, Wanted
from panoptic.segmentation import Categories, Frame, Targets
from pipelines.data.class_map import ClassesOf, ClassMap, fold, resolve
from pipelines.data.class_mapping import ClassMapping


class MappedModel(PanopticModel):
    """A model that predicts the target's classes of a class mapping."""

    def __init__(self, model: PanopticModel, mapping: ClassMapping) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.categories = mapping.categories
        self.divisor = model.divisor
        self._mapping = mapping
        self.train(model.training)

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """The outputs of the model's own network."""
        return self.model.network(images, frame)

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """No losses: the truth is in other classes than the outputs of the network.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model under a class map has no losses: its network knows other classes than the truth")

    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """No outputs: the truth is in other classes than those of the network.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model under a class map has no outputs that the truth could take the place of")

    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """The model's prediction, mapped; segments and instances of classes that become void are gone."""
        found, mapping = self.model.postprocess(outputs, frame, want), self._mapping
        return replace(
            found,
            maps=None if found.maps is None else [mapping.segmentation(one) for one in found.maps],
            instances=None if found.instances is None else [mapping.instances(one) for one in found.instances],
            semantics=None if found.semantics is None else [mapping.semantic(one) for one in found.semantics],
        )


def mapping_of(class_map: ClassMap, own: Categories, data: Categories | None) -> ClassMapping:
    """The mapping of a model's classes, in the order of the data's where the two lists have the same classes.

    Args:
        own: the model's classes.
        data: those that its predictions are compared with; None = nothing.

    Raises:
        ValueError: the map does not fit the model's classes, or makes other classes of them than the data has; names
            them.
    """
    mapping = resolve(class_map, [ClassesOf("model", own)]).mappings[0]
    if data is None:
        return mapping
    made = _kinds(mapping.categories)
    wanted = _kinds(data)
    if made != wanted:
        parts = "; ".join(filter(None, (_only("the map", made, wanted), _only("the data", wanted, made))))
        raise ValueError(
            f"{class_map.file}: makes other classes of the model's than the data has; {parts}. "
            "Change the map, or map the data, too (--data.class-map)"
        )
    places = {fold(name): k for k, name in enumerate(data.names)}
    order = [places[fold(name)] for name in mapping.categories.names]
    targets = tuple(target if target < 0 else order[target] for target in mapping.targets)
    return replace(mapping, categories=data, targets=targets)


def _kinds(categories: Categories) -> dict[str, bool]:
    return {fold(name): thing for name, thing in zip(categories.names, categories.is_thing, strict=True)}


def _only(whose: str, own: dict[str, bool], other: dict[str, bool]) -> str:
    """The classes that one list has and the other has not, or of another kind."""
    names = [f"{name} ({'thing' if thing else 'stuff'})" for name, thing in own.items() if other.get(name) != thing]
    if not names:
        return ""
    near = difflib.get_close_matches(names[0].split(" (")[0], list(other), 1)
    return f"only {whose} has {', '.join(names[:20])}" + (f" (the other has {near[0]})" if near else "")
