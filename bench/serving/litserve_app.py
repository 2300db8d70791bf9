"""``python -m bench.serving.litserve_app``: the same engines under LitServe, as somebody would who wants it to win.

Whole requests in batches; the compiled calls are those of our own server's engine, pictures are compressed as ours are,
by as many threads as there are cores, and the reply holds the same base64.
"""

# LitServe reads annotations as they stand, so none of them may be put off.

import argparse
import base64
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import litserve
import torch
from fastapi import Request

from rmd.pixels import to_pixels
from rmd.sampler import sample
from server.device.loading import load_model
from server.device.settings import EngineSettings
from server.front.media import encode_picture
from server.start.settings import ServerSettings

Body = dict[str, Any]


class Pictures(litserve.LitAPI):  # type: ignore[misc]
    """Prompts in, pictures out; one batch from texts to files."""

    def __init__(self, settings: ServerSettings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings

    def setup(self, device: str) -> None:
        """Load the model and its engines as our engine process does, warmed and timed."""
        told = self._settings
        settings = EngineSettings(
            address="",
            parent=os.getppid(),
            checkpoints=((str(told.models[0][0]), "litserve"),),
            engines=str(told.engines),
            backend=told.backend,
            device=told.device,
            dtype=told.dtype,
            buckets=told.buckets,
            threads=told.threads,
            decoder=told.decoder,
            serve_teacher=False,
            measure_teacher=False,
            max_batch=told.max_batch,
            policy="fifo",
            film_seconds=1.0,
            prompt_megabytes=0.0,
            log_level="warning",
        )
        self._model = load_model(settings, lambda done, total, text: None)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)

    def decode_request(self, request: Request) -> Body:
        """Take the body as it is: it has been read, whatever the annotation has to say for that."""
        return cast(Body, request)

    def batch(self, inputs: Sequence[Body]) -> Sequence[Body]:
        """Keep the list."""
        return inputs

    def predict(self, inputs: Sequence[Body] | Body) -> list[str] | str:
        """Draw every picture; those of one schedule in one batch."""
        bodies = [inputs] if isinstance(inputs, dict) else list(inputs)
        drawn: dict[int, str] = {}
        card = self._model.card
        for schedule in {body.get("schedule") or card.default for body in bodies}:
            places = [i for i, body in enumerate(bodies) if (body.get("schedule") or card.default) == schedule]
            pictures = self._draw([bodies[i] for i in places], schedule)
            drawn |= dict(zip(places, self._pool.map(_encoded, pictures), strict=True))
        encoded = [drawn[i] for i in range(len(bodies))]
        return encoded[0] if isinstance(inputs, dict) else encoded

    def unbatch(self, output: Sequence[str]) -> Sequence[str]:
        """Keep the list."""
        return output

    def encode_response(self, output: str) -> Body:
        """Answer as OpenAI's API does."""
        return {"created": int(time.time()), "data": [{"b64_json": output}]}

    @torch.inference_mode()
    def _draw(self, bodies: Sequence[Body], schedule: str) -> list[Any]:
        backbone, cascade = self._model.backbone, self._model.card.schedules[schedule].cascade
        conditioning = backbone.encode_prompts([body["prompt"] for body in bodies])
        latents = sample(backbone, cascade, conditioning, [int(body["seed"]) for body in bodies])
        return to_pixels(backbone.decode(latents, cascade.full_size))


def _encoded(pixels: Any) -> str:
    return base64.b64encode(encode_picture(pixels)).decode()


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="models/embedded")
    parser.add_argument("--engines", default="engines-cache")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=float, default=0.02)
    parser.add_argument("--fast-queue", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    told = parser.parse_args()
    settings = ServerSettings(
        checkpoint=told.checkpoint, engines=told.engines, backend=told.backend, threads=told.threads
    )
    api = Pictures(settings, max_batch_size=told.batch, batch_timeout=told.window, api_path="/v1/images/generations")
    more = {"workers_per_device": told.workers, "timeout": 300, "fast_queue": told.fast_queue}
    server = litserve.LitServer(api, accelerator="cpu", **more)
    server.run(host="127.0.0.1", port=told.port, num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
