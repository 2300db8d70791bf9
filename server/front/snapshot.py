"""The server's state at one scrape, gathered from where it is kept."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from server.front.generation import of_model
from server.front.member import Health
from server.telemetry.metrics import Snapshot

if TYPE_CHECKING:
    from server.front.service import Service


def take_snapshot(service: Service) -> Snapshot:
    """Return the state that the gauges show."""
    costs, cards, now = service.costs, service.fleet.cards, time.monotonic()
    baselines = {of_model(place, each.kind): each for place, card in cards.items() for each in card.baselines}
    speedup = {
        (of_model(place, name), kind): ratio
        for (place, name), mean in service.recent_compute().items()
        if place in cards
        for kind, ratio in cards[place].speedups(mean).items()
    }
    stations = [key for card in cards.values() for key in card.stations()]
    batches = {str(each.index): each.batch_seconds for each in service.fleet.members}
    jobs = service.film_jobs
    line = jobs.line() if jobs else None
    return Snapshot(
        ready=service.ready,
        draining=service.state.value == "draining",
        load_progress=1.0 if cards else service.progress.done / max(service.progress.total, 1),
        in_flight_requests=service.admission.requests,
        in_flight_items=service.admission.items,
        queue_capacity_items=service.admission.max_items,
        queue_depth=service.fleet.depths(),
        batch_width={key.label: costs.widest(key) for key in stations},
        engine_memory_bytes={
            of_model(place, name): held for place, card in cards.items() for name, held in card.memory_bytes.items()
        },
        teacher_seconds={kind: baseline.seconds for kind, baseline in baselines.items()},
        teacher_age_seconds={kind: now - baseline.measured for kind, baseline in baselines.items()},
        teacher_spread={kind: baseline.spread for kind, baseline in baselines.items()},
        speedup=speedup,
        stored_file_bytes=service.pictures.stored_bytes,
        video_jobs=jobs.counts() if jobs else {},
        video_oldest_seconds=max(time.time() - line.oldest, 0.0) if line and line.oldest else 0.0,
        video_work_seconds=line.waiting * jobs.seconds_per_film if line and jobs else 0.0,
        video_unserved_jobs=line.unserved if line else 0,
        admitted_work_seconds=sum(service.fleet.work().values()),
        batch_running_seconds={engine: ran for engine, (ran, _) in batches.items()},
        batch_expected_seconds={engine: expected for engine, (_, expected) in batches.items()},
        engine_up={str(each.index): each.health is Health.READY for each in service.fleet.members},
        station_compiled={label: bool(n) for card in cards.values() for label, n in card.compiled.items()},
    )
