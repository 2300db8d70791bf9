# syntax=docker/dockerfile:1
# One image: with the default torch it serves on NVIDIA GPUs and on CPUs. A CPU-only image, far smaller:
#   docker build --build-arg TORCH=cpu --build-arg TORCH_INDEX_URL=<PyTorch's index of CPU builds> --build-arg EXTRAS= -t rmd:cpu .
# Where builds must repeat to the bit, give PYTHON by digest (python@sha256:...; docs/deployment.md).
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ARG TORCH=cuda
ARG TORCH_INDEX_URL=
ARG EXTRAS=[gpu]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip
COPY deploy/image/torch-*.txt /lock/
# torch alone first: a layer of gigabytes that a change of our code does not build anew. Files are held to their sha256.
RUN --mount=type=cache,target=/var/cache/pip \
    python3 -m venv /opt/rmd \
    && /opt/rmd/bin/pip install --require-hashes --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
        -r "/lock/torch-${TORCH}.txt"
COPY deploy/image/requirements.txt /lock/
RUN --mount=type=cache,target=/var/cache/pip /opt/rmd/bin/pip install --require-hashes --no-deps -r /lock/requirements.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY rmd rmd
COPY engines engines
COPY server server
COPY training training
COPY bench bench
COPY cli cli
COPY deploy/ray deploy/ray
# Only what EXTRAS adds is still to be found, and is held to its version alone: TensorRT's wheels are made while they are installed.
RUN --mount=type=cache,target=/var/cache/pip /opt/rmd/bin/pip install --no-build-isolation ".${EXTRAS}" \
    && /opt/rmd/bin/pip check

FROM ${PYTHON}
# Engines are compiled where they run, at the first start: AOTInductor and Triton call a C++ compiler.
# Its version is the base image's own release; pinned here it would be gone with Debian's next point release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /var/lib/rmd rmd
COPY --from=build /opt/rmd /opt/rmd
WORKDIR /app
COPY models/embedded models/embedded
COPY models/embedded-decoder models/embedded-decoder
COPY models/embedded-teacher models/embedded-teacher
COPY models/embedded-video models/embedded-video
COPY models/embedded-video-teacher models/embedded-video-teacher
COPY LICENSE NOTICE ./
# A container's port is reached through whatever publishes it: keep that to 127.0.0.1, as compose does, or set RMD_API_KEYS.
ENV PATH=/opt/rmd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    RMD_HOST=0.0.0.0 \
    RMD_ALLOW_OPEN=true \
    RMD_ENGINES=/var/lib/rmd/engines \
    RMD_VIDEOS=/var/lib/rmd/videos
RUN install --directory --owner=rmd --group=rmd --mode=700 /var/lib/rmd/engines /var/lib/rmd/videos
# At the end, since they change with every commit: docker build --build-arg RMD_COMMIT=$(git rev-parse HEAD)
ARG VERSION=0.1.0
ARG RMD_COMMIT=unknown
LABEL org.opencontainers.image.title="rmd" \
      org.opencontainers.image.description="Few-step image and film cascades behind OpenAI-compatible HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${RMD_COMMIT}"
ENV RMD_COMMIT=${RMD_COMMIT}
USER 10001:10001
VOLUME /var/lib/rmd
EXPOSE 8000
# Alive, not ready: the first start compiles for minutes. Readiness is /health/ready, for whoever routes traffic.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
ENTRYPOINT ["rmd"]
CMD ["serve"]
