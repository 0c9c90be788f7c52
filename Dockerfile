# Three images of one source: `docker build --target gateway|tokenizer|worker .` Only the worker has torch and CUDA.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim AS base
RUN useradd --uid 10001 --create-home wint2
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
COPY --from=wheel /wheel /wheel

FROM base AS gateway
RUN pip install "$(echo /wheel/*.whl)[gateway]"
USER wint2
EXPOSE 8180 8182
ENTRYPOINT ["python", "-m", "gateway"]

FROM base AS tokenizer
RUN pip install "$(echo /wheel/*.whl)[tokenizer]"
USER wint2
EXPOSE 8190
ENTRYPOINT ["python", "-m", "tokenizer_svc"]

FROM base AS worker
# cuda13, cuda12 or cpu; CUDA itself comes with torch's wheels, the driver with the host.
ARG ACCELERATOR=cuda13
RUN pip install "$(echo /wheel/*.whl)[worker$(echo ,${ACCELERATOR} | sed 's/,cpu//')]"
# Torch's threads would spin on the cores that a CPU worker's own threads compute on.
ENV OMP_WAIT_POLICY=PASSIVE
USER wint2
EXPOSE 8191
ENTRYPOINT ["python", "-m", "gpu_worker"]
