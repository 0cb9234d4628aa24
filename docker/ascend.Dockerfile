# mindformers_ixc on Ascend 910B (Atlas 800T A2), on the public CANN image of Ubuntu and Python 3.11. From the
# repository's root, on a server with the driver (26.0.RC1 belongs to CANN 9.0.0):
#
#   docker build -f docker/ascend.Dockerfile -t mindformers_ixc:ascend .
#   docker run --rm -it --network host --shm-size 64g \
#     $(ls /dev/davinci[0-9]* | sed 's/^/--device /') \
#     --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc \
#     -v /usr/local/dcmi:/usr/local/dcmi:ro -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro \
#     -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro -v /etc/ascend_install.info:/etc/ascend_install.info:ro \
#     -v "$PWD:/work" mindformers_ixc:ascend plan --config ixc25_sft --devices 8
#
# Never built and never run: neither Docker nor an Ascend device was at hand. What rests on documents is said below.
#
# MindFormers 1.9.0's installation page pairs MindSpore 2.9.0 with CANN 9.0.0; the image's tags are
# <CANN>-<chip>-<system>-<python> by the naming rule of its repository (Ascend/cann-container-image). For MindSpore 2.7.2
# and MindFormers 1.8.0 it is 8.5.0; a chip of another kind (910c is A3) has a tag of its own.
ARG CANN=9.0.0
ARG CHIP=910b
FROM ascendai/cann:${CANN}-${CHIP}-ubuntu22.04-py3.11

ARG MINDSPORE=2.9.0
ARG MINDFORMERS=1.9.0

RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libgomp1 \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
# MindSpore's wheels on PyPI hold the CPU and the Ascend back end; CANN's own Python packages come with the image
RUN pip install --no-cache-dir "mindspore==${MINDSPORE}" "mindformers==${MINDFORMERS}" ".[eval,report]" \
 && mindformers recipes && rm -rf /src/*

# CANN's variables, wherever this version keeps the script that sets them (in `cann` from 8.5 on)
RUN printf '%s\n' '#!/bin/bash' \
    'export LD_LIBRARY_PATH=/usr/local/Ascend/driver/lib64/driver:/usr/local/Ascend/driver/lib64/common:$LD_LIBRARY_PATH' \
    'for script in /usr/local/Ascend/{cann,ascend-toolkit,nnal/atb}/set_env.sh; do' \
    '    if [ -f "$script" ]; then source "$script"; fi' \
    'done' \
    'exec mindformers "$@"' > /usr/local/bin/with_cann \
 && chmod +x /usr/local/bin/with_cann
ENV PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["with_cann"]
CMD ["--help"]
