# The pipeline in a container, for x86-64 and ARM; the working copy is mounted where it is installed:
#   docker build --tag rcm .
#   docker run --rm --volume "$PWD:/rcm" --shm-size 8g rcm snakemake --profile workflow/profiles/local
# For NVIDIA GPUs, PyPI's torch has CUDA with it: --build-arg INDEX=https://pypi.org/simple, then docker run --gpus all.
# flash-attn and transformer-engine are compiled: --build-arg EXTRAS=cluster,gpu --build-arg BASE=IMAGE as well, with an
# image that has nvcc and Python 3.11 or newer.
# No container engine was at hand: apt's line and the first of pip's were tried on Debian 12 (--dry-run, the latter in a
# fresh environment), the rest was read by a parser and hadolint. tests/test_environment.py compares it with other files.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRAS=cluster
ARG INDEX=https://download.pytorch.org/whl/cpu

# a compiler for Triton's launchers; git, so that records can name the commit of a mounted clone
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /rcm

WORKDIR /rcm
COPY . .
# what is compiled needs torch for that: it comes second, without an environment of its own
RUN pip install --no-cache-dir --extra-index-url "${INDEX}" -c constraints.txt -e ".[cluster]" ninja setuptools wheel \
    && pip install --no-cache-dir --extra-index-url "${INDEX}" --no-build-isolation -c constraints.txt -e ".[${EXTRAS}]"

CMD ["rcm", "doctor"]
