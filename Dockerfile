# The programs of launch/ with everything that they need, on one node or many: docs/containers.md.
#
#   docker build --tag ds-lowrank:0.1.0 .                                                for GPUs
#   docker build --tag ds-lowrank:0.1.0-cpu --build-arg BASE=python:3.12-slim .          for CPUs
#
# BASE is a Debian or an Ubuntu with apt. Its torch is kept if it has one. Settings of pip, such as an index of your own,
# are given as a secret, which no layer contains: --secret id=pip,src=pip.conf.

ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}
USER root

# What a base may already have (a Python of its own, a compiler, an MPI) is not installed again. Debian makes host keys
# when it installs sshd: a key that is in an image is no secret.
RUN set -eu; \
    packages="ca-certificates hostname openssh-client openssh-server pdsh procps tini"; \
    python3 -m pip --version >/dev/null 2>&1 || packages="$packages python3 python3-dev python3-pip"; \
    command -v g++ >/dev/null || packages="$packages g++"; \
    command -v mpirun >/dev/null || packages="$packages openmpi-bin"; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $packages; \
    rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

# Uid 1000 belongs to somebody else in some bases. The password '*' is one that nobody can give; sshd would refuse the
# account that useradd makes by itself, as locked. Any other uid may run the image too: what is written while it runs
# goes to /cache and runs/, which are open to all like /tmp.
RUN set -eu; \
    taken=$(getent passwd 1000 | cut -d: -f1); \
    [ -z "$taken" ] || userdel "$taken"; \
    getent group 1000 >/dev/null || groupadd --gid 1000 trainer; \
    useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash --password '*' trainer; \
    mkdir -p /opt/ds_lowrank/runs /cache; \
    chmod 1777 /opt/ds_lowrank/runs /cache

# NVIDIA's images constrain every pip to the packages that they were tested with, by PIP_CONSTRAINT.
ENV PIP_CONSTRAINT="" \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton

WORKDIR /opt/ds_lowrank

# Packages, before the code: they are installed again only if these files change. The environment sees the base's
# packages, and the constraints name the base's torch if it has one.
ARG EXTRAS=train,finetune,huggingface,megatron
COPY pyproject.toml constraints.txt ./
COPY launch/container/requirements.py launch/container/
RUN --mount=type=secret,id=pip set -eu; \
    export PIP_CONFIG_FILE=/run/secrets/pip; \
    python3 -m venv --without-pip --system-site-packages /opt/venv; \
    python launch/container/requirements.py --extras "$EXTRAS" --output /opt/venv; \
    python -m pip install --no-cache-dir \
        --requirement /opt/venv/requirements.txt --constraint /opt/venv/constraints.txt

# The code, once: a checkout that is mounted here replaces it. Nothing is downloaded for it. The base's own torchrun
# would start the base's Python, which has none of these packages.
COPY . .
RUN set -eu; \
    [ -e /opt/venv/bin/torchrun ] || install --mode 755 launch/container/torchrun /opt/venv/bin/torchrun; \
    python -m pip install --no-deps --no-build-isolation --no-index --editable .; \
    python -m compileall -q ds_lowrank launch; \
    install -D --mode 644 launch/container/ssh_config /etc/ssh/ssh_config.d/ds_lowrank.conf

ARG BASE
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="ds_lowrank" \
      org.opencontainers.image.description="Low-rank gradient projection for LLM training under an unmodified DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.base.name="${BASE}"

USER 1000:1000
ENTRYPOINT ["/opt/ds_lowrank/launch/container/entrypoint"]
CMD []
