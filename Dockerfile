# rm_recipe on a machine with an NVIDIA GPU. It needs NVIDIA's container toolkit and a driver for CUDA 13 (580 or
# newer). Linted with hadolint; the build was not run by us.
#
#   docker build -t rm-recipe .
#   docker run --rm --gpus all --shm-size 1g --user "$(id -u):$(id -g)" -v "$PWD:/project" rm-recipe run tinyllama_hh_lora
#
# /project is your folder: recipes, data and outputs lie there, and what comes from the Hub under .cache/huggingface.
# Nothing secret is built in: where the Hub asks for a token, `-e HF_TOKEN` passes yours on when it starts.
# `torch_compile: true` would need gcc besides.
FROM python:3.11.14-slim-bookworm

WORKDIR /source
# torch first: gigabytes that stay as they are when the code changes.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY rm_recipe rm_recipe
COPY recipes recipes
COPY accelerate_configs accelerate_configs
RUN pip install --no-cache-dir -c constraints.txt . && useradd --uid 1000 trainer

# The home is the volume, whoever `--user` says; caches go there.
ENV HOME=/project USER=trainer
USER 1000
WORKDIR /project
ENTRYPOINT ["rm-recipe"]
CMD ["--help"]
