"""Class maps: a JSON file that says which classes of a data set (or of a model) become which.

    {"version": 1,
     "classes": [{"name": "vehicle", "from": ["car", "truck", {"name": "train", "set": "cityscapes"}]},
                 {"name": "flat", "thing": false, "from": ["road", "sidewalk"]},
                 {"name": "pole", "thing": true, "from": [{"name": "pole", "split": "components", "min_area": 64}]}],
     "void": ["terrain"], "crowd_to_void": ["person"], "rest": "keep"}

`classes` is the list that results, in its order. Names are compared without regard to case, and to whether words are
parted by blanks, `_` or `-`. A map is resolved against the classes of one set, or of several that are joined: then an
entry applies to every set that has such a class, unless it names its `set`.

`class_mapping` says what happens to the pixels.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Le
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from panoptic.segmentation import SHOWN, Categories, default_colour, flag
from pipelines.cluster import storage
from pipelines.data import class_maps
from pipelines.data.class_mapping import VOID, ClassMapping, Split, SplitKind
from pipelines.data.manifest import readable

Channel = Annotated[int, Ge(0), Le(255)]

THREE_WAYS = (
    '"split": "components" (each connected part an instance), "whole" (one instance an image) or "crowd" (no instances)'
)


@dataclass(frozen=True)
class Entry:
    """A class of the source, by its name or by its id in the data set."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str | None = None
    id: int | None = None
    set: str | None = None
    """The one data set that is meant, where several are joined."""
    split: SplitKind | None = None
    """The way in which a stuff class becomes a thing."""
    min_area: Annotated[int, Ge(1)] | None = None
    """Smallest part, in pixels, of a split into components."""

    def __post_init__(self) -> None:
        if (self.name is None) == (self.id is None):
            raise ValueError("give either name or id")
        if self.min_area is not None and self.split != "components":
            raise ValueError('min_area belongs to "split": "components"')

    def __str__(self) -> str:
        text = f"id {self.id}" if self.name is None else repr(self.name)
        return f"{text} of {self.set}" if self.set else text


def _entry(value: Any) -> Any:
    """A name alone stands for an entry with that name."""
    return {"name": value} if isinstance(value, str) else value


AnyEntry = Annotated[Entry, BeforeValidator(_entry)]


@dataclass(frozen=True)
class TargetClass:
    """A class of the list that results."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"\S")]
    thing: Annotated[bool, BeforeValidator(flag)] | None = None
    """Thing or stuff; that of its sources where it is left out."""
    color: tuple[Channel, Channel, Channel] | None = None
    """Colour; that of its first source where it is left out."""
    sources: Annotated[tuple[AnyEntry, ...] | None, Field(alias="from")] = None
    """Classes of the source that become it; the class of the same name where it is left out."""


@dataclass(frozen=True)
class Content:
    """The content of a class map's file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    version: Literal[1]
    classes: tuple[TargetClass, ...]
    void: tuple[AnyEntry, ...] = ()
    """Classes whose pixels become void."""
    crowd_to_void: tuple[AnyEntry, ...] = ()
    """Classes (of the source, or else of the target) whose crowds become void."""
    rest: Literal["error", "void", "keep"] = "error"
    """The treatment of classes of the source that no entry names: an error, void, or kept."""


_SCHEMA: TypeAdapter[Content] = TypeAdapter(Content)


@dataclass(frozen=True)
class ClassMap:
    """A class map as it was read."""

    content: Content
    file: str
    """Name of the file, for messages."""

    @property
    def digest(self) -> str:
        """A sha256 of what the file says, whatever its name and its blanks."""
        return hashlib.sha256(_SCHEMA.dump_json(self.content)).hexdigest()


KEEP = ClassMap(Content(version=1, classes=(), rest="keep"), "joined by names (--data.class-map says otherwise)")
"""The map that changes nothing: sets that are joined by the names of their classes."""


class ClassesOf(NamedTuple):
    """The classes of one data set, under the name by which a map's `set` means it."""

    name: str
    categories: Categories
    reader: str = ""
    """The format, by which a map's `set` may mean the data set too."""


class Resolved(NamedTuple):
    """A class map on the classes of its sets."""

    mappings: tuple[ClassMapping, ...]
    """One mapping a set, all to the same classes."""
    notes: tuple[str, ...]
    """Lines about what is odd without being wrong."""
    record: dict[str, Any]
    """Record for manifests and models: the classes, and of each set the target of each id (-1 = void), with the sha256
    of these; the names of each set's classes, and what the file says."""


def load(uri: storage.Uri) -> ClassMap:
    """Read a class map: a file, or one of those that are ready (`class_maps`) by its name.

    Raises:
        ValueError: there is none, or it is no JSON, or a field is missing, unknown or of another kind.
    """
    file = storage.absolute(uri)
    if str(uri) in class_maps.NAMES and not storage.exists(file):
        return parse(class_maps.read(str(uri)), str(uri))
    if not storage.exists(file):
        raise ValueError(f"{uri}: no such class map; check the path, or name one of {', '.join(class_maps.NAMES)}")
    return parse(storage.read_bytes(file), str(uri))


def absolute(uri: storage.Uri) -> str:
    """A class map's file as an absolute path; the name of one that is ready stays."""
    file = storage.absolute(uri)
    return str(uri) if str(uri) in class_maps.NAMES and not storage.exists(file) else file


def parse(data: bytes, file: str) -> ClassMap:
    """The class map that the bytes hold; `file` is its name, for messages.

    Raises:
        ValueError: it is no JSON, or a field is missing, unknown or of another kind; in one line.
    """
    try:
        return ClassMap(_SCHEMA.validate_json(data), file)
    except ValidationError as error:
        raise ValueError(f"{file}: {readable(error)}; infra/REFERENCE.md shows the form") from error


def fold(name: str) -> str:
    """A name as names are compared: lower case, words parted by one blank."""
    return " ".join(re.split(r"[\s_-]+", name.lower())).strip()


def resolve(class_map: ClassMap, sets: Sequence[ClassesOf]) -> Resolved:
    """The map of each set's classes to one list.

    Args:
        class_map: what is asked for.
        sets: the classes of the data sets (or of the model); one, or several that are joined.

    Raises:
        ValueError: a class is unknown (near names are named), stands in two places or in none, or changes between thing
            and stuff without a rule; a line for each problem, with the field.
    """
    resolution, file = _Resolution(class_map.content, sets), class_map.file
    if resolution.problems:
        shown = [f"{file}: {problem}" for problem in resolution.problems[:SHOWN]]
        rest = len(resolution.problems) - SHOWN
        raise ValueError("\n".join(shown + [f"{file}: and {rest} more problems"] * (rest > 0)))
    mappings = resolution.mappings()
    notes = (*resolution.notes, *(_absence(one, mapping) for one, mapping in zip(sets, mappings, strict=True)))
    return Resolved(mappings, tuple(filter(None, notes)), _record(class_map, sets, mappings))


def _absence(one: ClassesOf, mapping: ClassMapping) -> str:
    """The note about the target's classes that a set never annotates."""
    if not mapping.absent:
        return ""
    return (
        f"{one.name} annotates no {', '.join(mapping.absent)}: what its images show of it must be void, or is learnt "
        "as another class; predictions of it are not counted there"
    )


def _record(class_map: ClassMap, sets: Sequence[ClassesOf], mappings: Sequence[ClassMapping]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "classes": mappings[0].categories.to_coco(),
        "sets": {
            one.name: {
                "targets": dict(zip(map(str, one.categories.ids), mapping.targets, strict=True)),
                "crowd_to_void": [i for i, yes in zip(one.categories.ids, mapping.crowd_to_void, strict=True) if yes],
                "splits": {
                    str(i): [split.kind, split.min_area]
                    for i, split in zip(one.categories.ids, mapping.splits, strict=True)
                    if split is not None
                },
            }
            for one, mapping in zip(sets, mappings, strict=True)
        },
    }
    names = {one.name: dict(zip(map(str, one.categories.ids), one.categories.names, strict=True)) for one in sets}
    said = _SCHEMA.dump_python(class_map.content, mode="json", by_alias=True, exclude_none=True)
    return {
        **content,
        "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "names": names,
        "content": said,
    }


def from_record(record: Mapping[str, Any], one: ClassesOf) -> ClassMapping:
    """The mapping of a data set's classes that a manifest or a model keeps (`Resolved.record`).

    A set whose classes are those of one that was mapped then is mapped as that was; another by what the file said.

    Args:
        record: of the map.
        one: the data set's classes.

    Raises:
        ValueError: the record is none of this version, or does not tell what becomes of these classes.
    """
    try:
        categories = Categories.from_coco(record["classes"], "class map")
        sets = [(name, record["sets"][name], record["names"][name]) for name in record["sets"]]
        content = _SCHEMA.validate_python({**record["content"]})
        known = [_recorded(stated, names, one.categories, categories) for _, stated, names in sets]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the class map that is stored with the model cannot be read ({type(error).__name__}: {error}); name it "
            "with --data.class-map"
        ) from error
    fitting = {name: mapping for (name, _, _), mapping in zip(sets, known, strict=True) if mapping is not None}
    own = [mapping for name, mapping in fitting.items() if fold(name) in (fold(one.name), fold(one.reader))]
    if own or (fitting and len(set(fitting.values())) == 1):
        return (own or list(fitting.values()))[0]
    if fitting:
        raise ValueError(
            f"the model knows the classes of {', '.join(fitting)}, which are those of {one.name}, and maps them "
            "differently; name the map with --data.class-map"
        )
    if not content.classes:
        raise ValueError(
            f"the model was trained on {', '.join(record['sets'])} joined, none of which has the classes of "
            f"{one.name}; name a map with --data.class-map"
        )
    made = resolve(ClassMap(content, "the class map that is stored with the model"), [one]).mappings[0]
    if (made.categories.names, made.categories.is_thing) != (categories.names, categories.is_thing):
        raise ValueError(
            f"the class map that is stored with the model makes other classes of those of {one.name} than the model "
            "has; name a map with --data.class-map"
        )
    return made


def _recorded(
    stated: Mapping[str, Any], names: Mapping[str, str], own: Categories, target: Categories
) -> ClassMapping | None:
    """The mapping of a recorded set for classes that have its names; None where they have others."""
    ids = {fold(name): number for number, name in names.items()}
    if sorted(ids) != sorted(map(fold, own.names)) or len(ids) != len(own):
        return None
    keys = [ids[fold(name)] for name in own.names]
    crowds = set(map(str, stated["crowd_to_void"]))
    splits = [stated["splits"].get(key) for key in keys]
    targets = tuple(int(stated["targets"][key]) for key in keys)
    if not all(VOID <= k < len(target) for k in targets):
        raise ValueError("a target that is no class")
    return ClassMapping(
        categories=target,
        targets=targets,
        crowd_to_void=tuple(key in crowds for key in keys),
        splits=tuple(None if split is None else Split(split[0], int(split[1])) for split in splits),
    )


class _Place(NamedTuple):
    """A class of a set."""

    set: int
    label: int


@dataclass
class _Target:
    """A class of the result while it is resolved."""

    name: str
    place: str
    """Place of the class in the file, for messages."""
    thing: bool | None = None
    colour: tuple[int, int, int] | None = None
    places: list[_Place] = field(default_factory=list)


class _Resolution:
    """The steps of `resolve`, with what they find."""

    def __init__(self, content: Content, sets: Sequence[ClassesOf]) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._map, self._sets = content, sets
        self._targets: list[_Target] = []
        self._taken: dict[_Place, str] = {}  # the field that names each class
        self._splits: dict[_Place, Split] = {}
        self._crowds: set[_Place] = set()
        self._read_classes()
        self._read_void()
        self._read_crowds()
        self._apply_rest()
        for target in self._targets:
            self._settle_kind(target)
        if not self._targets and not self.problems:
            self.problems.append("classes: none is left; name at least one, or let rest be keep")

    def mappings(self) -> tuple[ClassMapping, ...]:
        """The result, where there is no problem."""
        categories = Categories(
            names=tuple(target.name for target in self._targets),
            is_thing=tuple(bool(target.thing) for target in self._targets),
            ids=tuple(range(len(self._targets))),
            colours=tuple(target.colour or default_colour(k) for k, target in enumerate(self._targets)),
        )
        index = {place: k for k, target in enumerate(self._targets) for place in target.places}
        mappings = []
        for number, one in enumerate(self._sets):
            places = [_Place(number, label) for label in range(len(one.categories))]
            targets = tuple(index.get(place, VOID) for place in places)
            mappings.append(
                ClassMapping(
                    categories=categories,
                    targets=targets,
                    crowd_to_void=tuple(place in self._crowds for place in places),
                    splits=tuple(self._splits.get(place) for place in places),
                )
            )
        return tuple(mappings)

    # The steps

    def _read_classes(self) -> None:
        for k, asked in enumerate(self._map.classes):
            target = _Target(asked.name.strip(), f"classes[{k}] ({asked.name.strip()})", asked.thing, asked.color)
            same = next((one for one in self._targets if fold(one.name) == fold(target.name)), None)
            if same is not None:
                self.problems.append(f"{target.place}: has the name of {same.place}; names must be unique")
            if asked.sources == ():
                self.problems.append(f"{target.place}.from: is empty; name a class, or take this one out")
            entries = (Entry(name=asked.name),) if asked.sources is None else asked.sources
            for j, entry in enumerate(entries):
                name = target.place if asked.sources is None else f"{target.place}.from[{j}]"
                for place in self._take(entry, name):
                    target.places.append(place)
                    self._note_split(place, entry, target, name)
            self._targets.append(target)

    def _note_split(self, place: _Place, entry: Entry, target: _Target, name: str) -> None:
        """Keep the rule of a stuff class that becomes a thing; things need none."""
        if entry.split is None:
            return
        if target.thing is False:
            self.problems.append(f"{name}: split makes things, but the class is stuff; take out split, or thing: false")
        elif not self._is_thing(place):
            self._splits[place] = Split(entry.split, entry.min_area or 1)

    def _read_void(self) -> None:
        for j, entry in enumerate(self._map.void):
            if entry.split is not None:
                self.problems.append(f"void[{j}]: split makes things of a class; one that becomes void takes none")
            for _ in self._take(entry, f"void[{j}]"):
                pass

    def _read_crowds(self) -> None:
        for j, entry in enumerate(self._map.crowd_to_void):
            places = [place for place, _ in self._find(entry)]
            if not places and entry.name is not None and entry.set is None:
                same = (target for target in self._targets if fold(target.name) == fold(entry.name or ""))
                places = [place for target in same for place in target.places]
            if not places:
                self._unknown(entry, f"crowd_to_void[{j}]")
            self._crowds.update(places)

    def _apply_rest(self) -> None:
        """Treat the classes that no entry names as `rest` says."""
        kept: dict[str, _Target] = {}
        for number, one in enumerate(self._sets):
            places = [_Place(number, label) for label in range(len(one.categories))]
            left = [place for place in places if place not in self._taken]
            if left and self._map.rest == "error":
                names = ", ".join(self._name(place) for place in left)
                of = f" of {one.name}" if one.name else ""
                self.problems.append(
                    f"rest: no entry names {names}{of}; add them to a from or to void, or set rest to keep or void"
                )
            for place in left if self._map.rest == "keep" else ():
                self._keep(place, kept)

    def _keep(self, place: _Place, kept: dict[str, _Target]) -> None:
        """Add a class that no entry names to the result, once for all sets that have it."""
        name = self._name(place)
        same = next((one for one in self._targets if fold(one.name) == fold(name)), None)
        if same is None:
            same = kept[fold(name)] = _Target(name, f"class {name}")
            self._targets.append(same)
        elif fold(name) not in kept:
            self.problems.append(
                f"rest: keeps {name} of {self._sets[place.set].name}, and {same.place} has this name; add it to its "
                "from, or to void"
            )
        elif any(place.set == other.set for other in same.places):
            self.problems.append(
                f"rest: {self._sets[place.set].name} has two classes that are named {name}, but for case or signs "
                "between words; name them in classes"
            )
        same.places.append(place)

    def _settle_kind(self, target: _Target) -> None:
        """Settle whether a class of the result is a thing, and its colour."""
        made = {place: self._is_thing(place) or place in self._splits for place in target.places}
        things = [place for place, thing in made.items() if thing]
        stuff = [place for place, thing in made.items() if not thing]
        if target.thing is None and not made:
            if not any(target.place in problem for problem in self.problems):
                self.problems.append(f"{target.place}: has no source here, so say whether it is a thing (thing: true)")
        elif target.thing is None and things and stuff:
            self.problems.append(
                f"{target.place}: {self._list(things)} is thing, {self._list(stuff)} is stuff; either make all of it "
                f'stuff ("thing": false), or things ("thing": true, and for what is stuff {THREE_WAYS})'
            )
        elif target.thing and stuff:
            self.problems.append(
                f"{target.place}: is a thing, but {self._list(stuff)} is stuff; say how it becomes instances: "
                f"{THREE_WAYS}"
            )
        if target.thing is None:
            target.thing = bool(things)
        if not target.thing:
            for place in target.places:
                self._splits.pop(place, None)
        if target.colour is None and target.places:
            first = target.places[0]
            target.colour = self._sets[first.set].categories.colours[first.label]

    # Classes by their names

    def _take(self, entry: Entry, field: str) -> Iterator[_Place]:
        """The classes that an entry means, each of which no other entry may name."""
        if entry.id is not None and entry.set is None and len(self._sets) > 1:
            self.problems.append(f"{field}: an id means another class in each of the sets; add set, or give the name")
            return
        places = list(self._find(entry))
        if not places:
            self._unknown(entry, field)
        for place, exact in places:
            if place in self._taken:
                self.problems.append(
                    f"{field}: {self._list([place])} stands in {self._taken[place]}, too; name each class once"
                )
            elif not exact:
                self.problems.append(
                    f"{field}: {entry} means several classes of {self._sets[place.set].name}; give them by their ids"
                )
            else:
                self._taken[place] = field
                yield place

    def _find(self, entry: Entry) -> Iterator[tuple[_Place, bool]]:
        """The class that an entry means in each set, and whether it alone is meant."""
        for number, one in enumerate(self._sets):
            if entry.set is not None and fold(entry.set) not in (fold(one.name), fold(one.reader)):
                continue
            if entry.id is not None:
                found = [k for k, i in enumerate(one.categories.ids) if i == entry.id]
            else:
                found = [k for k, name in enumerate(one.categories.names) if name == entry.name]
                wanted = fold(entry.name or "")
                found = found or [k for k, name in enumerate(one.categories.names) if fold(name) == wanted]
            if found:
                yield _Place(number, found[0]), len(found) == 1

    def _unknown(self, entry: Entry, field: str) -> None:
        """A problem for an entry that means no class, but a note where it is meant for a set that is not here."""
        sets = [name for one in self._sets for name in (one.name, one.reader) if name]
        if entry.set is not None and fold(entry.set) not in map(fold, sets):
            near = difflib.get_close_matches(entry.set, sets, 1)
            if near:
                self.problems.append(f"{field}: no set is called {entry.set}; is {near[0]} meant?")
            else:
                self.notes.append(f"{field}: is for the set {entry.set}, which is not read here ({', '.join(sets)})")
            return
        here = [one for one in self._sets if entry.set is None or fold(entry.set) in (fold(one.name), fold(one.reader))]
        names = list(dict.fromkeys(name for one in here for name in one.categories.names))
        if entry.id is not None:
            every = [f"{i} {n}" for o in here for i, n in zip(o.categories.ids, o.categories.names, strict=True)]
            self.problems.append(f"{field}: no class has the id {entry.id}; there are {', '.join(every[:20])}")
            return
        folded = {fold(name): name for name in names}
        near = [folded[one] for one in difflib.get_close_matches(fold(entry.name or ""), list(folded), 3)]
        advice = f"is {' or '.join(near)} meant?" if near else f"there are {', '.join(names[:20])}"
        self.problems.append(f"{field}: no class is called {entry.name!r}; {advice}")

    def _is_thing(self, place: _Place) -> bool:
        return self._sets[place.set].categories.is_thing[place.label]

    def _name(self, place: _Place) -> str:
        return self._sets[place.set].categories.names[place.label]

    def _list(self, places: Iterable[_Place]) -> str:
        """Names of classes, with their sets where there are several."""
        several = len(self._sets) > 1
        return ", ".join(f"{self._name(p)} of {self._sets[p.set].name}" if several else self._name(p) for p in places)
