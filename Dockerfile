# An image with paddle-finetune and all it needs, by the hashes of a lock.
#
# For CPUs:
#   docker build -t paddle-finetune .
# On an image that has Python 3.10 to 3.12 and a GPU build of Paddle 3.3:
#   docker build -t paddle-finetune:gpu --build-arg BASE=IMAGE --build-arg LOCK=requirements/base.lock .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# cpu.lock holds PaddlePaddle for CPUs, base.lock leaves the one of the image in place.
ARG LOCK=requirements/cpu.lock
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# PaddlePaddle's wheel for CPUs needs the OpenMP runtime, which slim images lack.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

# The requirements come first, so that a change of the code does not install them anew.
WORKDIR /opt/paddle-finetune
COPY requirements/ requirements/
RUN python -m pip install --require-hashes --requirement "${LOCK}"
COPY . .
RUN python -m pip install --no-deps --no-build-isolation .

# Runs read and write the folder that is mounted here, as a user without rights on the rest:
#   docker run --rm -it --user "$(id -u):$(id -g)" -v "$PWD:/work" paddle-finetune train run.json
RUN useradd --create-home --uid 1000 trainer \
    && mkdir -p /work \
    && chown trainer /work
USER 1000
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["paddle-finetune"]
CMD ["--help"]
