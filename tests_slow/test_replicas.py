"""Servers behind a balancer are one server: also while one of them is killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rmd.backbones.tiny import write_tiny_folder
from tests_slow.replicas import Clients, House, Seen, two_servers, with_one_killed

PICTURES, FILMS = 200, 20
REPEATED = PICTURES // 4 + FILMS
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("replicas")
    checkpoints = [write_tiny_folder("sd3", folder / "pictures"), write_tiny_folder("wan-1.3b", folder / "films")]
    with two_servers(checkpoints, folder) as running:
        yield running


@pytest.fixture(scope="module")
def calm(house: House) -> Seen:
    """What clients get while nothing happens."""
    seen = Clients(house.url).work(PICTURES, FILMS)
    assert seen.lost == [] and (len(seen.pictures), len(seen.films), seen.repeated) == (PICTURES, FILMS, REPEATED)
    assert len(set(seen.pictures.values())) == PICTURES and len(set(seen.films.values())) == FILMS
    return seen


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_is_lost_and_nothing_is_wrong_while_a_server_is_killed(house: House, calm: Seen, seed: int) -> None:
    outcome = with_one_killed(house, calm, seed)
    assert (outcome.lost, outcome.wrong, outcome.pictures, outcome.films) == ([], 0, PICTURES, FILMS), outcome
    assert outcome.repeated == REPEATED, outcome
