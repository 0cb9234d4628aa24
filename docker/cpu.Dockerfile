# mindformers_ixc on the CPU: trains the tiny recipes, answers, converts, plans. From the repository's root:
#
#   docker build -f docker/cpu.Dockerfile -t mindformers_ixc .
#   mkdir -p work && docker run --rm --shm-size 1g --user "$(id -u):$(id -g)" -v "$PWD/work:/work" \
#     mindformers_ixc run --config ixc25_sft_tiny --output_dir out
#   docker run --rm -it --user "$(id -u):$(id -g)" -v "$PWD/work:/work" mindformers_ixc chat --model out/model
#
# docs/install.md#in-a-container says what of this was checked, for no Docker was at hand.
FROM python:3.11-slim-bookworm

# g++ builds the kernels of inference below, and at run time the libraries of parallel runs on the CPU; libgomp1 and
# libstdc++6 are MindSpore's
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libc6-dev libgomp1 libstdc++6 \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir ".[eval,report]" && rm -rf /src/*

# what a run writes belongs to no root; with --user it belongs to whoever started it, who may read the kernels built here
RUN useradd --create-home user && chmod 755 /home/user && install -d -m 777 /work
USER user
ENV HOME=/home/user PYTHONUNBUFFERED=1
WORKDIR /work
RUN python -m mindformers_ixc.native && mindformers recipes
ENTRYPOINT ["mindformers"]
CMD ["--help"]
