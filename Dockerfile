# The image of tallyd, for a PostgreSQL of your own: docs/how-to/run-in-a-container.md.
# Both stages share one base, since the virtual environment links to the base's Python.
ARG BASE=docker.io/library/python:3.13-slim-trixie

FROM ${BASE} AS builder
ARG UV_VERSION=0.13.9
# Optional extras of pyproject.toml, parted by spaces. Not `embedded`: its database would die with the container.
ARG EXTRAS=""
RUN pip install --no-cache-dir --disable-pip-version-check uv==${UV_VERSION}
ENV UV_PROJECT_ENVIRONMENT=/opt/tallyd \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /src
# The dependencies are a layer of their own: it changes with the lock file, and not with the code.
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/uv \
    set -- && for extra in ${EXTRAS}; do set -- "$@" --extra "${extra}"; done \
    && uv sync --locked --no-dev --no-editable --no-install-project "$@"
COPY daemon ./daemon
RUN --mount=type=cache,target=/root/.cache/uv \
    set -- && for extra in ${EXTRAS}; do set -- "$@" --extra "${extra}"; done \
    && uv sync --locked --no-dev --no-editable "$@" \
    && /opt/tallyd/bin/tallyd --version

FROM ${BASE}
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tallyd" \
      org.opencontainers.image.description="Tracks what many tenants spend on AI APIs, and books every change in Postgres exactly once." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
# Owned by root, so that the daemon cannot change its own code.
COPY --from=builder /opt/tallyd /opt/tallyd
ENV PATH=/opt/tallyd/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TALLYD_LISTEN=0.0.0.0:8080
# A number, so that Kubernetes can tell that it is not root; no such name needs to exist.
USER 65532:65532
EXPOSE 8080
# The daemon is process 1: it drains at SIGTERM by itself, and starts no children that an init would have to reap.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["tallyd", "healthcheck"]
ENTRYPOINT ["tallyd"]
CMD ["run"]
