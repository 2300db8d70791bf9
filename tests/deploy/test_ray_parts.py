"""What of the Ray application can be said without Ray: who is listed, how work is shared out, how many engines."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deploy.ray.roster import Roster, Share
from deploy.ray.scaling import EnginesForWork
from deploy.ray.settings import ClusterSettings
from server.device.settings import Contact
from tests.server.house import Clock

HERE = Contact("tcp://10.0.0.7:1", "key")
ROOT = Path(__file__).parents[2]
SHARED: dict[str, Any] = {"video_database": "postgresql://films@db/films", "objects": "s3://films"}


def run(call: Any) -> Any:
    return asyncio.run(call)


def test_an_engine_is_listed_once_it_admits_the_fronts() -> None:
    clock, roster = Clock(), None
    roster = Roster(clock)
    share: Share = run(roster.engine("a", HERE, b""))
    assert run(roster.front("f", {}, "10.0.0.8:9")).engines == {}, "it would refuse who came now"
    run(roster.engine("a", HERE, share.key))
    listing = run(roster.front("f", {}, "10.0.0.8:9"))
    assert listing.engines == {"a": HERE} and listing.keys.public == share.key
    clock.now = 9.0
    run(roster.engine("b", HERE, share.key))
    clock.now = 11.0
    assert run(roster.front("f", {}, "10.0.0.8:9")).engines == {"b": HERE}, "nothing was heard of the other"
    run(roster.engine_leaves("b"))
    assert run(roster.front("f", {}, "10.0.0.8:9")).engines == {}


def test_work_is_the_sum_over_fronts_and_foreign_to_each_what_others_gave() -> None:
    roster = Roster(Clock())
    key = run(roster.engine("a", HERE, b"")).key
    for name in ("a", "b"):
        run(roster.engine(name, HERE, key))
    run(roster.front("left", {"": 3.0, "a": 2.0, "gone": 1.0}, "l:1"))
    assert run(roster.front("right", {"": 0.0, "b": 6.0}, "r:1")).foreign == {"a": 2.0, "b": 0.0}
    assert run(roster.engine("a", HERE, key)).work == 6.0, "half of twelve: what no engine has yet is work too"
    assert run(roster.scraped()) == ["l:1", "r:1"]
    run(roster.front_leaves("right"))
    assert run(roster.engine("a", HERE, key)).work == 3.0


def test_engines_for_work() -> None:
    policy = EnginesForWork(10.0, "work")
    known = SimpleNamespace(aggregated_metrics={"work": {"a": 12.0, "b": 13.0}}, target_num_replicas=2, policy_state={})
    assert policy(known) == (2.5, {}), "Ray rounds up"
    for nothing in (None, {}, {"work": {}}):
        known.aggregated_metrics = nothing
        assert policy(known) == (2, {}), "as it is"


def test_settings_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValidationError, match="no api_keys"):
        ClusterSettings()
    settings = ClusterSettings(api_keys="k", checkpoint="models/mine", max_engines=3)
    told = settings.of_replicas()
    assert told.checkpoint == (tmp_path / "models/mine",) and told.engines == tmp_path / "engines-cache"
    assert told.api_keys[0].get_secret_value() == "k" and not hasattr(told, "max_engines")
    for wrong, reason in (
        ({"devices": "cuda:0,cuda:1"}, "each engine is a replica"),
        ({"build_missing": True}, "run rmd build ahead"),
        ({"stages": "low,high+decode"}, "stages\n.*say pools"),
        ({"pools": "low:1,high:1"}, "pools: no engine has decode"),
        ({"pools": "low+high,decode:1"}, r"pools: 'low\+high' does not say how many"),
        ({"pools": "low+high:0,decode:1"}, "does not say how many"),
        ({"pools": "low+high:1,dekode:1"}, "pools: 'dekode' is no stage"),
        ({"pools": "low+high:1,high+low:1,decode:1"}, "named twice"),
        ({"pools": "low+high:1,decode:1", "max_engines": 3}, "leave min_engines, max_engines out"),
        ({"min_engines": 4}, r"max_engines \(1\) is less than min_engines \(4\)"),
        ({"fronts": 2}, "set video_database .* and objects"),
        ({"fronts": 2, **SHARED, "objects": None}, "set video_database .* and objects"),
        ({"fronts": 2, **SHARED, "video_database": None}, "set video_database .* and objects"),
        ({"fronts": 2, **SHARED, "video_database": "sqlite:////films/jobs"}, "not SQLite"),
    ):
        with pytest.raises(ValidationError, match=reason):
            ClusterSettings(api_keys="k", **wrong)
    assert ClusterSettings(api_keys="k", fronts=2, **SHARED).fronts == 2
    pools = ClusterSettings(api_keys="k", pools="low:1, high+decode:2").engine_pools
    assert pools == {frozenset({"low"}): 1, frozenset({"high", "decode"}): 2}


def test_the_shipped_application_names_settings_that_exist() -> None:
    (application,) = yaml.safe_load((ROOT / "deploy/ray/rmd.yaml").read_text())["applications"]
    assert ClusterSettings.model_validate(application["args"]).max_engines == 4
