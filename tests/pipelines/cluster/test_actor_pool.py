"""Actors: what a pool comes to on a cluster, and items that kill whoever works on them."""

from __future__ import annotations

import pytest

from pipelines.cluster import actor_pool
from pipelines.cluster.actor_pool import Killed, Pool, each, shares_of


def test_threads_do_not_depend_on_the_number_of_actors() -> None:
    """Two threads add up in another order than one: figures would differ in the last bits."""
    for cores, gpus in ((2, 0), (64, 0), (64, 8)):
        assert {shares_of(Pool(n), 100, cores, gpus).threads for n in (-1, 1, 2, 8)} == {1}
        assert {shares_of(Pool(n, threads=3), 100, cores, gpus).threads for n in (-1, 1, 8)} == {3}


def test_one_actor_a_gpu_or_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert shares_of(Pool(), 100, 64, 0)[:3] == (16, 1.0, 0.0)
    assert shares_of(Pool(), 100, 64, 4)[:3] == (4, 1.0, 1.0)
    assert shares_of(Pool(), 3, 64, 4).actors == 3 and shares_of(Pool(), 100, 64, 0, nodes=2).actors == 32
    assert shares_of(Pool(gpu=False), 100, 4, 4)[:3] == (4, 0.5, 0.0)
    assert shares_of(Pool(2), 100, 1, 0)[:3] == (2, 0.25, 0.0)


@pytest.mark.parametrize(("pool", "gpus"), [(Pool(3), 2), (Pool(3, gpu=True), 2), (Pool(2, gpu=True), 0)])
def test_more_actors_than_gpus_are_refused(pool: Pool, gpus: int) -> None:
    """Not moved to CPUs in silence."""
    with pytest.raises(ValueError, match=rf"need {pool.actors} GPUs and the cluster has {gpus}; give --actors"):
        shares_of(pool, 100, 16, gpus)
    assert shares_of(pool, 1, 16, 2).actors == 1  # one item needs no more


def test_an_item_that_kills_every_actor_is_named(ray_cluster: None) -> None:
    from tests.support.dying_actors import deadly

    with pytest.raises(Killed, match=r"^rows 4 to 5: the actor died 2 times.*--actors 0") as caught:
        list(each(deadly, (range(4, 6),), [range(k, k + 2) for k in range(0, 8, 2)], Pool(2, retries=1)))
    assert caught.value.item == range(4, 6)


def test_actors_that_cannot_be_set_up_are_an_end(ray_cluster: None) -> None:
    from tests.support.dying_actors import unbuildable

    with pytest.raises(Killed, match=r"^setting up: the actor died 2 times"):
        list(each(unbuildable, (), [1], Pool(1, retries=1)))


def test_ray_data_takes_actors_with_gpus(ray_cluster: None) -> None:
    """Its checks come before it looks for any."""
    from tests.support.dying_actors import deadly

    dataset = actor_pool._dataset(deadly, (0,), [1, 2], shares_of(Pool(2), 2, 4, 2))
    assert dataset is not None


def test_this_process_takes_the_threads_that_are_asked_for() -> None:
    import torch

    before = torch.get_num_threads()

    def build():
        return lambda item: (item, torch.get_num_threads())

    assert list(each(build, (), [1, 2], Pool(0, threads=before + 1))) == [(1, before + 1), (2, before + 1)]
    assert torch.get_num_threads() == before
