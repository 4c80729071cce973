# A vLLM node with the plugin. DEVICE=cpu or cuda: CUDA's libraries are wheels, so both are made from one base.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
ARG DEVICE=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3.11 -m venv /venv
COPY requirements/torch-${DEVICE}.txt requirements/
# The CPU build is on PyTorch's own index, unless pip is configured with one that has it.
RUN /venv/bin/pip install --quiet --no-deps -r requirements/torch-${DEVICE}.txt \
    || /venv/bin/pip install --quiet --no-deps -r requirements/torch-${DEVICE}.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu
COPY requirements/service.txt requirements/worker.txt requirements/node-${DEVICE}.txt requirements/
RUN /venv/bin/pip install --quiet --no-deps --require-hashes -r requirements/service.txt -r requirements/worker.txt \
        -r requirements/node-${DEVICE}.txt
COPY LICENSE README.md pyproject.toml ./
COPY service service
COPY worker worker
RUN /venv/bin/pip install --quiet --no-deps --no-build-isolation .

FROM ${BASE}
# libnuma is what vLLM's CPU build links against; Triton and torch.compile compile when the server starts. Debian keeps
# no old package versions, so a pinned one would stop building: the base image's tag is the pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# Volumes take their first owner from these folders; every image has the same ones.
RUN useradd --uid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin errata \
    && install --directory --owner=errata --group=errata /models /versions /cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /cache
EXPOSE 8001
CMD ["python", "-m", "worker.inference.launcher", "--host", "0.0.0.0", "--port", "8001"]
