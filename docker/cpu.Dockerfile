# mindformers_ixc on the CPU: trains the tiny recipes, answers, converts, plans. From the repository's root:
#
#   docker build -f docker/cpu.Dockerfile -t mindformers_ixc .
#   docker run --rm -v "$PWD/work:/work" mindformers_ixc run --config ixc25_sft_tiny --output_dir out
#   docker run --rm -it -v "$PWD/work:/work" mindformers_ixc chat --model out/model
#
# Not built where it was written, for lack of Docker. `.ci/run` installs the same in a fresh virtual environment of
# Python 3.11, and the system libraries are those that the files of MindSpore, OpenCV and decord ask for (ldd).
FROM python:3.11-slim-bookworm

# g++ builds the kernels of inference here, and at run time the libraries of parallel runs on the CPU; libgomp1 and
# libstdc++6 are MindSpore's
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libc6-dev libgomp1 libstdc++6 \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir ".[eval,report]" && mindformers recipes && rm -rf /src/*

# what a run writes belongs to no root; --user "$(id -u):$(id -g)" makes it one's own
RUN useradd --create-home user && install -d -o user -g user /work
USER user
ENV HOME=/home/user PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["mindformers"]
CMD ["--help"]
