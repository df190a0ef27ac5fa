"""What Ray is asked for: processors for every rank, and a GPU for each rank of a bundle that runs on GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.bundle.manifest import Manifest
from herdgraph.runtimes.server import ranks as ranks_module
from herdgraph.runtimes.server.cluster_options import ClusterOptions, RankResources
from herdgraph.runtimes.server.ranks import Ranks, require_room
from herdgraph.runtimes.server.replicas import _deployment

GPU = RankResources(4, 1)


@pytest.mark.parametrize(("executor", "provider", "gpus"), [
    ("onnxruntime", "CPUExecutionProvider", 0), ("onnxruntime", "CUDAExecutionProvider", 1),
    ("tensorrt", "tensorrt_rtx", 1),
])
def test_the_manifest_says_who_needs_a_gpu(executor: str, provider: str, gpus: int) -> None:
    manifest = Manifest(target="any", executor=executor, provider=provider, recipe="bf16", config=TINY, graphs={},
                        active_bytes=0, files={})
    assert RankResources.of(manifest, 4) == RankResources(4, gpus)


class Serve:
    """Ray Serve, as far as a deployment is described."""

    def deployment(self, _: type) -> Serve:
        return self

    def options(self, **options: Any) -> dict[str, Any]:
        return options


@pytest.mark.parametrize(("resources", "bundle", "actor"), [
    (GPU, {"CPU": 4, "GPU": 1}, {"num_cpus": 4, "num_gpus": 1}),
    (RankResources(2), {"CPU": 2}, {"num_cpus": 2, "num_gpus": 0}),
])
def test_a_replica_has_a_place_for_every_rank(
    resources: RankResources, bundle: dict[str, float], actor: dict[str, float]
) -> None:
    found = _deployment(Serve(), ClusterOptions(3), [resources] * 2, with_http=False)
    assert (found["placement_group_bundles"], found["ray_actor_options"]) == ([bundle, bundle], actor)
    assert (found["num_replicas"], found["placement_group_strategy"]) == (3, "PACK")


class Ray:
    """Ray, as far as actors are asked for; ``asked`` is what each was to have."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        strategy = SimpleNamespace(PlacementGroupSchedulingStrategy=lambda group, **place: (group, place))
        self.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1", scheduling_strategies=strategy,
                                    get_current_placement_group=lambda: "group")

    def remote(self, _: type) -> Ray:
        return self

    def options(self, **options: Any) -> Any:
        self.asked.append(options)
        called = SimpleNamespace(remote=lambda *_: None)
        return SimpleNamespace(remote=lambda: SimpleNamespace(process=called, serve=called))

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 16.0, "GPU": 2.0}


def test_other_ranks_take_their_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    monkeypatch.setattr(ranks_module, "load_ray", lambda: ray)
    monkeypatch.setattr(ranks_module, "join_as", lambda *_: None)
    Ranks("bundle", 3, ClusterOptions(threads=4), GPU)
    places = [("group", {"placement_group_bundle_index": rank}) for rank in (1, 2)]
    assert ray.asked == [{"num_cpus": 4, "num_gpus": 1, "scheduling_strategy": place} for place in places]


def test_more_gpus_than_the_cluster_has() -> None:
    require_room(Ray(), ClusterOptions(1), 2, GPU)
    with pytest.raises(HerdError, match="2 replicas of 2 x 1 GPUs need 4, the cluster has 2: start fewer replicas"):
        require_room(Ray(), ClusterOptions(2), 2, GPU)
    with pytest.raises(HerdError, match="5 replicas of 2 x 4 CPUs need 40, the cluster has 16"):
        require_room(Ray(), ClusterOptions(5), 2, RankResources(4))
