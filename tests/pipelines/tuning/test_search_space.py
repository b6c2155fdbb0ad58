"""Expressions of a sweep: what is understood, what is refused and how."""

from __future__ import annotations

import pytest

from pipelines.tuning.search_space import Domain, dry_run, label, parse, probes, short_names


@pytest.mark.parametrize(
    ("expression", "kind", "values"),
    [
        ("grid(0,2,4,5)", "grid", (0, 2, 4, 5)),
        ("choice(adam, adamw)", "choice", ("adam", "adamw")),
        ("choice(panoptic-deeplab-r52-coco,mask2former-r50-coco)", "choice", None),
        ("grid((3,6,9),(6,12,18))", "grid", ((3, 6, 9), (6, 12, 18))),
        ("grid([], ['backbone.*'])", "grid", ((), ("backbone.*",))),
        ("grid(true, False, none)", "grid", (True, False, None)),
        ("uniform(-1, 0.5)", "uniform", (-1, 0.5)),
        ("loguniform(1e-5,1e-3)", "loguniform", (1e-5, 1e-3)),
        ("randint(1, 4)", "randint", (1, 4)),
        ("quniform(100, 1000, 50)", "quniform", (100, 1000, 50)),
        ("1e-3", "grid", (1e-3,)),
        ("res2net50_26w_4s", "grid", ("res2net50_26w_4s",)),
        ("grid('5 2@500')", "grid", ("5 2@500",)),
    ],
)
def test_expressions(expression: str, kind: str, values: tuple | None):
    (domain,) = parse([f"some.path={expression}"]).values()
    expected = values or ("panoptic-deeplab-r52-coco", "mask2former-r50-coco")
    assert (domain.kind, domain.values) == (kind, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "write path=expression"),
        ("=grid(1)", "write path=expression"),
        ("a=__import__('os').system('true')", "is not known"),
        ("a=eval('1')", "'eval' is not known; there are grid, choice"),
        ("a=grid(open('x'))", "neither a number, a name"),
        ("a=grid(1+1)", "neither a number"),
        ("a=grid(x for x in y)", "neither a number"),
        ("a=lambda: 1", "neither a number"),
        ("a=grid(*b)", "neither a number"),
        ("a=grid(1", "is not an expression"),
        ("a=grid()", "takes 1 or more arguments, not 0"),
        ("a=uniform(1)", "uniform takes 2 arguments, not 1"),
        ("a=uniform(low=1,high=2)", "by place, not by name"),
        ("a=uniform(2,1)", "must lie below"),
        ("a=uniform(1,x)", "takes numbers"),
        ("a=uniform(false,true)", "takes numbers"),
        ("a=uniform(0,1e999)", "takes numbers"),
        ("a=loguniform(0,1)", "lower end above 0"),
        ("a=randint(0.5,3)", "whole numbers"),
        ("a=quniform(0,1,2)", "step must be above 0"),
        ("a=quniform(1,9,2)", "both ends must be multiples of the step 2"),
        ("a=grid(1,1)", "stands there twice"),
    ],
)
def test_what_is_refused(text: str, message: str):
    with pytest.raises(ValueError) as refused:
        parse([text])
    assert message in str(refused.value) and repr(text) in str(refused.value)


def test_a_path_may_stand_once_and_hyphens_are_underscores():
    assert list(parse(["optim.warmup-steps=grid(1,2)"])) == ["optim.warmup_steps"]
    with pytest.raises(ValueError, match=r"optim\.lr is given twice"):
        parse(["optim.lr=grid(1,2)", "optim.lr=uniform(1,2)"])


def test_probes_try_every_combination_or_at_least_every_value():
    space = parse(["a=grid(1,2)", "b=choice(x,y,z)", "c=loguniform(1e-4,1)", "d=randint(2,9)"])
    drawn = list(probes(space))
    assert len(drawn) == 2 * 3 * 2 * 2 and {p["d"] for p in drawn} == {2, 8}
    large = parse([f"p{k}=grid({','.join(map(str, range(10)))})" for k in range(4)])
    drawn = list(probes(large))
    assert len(drawn) == 10 and all({p[f"p{k}"] for p in drawn} == set(range(10)) for k in range(4))


def test_drawn_values_are_cleaned_and_clipped():
    whole, fraction = Domain("quniform", (100, 1000, 50)), Domain("quniform", (0.0, 1.0, 0.25))
    assert whole.cleaned(150.0) == 150 and isinstance(whole.cleaned(150.0), int)
    assert fraction.cleaned(0.25) == 0.25 and fraction.clipped(0.6) == 0.5
    assert whole.clipped(1e6) == 1000 and whole.clipped(0) == 100 and whole.clipped(149) == 150
    assert Domain("randint", (1, 4)).clipped(9) == 3
    assert Domain("loguniform", (1e-4, 1e-2)).clipped(1.0) == 1e-2
    assert Domain("choice", ("a",)).clipped("a") == "a"


def test_a_dry_run_names_the_values_that_fail():
    space = parse(["optim.lr=grid(1.0,2.0)", "train.batch=randint(1,8)"])

    def check(probe):
        if probe["optim.lr"] == 2.0:
            raise ValueError("train.batch: too small")

    with pytest.raises(ValueError, match=r"cannot take optim\.lr=2\.0 train\.batch=1: train\.batch: too small"):
        dry_run(space, check)
    assert dry_run(space, lambda probe: None) == 4


def test_names_are_as_short_as_they_can_be():
    paths = ["optim.lr", "model.backbone.freeze", "train.freeze", "preset"]
    names = short_names(paths)
    assert names == {
        "optim.lr": "lr",
        "model.backbone.freeze": "backbone.freeze",
        "train.freeze": "train.freeze",
        "preset": "preset",
    }
    values = {"optim.lr": 0.00031234, "train.freeze": ("backbone.*",), "preset": "a-b"}
    assert label(values, names) == "lr=0.000312 train.freeze=backbone.* preset=a-b"
    assert label({"x": ()}, {}) == "x=()"


def test_the_space_of_tune():
    from ray.tune.search.sample import Categorical, Float, Integer

    from pipelines.tuning.search_space import to_tune

    space = parse(["a=grid(1,2)", "b=choice(x,y)", "c=loguniform(1e-4,1)", "d=randint(2,9)", "e=quniform(2,8,2)"])
    param_space = to_tune(space)
    assert param_space["a"] == {"grid_search": [1, 2]}
    assert [type(param_space[key]) for key in "bcde"] == [Categorical, Float, Integer, Float]
    assert to_tune(space, enumerate_choices=True)["b"] == {"grid_search": ["x", "y"]}
    constants = parse(["a=0.5", "b=grid((1,2))", "c=choice(x)"])  # searchers that draw refuse grids of one value
    assert to_tune(constants) == {"a": 0.5, "b": (1, 2), "c": "x"} == to_tune(constants, enumerate_choices=True)
