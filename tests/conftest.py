"""Fixtures that many tests share. Nothing heavy is imported before a test asks for it.

Shapes: H x W pixels, N segments.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from panoptic.segmentation import Categories, Segmentation

ROOT = Path(__file__).resolve().parents[1]

# Ray, MLflow and torch read these while they are imported, and child processes inherit them.
os.environ.update(
    {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # `ray.train.report` blocks for one poll of the controller: 2 s by default.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        # Ray's workers give way to all other programs by default: beside tests that compute they hardly ran.
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Ray's workers import the modules in which the functions sent to them are defined.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
)
# A test must never reach the cluster or the tracking server of the person who runs it.
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
    os.environ.pop(name, None)


SCATTERED = ("test_contract.py", "test_overfit.py", "test_traces.py", "test_devices.py", "test_claimed_cuda.py")
"""Files whose tests run in any process."""


@pytest.hookimpl(wrapper=True)  # before xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Say which tests run in one process when there are several (`make test`).

    All that start or join Ray share a process, so that Ray starts once. They are the longest block and come first, so
    that the processes end together; then files with a Ray of their own. The other tests of a file share its fixtures,
    but for those of `SCATTERED`, which have none and would be a long block too.
    """
    for item in items:
        path = item.path.relative_to(ROOT)
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif path.name not in SCATTERED:
            item.add_marker(pytest.mark.xdist_group(path.as_posix()))
    items.sort(key=lambda item: [name not in getattr(item, "fixturenames", ()) for name in ("ray_cluster", "own_ray")])
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fail a test that starts Ray by itself: with several processes that would be one in each of them."""
    before = ray_runs()
    result = yield
    if ray_runs() and not before and not {"ray_cluster", "own_ray"} & set(getattr(item, "fixturenames", ())):
        pytest.exit(f"{item.nodeid} started Ray: it must ask for the fixture `ray_cluster`", 1)
    return result


def ray_runs() -> bool:
    """True if this process has started or joined a Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("fixtures/pixels")` is that path of the shared reference folder; the test skips where it is missing."""
    root = Path(os.environ.get("PANOPTIC_SHARED") or ROOT.parent / "shared")

    def find(relative: str) -> Path:
        path = root / relative
        if not path.exists():
            pytest.skip(f"no {relative} in ../shared (PANOPTIC_SHARED names another folder)")
        return path

    return find


@pytest.fixture(scope="session")
def fixture_arrays(shared: Callable[[str], Path]) -> Callable[[str], tuple[dict[str, np.ndarray], dict]]:
    """`arrays, meta = fixture_arrays("pdl_a_targets")` of the reference numbers in fixtures/pixels."""

    def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
        with np.load(shared(f"fixtures/pixels/{name}.npz")) as file:
            arrays = {key: file[key] for key in file.files if key != "__meta__"}
            return arrays, json.loads(file["__meta__"].tobytes())

    return load


@pytest.fixture(scope="session")
def fixture_rules(shared: Callable[[str], Path]) -> ModuleType:
    """The module of rules (`fill_value`, `image`, `make_panoptic`, …) that regenerates weights and inputs."""
    import torch

    spec = importlib.util.spec_from_file_location("fixture_rules", shared("fixtures/pixels/fixtures.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    # Its import silences warnings and sets the number of threads, which would reach every later test.
    with warnings.catch_warnings():
        spec.loader.exec_module(module)
    torch.set_num_threads(threads)
    return module


@pytest.fixture
def half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 and float16 are computed as such, also on a CPU that has no instructions for them."""
    from panoptic.layers import precision

    monkeypatch.setattr(precision, "multiplies", lambda device, kind: True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of 4 logical CPUs for the whole session: two workers, their data, one to spare.

    With a dashboard, since Ray Train asks its state API and fills the log with complaints otherwise.
    `ray stop` would end every Ray on the machine, so the session only shuts down its own.
    """
    import ray

    from pipelines.cluster import session

    session.connect(cpus=4, object_store=300_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def own_ray() -> Iterator[Callable[[], None]]:
    """Starts a Ray for one file of slow tests, whose processes know the environment of then. It ends with the file."""
    import ray

    from pipelines.cluster import session

    shared_one = ray.is_initialized()  # of `ray_cluster`, where all tests run in one process

    def start() -> None:
        ray.shutdown()
        session.connect(cpus=4, object_store=300_000_000)

    yield start
    ray.shutdown()
    if shared_one:
        session.connect(cpus=4, object_store=300_000_000)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty MLflow database: the migrations take seconds, a copy milliseconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "template.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_store(mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a fresh MLflow store, also in MLFLOW_TRACKING_URI; nothing of it outlives the test.

    The working directory is the test's own, so that artifacts of a store without a root land there.
    """
    import mlflow

    database = tmp_path / "mlflow.db"
    shutil.copy(mlflow_template, database)
    uri = f"sqlite:///{database}"
    before = {name for name in os.environ if name.startswith("MLFLOW_")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    yield uri
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri("")
    mlflow.set_registry_uri("")
    for name in [name for name in os.environ if name.startswith("MLFLOW_") and name not in before]:
        del os.environ[name]


@pytest.fixture(scope="session")
def scenes16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO-panoptic folder of 16 drawn training scenes and 8 of validation."""
    from pipelines.data.scenes import write_scenes

    root = tmp_path_factory.mktemp("scenes16")
    write_scenes(root, train=16, val=8, seed=7, workers=1)
    return root


@pytest.fixture(scope="session")
def small_categories() -> Categories:
    """Three thing and two stuff classes, interleaved and with sparse ids, so that no index passes by luck."""
    from panoptic.segmentation import Categories

    return Categories(
        names=("person", "sky", "car", "road", "dog"),
        is_thing=(True, False, True, False, True),
        ids=(24, 7, 3, 100, 18),
        colours=((220, 20, 60), (70, 130, 180), (0, 0, 142), (128, 64, 128), (119, 11, 32)),
    )


@pytest.fixture(scope="session")
def random_segmentation() -> Callable[..., Segmentation]:
    """The function `draw_segmentation` below: `random_segmentation(rng, h, w, categories, things=5, …)`."""
    return draw_segmentation


def draw_segmentation(
    rng: np.random.Generator,
    height: int,
    width: int,
    categories: Categories,
    things: int = 5,
    crowd: bool = False,
    void: bool = True,
) -> Segmentation:
    """Bands of stuff under ellipses of things; every segment has a pixel and a stuff class has one segment.

    Args:
        rng: the only source of chance.
        height: H.
        width: W.
        categories: may lack stuff or things.
        things: how many ellipses are drawn; a later one may hide an earlier one.
        crowd: draw one more segment of a thing class that is a crowd.
        void: leave a corner without a segment.
    """
    from panoptic.segmentation import Segmentation

    rows, columns = np.mgrid[0:height, 0:width]
    segments = np.zeros((height, width), np.int32)
    labels: list[int] = []
    stuff = rng.permutation(np.array(categories.stuff, np.int64))
    for k, label in enumerate(stuff):
        segments[k * height // len(stuff) : (k + 1) * height // len(stuff)] = k + 1
        labels.append(int(label))
    is_crowd = [False] * len(labels)
    for k in range((things + crowd) if categories.things else 0):
        row, column = rng.integers(height), rng.integers(width)
        semi = rng.integers(1, max(2, height // 3)), rng.integers(1, max(2, width // 3))
        inside = ((rows - row) / semi[0]) ** 2 + ((columns - column) / semi[1]) ** 2 <= 1
        labels.append(int(rng.choice(np.array(categories.things))))
        is_crowd.append(crowd and k == things)
        segments[inside] = len(labels)
    if void:
        segments[: max(1, height // 6), : max(1, width // 6)] = 0
    present = np.unique(segments[segments > 0])
    table = np.zeros(len(labels) + 1, np.int32)
    table[present] = np.arange(1, len(present) + 1)
    return Segmentation(
        segments=table[segments],
        labels=np.array(labels, np.int64)[present - 1],
        crowd=np.array(is_crowd, bool)[present - 1],
    )


if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
