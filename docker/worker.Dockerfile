# The train worker. DEVICE=cpu or cuda: PyTorch's CUDA libraries are wheels, so both are made from one base.
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
COPY requirements/service.txt requirements/worker.txt requirements/
RUN /venv/bin/pip install --quiet --no-deps --require-hashes -r requirements/service.txt -r requirements/worker.txt
COPY LICENSE README.md pyproject.toml ./
COPY service service
COPY worker worker
RUN /venv/bin/pip install --quiet --no-deps --no-build-isolation .

FROM ${BASE}
# Volumes take their first owner from these folders; every image has the same ones.
RUN useradd --uid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin errata \
    && install --directory --owner=errata --group=errata /models /versions
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /tmp
CMD ["celery", "-A", "worker.tasks", "worker", "-Q", "train", "--pool", "solo"]
