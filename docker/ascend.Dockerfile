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
# Never built and never run: neither Docker nor an Ascend device was at hand. docs/install.md#in-a-container says what
# was checked.
#
# MindFormers 1.9.0's installation page pairs MindSpore 2.9.0 with CANN 9.0.0. The image's name, its tags
# (<CANN>-<chip>-<system>-<python>), what is installed in it and its variables are those of the public repository that
# builds it, github.com/Ascend/cann-container-image, file cann/9.0.0-910b-ubuntu22.04-py3.11/Dockerfile. For MindSpore
# 2.7.2 and MindFormers 1.8.0 CANN is 8.5.0; Atlas A3 has the chip `a3`.
ARG CANN=9.0.0
ARG CHIP=910b
FROM quay.io/ascend/cann:${CANN}-${CHIP}-ubuntu22.04-py3.11

ARG MINDSPORE=2.9.0
ARG MINDFORMERS=1.9.0

# the image has gcc, g++ and Python's own pip; CANN's Python packages are found by its PYTHONPATH
WORKDIR /src
COPY . .
# MindSpore's wheels on PyPI hold the CPU and the Ascend back end
RUN pip install --no-cache-dir "mindspore==${MINDSPORE}" "mindformers==${MINDFORMERS}" ".[eval,report]" \
 && python -m mindformers_ixc.native && mindformers recipes && rm -rf /src/*

# the same scripts that the image's own entry point reads, before the command
RUN printf '%s\n' '#!/bin/bash' \
    'source /usr/local/Ascend/ascend-toolkit/set_env.sh' \
    'for script in /usr/local/Ascend/cann-*/share/info/ascendnpu-ir/bin/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do' \
    '    if [ -f "$script" ]; then source "$script"; fi' \
    'done' \
    'exec mindformers "$@"' > /usr/local/bin/with_cann \
 && chmod +x /usr/local/bin/with_cann
ENV PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["with_cann"]
CMD ["--help"]
