# API, gateway, control worker and beat: one image, four commands. No torch, and the build proves it.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3.11 -m venv /venv
COPY requirements/service.txt requirements/
RUN /venv/bin/pip install --quiet --no-deps --require-hashes -r requirements/service.txt
COPY LICENSE README.md pyproject.toml ./
COPY service service
# pip and the build backend have no business in a server.
RUN /venv/bin/pip install --quiet --no-deps --no-build-isolation . \
    && /venv/bin/pip uninstall --quiet --yes setuptools pip
RUN /venv/bin/python -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") and "torch is in this image")'

FROM ${BASE}
# Volumes take their first owner from these folders; every image has the same ones.
RUN useradd --uid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin errata \
    && install --directory --owner=errata --group=errata /models
COPY --from=build /venv /venv
# The command below listens on it, port 8000, and asks for keys because of it.
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 ERRATA_HOST=0.0.0.0
USER 10001
WORKDIR /tmp
EXPOSE 8000
CMD ["python", "-m", "service.server"]
