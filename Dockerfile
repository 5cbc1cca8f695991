# golf_kernels with its CUDA kernels, for docs/8xh100.md:
#   docker build -t golf_kernels .
#   docker run --gpus all --shm-size=16g -it golf_kernels
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ gcc git make python3-dev python3-venv util-linux \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /golf_kernels
COPY Makefile pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY golf golf
COPY golf_kernels golf_kernels
COPY train train
COPY benchmarks benchmarks
COPY examples examples
COPY docs docs
COPY tests tests

# without a GPU at build time, the compiler must not leave CUDA out
ENV GOLF_FORCE_CUDA=1 CUDA_HOME=/usr/local/cuda
RUN make .venv/.ready
RUN .venv/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .
RUN make doctor

CMD ["bash"]
