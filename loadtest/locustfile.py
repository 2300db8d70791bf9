"""Load as a crowd makes it: requests arrive at random, whether or not the server keeps up (an open loop).

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 -u 4 --rate 2 -t 60s --html report.html

is 4 streams of 2 arrivals a second each, 8 together: Poisson processes add up. Users who wait for one picture before
they ask for the next (a closed loop, what load generators do by default) slow down with the server and so hide its
queue. All of locust's own options work: its web page, ramps (`-r`), several machines (`--master`, `--worker`), CSV.

Nothing is sent again: a 429 counts as a failure, by name. At the end the server's own account of the pictures is
printed: time in queues, company in batches, speed-up over the teacher.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from gevent.pool import Group
from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

ROUTE = "/v1/images/generations"
PROMPTS = (
    "red apple, noto style", "sailboat, fluent 3d style", "alarm clock, twemoji style", "maple leaf, fluent flat style",
    "rocket, twemoji style", "bread, noto style", "guitar, fluent 3d style", "snowman, fluent flat style",
)  # fmt: skip

reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
"""The `rmd` objects of the replies, by schedule."""


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: LocustArgumentParser) -> None:
    """What locust does not know."""
    parser.add_argument("--rate", type=float, default=1.0, help="mean arrivals a second of each user's stream")
    parser.add_argument("--schedule", default="", help="schedules to draw from, comma-separated; the server's default")
    parser.add_argument("--prompts", default="", help="a file of prompts, one a line")
    parser.add_argument("--key", default="", env_var="RMD_API_KEY", is_secret=True, help="API key")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for a reply")


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def forget(**_: Any) -> None:
    """A new test has its own account."""
    reports.clear()


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def print_account(environment: Environment, **_: Any) -> None:
    """What the server says of the pictures that this process received."""
    for schedule, found in sorted(reports.items()):
        queue = sorted(report["seconds"]["queue"] for report in found)
        line = f"schedule {schedule}: {len(found)} pictures; queue {_quantile(queue, 0.5):.3f} s median, "
        line += f"{_quantile(queue, 0.95):.3f} s 95th percentile"
        for index, stage in enumerate(found[0]["stages"]):
            company = [size for report in found for size in report["stages"][index]["batch_sizes"]]
            line += f"; batches at {stage['size']} {statistics.fmean(company):.2f} on average"
        for kind in found[0]["speedup"]:
            ratio = statistics.median(report["speedup"][kind] for report in found)
            line += f"; {ratio:.1f} x the {kind} teacher (median)"
        print(line)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class ArrivalStream(FastHttpUser):
    """One Poisson stream of requests, each from somebody who waits for nobody else."""

    concurrency = 4096  # connections: the server's queue is to be measured, not this pool's

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        self.network_timeout = self.connection_timeout = options.patience
        super().__init__(environment)
        self.rate = options.rate
        self.schedules = [name for name in options.schedule.split(",") if name]
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines() if options.prompts else PROMPTS
        self.prompts = [line.strip() for line in lines if line.strip()]
        self.headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
        self.under_way = Group()

    def wait_time(self) -> float:
        """Seconds to the next arrival."""
        return random.expovariate(self.rate)

    @task
    def arrive(self) -> None:
        """Let one more person ask, and wait for no reply."""
        self.under_way.spawn(self.ask)

    def on_stop(self) -> None:
        """Wait for what was asked for: to drop the slowest requests would flatter the server."""
        self.under_way.join(timeout=self.network_timeout)

    def ask(self) -> None:
        """Ask for one picture and check what comes."""
        body: dict[str, Any] = {"prompt": random.choice(self.prompts)}
        if self.schedules:
            body["schedule"] = random.choice(self.schedules)
        with self.client.post(ROUTE, json=body, headers=self.headers, catch_response=True) as reply:
            if reply.status_code != 200:
                reply.failure(f"{reply.status_code} {_code(reply)}")
                return
            content = reply.json()
            if not content["data"][0]["b64_json"]:
                reply.failure("200 without a picture")
                return
            reports[content["rmd"]["schedule"]].append(content["rmd"])


def _code(reply: Any) -> str:
    try:
        return str(reply.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return str(reply.error or "no error object")
