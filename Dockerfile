# eamdeploy for a board: no torch, no compiler, not root. How to build and run it: docs/guides/containers.md.
# Any base with glibc, libstdc++ and Python 3.10 to 3.13 with its venv module; on a Jetson one that has TensorRT.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Further pinned files to install: "trt", "jetson" or "trt jetson".
ARG EXTRAS=""
WORKDIR /build
COPY docker/requirements*.txt docker/
# System packages stay visible, so that a JetPack base's own TensorRT can be imported.
RUN python3 -m venv --system-site-packages /opt/eamdeploy
RUN for file in requirements requirements-build $(for extra in ${EXTRAS}; do echo "requirements-${extra}"; done); do \
        /opt/eamdeploy/bin/python -m pip install --no-cache-dir --no-compile --no-deps -r "docker/${file}.txt" || exit 1; \
    done
COPY pyproject.toml README.md LICENSE ./
COPY eamdeploy/ eamdeploy/
RUN /opt/eamdeploy/bin/python -m pip install --no-cache-dir --no-compile --no-deps --no-build-isolation . \
    && /opt/eamdeploy/bin/python -m pip uninstall --yes setuptools pip
# Gone: tests of packages, and a second copy of ONNX Runtime (35 MB) that is for programs in other languages. Compiled last,
# without what is gone: a command starts in 0.5 s instead of 1.3 s, and a read-only root can't keep what Python compiles.
RUN find /opt/eamdeploy -depth -type d \( -name tests -o -name __pycache__ \) -exec rm -r {} + \
    && find /opt/eamdeploy -path "*/onnxruntime/capi/libonnxruntime.so.*" -delete \
    && /opt/eamdeploy/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/eamdeploy/lib

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="eamdeploy" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/eamdeploy /opt/eamdeploy
# The embedded default: a frozen model, its unfrozen twin, and digits that neither was trained on.
COPY docker/entrypoint.sh models/digits_deit*.onnx models/digits_deit*.reference.npz /usr/share/eamdeploy/
COPY calib_data/digits/heldout/ /usr/share/eamdeploy/heldout/
ENV PATH=/opt/eamdeploy/bin:${PATH} \
    HOME=/tmp
# The first user of most boards, so that a mounted folder of theirs can be written.
USER 1000:1000
WORKDIR /data
# Seldom, as a check that runs amid a measurement disturbs it.
HEALTHCHECK --interval=10m --timeout=2m --start-period=10m CMD ["eamdeploy", "doctor", "--json"]
ENTRYPOINT ["sh", "/usr/share/eamdeploy/entrypoint.sh"]
