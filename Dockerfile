# The NVIDIA container brings TensorFlow and NumPy built for its CUDA; any other base works too, for example
#   docker build --build-arg BASE=python:3.11-slim -t mscnn .
ARG BASE=nvcr.io/nvidia/tensorflow:25.02-tf2-py3
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What the base has of the TensorFlow stack is written down first, binds pip as constraints, and is compared after:
# pip must neither replace nor upgrade it. A base without TensorFlow gets it from requirements.txt.
COPY requirements.txt /tmp/build/
WORKDIR /tmp/build
RUN python3 -m pip list --format=freeze > before.txt \
 && { grep -iE '^(tensorflow|keras|numpy|protobuf|h5py|ml[_-]dtypes|tensorboard)==' before.txt > base.txt || true; } \
 && if grep -q '^tensorflow==' base.txt; \
    then grep -vE '^(tensorflow|keras|numpy)[<>=]' requirements.txt > wanted.txt; \
    else cp requirements.txt wanted.txt; fi
# Ubuntu's Python 3.12 would refuse to install beside apt's packages; in a container there is nothing to protect.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir -c base.txt -r wanted.txt 'pytest>=8' \
 && python3 -m pip list --format=freeze > after.txt \
 && { ! grep -vxFf after.txt base.txt || { echo "pip changed the base's versions listed above" >&2; exit 1; }; }

# Id 1000 is that of the first user on most Linux machines, so that files in mounted folders belong to them;
# Ubuntu's own images give it to a user `ubuntu`.
RUN if id ubuntu &> /dev/null; then userdel --remove ubuntu; fi \
 && useradd --create-home --uid 1000 mscnn \
 && mkdir -p /data /mscnn && chown mscnn /data /mscnn
USER 1000
WORKDIR /mscnn
COPY --chown=1000 . .

# /data: mount a folder here to keep downloads. SYSTEM_PYTHON: the Makefile makes no environment of its own.
ENV MSCNN_DATA_DIR=/data SYSTEM_PYTHON=1
EXPOSE 8888
# JupyterLab prints its address with a token; without one it lets nobody in.
CMD ["python3", "-m", "jupyterlab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--LabApp.default_url=/lab/tree/notebooks"]
